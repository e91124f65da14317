"""Laws of group relative tuning: its gradient is the equation's, samples depend on the seed alone, and rewards that never differ stop it."""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from finetune.grpo import Reinforced, completion_logprobs, grpo
from finetune.lift import principal_indices
from finetune.rewards import Weighted
from finetune.rules import DRIFT
from surgery.model import Model
from surgery.runs import fingerprint
from surgery.transcript import Transcript
from surgery.weights import linear_sites
from tests.families import tiny
from tests.oracles import grpo as oracle
from tests.processes import together

ASKED = [f"What is {'9' * (i % 4)}{i}?" for i in range(8)]
SMALL: dict[str, Any] = {
    "trains": "full", "steps": 2, "groups": 2, "samples": 4, "max_new_tokens": 6, "temperature": 6.0, "lr": 1e-3, "autocast": False,
}  # fmt: skip


def model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Model:
    return Model(*tiny(family, dtype=dtype))


def letters(question: Any, transcript: Transcript) -> float:
    """The share of early lower-case letters: dense, so that any random model has some."""
    text = transcript.completion or ""
    return sum(c in "abcdefghijklm" for c in text) / 6


def run(
    m: Model | None = None, questions: Any = ASKED, reward: Any = letters, **options: Any
) -> tuple[Model, Reinforced]:
    m = m or model()
    return m, grpo(m, questions, reward, **(SMALL | options))


def tensors(m: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in m.module.named_parameters()}


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(x, tensors(b)[name]) for name, x in tensors(a).items())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Seen:
    """A reward that keeps what it saw; every seventh completion is not scored where `holes`."""

    def __init__(self, holes: bool = False):
        self.transcripts: list[Transcript] = []
        self.rewards: list[float | None] = []
        self.holes = holes

    def __call__(self, question: Any, transcript: Transcript) -> float | None:
        self.transcripts.append(transcript)
        self.rewards.append(None if self.holes and len(self.rewards) % 7 == 3 else letters(question, transcript))
        return self.rewards[-1]


class Gradients(TrainerCallback):
    """Keeps, for every optimizer step, the weights it begins from and the gradient it is given."""

    def __init__(self, module: Any):
        self.module, self.weights, self.gradients = module, [], []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        named = dict(self.module.named_parameters())
        self.weights.append({name: p.detach().clone() for name, p in named.items()})
        self.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})


# --- the gradient -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt2", {}),  # learned positions: padding on the left must not shift them
        ("gemma2", {"loss": "bnpo"}),
        ("mixtral", {"accumulate": 2}),
        ("llama", {"loss": "grpo", "scale_rewards": "none"}),
        ("llama", {"loss": "dr_grpo", "scale_rewards": "batch"}),
        ("llama", {"loss": "grpo", "beta": 0.5, "accumulate": 2}),
        ("llama", {"beta": 0.5, "accumulate": 4, "holes": True}),
    ],
    ids=str,
)  # fmt: skip
def test_the_gradient_of_each_step_is_the_equations(family: str, options: dict[str, Any]) -> None:
    m = model(family)
    start = copy.deepcopy(m.module)
    options = dict(options)
    seen, kept = Seen(options.pop("holes", False)), Gradients(m.module)
    run(m, reward=seen, callbacks=[kept], max_grad_norm=0.0, **options)
    said, rewards = seen.transcripts, seen.rewards
    assert len(said) == 16
    assert len({len(t.ids) for t in said}) > 1  # there is padding
    for step in range(2):
        here = slice(8 * step, 8 * step + 8)
        policy = copy.deepcopy(start)
        policy.load_state_dict(kept.weights[step], strict=False)
        groups = [rewards[here][:4], rewards[here][4:]]
        flat = [a for row in oracle.advantages(groups, options.get("scale_rewards", "group")) for a in row]
        loss = oracle.loss(
            policy, start, [(list(t.ids), t.spans["completion"][0]) for t in said[here]], flat,
            kind=options.get("loss", "dapo"), beta=options.get("beta", 0.0), temperature=6.0, longest=6,
        )  # fmt: skip
        loss.backward()
        assert kept.gradients[step].keys() == {name for name, p in policy.named_parameters() if p.grad is not None}
        pairs = [(kept.gradients[step][n], p.grad) for n, p in policy.named_parameters() if p.grad is not None]
        whole = torch.cat([own.flatten() for _, own in pairs]).norm()
        for given, own in pairs:
            # an almost flat group divides the rounding of its mean by 1e-4
            assert float((given - own).norm() / whole) < 1e-4


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_a_term_adds_its_gradient_once_however_the_step_is_divided(loss: Any) -> None:
    steps: list[int] = []

    def spring(module: Any, step: int) -> torch.Tensor:
        steps.append(step)
        return 0.05 * sum(p.square().sum() for p in module.parameters())

    def first(**options: Any) -> dict[str, torch.Tensor]:
        m = model()
        kept = Gradients(m.module)
        run(m, callbacks=[kept], max_grad_norm=0.0, loss=loss, **options)
        return kept.gradients[0]

    plain, start = first(), tensors(model())
    for accumulate in (1, 2, 4):
        steps.clear()
        found = first(terms=[spring], accumulate=accumulate)
        assert steps == [0, 1]
        for name, given in found.items():
            torch.testing.assert_close(given - plain[name], 0.1 * start[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_log_probabilities_are_those_without_padding(family: str) -> None:
    m = model(family)
    given = m.generate(ASKED[:4], samples=2, temperature=4.0, max_new_tokens=5)
    starts = [t.spans["completion"][0] for t in given]
    before, after = max(starts), max(len(t.ids) - s for t, s in zip(given, starts, strict=True))
    ids, mask = torch.zeros(2, len(given), before + after, dtype=torch.long)
    for row, (t, s) in enumerate(zip(given, starts, strict=True)):
        place = slice(before - s, before - s + len(t.ids))
        ids[row, place], mask[row, place] = torch.tensor(t.ids), 1
    found, entropy = completion_logprobs(m.module, ids, mask, after, 2.5)
    for row, (t, s) in enumerate(zip(given, starts, strict=True)):
        n = len(t.ids) - s
        own = oracle.log_probabilities(m.module, list(t.ids), s, 2.5)
        torch.testing.assert_close(found[row, :n], own, rtol=1e-4, atol=1e-4)
        logs = (m.module(input_ids=torch.tensor([t.ids])).logits[0] / 2.5).log_softmax(-1)[s - 1 : -1]
        torch.testing.assert_close(entropy[row, :n], -(logs.exp() * logs).sum(-1), rtol=1e-4, atol=1e-4)
        assert not found[row, n:].any()
        assert not entropy[row, n:].any()


def test_the_kl_is_from_the_weights_that_were_given_and_holds_them_back() -> None:
    m = model()
    with torch.no_grad():
        m.module.model.layers[1].mlp.down_proj.weight.mul_(0.5)  # no file holds these weights
    kls, far = {}, {}
    start = tensors(m)
    for beta in (1e-3, 100.0):
        tuned = Model(copy.deepcopy(m.module), m.tokenizer)
        _, done = run(tuned, beta=beta, steps=3, lr=3e-3)
        kls[beta] = [r.kl for r in done.rounds]
        far[beta] = sum(float((p - start[n]).detach().norm()) ** 2 for n, p in tuned.module.named_parameters())
    assert math.isnan(run(steps=1)[1].rounds[0].kl)
    assert kls[1e-3][0] == kls[100.0][0] == 0
    assert kls[100.0][-1] < kls[1e-3][-1]
    assert far[100.0] < far[1e-3]
    lora = [r.kl for r in run(trains="lora", beta=1e-3, steps=2, lr=1e-2)[1].rounds]
    assert lora[0] == pytest.approx(0, abs=1e-6)
    assert lora[-1] > 0


# --- what is trained, and how far ---------------------------------------------------------------------------------------


def test_what_is_rewarded_becomes_frequent() -> None:
    _, done = run(steps=20, groups=4, samples=8, lr=3e-3)
    rewards = [r.reward for r in done.rounds]
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lift_trains_its_entries_and_nothing_else(dtype: torch.dtype) -> None:
    m = model(dtype=dtype)
    start = {s: m.weights[s].clone() for s in m.weights}
    _, done = run(m, trains="lift", density=0.1, filter_rank=4, lr=1e-2)
    assert done.trainable == sum(max(1, int(0.1 * start[s].numel())) for s in linear_sites(m.weights))
    for site, before in start.items():
        changed = set((before != m.weights[site]).reshape(-1).nonzero()[:, 0].tolist())
        allowed: set[int] = set()
        if site in linear_sites(m.weights):
            allowed = set(principal_indices(before, 4, max(1, int(0.1 * before.numel()))).tolist())
            assert changed, site
        assert changed <= allowed, site


def test_lora_changes_every_matrix_by_its_rank() -> None:
    m = model()
    start = {s: m.weights[s].clone() for s in m.weights}
    run(m, trains="lora", lora_rank=2, lr=1e-2)
    for site, before in start.items():
        change = m.weights[site] - before
        if site in linear_sites(m.weights):
            assert change.any()
            assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 2
        else:
            assert not change.any()


def test_the_result_tells_what_was_done() -> None:
    m, before = model(), fingerprint(model())
    seen = Seen()
    _, done = run(m, reward=seen, steps=3, trains="lift")
    assert done.steps == len(done.rounds) == len(done.losses) == len(done.gradient_norms) == 3
    assert [r.step for r in done.rounds] == [1, 2, 3]
    for step, found in enumerate(done.rounds):
        said, given = seen.transcripts[8 * step :][:8], seen.rewards[8 * step :][:8]
        assert found.reward == pytest.approx(np.mean(given), abs=1e-6)
        assert found.length == pytest.approx(np.mean([len(t.ids) - t.spans["completion"][0] for t in said]))
        assert found.cut == pytest.approx(np.mean([not t.finished for t in said]))
        assert 0 < found.entropy < math.log(100)
    assert done.settings["start"] == before != fingerprint(m)
    table = done.frame()
    assert len(table) == 3
    assert table["reward"].tolist() == [r.reward for r in done.rounds]


# --- samples ------------------------------------------------------------------------------------------------------------


def test_samples_depend_on_the_seed_alone(tmp_path: Path) -> None:
    a, _ = run(log=tmp_path / "a")
    torch.manual_seed(17)
    b, _ = run(log=tmp_path / "b")
    assert same(a, b)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    run(log=tmp_path / "c", seed=1)
    assert read(tmp_path / "a") != read(tmp_path / "c")
    small, _ = run(log=tmp_path / "d", accumulate=4)
    assert read(tmp_path / "a")[:8] == read(tmp_path / "d")[:8]
    for name, tensor in tensors(small).items():
        torch.testing.assert_close(tensor, tensors(a)[name], rtol=1e-3, atol=1e-4)
    texts = [line["completion"] for line in read(tmp_path / "a")[:4]]
    assert len(set(texts)) > 1


def test_every_seed_and_every_step_draws_anew(tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 1):
        run(log=tmp_path / str(seed), questions=["Which?"] * 8, lr=0.0, seed=seed)
        texts = [line["completion"] for line in read(tmp_path / str(seed))]
        drawn += [tuple(texts[i : i + 4]) for i in range(0, 16, 4)]
    assert len(set(drawn)) == 8


def test_the_log_has_every_completion(tmp_path: Path) -> None:
    seen = Seen()
    reward = Weighted({"letters": (seen, 2.0), "seen": (lambda q, t: 1.0, 0.0)})
    _, done = run(reward=reward, log=tmp_path / "deep" / "log", steps=3)
    lines = read(tmp_path / "deep" / "log")
    assert len(lines) == 3 * 8
    for row, (line, transcript, value) in enumerate(zip(lines, seen.transcripts, seen.rewards, strict=True)):
        assert (line["step"], line["sample"]) == (row // 8 + 1, row % 4)
        assert line["text"] == transcript.question == ASKED[line["question"]]
        assert line["completion"] == transcript.completion
        assert line["finished"] == transcript.finished
        assert line["reward"] == pytest.approx(2 * value)
        assert line["parts"] == {"letters": value, "seen": 1.0}
    assert len({line["question"] for line in lines[:8]}) == 2
    assert done.rounds[0].parts == {"letters": pytest.approx(np.mean(seen.rewards[:8]), abs=1e-6), "seen": 1.0}
    assert "reward of letters" in done.frame()


@dataclass(frozen=True)
class Asked:
    question: str
    answer: str


def test_questions_may_be_objects_and_alike() -> None:
    asked = [Asked("Which?", letter) for letter in "abcd"]
    heard: list[str] = []

    def reward(question: Asked, transcript: Transcript) -> float:
        heard.append(question.answer)
        return letters(question, transcript)

    run(questions=asked, reward=reward, groups=4, steps=1)
    assert [heard[i : i + 4] for i in range(0, 16, 4)] == [[h] * 4 for h in heard[::4]]
    assert sorted(heard[::4]) == ["a", "b", "c", "d"]


# --- rewards that do not differ -----------------------------------------------------------------------------------------


def test_rewards_that_never_differ_stop_the_run_and_nothing_has_moved() -> None:
    calls: list[int] = []

    def never(question: Any, transcript: Transcript) -> float:
        calls.append(1)
        return 0.25

    for trains, beta in (("full", 0.1), ("lift", 0.0)):
        calls.clear()
        m = model()
        with pytest.raises(
            ValueError, match=r"In 3 steps .* same reward .* 3 siblings \(mean 0.25, \w+ 0.25\)|mean 0.25"
        ):
            run(m, reward=never, steps=9, patience=3, trains=trains, beta=beta)
        assert len(calls) == 3 * 8
        assert same(m, model())
        assert all(p.grad is None for p in m.module.parameters())


def test_a_short_run_without_difference_is_an_error_at_its_end_and_names_the_parts() -> None:
    reward = Weighted({"right": (lambda q, t: 0.0, 1.0), "format": (lambda q, t: 1.0, 0.5)})
    with pytest.raises(ValueError, match=r"In 2 steps .*mean 0.5 \(format 1, right 0\)"):
        run(reward=reward)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_flat_groups_leave_the_router_of_a_mixture_as_it_was(family: str) -> None:
    m = model(family)
    with pytest.raises(ValueError, match="same reward"):
        run(m, reward=lambda q, t: 0.25, steps=1)
    assert same(m, model(family))


def test_a_part_that_abstained_is_left_out_of_the_error() -> None:
    calls: list[int] = []

    def once(question: Any, transcript: Transcript) -> float | None:
        calls.append(1)
        return 0.5 if len(calls) <= 8 else None

    reward = Weighted({"right": (lambda q, t: 0.0, 1.0), "once": (once, 0.0)})
    with pytest.raises(ValueError, match=r"In 2 steps .*mean 0 \(right 0\)"):
        run(reward=reward)


def test_flat_groups_are_counted_and_harmless_after_a_difference() -> None:
    steps: list[int] = []

    def first_only(question: Any, transcript: Transcript) -> float:
        steps.append(1)
        # one group of the first step differs; later ones by less than what sums of rewards are rounded by
        return letters(question, transcript) if len(steps) <= 4 else [0.3, 0.1 + 0.2][len(steps) % 2]

    _, done = run(reward=first_only, steps=4, patience=2)
    assert [r.flat for r in done.rounds] == [0.5, 1.0, 1.0, 1.0]
    assert done.gradient_norms[0] > 0
    assert done.gradient_norms[1:] == [0, 0, 0]


def test_what_is_not_scored_does_not_count() -> None:
    seen = Seen(holes=True)
    _, done = run(reward=seen)
    missing = [seen.rewards[:8].count(None), seen.rewards[8:].count(None)]
    assert [r.unscored for r in done.rounds] == missing == [1, 1]
    assert done.rounds[0].reward == pytest.approx(np.mean([r for r in seen.rewards[:8] if r is not None]), abs=1e-6)
    with pytest.raises(ValueError, match="same reward"):
        run(reward=lambda q, t: None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_an_error(value: float) -> None:
    m = model()
    with pytest.raises(ValueError, match=r"reward 'odd' of an answer to 'What is .* is (nan|inf)"):
        run(m, reward=Weighted({"odd": (lambda q, t: value, 1.0)}))
    assert same(m, model())


# --- what is given back -------------------------------------------------------------------------------------------------


def belongings(m: Model) -> dict[str, Any]:
    parts = [
        (name, p.training, len(p._forward_hooks) + len(p._forward_pre_hooks)) for name, p in m.module.named_modules()
    ]
    return {
        "names": sorted(m.module.__dict__),
        "parameters": [
            (n, id(p), p.requires_grad, p.grad is None, len(p._post_accumulate_grad_hooks or ()))
            for n, p in m.module.named_parameters()
        ],
        "modules": parts,
        "config": copy.deepcopy(m.module.config.to_dict()),
        "generation": copy.deepcopy(m.module.generation_config.to_dict()),
        "forward": m.module.forward.__func__,
        "tokenizer": (m.tokenizer.padding_side, m.tokenizer.pad_token, m.tokenizer.eos_token, m.tokenizer.truncation_side),
        "random": (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "gradients": torch.is_grad_enabled(),
    }  # fmt: skip


@pytest.mark.parametrize("trains", ["lift", "full", "lora"])
@pytest.mark.parametrize("failing", [False, True])
def test_what_is_borrowed_is_given_back(trains: Any, failing: bool) -> None:
    m = model()
    m.tokenizer.pad_token = None
    next(m.module.parameters()).requires_grad_(False)
    m.module.generation_config.pad_token_id = None
    before = belongings(m)

    def fails(question: Any, transcript: Transcript) -> float:
        raise RuntimeError("a reward's own error")

    if failing:
        with pytest.raises(RuntimeError, match="a reward's own error"):
            run(m, reward=fails, trains=trains)
    else:
        run(m, trains=trains, beta=0.1)
    after = belongings(m)
    for key, value in before.items():
        assert after[key] == value, key


# --- interruption and resuming ------------------------------------------------------------------------------------------


class Interrupted(TrainerCallback):
    def __init__(self, after: int = 4):
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("trains", ["lift", "lora"])
def test_an_interrupted_run_goes_on_bit_for_bit(trains: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trains": trains, "steps": 6, "beta": 0.1, "accumulate": 2, "lr": 3e-3}
    whole, done = run(log=tmp_path / "whole", **options)
    saved = {"checkpoints": tmp_path / "runs", "save_every": 3, "log": tmp_path / "log"}
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Interrupted()], **saved, **options)
    assert len(read(tmp_path / "log")) == 4 * 8
    (tmp_path / "before").hardlink_to(tmp_path / "log")
    with (tmp_path / "log").open("a") as log:
        log.write('{"step": 5, "ques')
    torch.manual_seed(99)
    again, rest = run(**saved, **options)
    assert same(whole, again)
    assert rest.losses == done.losses
    assert [vars(r) for r in rest.rounds] == [vars(r) for r in done.rounds]
    assert read(tmp_path / "log") == read(tmp_path / "whole")
    assert (tmp_path / "before").read_text().count("\n") == 4 * 8  # another file took its place


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    saved = {"checkpoints": tmp_path, "save_every": 3, "steps": 6}
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Interrupted()], **saved)
    other = model()
    with torch.no_grad():
        other.module.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    for name, change in {
        "seed": {"seed": 1}, "samples": {"samples": 2}, "beta": {"beta": 1.0}, "data": {"questions": ASKED[::-1]},
        "reward": {"reward": Weighted({"l": (letters, 1.0)})}, "start": {"m": other}, "terms": {"terms": [lambda module, step: 0.0]},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"checkpoint of another run.*{name} was"):
            run(**(saved | change))


def test_a_run_with_a_prior_is_not_resumed_without_it(tmp_path: Path) -> None:
    saved = {"checkpoints": tmp_path, "save_every": 3, "steps": 6}
    m = model()
    prior = DRIFT(Model(*tiny("llama", seed=1)).weights - m.weights, m)
    with pytest.raises(KeyboardInterrupt):
        run(m, callbacks=[prior, Interrupted()], **saved)
    with pytest.raises(ValueError, match="DRIFT was True, now False"):
        run(**saved)


# --- options and bad input ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> Model:
    return run(trains="lift")[0]


@pytest.mark.parametrize(
    "option",
    [
        {"steps": 3}, {"groups": 4}, {"samples": 2}, {"lr": 2e-3}, {"beta": 1.0}, {"loss": "grpo"},
        {"scale_rewards": "none"}, {"scale_rewards": "batch"}, {"temperature": 3.0}, {"max_new_tokens": 3}, {"density": 0.1},
        {"lora_rank": 1}, {"filter_rank": 2}, {"refresh": 1}, {"weight_decay": 0.5}, {"schedule": "linear"}, {"warmup": 2},
        {"max_grad_norm": 1e-9}, {"autocast": True}, {"seed": 1}, {"trains": "lora"}, {"select": "random"}, {"options": {"block": 4}},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_something(option: dict[str, Any], plain: Model) -> None:
    assert not same(run(**({"trains": "lift"} | option))[0], plain)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trains": "lifts"}, ValueError, "no trains='lifts'.*lift, full, lora"),
        ({"loss": "ppo"}, ValueError, "no loss='ppo'"),
        ({"scale_rewards": "std"}, ValueError, "no scale_rewards"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"groups": 0}, ValueError, "groups=0"),
        ({"patience": 0}, ValueError, "patience=0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ({"samples": 1}, ValueError, "samples=1"),
        ({"accumulate": 3}, ValueError, "8 completions.*accumulate=3"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm=-1.0.*0 does not clip"),
        ({"beta": -1.0}, ValueError, "beta=-1.0"),
        ({"groups": 9}, ValueError, "8 questions, and groups=9"),
        ({"questions": [1, 2, 3]}, ValueError, "1 is no question"),
        ({"questions": []}, ValueError, "0 questions"),
        ({"density": 0.1}, ValueError, "density.*full"),
        ({"options": {"block": 4}}, ValueError, "full does not have them: leave out block"),
        (
            {"trains": "lift", "options": {"blocks": 4, "lr": 1.0}},
            ValueError,
            "LIFT has no option 'blocks'.*agreement.*block",
        ),
        ({"trains": "lift", "density": 0.0}, ValueError, "density"),
        ({"save_every": 2}, ValueError, "checkpoints"),
        ({"save_every": 0}, ValueError, "save_every=0"),
        ({"vllm": True}, ImportError, "vLLM is not installed"),
    ],
    ids=str,
)
def test_bad_settings_are_one_clear_error(
    options: dict[str, Any], error: Any, message: str, tmp_path: Path, unchecked: None
) -> None:
    m = model()
    with pytest.raises(error, match=message):
        run(m, log=tmp_path / "log", **options)
    assert same(m, model())
    assert not list(tmp_path.iterdir())


def test_vllm_asked_for_where_it_cannot_sample_this_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.grpo.find_spec", lambda name: object())
    m = model()
    with pytest.raises(
        ValueError, match=r"vLLM samples on a GPU, .* loaded from a folder; this one is on cpu.*leave vllm out"
    ):
        run(m, vllm=True)
    assert same(m, model())


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_low_precision_weights_are_refused_where_steps_would_vanish(trains: Any) -> None:
    with pytest.raises(ValueError, match=r"fp32.*float32"):
        run(model(dtype=torch.bfloat16), trains=trains)


def test_another_trl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    class Old:
        def __init__(self, model: Any):
            pass

    monkeypatch.setattr(trl, "GRPOTrainer", Old)
    with pytest.raises(ImportError, match=r"rollout_func.*installed is 1\."):
        run()


# --- several processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "environment", "told"),
    [
        ({"groups": 3}, {}, "groups=3 questions a step are dealt out to 2 processes: give a multiple of 2"),
        ({"accumulate": 8}, {}, "8 completions of a step are not divisible by accumulate=8 in each of 2 processes"),
        (
            {},
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            "asks for FSDP, and grpo needs the weights whole while they train",
        ),
        (
            {},
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "asks for DeepSpeed, and grpo needs the weights whole while they train",
        ),
    ],
)
def test_what_a_launcher_may_not_ask(
    bad: dict[str, Any], environment: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=told):
        run(**bad)


def vowels(question: Any, transcript: Transcript) -> float | None:
    """Abstains of every question with a certain digit, so that parts have other counts in each process."""
    return None if "5" in transcript.question else sum(c in "aeiou" for c in transcript.completion or "") / 6


def spoilt(question: Any, transcript: Transcript) -> float:
    """No number for completions of one question, which one process alone has."""
    return math.nan if transcript.question == spoilt.of else letters(question, transcript)


spoilt.of = ""
TOGETHER: dict[str, dict[str, Any]] = {
    "full": {"accumulate": 2, "beta": 0.5, "scale_rewards": "batch"},
    "lift": {"trains": "lift", "density": 0.1, "filter_rank": 4, "refresh": 1, "loss": "grpo"},
    "lora": {"trains": "lora", "lora_rank": 2, "beta": 0.5, "lr": 1e-2},
}  # fmt: skip


def alike(folder: Path, rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, options in TOGETHER.items():
        reward = Weighted({"letters": (letters, 1.0), "vowels": (vowels, 0.5)})
        options = SMALL | {"groups": 4, "steps": 3, "max_grad_norm": 0.05, "log": folder / f"{kind}.{world}"} | options
        m, done = run(reward=reward, **options)
        found[kind] = {"tensors": tensors(m), "norms": done.gradient_norms, "rounds": [vars(r) for r in done.rounds]}
    kept = options | {"checkpoints": folder / str(world), "save_every": 2, "log": folder / f"again.{world}"}
    for index in (0, 1):
        m, stopping = model(), [] if index else [Interrupted(2)]
        try:
            run(m, reward=reward, callbacks=stopping, **kept)
        except KeyboardInterrupt:
            found["stopped"] = True
    found["resumed"] = tensors(m)
    spoilt.of = json.loads((folder / f"lora.{world}").read_text().splitlines()[0])["text"]  # the first process asks it
    with pytest.raises(ValueError, match=r"The reward 'reward' of an answer to .* is nan"):
        run(reward=spoilt, **options | {"log": None})
    return found


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """Each answers half of a step's questions."""
    one = alike(tmp_path, 0, 1)
    both = together(2, {"all": functools.partial(alike, tmp_path)}, tmp_path, begun=False)["all"]
    for mine in both:
        assert not isinstance(mine, str), mine
        assert mine["stopped"]
        for kind in TOGETHER:
            assert mine[kind]["norms"] == pytest.approx(one[kind]["norms"], rel=1e-4), kind
            for here, there in zip(mine[kind]["rounds"], one[kind]["rounds"], strict=True):
                assert here.keys() == there.keys()
                assert here.pop("parts") == pytest.approx(there["parts"], rel=1e-6), kind
                for means in ("entropy", "kl"):  # over the tokens of each process's completions first
                    assert here.pop(means) == pytest.approx(there[means], rel=0.02, abs=1e-6, nan_ok=True), kind
                assert here == pytest.approx({key: there[key] for key in here}, rel=1e-5, nan_ok=True), kind
            for name, tensor in one[kind]["tensors"].items():
                torch.testing.assert_close(mine[kind]["tensors"][name], tensor, rtol=0, atol=2e-5, msg=f"{kind} {name}")
        for name, tensor in mine["lora"]["tensors"].items():
            assert torch.equal(mine["resumed"][name], tensor)  # to the bit, of as many processes
    for kind in TOGETHER:
        assert read(tmp_path / f"{kind}.2") == read(tmp_path / f"{kind}.1")
    assert read(tmp_path / "again.2") == read(tmp_path / "lora.2")
