"""Objectives at work: each in tune() and in a plain Trainer, DFT and DPO beside TRL's own, and inputs with hidden tokens."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from analyses.tasks import chained_sums
from finetune.examples import Collate, Example, examples, rows_of
from finetune.hosts import Surgical
from finetune.objectives import Glow, MaskedThought, Objective, aft, asft, dft, dpo, kl_divergence, nll
from finetune.predictions import predict
from finetune.tune import tune
from surgery.model import Model
from surgery.transcript import Transcript
from tests.families import tiny
from tests.finetune.test_objectives import MADE

QUESTIONS = chained_sums(16, seed=5, terms=(2, 3))


def model() -> Model:
    return Model(*tiny("llama"))


def taught(m: Model, count: int = 8) -> list[Transcript]:
    return [m.transcript(q.question, q.completion(m.markers)) for q in QUESTIONS[:count]]


def pairs(m: Model, count: int = 4) -> list[list[Example]]:
    """Groups of a right answer and a shorter, wrong one."""
    found = []
    for q in QUESTIONS[:count]:
        right, wrong = (
            m.transcript(q.question, q.completion(m.markers)),
            m.transcript(q.question, "<think>so</think>no"),
        )
        group = []
        for t, positive in ((right, 1.0), (wrong, 0.0)):
            begin, end = t.spans["completion"]
            weights = tuple(float(begin <= i < end) for i in range(len(t.ids)))
            group.append(Example(t, weights, {"positive": positive}))
        found.append(group)
    return found


def batch(m: Model, count: int = 8) -> dict[str, Tensor]:
    return Collate(m.pad_id)(rows_of(examples(taught(m, count), "completion")))


# --- hidden tokens ------------------------------------------------------------------------------------------------------


def test_hidden_tokens_are_learnt_ones_at_the_rate_asked_for() -> None:
    m = model()
    b = batch(m, 16)
    kept = {name: value.clone() for name, value in b.items()}
    mask = MaskedThought(mask_id=3, rate=0.4, warmup=0.5)
    found = mask(b, 10, 20)
    changed = found["input_ids"] != b["input_ids"]
    learnt = b["labels"] != -100
    assert not (changed & ~learnt).any()
    assert (found["input_ids"][changed] == 3).all()
    count = int(learnt.sum())
    assert abs(float(changed.sum()) / count - 0.4) < 4 * math.sqrt(0.4 * 0.6 / count)
    assert all(torch.equal(found[name], b[name]) for name in b if name != "input_ids")
    assert all(torch.equal(kept[name], b[name]) for name in b)


def test_the_rate_rises_and_then_stays() -> None:
    mask = MaskedThought(3, rate=0.4, warmup=2 / 3)
    assert [mask.rate_at(step, 30) for step in (0, 5, 10, 20, 29)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert MaskedThought(3, warmup=0.0).rate_at(0, 30) == 0.4
    m = model()
    assert torch.equal(mask(batch(m), 0, 30)["input_ids"], batch(m)["input_ids"])


def test_what_is_hidden_depends_on_seed_step_and_sequence_alone() -> None:
    m = model()
    b, mask = batch(m), MaskedThought(3, warmup=0.0, seed=1)
    whole = mask(b, 7, 10)["input_ids"]
    for row in range(len(whole)):
        alone = mask({name: value[row : row + 1] for name, value in b.items()}, 7, 10)["input_ids"]
        assert torch.equal(alone[0], whole[row])
    for other in (mask(b, 8, 10), MaskedThought(3, warmup=0.0, seed=2)(b, 7, 10)):
        assert not torch.equal(other["input_ids"], whole)


# --- at work ------------------------------------------------------------------------------------------------------------

GROUPED = {"aft", "aft-boundary", "dpo", "dpo-per-token"}


def data(m: Model, name: str) -> Any:
    return pairs(m) if name in GROUPED else taught(m, 4)


def hosted(m: Model, of: Objective, rows: Any, **options: Any) -> tuple[list[float], Any]:
    """Losses of a short run in a plain transformers.Trainer."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    class Hosted(Surgical, Trainer):
        pass

    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "weight_decay": 0.0,
        "seed": 0, "data_seed": 0, "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "remove_unused_columns": False, "dataloader_pin_memory": False,
    } | options  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = Hosted(
            model=m.module,
            args=TrainingArguments(output_dir=folder, **settings),
            train_dataset=Dataset.from_list(rows_of(examples(rows))),
            data_collator=Collate(m.pad_id),
            objective=of,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize("name", MADE)
def test_each_works_in_tune_and_in_a_plain_trainer(name: str) -> None:
    """The first step's loss is that of the batch by hand; the run is the same in both, and moves the model."""
    m, other = model(), model()
    rows = data(m, name)
    start = {n: p.detach().clone() for n, p in m.module.named_parameters()}
    with torch.no_grad():
        b = Collate(m.pad_id)(rows_of(examples(rows)))
        p = predict(m.module, b)
        expected = float(MADE[name]()(replace(p, reference=lambda: p.logits)))
    done = tune(
        m, rows, method="full", objective=MADE[name](), lr=1e-3, steps=2, batch_size=4, accumulate=2, autocast=False
    )
    assert done.losses[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    losses, _ = hosted(other, MADE[name](), data(other, name))
    assert losses == pytest.approx(done.losses, rel=1e-4, abs=1e-6)
    for (n, a), c in zip(m.module.named_parameters(), other.module.parameters(), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4, msg=n)
    if name not in ("kl_to_base", "kl_from_base"):  # these have their minimum where they start
        assert any(not torch.equal(p, start[n]) for n, p in m.module.named_parameters())


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (nll + aft(), "Item 1 of the data: All of its 2 answers have positive = 0"),
        (dpo(), "Item 1 of the data: Its positive is 0, 0: dpo compares two answers"),
    ],
)
def test_groups_that_cannot_be_compared_end_a_run_before_it_begins(of: Objective, message: str) -> None:
    m = model()
    start = {n: p.detach().clone() for n, p in m.module.named_parameters()}
    groups = pairs(m)
    groups[1] = [replace(e, columns={"positive": 0.0}) for e in groups[1]]
    with pytest.raises(ValueError, match=message):
        tune(m, groups, objective=of, steps=1, batch_size=4, autocast=False)
    assert all(torch.equal(p, start[n]) for n, p in m.module.named_parameters())


def test_dft_says_which_share_of_the_tokens_is_improbable() -> None:
    m = model()
    told = [*taught(m, 2), *m.generate(["a?", "b?"], max_new_tokens=12)]  # what it says itself is likely
    data = [Example(t, tuple(0.5 * (i % 3) * (i >= t.spans["completion"][0]) for i in range(len(t.ids)))) for t in told]
    weights, improbable = [0.0] * 4, [0.0] * 4
    with torch.no_grad():
        for k, example in enumerate(data):
            chances = m.module(input_ids=torch.tensor([example.transcript.ids])).logits[0].softmax(-1)
            for i, w in enumerate(example.weights):
                weights[k] += w
                improbable[k] += w * bool(chances[i - 1, example.transcript.ids[i]] < 0.01)

    def share(some: Sequence[int]) -> float:
        return sum(improbable[k] for k in some) / sum(weights[k] for k in some)

    assert 0.1 < share(range(4)) < 0.9
    still: dict[str, Any] = {"steps": 2, "batch_size": 2, "accumulate": 2, "lr": 0.0, "autocast": False}
    done = tune(m, data, objective=asft(0.5), **still)
    halves = [(a, b, *{0, 1, 2, 3} - {a, b}) for a, b in combinations(range(4), 2)]  # whichever the first step had
    assert any(
        done.shares == {"improbable": [pytest.approx(share(h[:2])), pytest.approx(share(h[2:]))]} for h in halves
    )
    assert nll.shares == {}


def test_dft_is_trls() -> None:
    """Three steps of full tuning, against SFTTrainer with loss_type="dft" and nothing of ours in it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    ours, theirs = model(), model()
    done = tune(
        ours, taught(ours), method="full", objective=dft, lr=1e-3, steps=3, batch_size=4, accumulate=2, autocast=False
    )
    rows = []
    for t in taught(theirs):
        begin, _ = t.spans["completion"]
        rows.append({"input_ids": list(t.ids), "labels": [-100] * begin + list(t.ids[begin:])})
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=theirs.module,
            args=SFTConfig(
                output_dir=folder, loss_type="dft", max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                learning_rate=1e-3, weight_decay=0.0, seed=0, data_seed=0, bf16=False, use_cpu=True, logging_steps=1,
                save_strategy="no", report_to=[], disable_tqdm=True, max_length=None, remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False, dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
            processing_class=theirs.tokenizer,
        )  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert done.losses == pytest.approx(losses, rel=1e-4)
    for (name, a), b in zip(ours.module.named_parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("per_token", "kind"), [(False, "sigmoid"), (True, "sigmoid_norm")])
def test_dpo_is_trls(per_token: bool, kind: str) -> None:
    """Three steps of full tuning on pairs, against DPOTrainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    ours, theirs = model(), model()
    groups = pairs(ours, 8)
    done = tune(
        ours, groups, method="full", objective=dpo(0.2, per_token=per_token), lr=1e-3, steps=3, batch_size=4, accumulate=2,
        autocast=False,
    )  # fmt: skip
    rows = []
    for chosen, rejected in groups:
        begin = chosen.transcript.spans["completion"][0]
        ids = [list(e.transcript.ids) for e in (chosen, rejected)]
        rows.append({"prompt_ids": ids[0][:begin], "chosen_ids": ids[0][begin:], "rejected_ids": ids[1][begin:]})
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=theirs.module,
            args=DPOConfig(
                output_dir=folder, loss_type=[kind], beta=0.2, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                learning_rate=1e-3, weight_decay=0.0, seed=0, data_seed=0, bf16=False, use_cpu=True, logging_steps=1,
                save_strategy="no", report_to=[], disable_tqdm=True, max_length=None, gradient_checkpointing=False,
                dataloader_pin_memory=False,
            ),
            ref_model=model().module,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8),
            processing_class=theirs.tokenizer,
        )  # fmt: skip
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert done.losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert done.losses == pytest.approx(losses, rel=1e-3)
    for (name, a), b in zip(ours.module.named_parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


def kl_after(of: Objective) -> float:
    """KL(start || tuned) after a little tuning."""
    m, start = model(), model()
    tune(m, taught(m), method="full", objective=of, lr=1e-2, steps=8, batch_size=8, autocast=False)
    with torch.no_grad():
        now, then = predict(m.module, batch(m)), predict(start.module, batch(start))
    return float(kl_divergence(then.logits, now.logits).mean())


def test_an_anchor_holds_the_model_where_it_was() -> None:
    loose, anchored, tight = (kl_after(of) for of in (dft, asft(0.1), asft(100.0)))
    assert tight < anchored < loose  # not to nothing: the size of Adam's steps is not the gradient's


def test_hidden_tokens_change_training_and_only_through_the_input() -> None:
    m, plain, same = model(), model(), model()
    options: dict[str, Any] = {"method": "full", "steps": 2, "batch_size": 4, "autocast": False, "lr": 1e-3}
    hidden = tune(m, taught(m), corrupt=MaskedThought(mask_id=3, warmup=0.0), **options)
    without = tune(plain, taught(plain), **options)
    never = tune(same, taught(same), corrupt=MaskedThought(mask_id=3, rate=0.0), **options)
    assert never.losses == without.losses
    assert hidden.losses[0] != pytest.approx(without.losses[0], rel=1e-3)
    with torch.no_grad():
        whole = predict(model().module, MaskedThought(3, warmup=0.0)(batch(m), 0, 2))
    several = [tune(m := model(), taught(m), corrupt=MaskedThought(3, warmup=0.0), **(options | {"steps": 1, "batch_size": 8, "accumulate": k})) for k in (1, 4)]  # fmt: skip
    assert several[0].losses[0] == pytest.approx(float(nll(whole)), rel=1e-5)
    assert several[1].losses[0] == pytest.approx(several[0].losses[0], rel=1e-5)


def test_a_resumed_run_weighs_by_the_past_it_had(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 6, "batch_size": 4, "autocast": False, "method": "full", "lr": 1e-3}
    m = model()
    whole = tune(m, taught(m), objective=nll + Glow(), **options)  # two steps an epoch
    plain = tune(m := model(), taught(m), objective=2 * nll, **options)
    assert whole.losses != plain.losses

    class StopError(Exception):
        pass

    from transformers import TrainerCallback

    class Stopping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                raise StopError

    saved = options | {"checkpoints": tmp_path, "save_every": 3}
    with pytest.raises(StopError):
        tune(m := model(), taught(m), objective=nll + Glow(), callbacks=[Stopping()], **saved)
    again = tune(m := model(), taught(m), objective=nll + Glow(), **saved)
    assert again.losses == pytest.approx(whole.losses, rel=1e-6)


def test_a_run_begins_without_the_past_of_another() -> None:
    glow, sum_ = Glow(), nll + 0.5 * Glow()
    for of, fresh in ((glow, Glow()), (sum_, nll + 0.5 * Glow())):
        options: dict[str, Any] = {"objective": of, "steps": 3, "batch_size": 4, "autocast": False}
        tune(m := model(), taught(m), **options)
        again, alone = model(), model()
        tune(again, taught(again), **options)
        tune(alone, taught(alone), **options | {"objective": fresh})
        for one, other in zip(again.module.parameters(), alone.module.parameters(), strict=True):
            assert torch.equal(one, other)
    assert len(glow.before) == 8
