"""Laws of tuning: the loss is the module's own, what a step does not depend on, what is given back, and what a killed run leaves."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import is_tensorboard_available

from analyses.tasks import chained_sums
from finetune.checkpoints import last_complete, mark_complete
from finetune.learner import one_device
from finetune.lift import LIFT, budget, principal_indices
from finetune.monitors import Recorder, every, read_log
from finetune.objectives import kl_to_base, nll
from finetune.predictions import Predictions, Totals, predict
from finetune.retention import Replay
from finetune.tune import Tuned, tune
from surgery.model import Model
from surgery.transcript import Transcript
from surgery.weights import linear_sites
from tests.families import characters, tiny, tiny_vlm
from tests.hosted import belongings

QUESTIONS = chained_sums(16, seed=3, terms=(2, 3))
SMALL: dict[str, Any] = {"steps": 3, "batch_size": 4, "autocast": False}
STARTS = {"llama": tiny("llama")[0]}


def model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Model:
    module, tokenizer = tiny(family, dtype=dtype)
    return Model(module, tokenizer)


def taught(m: Model, count: int = 16) -> list[Transcript]:
    return [m.transcript(q.question, q.completion(m.markers)) for q in QUESTIONS[:count]]


def tensors(m: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in m.module.named_parameters()}


def run(**options: Any) -> tuple[Model, Tuned]:
    m = model()
    return m, tune(m, taught(m), **(SMALL | options))


def reached(m: Model, step: int) -> dict[str, float]:
    return {"reached": float(step)}


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(x, tensors(b)[name]) for name, x in tensors(a).items())


def moved(m: Model) -> set[str]:
    start = dict(STARTS["llama"].named_parameters())
    return {name for name, p in m.module.named_parameters() if not torch.equal(p, start[name])}


# --- the loss ---------------------------------------------------------------------------------------------------------


def batch(m: Model, count: int = 4) -> dict[str, torch.Tensor]:
    rows = []
    for t in taught(m, count):
        begin, end = t.spans["completion"]
        ids = torch.tensor(t.ids)
        labels = torch.full_like(ids, -100)
        labels[begin:end] = ids[begin:end]
        rows.append((ids, labels))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([r[0] for r in rows], batch_first=True)
    mask = pad([torch.ones_like(r[0]) for r in rows], batch_first=True)
    labels = pad([r[1] for r in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3", "gpt-neox"])
def test_loss_and_gradients_are_the_modules_own(family: str, share: bool) -> None:
    m = model(family)
    inputs = batch(m)
    own = m.module(**inputs).loss
    own.backward()
    expected = {name: p.grad.clone() for name, p in m.module.named_parameters() if p.grad is not None}
    m.module.zero_grad()
    found = nll(predict(m.module, inputs, share=share))
    found.backward()
    torch.testing.assert_close(found, own, rtol=1e-5, atol=0)
    for name, p in m.module.named_parameters():
        if name in expected:
            assert p.grad is not None, name
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=2e-5 * float(expected[name].abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2-vl", "qwen2.5-vl"])
def test_a_module_in_an_adapter_predicts_as_it_does_itself(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    m = Model(tiny_vlm(family), characters()) if "vl" in family else model(family)
    inputs = batch(m)
    with torch.no_grad():
        plain = [predict(m.module, inputs, share=share).logits for share in (True, False)]
        wrapped: Any = get_peft_model(m.module, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))  # type: ignore[arg-type]
        kept = torch.tensor([[-3]])
        m.module.base_model.rope_deltas = kept  # of an image that was seen before
        shared, apart = (predict(wrapped, inputs, share=share).logits for share in (True, False))
        torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)
        assert m.module.base_model.rope_deltas is kept
        assert not torch.allclose(apart, plain[1])
        with wrapped.disable_adapter():
            found = [predict(wrapped, inputs, share=share).logits for share in (True, False)]
    assert all(map(torch.equal, found, plain))
    with pytest.raises(ValueError, match=r"merge_and_unload"):
        Model(wrapped, m.tokenizer)


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl"])
def test_images_seen_before_move_no_token_of_a_text(family: str) -> None:
    """Such a model keeps how far the last batch's images moved its positions, and adds it to what goes on over a cache."""
    m = Model(tiny_vlm(family), characters())
    for kept in (torch.tensor([[-3]]), torch.zeros(3, 1, dtype=torch.long)):  # of another number of rows, too
        m.module.base_model.rope_deltas = kept
        with torch.no_grad():
            shared, apart = (predict(m.module, batch(m), share=share).logits for share in (True, False))
        torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)
        assert m.module.base_model.rope_deltas is kept


def test_loss_of_one_row_and_of_a_given_count() -> None:
    m = model()
    one = {k: v[:1] for k, v in batch(m).items()}
    torch.testing.assert_close(nll(predict(m.module, one)), m.module(**one).loss)
    inputs = batch(m)
    n = int((inputs["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(nll(predict(m.module, inputs, totals=Totals(2 * n, 4, 4))), m.module(**inputs).loss / 2)
    nothing = inputs | {"labels": torch.full_like(inputs["labels"], -100)}  # as rows cut before their answer are
    assert float(nll(predict(m.module, nothing, totals=Totals(n, 4, 4)))) == 0


def test_training_is_trls_own() -> None:
    """Full tuning with our loss, step by step, against SFTTrainer with nothing of ours in it."""
    import tempfile

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    ours, done = run(method="full", lr=1e-3, batch_size=4, accumulate=2, weight_decay=10.0)
    theirs = model()
    rows = []
    for t in taught(theirs):
        begin, _ = t.spans["completion"]
        rows.append({"input_ids": list(t.ids), "labels": [-100] * begin + list(t.ids[begin:])})
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
            weight_decay=10.0, seed=0, data_seed=0, bf16=False, use_cpu=True, logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, max_length=None, remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=theirs.module,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
            processing_class=theirs.tokenizer,
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert done.losses == pytest.approx(losses, rel=1e-4)
    for name, tensor in tensors(ours).items():
        torch.testing.assert_close(tensor, tensors(theirs)[name], rtol=1e-3, atol=1e-4)


def test_tokens_outside_the_span_have_no_loss() -> None:
    """The answer's loss is a per-token mean over the answer alone, computed here from the logits."""
    m = model()
    told = taught(m, 4)
    nats, count = 0.0, 0
    with torch.no_grad():
        for t in told:
            begin, end = t.spans["answer"]
            log_probabilities = m.module(input_ids=torch.tensor([t.ids])).logits[0].log_softmax(-1)
            for i in range(begin, end):
                nats -= float(log_probabilities[i - 1, t.ids[i]])
                count += 1
    done = tune(m, told, over="answer", **(SMALL | {"steps": 1}))
    assert done.losses == [pytest.approx(nats / count, rel=1e-5)]
    assert done.losses[0] != pytest.approx(tune(model(), told, **(SMALL | {"steps": 1})).losses[0], rel=1e-2)


# --- what a step does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lift", "full"])
def test_accumulation_is_one_large_batch(method: Any) -> None:
    small, a = run(method=method, batch_size=16, accumulate=4)
    large, b = run(method=method, batch_size=16, accumulate=1)
    assert a.losses == pytest.approx(b.losses, rel=1e-5)
    assert a.gradient_norms == pytest.approx(b.gradient_norms, rel=1e-4)
    for name, tensor in tensors(small).items():
        torch.testing.assert_close(tensor, tensors(large)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"select": "random"}, {"method": "full"}, {"method": "lora"}], ids=str)
def test_a_run_repeats_whatever_the_random_state(options: dict[str, Any]) -> None:
    first = run(**options)[0]
    torch.manual_seed(17)
    assert same(first, run(**options)[0])


@pytest.mark.parametrize("method", ["lift", "full"])
def test_clipping_acts_and_the_norm_is_that_before_it(method: Any) -> None:
    # without steps of its own (lr 0) the gradient's norm does not depend on the clip
    reported = [run(method=method, lr=0.0, max_grad_norm=norm)[1].gradient_norms for norm in (0.0, 1.0, 1e-9)]
    assert reported[0] == pytest.approx(reported[1], rel=1e-5)
    assert reported[0] == pytest.approx(reported[2], rel=1e-5)
    assert min(reported[0]) > 1
    tightly, loosely, freely = (run(method=method, max_grad_norm=norm)[0] for norm in (1e-9, 1.0, 0.0))
    assert not same(tightly, loosely)
    assert not same(freely, loosely)
    # Adam divides the scale away, but not below its eps: 1e-8
    start = dict(STARTS["llama"].named_parameters())
    far = {
        m: max(float((p - start[n]).detach().abs().max()) for n, p in m.module.named_parameters())
        for m in (tightly, loosely)
    }
    assert far[tightly] < far[loosely] / 2


def test_lifts_own_clip_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    clip = LIFT.clip_grad_norm_
    monkeypatch.setattr(LIFT, "clip_grad_norm_", lambda self, norm: (asked.append(norm), clip(self, norm))[1])
    run(max_grad_norm=0.25)
    assert asked == [0.25] * 3


def test_lift_leaves_every_other_entry_its_bytes() -> None:
    m = model()
    start = {s: m.weights[s].clone() for s in m.weights}
    done = tune(m, taught(m), density=0.1, filter_rank=4, **SMALL)
    assert done.trainable == sum(max(1, int(0.1 * start[s].numel())) for s in linear_sites(m.weights))
    for site, before in start.items():
        after = m.weights[site]
        changed = (before.view(torch.int32) != after.view(torch.int32)).reshape(-1).nonzero().squeeze(1)
        if site in linear_sites(m.weights):
            allowed = principal_indices(before, 4, max(1, int(0.1 * before.numel())))
            assert len(changed) > 0.9 * len(allowed)
            assert not set(changed.tolist()) - set(allowed.tolist()), site
        else:
            assert not len(changed), site


def test_lift_tunes_bfloat16_in_place() -> None:
    m = model(dtype=torch.bfloat16)
    done = tune(m, taught(m), lr=1e-2, **(SMALL | {"steps": 6}))
    assert done.losses[-1] < done.losses[0]
    assert {p.dtype for p in m.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("method", "free"), [("lift", 1260), ("full", 28768), ("lora", 0)])
def test_each_method_trains(method: Any, free: int) -> None:
    m = model()
    done = tune(
        m, taught(m), method=method, lr=1e-2, lora_rank=4 if method == "lora" else None, **(SMALL | {"steps": 6})
    )
    assert done.losses[-1] < done.losses[0] - 0.5
    assert len(done.losses) == len(done.gradient_norms) == done.steps == 6
    assert done.seconds > 0
    everything = set(dict(m.module.named_parameters()))
    matrices = {m.anatomy.places[s].name for s in linear_sites(m.weights)}
    assert moved(m) == (everything if method == "full" else matrices)
    if method == "lora":
        free = sum(4 * (a + b) for a, b in (m.weights.shape(s) for s in linear_sites(m.weights)))
    assert done.trainable == free


def test_a_merged_adapter_has_its_rank() -> None:
    m = model()
    start = {s: m.weights[s].clone() for s in linear_sites(m.weights)}
    tune(m, taught(m), method="lora", lora_rank=2, lr=1e-2, **SMALL)
    for site, before in start.items():
        assert torch.linalg.matrix_rank(m.weights[site] - before, rtol=1e-4) <= 2


def test_each_select_trains_another_set() -> None:
    changed = {}
    for select in ("largest", "smallest", "magnitude", "random"):
        m, _ = run(select=select, filter_rank=4, steps=1)
        start = dict(STARTS["llama"].named_parameters())
        flat = [(p != start[n]).reshape(-1) for n, p in m.module.named_parameters()]
        changed[select] = frozenset(torch.cat(flat).nonzero().squeeze(1).tolist())
        assert changed[select]
    assert len(set(changed.values())) == 4
    assert not changed["largest"] & changed["smallest"]


@pytest.mark.parametrize(
    "option",
    [
        {"lr": 2e-3}, {"batch_size": 8}, {"steps": 4}, {"density": 0.1}, {"lora_rank": 1}, {"filter_rank": 2}, {"refresh": 1},
        {"select": "random"}, {"weight_decay": 0.5}, {"schedule": "constant"}, {"warmup": 2}, {"max_grad_norm": 1e-9},
        {"over": "answer"}, {"autocast": True}, {"seed": 1}, {"method": "full"}, {"method": "lora"},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_something(option: dict[str, Any], plain: Model) -> None:
    assert not same(run(**option)[0], plain)


@pytest.fixture(scope="module")
def plain() -> Model:
    return run()[0]


def test_refreshes_are_reported() -> None:
    done = run(refresh=2, lr=0.1, steps=4)[1]
    assert [r.step for r in done.refreshes] == [2, 4]
    assert all(0 < r.overlap < 1 for r in done.refreshes)


class Reporter(TrainerCallback):
    """What an integration of transformers is: told of all that the trainer logs."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append({"step": state.global_step, **logs})


@pytest.mark.parametrize("made", ["by tune", "before"])
def test_what_is_recorded_reaches_the_reporters(made: str, tmp_path: Path) -> None:
    m, reporter, log = model(), Reporter(), tmp_path / "log"
    if made == "before":
        options: dict[str, Any] = {"callbacks": [reporter, Recorder(m, [every(2, reached)], log)]}
    else:
        options = {"callbacks": [reporter], "watch": [every(2, reached)], "log": log}
    tune(m, taught(m), **(SMALL | {"steps": 4} | options))
    assert {one["step"]: one["reached/reached"] for one in reporter.seen if "reached/reached" in one} == {
        0: 0,
        2: 2,
        4: 4,
    }
    assert [line["step"] for line in read_log(log) if line["monitor"] == "reached"] == [0, 2, 4]


@pytest.mark.skipif(is_tensorboard_available(), reason="is about its absence")
@pytest.mark.parametrize("method", ["lift", "grpo"])
def test_a_reporter_that_is_not_installed_is_one_clear_error(method: Any) -> None:
    m = model()
    more: dict[str, Any] = {"data": taught(m)}
    if method == "grpo":
        more = {"data": [q.question for q in QUESTIONS], "reward": lambda question, transcript: 1.0}
    with pytest.raises(RuntimeError, match="requires tensorboard to be installed"):
        tune(m, steps=1, method=method, report_to=["tensorboard"], **more)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    with pytest.raises(ValueError, match="nowhere is not supported"):
        tune(m, steps=1, method=method, report_to=["nowhere"], **more)
    assert not moved(m)


@pytest.mark.skipif(not is_tensorboard_available(), reason="needs tensorboard")
def test_tensorboards_files_outlive_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(report_to=["tensorboard"], checkpoints=tmp_path / "saved", save_every=2)
    assert list((tmp_path / "runs").rglob("events.*"))


def test_tune_keeps_a_budget_and_makes_the_page(tmp_path: Path) -> None:
    m, pages = model(), []
    log = tmp_path / "log.jsonl"
    tune(m, taught(m), watch=[reached], log=log, budget=0.0, page=pages.append, **SMALL)
    assert pages == [log]
    assert not [line for line in read_log(log) if line["monitor"] == "reached"]
    begun = read_log(log)[0]
    assert begun["budget"] == 0
    tune(m, taught(m), watch=[reached], log=log, budget=100.0, **SMALL)
    assert [line["step"] for line in read_log(log) if line["monitor"] == "reached"] == [0, 1, 2, 3]
    assert pages == [log]


def test_the_log_says_how_much_of_the_mask_stayed(tmp_path: Path) -> None:
    m = model()
    options: dict[str, Any] = {
        "refresh": 2,
        "lr": 0.1,
        "steps": 5,
        "log": tmp_path / "log",
        "watch": [every(5, reached)],
    }
    done = tune(m, taught(m), **(SMALL | options))
    lines = [line for line in read_log(tmp_path / "log") if "mask_overlap" in line]
    assert {line["step"]: line["mask_overlap"] for line in lines} == {r.step: r.overlap for r in done.refreshes}
    assert [line["monitor"] for line in lines] == ["training"] * 2
    assert all("loss" in line for line in lines)


# --- what is given back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lift", "full", "lora", "grpo"])
def test_steps_leave_no_tensors_behind(method: Any) -> None:
    alive: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step in (2, 6):
                gc.collect()
                alive.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))

    m = model()
    data: Any = taught(m)
    own: dict[str, Any] = {"terms": [Replay(data, batch_size=2)], "objective": kl_to_base, "batch_size": 4}
    if method == "grpo":
        data = [q.question for q in QUESTIONS[:4]]
        group = {"groups": 2, "samples": 2, "max_new_tokens": 4}
        own = {"reward": lambda question, transcript: float(sum(transcript.ids) % 17), "options": group}
    tune(m, data, method=method, steps=6, autocast=False, callbacks=[Count()], **own)
    assert alive[0] == alive[1]


@pytest.mark.parametrize("method", ["lift", "full", "lora"])
@pytest.mark.parametrize("failing", [False, True])
def test_what_is_borrowed_is_given_back(method: Any, failing: bool, tmp_path: Path) -> None:
    m = model()
    next(m.module.parameters()).requires_grad_(False)
    told, before = taught(m), belongings(m)
    ids = torch.tensor([told[0].ids])
    if failing:

        def fails(model: Model, step: int) -> dict[str, float]:
            if step == 2:
                raise KeyboardInterrupt  # a monitor's own errors do not end the training
            return {}

        with pytest.raises(KeyboardInterrupt):
            tune(m, told, method=method, watch=[every(1, fails)], log=tmp_path / "log", **SMALL)
    else:
        tune(m, told, method=method, **SMALL)
    after = belongings(m)
    for key, value in before.items():
        assert after[key] == value, key
    with torch.no_grad():
        assert m.module(input_ids=ids).logits.shape[-1] == m.anatomy.vocab


def test_a_module_that_had_a_forward_of_its_own_keeps_it() -> None:
    m = model()
    own = m.module.forward
    m.module.forward = own
    tune(m, taught(m), **(SMALL | {"steps": 1}))
    assert m.module.__dict__["forward"] == own


# --- interruption and resuming ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lift", "full", "lora"])
def whole(request: pytest.FixtureRequest) -> tuple[str, Model, Tuned]:
    options: dict[str, Any] = {"refresh": 2} if request.param == "lift" else {}
    m, done = run(method=request.param, steps=6, **options)
    return request.param, m, done


def interrupted(folder: Path, method: Any, **options: Any) -> Model:
    """A run of 6 steps with a checkpoint at 3, stopped in step 4 as by Ctrl-C."""

    def stop(model: Model, step: int) -> dict[str, float]:
        if step == 4:
            raise KeyboardInterrupt
        return {"reached": float(step)}

    m = model()
    watch = {"watch": [every(1, stop)], "log": folder / "log.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        tune(m, taught(m), method=method, checkpoints=folder, save_every=3, **(SMALL | {"steps": 6} | watch | options))
    return m


def test_an_interrupted_run_goes_on_bit_for_bit(whole: tuple[str, Model, Tuned], tmp_path: Path) -> None:
    method, expected, done = whole
    options: dict[str, Any] = {"refresh": 2} if method == "lift" else {}
    interrupted(tmp_path, method, **options)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    half = tmp_path / "checkpoint-5"  # as left by a kill while it was being written
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    m, again = model(), None
    torch.manual_seed(99)  # a fresh process has another random state
    again = tune(m, taught(m), method=method, checkpoints=tmp_path, save_every=3, **(SMALL | {"steps": 6} | options))
    assert same(m, expected)
    assert again.losses == done.losses
    assert again.gradient_norms == done.gradient_norms
    assert again.trainable == done.trainable
    assert again.refreshes == done.refreshes
    assert not half.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, "lift")
    for other in ({"lr": 5e-4}, {"seed": 1}, {"density": 0.1}, {"steps": 7}):
        m = model()
        with pytest.raises(ValueError, match=f"checkpoint of another run.*{next(iter(other))}"):
            tune(m, taught(m), checkpoints=tmp_path, save_every=3, **(SMALL | {"steps": 6} | other))
        assert not moved(m)
    m = model()
    with pytest.raises(ValueError, match=r"checkpoint of another run.*data"):
        tune(m, taught(m, 8), checkpoints=tmp_path, save_every=3, **(SMALL | {"steps": 6}))
    m = Model(*tiny("llama", seed=1))
    with pytest.raises(ValueError, match=r"checkpoint of another run.*start"):
        tune(m, taught(m), checkpoints=tmp_path, save_every=3, **(SMALL | {"steps": 6}))


def test_settings_that_come_in_pairs_are_those_that_were_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {"over": ("thinking", "answer"), "options": {"betas": (0.9, 0.95)}, "steps": 4}
    first, _ = run(checkpoints=tmp_path, save_every=2, **options)
    again, _ = run(checkpoints=tmp_path, save_every=2, **options)
    assert same(first, again)


@pytest.mark.parametrize(("family", "method"), [("mixtral", "full"), ("mixtral", "lift"), ("qwen2-moe", "lift")])
def test_a_family_that_is_converted_on_loading_goes_on_bit_for_bit(family: str, method: Any, tmp_path: Path) -> None:
    """Its experts are one tensor in memory and many in the hub's files: a checkpoint has to be found again."""
    options: dict[str, Any] = SMALL | {"method": method, "steps": 4, "lr": 1e-3}
    unbroken, m = model(family), model(family)
    tune(unbroken, taught(unbroken), **options)

    def stop(_: Model, step: int) -> dict[str, float]:
        if step == 3:
            raise KeyboardInterrupt
        return {"reached": float(step)}

    kept: dict[str, Any] = {"checkpoints": tmp_path, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        tune(m, taught(m), watch=[every(1, stop)], log=tmp_path / "log.jsonl", **options, **kept)
    m = model(family)
    tune(m, taught(m), **options, **kept)
    assert same(m, unbroken)
    assert not same(m, model(family))


def test_experts_in_one_tensor_take_no_adapter() -> None:
    for method in ("lora", "shira"):
        m = model("mixtral")
        with pytest.raises(
            ValueError,
            match=r"An adapter lies beside a layer, and the experts of this model are one tensor.*: use lift or full",
        ):
            tune(m, taught(m), **(SMALL | {"method": method}))


def test_checkpoints_of_others_are_never_removed(tmp_path: Path) -> None:
    """Those of a plain Trainer do not say that they are complete: they are not halves of ours."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    theirs = model()
    plain: dict[str, Any] = {"max_steps": 1, "save_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    data = Dataset.from_list([{"input_ids": list(t.ids), "labels": list(t.ids)} for t in taught(theirs, 1)])
    Trainer(theirs.module, TrainingArguments(str(tmp_path), **plain), train_dataset=data).train()
    (tmp_path / "checkpoint-best").mkdir()
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert tmp_path / "checkpoint-1" / "trainer_state.json" in kept
    with pytest.raises(ValueError, match=r"checkpoint-1, which is of no run that was begun here.*another folder"):
        run(checkpoints=tmp_path, save_every=2)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == kept


def test_the_latest_checkpoint_is_that_of_the_most_steps(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        mark_complete(tmp_path / f"checkpoint-{step}", {"seed": 0})
    assert last_complete(tmp_path, {"seed": 0}) == tmp_path / "checkpoint-100"


def test_halves_of_another_run_are_kept(tmp_path: Path) -> None:
    interrupted(tmp_path, "lift")
    half = tmp_path / "checkpoint-5"
    half.mkdir()
    with pytest.raises(ValueError, match=r"checkpoint of another run.*seed"):
        run(checkpoints=tmp_path, save_every=3, steps=6, seed=1)
    assert half.exists()
    shutil.rmtree(tmp_path / "checkpoint-3")  # now nothing but the half: it is the other run's still
    with pytest.raises(ValueError, match=r"checkpoint of another run.*seed"):
        run(checkpoints=tmp_path, save_every=3, steps=6, seed=1)
    assert half.exists()
    run(checkpoints=tmp_path, save_every=3, steps=6)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_folder_of_before_runs_were_marked_is_resumed_from(tmp_path: Path) -> None:
    whole, done = run(steps=4)
    run(checkpoints=tmp_path, save_every=2, steps=4)
    (tmp_path / "run.json").unlink()
    (tmp_path / "checkpoint-3").mkdir()
    m, again = run(checkpoints=tmp_path, save_every=2, steps=4)
    assert same(m, whole)
    assert again.losses == done.losses
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_lift_trains_every_matrix_of_a_mixture(family: str) -> None:
    m, start = model(family), model(family)
    done = tune(m, taught(m), refresh=2, **(SMALL | {"method": "lift"}))
    linear = linear_sites(m.weights)
    assert done.trainable == sum(budget(m.weights.shape(site), density=0.05) for site in linear)
    assert {s for s in m.weights if not torch.equal(m.weights[s], start.weights[s])} == set(linear)
    (refresh,) = done.refreshes
    assert set(refresh.by_parameter) == set(map(str, linear))


def test_lift_on_codes_of_a_quantised_model_points_to_the_overlay() -> None:
    for dtype in (torch.int8, torch.uint8):
        m = model()
        layer = m.module.get_submodule("model.layers.1.mlp.down_proj")
        layer.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        free = [p.requires_grad for p in m.module.parameters()]
        with pytest.raises(ValueError, match=rf"1\.mlp\.down is stored as {dtype}.*finetune\.overlay\.overlay_"):
            tune(m, taught(m), **SMALL)
        assert [p.requires_grad for p in m.module.parameters()] == free


def test_without_save_every_nothing_is_saved(tmp_path: Path) -> None:
    run(checkpoints=tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_that_had_finished_ends_the_same_again(steps: int, tmp_path: Path) -> None:
    first, done = run(steps=steps, schedule="constant", checkpoints=tmp_path, save_every=3)
    second, again = run(steps=steps, schedule="constant", checkpoints=tmp_path, save_every=3)
    assert same(first, second)
    assert again.losses == done.losses


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_library_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    own = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.1" if name == "trl" else own(name))
    with pytest.raises(ValueError, match=r"trl<2,>=1.14 is needed; here is trl 0.9.1. pip install 'trl"):
        run()


def test_a_launchers_precision_does_not_take_the_place_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    m = run(steps=1)[0]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert same(run(steps=1)[0], m)


def test_a_loss_that_is_not_finite_names_the_step() -> None:
    m = model()
    with torch.no_grad():
        m.module.get_input_embeddings().weight[5].fill_(float("nan"))
        m.module.get_input_embeddings().weight[:] += 0 * m.module.get_input_embeddings().weight[5, 0]
    with pytest.raises(FloatingPointError, match=r"nan at step 1.*weights of embed are not finite.*lr"):
        tune(m, taught(m), **SMALL)
    with pytest.raises(FloatingPointError, match=r"at step [2-9].*lr"):
        run(method="full", lr=1e30, steps=9, max_grad_norm=0.0)


def test_a_loss_that_is_not_finite_says_where_the_weights_are() -> None:
    m = model()
    with pytest.raises(FloatingPointError, match=r"nan at step 1, though all weights are finite"):
        tune(m, taught(m), objective=lambda p: nll(p) * float("nan"), **SMALL)


@pytest.mark.parametrize("method", ["lift", "full"])
def test_weights_that_overflow_are_never_the_last_good_checkpoint(method: Any, tmp_path: Path) -> None:
    m = model()

    def overflow(model: Model, step: int, optimizer: Any) -> dict[str, float]:
        if step == 4:
            with torch.no_grad():
                model.weights.parameter("1.mlp.down").fill_(3e38)
            for group in optimizer.param_groups:
                group["lr"] = 1e38
        return {}

    overflow.before_step = True  # type: ignore[attr-defined]
    with pytest.raises(
        FloatingPointError, match=r"weights of \S+ are not finite after step 4.*checkpoint is \S+checkpoint-2\."
    ):
        tune(
            m,
            taught(m),
            method=method,
            watch=[every(1, overflow)],
            log=tmp_path / "log",
            checkpoints=tmp_path,
            save_every=2,
            **(SMALL | {"steps": 6}),
        )
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_half_a_checkpoint_is_not_called_good(tmp_path: Path) -> None:
    def spoilt(p: Predictions) -> torch.Tensor:
        if (tmp_path / "checkpoint-2" / "complete.json").is_file():
            (tmp_path / "checkpoint-3").mkdir()  # as a kill leaves it
            return nll(p) * float("nan")
        return nll(p)

    with pytest.raises(FloatingPointError, match=r"last good checkpoint is \S+checkpoint-2\."):
        run(objective=spoilt, checkpoints=tmp_path, save_every=2, steps=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density.*1.5"),
        ({"density": -0.1}, "density"),
        ({"density": 0.1, "lora_rank": 2}, "exactly one"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"method": "lora", "lora_rank": 0}, "lora_rank"),
        ({"filter_rank": 0}, "rank"),
        ({"refresh": 0}, "refresh"),
        ({"method": "full", "density": 0.1}, "density.*full"),
        ({"method": "full", "lora_rank": 2}, "lora_rank"),
        ({"method": "full", "refresh": 2}, "refresh.*full"),
        ({"method": "full", "filter_rank": 3}, "filter_rank.*full"),
        ({"method": "lora", "select": "random"}, "select.*lora"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0.*0 does not clip"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"accumulate": 3}, "divisible"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"over": "thoughts"}, "'thoughts' is not a span.*completion"),
        ({"save_every": 2}, "checkpoints"),
        ({"save_every": 0, "checkpoints": "x"}, "save_every=0"),
        ({"watch": [every(1, lambda model, step: {})]}, "watch and log"),
        ({"log": "x"}, "watch and log"),
        ({"budget": 0.1}, "budget and page belong to watch"),
        ({"page": print}, "budget and page belong to watch"),
    ],
    ids=lambda v: "" if isinstance(v, str) else str(v)[:50],
)
def test_bad_settings_are_one_clear_error(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    m = model()
    for key in ("checkpoints", "log"):
        if key in options:
            options = options | {key: tmp_path / "x"}
    with pytest.raises(ValueError, match=message):
        tune(m, taught(m, 4), **(SMALL | options))
    assert not moved(m)
    assert not list(tmp_path.iterdir())


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(ValueError, match="no transcripts"):
        tune(model(), [], **SMALL)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_low_precision_weights_are_refused_where_steps_would_vanish(method: Any) -> None:
    m = model(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"fp32.*float32"):
        tune(m, taught(m), method=method, **SMALL)


def test_a_checkpoint_says_what_run_it_is_of(tmp_path: Path) -> None:
    _, done = run(checkpoints=tmp_path, save_every=2)
    saved = json.loads((tmp_path / "checkpoint-2" / "complete.json").read_text())
    assert saved == done.settings


# --- by rewards -------------------------------------------------------------------------------------------------------


def test_grpo_is_the_function_of_that_name() -> None:
    from finetune.grpo import Reinforced, grpo

    def reward(question: Any, transcript: Transcript) -> float:
        return float(sum(transcript.ids) % 17)

    asked = [q.question for q in QUESTIONS[:4]]
    small: dict[str, Any] = {"groups": 2, "samples": 2, "max_new_tokens": 4}
    through, direct = model(), model()
    done = tune(through, asked, method="grpo", reward=reward, steps=2, density=0.1, autocast=False, options=small)
    assert isinstance(done, Reinforced)
    assert done.method == "grpo"
    own = grpo(direct, asked, reward, steps=2, density=0.1, autocast=False, **small)
    assert same(through, direct)
    assert done.settings == own.settings
    for bad, message in (
        ({"batch_size": 8, "reward": reward, "method": "grpo"}, "batch_size has no use with method='grpo'"),
        ({"reward": reward}, "reward has no use with method='lift'"),
        ({"method": "grpo"}, "needs a reward"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(model(), asked, **bad)


def test_grpo_is_watched_and_held_back_and_takes_the_options_of_lift(tmp_path: Path) -> None:
    def reward(question: Any, transcript: Transcript) -> float:
        return float(sum(transcript.ids) % 17)

    steps: list[int] = []

    def spring(module: Any, step: int) -> torch.Tensor:
        steps.append(step)
        return sum(p.square().sum() for p in module.parameters())

    def tuned(**options: Any) -> Model:
        m, small = model(), {"groups": 2, "samples": 2, "max_new_tokens": 4}
        given: dict[str, Any] = {"method": "grpo", "reward": reward, "steps": 2, "autocast": False} | options
        tune(m, [q.question for q in QUESTIONS[:4]], **given | {"options": small | given.get("options", {})})
        return m

    plain, log = tuned(), tmp_path / "log"
    assert same(tuned(watch=[every(1, lambda model, step: {"twice": 2 * step}, "counted")], log=log), plain)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["twice"] for line in lines if line["monitor"] == "counted"] == [0, 2, 4]
    assert not same(tuned(terms=[spring]), plain)
    assert steps == [0, 1]
    for options in ({"select": "random"}, {"options": {"block": 4}}, {"options": {"scope": "global"}}):
        assert not same(tuned(**options), plain)
    for bad in ({"options": {"blocks": 4}}, {"options": {"lr": 1.0}}):
        with pytest.raises(ValueError, match=f"LIFT has no option '{next(iter(bad['options']))}'"):
            tuned(**bad)
        with pytest.raises(ValueError, match="LIFT has no option"):
            run(**bad)


def test_a_trainer_keeps_to_one_device() -> None:
    """Arguments as they are with two GPUs in sight: in one process, and in the second of two."""
    here = torch.device("cuda", 0)
    sight: Any = SimpleNamespace(device=torch.device("cuda", 0), n_gpu=2, _n_gpu=2, world_size=1)
    one_device(sight, here)
    assert sight._n_gpu == 1
    elsewhere: Any = SimpleNamespace(device=torch.device("cuda", 1), n_gpu=1, _n_gpu=1, world_size=1)
    with pytest.raises(ValueError, match="model is on cuda:0, and training happens on cuda:1"):
        one_device(elsewhere, here)
    elsewhere.world_size = 2
    one_device(elsewhere, here)  # each process carries its own


@pytest.mark.parametrize("there", ["cuda", "cpu"])
def test_a_launcher_that_asks_for_fsdp1_is_refused_before_training(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Any = SimpleNamespace(device=torch.device(there), n_gpu=1, _n_gpu=1, world_size=2)
    one_device(asked, torch.device(there))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP1.*FSDP2 .*torchrun \(DDP\)"):
        one_device(asked, torch.device(there))
    monkeypatch.setenv("FSDP_VERSION", "2")
    one_device(asked, torch.device(there))
