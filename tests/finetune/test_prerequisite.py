"""Laws of prerequisite learning: the model is left as it was, the skill is learnt on frozen knowledge, and both are what a dense loop gives."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.examples import examples
from finetune.learner import adapted_layers
from finetune.prerequisite import Prerequisite, _with_adapters, batches_of, prereq_tune
from surgery.delta import StoredDelta, save_delta
from surgery.model import Model
from surgery.transcript import Transcript
from surgery.weights import linear_sites
from tests.families import tiny
from tests.oracles import prerequisite as oracle

SMALL: dict[str, Any] = {
    "knowledge_steps": 3, "skill_steps": 4, "knowledge_rank": 3, "skill_rank": 5, "batch_size": 2, "autocast": False,
}  # fmt: skip


def model(family: str = "llama", **options: Any) -> Model:
    return Model(*tiny(family, **options))


def data(m: Model) -> tuple[dict[str, list[Transcript]], dict[str, list[Transcript]]]:
    facts = {
        v: [m.transcript(f"{w}?", f"{w}{d}") for d, w in enumerate(("ab", "cd", "ef"), n)]
        for n, v in ((1, "one.a"), (5, "two"))
    }
    tasks = {
        v: [m.transcript(f"say {t.question}", f"<think>{t.answer}</think>{t.answer}!") for t in ts]
        for v, ts in facts.items()
    }
    return facts, tasks


def run(m: Model, **options: Any) -> Prerequisite:
    return prereq_tune(m, *data(m), **(SMALL | options))


@functools.cache
def usual() -> Prerequisite:
    return run(model())


def same(a: Any, b: Any) -> bool:
    return list(a) == list(b) and all(torch.equal(a[s], b[s]) for s in a)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_it_is_what_a_dense_loop_gives(family: str) -> None:
    m = model(family)
    for part in m.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # gpt2 has some, and what it drops is not the oracle's
    sites, names = linear_sites(m.weights), adapted_layers(m)
    facts, tasks = data(m)
    done = run(m, seed=7, skill_steps=8)

    def rows(batches: Any) -> Any:
        return [(v, [(e.transcript.ids, e.weights) for e in batch]) for v, batch in batches]

    plain = copy.deepcopy(m.module).requires_grad_(False)
    twin = copy.deepcopy(m.module)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        learner = _with_adapters(twin, names, {"knowledge0": 3, "knowledge1": 3, "skill": 5})
    starts = {
        name: [learner.base_model.model.get_submodule(n).lora_A[name].weight.detach().clone() for n in names]
        for name in ("knowledge0", "knowledge1", "skill")
    }
    alone = {v: [e for (e,) in examples(ts)] for v, ts in facts.items()}
    frozen = {}
    for k, version in enumerate(facts):
        batches = rows(batches_of({version: alone[version]}, 3, 2, 7))
        frozen[version], losses = oracle.train(
            plain, names, family == "gpt2", batches, {}, starts[f"knowledge{k}"], 1e-3
        )
        assert done.losses[f"knowledge {version}"] == pytest.approx(losses, rel=1e-4)
    batches = batches_of({v: [e for (e,) in examples(ts)] for v, ts in tasks.items()}, 8, 2, 7)
    assert done.versions == tuple(v for v, _ in batches)
    assert len(set(done.versions)) == 2
    skill, losses = oracle.train(plain, names, family == "gpt2", rows(batches), frozen, starts["skill"], 1e-3)
    assert done.losses["skill"] == pytest.approx(losses, rel=1e-4)
    found = {"skill": done.skill, **done.knowledge}
    for what, pairs in {"skill": skill, **frozen}.items():
        whole = {name: 2 * B @ A for name, (A, B) in zip(names, pairs, strict=True)}
        assert set(found[what]) == set(sites)
        for site in sites:
            place = m.anatomy.places[site]
            part = whole[place.name.removesuffix(".weight")]
            part = part if place.rows is None else part[place.rows]
            torch.testing.assert_close(found[what][site], part, rtol=2e-3, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    m = model()
    m.module.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    tensors = {name: p.detach().clone() for name, p in m.module.named_parameters()}
    needs = {name: p.requires_grad for name, p in m.module.named_parameters()}
    kinds, random_state = [type(x) for x in m.module.modules()], torch.random.get_rng_state()
    attributes = set(m.module.__dict__)
    done = run(m)
    assert all(torch.equal(p, tensors[name]) for name, p in m.module.named_parameters())
    assert {name: p.requires_grad for name, p in m.module.named_parameters()} == needs
    assert [type(x) for x in m.module.modules()] == kinds
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert set(m.module.__dict__) == attributes
    assert not m.module.training
    assert all(float(n) > 0 for n in done.skill.norms().values())
    # also after an error on the way
    with pytest.raises(FloatingPointError):
        run(m, skill_lr=float("inf"), skill_steps=8)
    assert [type(x) for x in m.module.modules()] == kinds
    assert all(torch.equal(p, tensors[name]) for name, p in m.module.named_parameters())


def test_knowledge_is_frozen_and_needed() -> None:
    m = model()
    done, longer = usual(), run(m, skill_steps=9)
    assert all(same(done.knowledge[v], longer.knowledge[v]) for v in done.knowledge)
    assert not same(done.skill, longer.skill)
    facts, tasks = data(m)
    crossed = prereq_tune(m, {"one.a": facts["two"], "two": facts["one.a"]}, tasks, **SMALL)
    assert crossed.versions == done.versions
    assert not same(crossed.skill, done.skill)  # the same tasks, with the other facts in place


def test_the_same_seed_gives_the_same_bits() -> None:
    m = model()
    done, again, other = usual(), run(m), run(m, seed=1)
    assert same(done.skill, again.skill)
    assert done.losses == again.losses
    assert not same(done.skill, other.skill)


def test_batches_depend_on_seed_and_number_alone() -> None:
    m = model()
    drawn = {v: [e for (e,) in examples(ts)] for v, ts in data(m)[1].items()}
    assert batches_of(drawn, 9, 2, 3)[:4] == batches_of(drawn, 4, 2, 3)
    for version, batch in batches_of(drawn, 30, 2, 3):
        assert len(batch) == len({id(e) for e in batch}) == 2
        assert all(any(e is x for x in drawn[version]) for e in batch)
    assert all(len(batch) == 3 for _, batch in batches_of(drawn, 3, 8, 3))
    assert {v for v, _ in batches_of(drawn, 30, 2, 3)} == set(drawn)


@pytest.mark.parametrize(
    "option",
    [
        {"knowledge_lr": 1e-4}, {"skill_lr": 1e-4}, {"knowledge_rank": 2}, {"skill_rank": 2}, {"knowledge_steps": 2}, {"batch_size": 1},
        {"schedule": "constant"}, {"max_grad_norm": 1e-3}, {"knowledge_over": "answer[:1]"}, {"skill_over": "answer"}, {"autocast": True},
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_every_option_changes_the_skill(option: dict[str, Any]) -> None:
    assert not same(usual().skill, run(model(), **option).skill)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    begun: list[int] = []

    class Stop(TrainerCallback):
        """Ctrl-C when so many stages are done, in a step of the next; it notes the step at which each stage begins."""

        def __init__(self, stages: int, step: int):
            self.stages, self.step = stages, step

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            begun.append(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if len(begun) > self.stages and state.global_step == self.step:
                raise KeyboardInterrupt

    kept: dict[str, Any] = {"checkpoints": tmp_path / "kept", "save_every": 2}
    for stages, step, expected in ((1, 1, [0, 0]), (1, 3, [0, 0]), (9, 0, [2])):
        begun.clear()
        torch.manual_seed(stages + step)  # a fresh process has another random state
        m = model()
        if stages == 9:
            done = run(m, **kept, callbacks=[Stop(stages, step)])
            assert same(done.skill, usual().skill)
            assert all(same(done.knowledge[v], usual().knowledge[v]) for v in done.knowledge)
            assert done.losses == usual().losses
            assert done.versions == usual().versions
        else:
            with pytest.raises(KeyboardInterrupt):
                run(m, **kept, callbacks=[Stop(stages, step)])
        assert begun == expected
    assert sorted(p.name for p in (tmp_path / "kept").rglob("*") if p.is_file()) == ["adapter.safetensors"] * 3
    begun.clear()
    assert same(run(model(), **kept, callbacks=[Stop(9, 0)]).skill, usual().skill)
    assert not begun  # every stage was there
    for other in ({"skill_lr": 1e-4}, {"seed": 1}, {"batch_size": 1}):
        with pytest.raises(ValueError, match=f"checkpoint of another run.*{next(iter(other))} was"):
            run(model(), **kept, **other)
    with pytest.raises(ValueError, match=r"checkpoint of another run.*start was"):
        run(model("llama", seed=9), **kept)


def test_vectors_are_points_files_and_adapters(tmp_path: Any) -> None:
    m = model(dtype=torch.bfloat16)
    done = run(m)
    save_delta(done.skill, tmp_path / "skill", base_hash="none")
    assert same(StoredDelta(tmp_path / "skill"), done.skill)
    ids = torch.tensor([data(m)[0]["two"][0].ids])
    before = m.module(input_ids=ids).logits
    with m.installed(m.weights + done.skill):
        skilled = m.module(input_ids=ids).logits
    with m.installed(m.weights + done.skill + done.knowledge["two"]):
        knowing = m.module(input_ids=ids).logits
    assert torch.equal(before, m.module(input_ids=ids).logits)
    assert not torch.equal(before, skilled)
    assert not torch.equal(skilled, knowing)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_experts_that_are_one_tensor_are_refused(family: str) -> None:
    m = model(family)
    with pytest.raises(ValueError, match=r"experts of this model are one tensor together .*are no layers"):
        run(m)
    assert not any("lora" in name for name, _ in m.module.named_modules())


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    m = model()
    facts, tasks = data(m)
    with pytest.raises(ValueError, match="knowledge has the versions"):
        prereq_tune(m, facts, {"two": tasks["two"]}, **SMALL)
    with pytest.raises(ValueError, match="knowledge has the versions"):
        prereq_tune(m, {}, {}, **SMALL)
    with pytest.raises(ValueError, match="skill_rank=0, batch_size=-1"):
        run(m, skill_rank=0, batch_size=-1)
    with pytest.raises(ValueError, match=r"max_grad_norm=-1\.0.*0 does not clip"):
        run(m, max_grad_norm=-1.0)
    with pytest.raises(ValueError, match="has a span thinking"):
        run(m, knowledge_over="thinking")
    with pytest.raises(ValueError, match="not groups"):
        prereq_tune(m, facts, {v: [(t, t) for t in ts] for v, ts in tasks.items()}, **SMALL)
    with pytest.raises(ValueError, match="save_every needs checkpoints"):
        run(m, save_every=2)
    assert not any("lora" in name for name, _ in m.module.named_modules())
    assert isinstance(m.module.model.layers[0].mlp.up_proj, nn.Linear)


def test_launchers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        ValueError, match="asks for DeepSpeed, and prereq_tune needs the weights whole while they train"
    ):
        run(m)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="prereq_tune works in one process; here are 2"):
        run(m)
