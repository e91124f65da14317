"""Examples, predictions and the mixin: what a batch is, what a step's loss is, and that any trainer can host it."""

from __future__ import annotations

import math
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor

from analyses.tasks import chained_sums
from finetune.distributed import _checksum, require_bare_gradients, require_whole_steps
from finetune.examples import Collate, Example, examples, rows_of
from finetune.hosts import Surgical
from finetune.lift import LIFT
from finetune.objectives import Glow, MaskedThought, aft, nll, objective
from finetune.predictions import Predictions, Totals, predict
from finetune.retention import EWC, Kickstarting, Replay, fisher_diagonal
from finetune.tune import tune
from surgery.model import Model
from surgery.transcript import Transcript
from tests.families import tiny

QUESTIONS = chained_sums(12, seed=5, terms=(2, 3))


def model(family: str = "llama") -> Model:
    return Model(*tiny(family))


def taught(m: Model, count: int = 12) -> list[Transcript]:
    return [m.transcript(q.question, q.completion(m.markers)) for q in QUESTIONS[:count]]


def batch(m: Model, data: Any, over: Any = "completion") -> dict[str, Tensor]:
    return Collate(m.pad_id)(rows_of(examples(data, over)))


def shake(m: Model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in m.module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def log_probabilities(m: Model, t: Transcript) -> Tensor:
    with torch.no_grad():
        return m.module(input_ids=torch.tensor([t.ids])).logits[0].float().log_softmax(-1)


# --- examples and batches -----------------------------------------------------------------------------------------------


def test_spans_weigh_tokens_and_the_last_that_names_one_decides() -> None:
    (t,) = taught(model(), 1)
    ((found,),) = examples([t], {"completion": 0.5, "answer": 0.25})
    begin, end = t.spans["answer"]
    for token, weight in enumerate(found.weights):
        inside = t.spans["completion"][0] <= token < t.spans["completion"][1]
        assert weight == (0.25 if begin <= token < end else 0.5 if inside else 0.0)
    ((first,),) = examples([t], "thinking[:2]")
    start = t.spans["thinking"][0]
    assert [i for i, w in enumerate(first.weights) if w] == [start, start + 1]


def test_a_batch_is_padded_numbered_and_grouped() -> None:
    m = model()
    a, b, c = taught(m, 3)
    lone = Example(c, (0.0, *(1.5,) * (len(c.ids) - 1)), {"positive": 0.0})
    pair = [Example(t, (1.0,) * len(t.ids), {"positive": p}) for t, p in ((a, 1.0), (b, 0.0))]
    found = batch(m, [pair, lone])
    assert found["sample"].tolist() == [0, 1, 2]
    assert found["group"].tolist() == [0, 0, 1]
    assert found["positive"].tolist() == [1.0, 0.0, 0.0]
    assert found["attention_mask"].sum(1).tolist() == [len(t.ids) for t in (a, b, c)]
    assert (found["labels"][:, 0] == -100).all()  # nothing comes before the first token
    assert torch.equal(found["labels"] != -100, found["token_weights"] != 0)
    whole, half = (Example(t, (0, *(w,) * (len(t.ids) - 1))) for t, w in ((a, 1), (b, 0.5)))
    mixed = Collate(m.pad_id)(rows_of([(whole,), (half,)]))
    assert mixed["token_weights"].dtype == torch.float32  # and a half is no whole number
    assert mixed["token_weights"].sum() == len(a.ids) - 1 + 0.5 * (len(b.ids) - 1)
    assert Totals.of(found) == Totals(len(a.ids) + len(b.ids) - 2 + 1.5 * (len(c.ids) - 1), 3.0, 2.0)


@pytest.mark.parametrize(
    ("data", "over", "message"),
    [
        (lambda t: [], "completion", "no transcripts"),
        (lambda t: [t], (), "over names no span"),
        (lambda t: [[t], []], "completion", "Group 1 of the data is empty"),
        (lambda t: [t], "/not in it/", "Transcript 0: None of the 1 transcripts"),
        (lambda t: [t], {"answer": 0.0}, "Item 0 of the data leaves no token with a loss"),
        (lambda t: [Example(t, (1.0,) * len(t.ids), {"x": 1.0}), t], "completion", "Item 1 of the data lacks the column 'x'"),
    ],
)  # fmt: skip
def test_what_leaves_nothing_to_learn(data: Any, over: Any, message: str) -> None:
    (t,) = taught(model(), 1)
    with pytest.raises((ValueError, TypeError), match=message):
        rows_of(examples(data(t), over))


@pytest.mark.parametrize("name", ["group", "sample", "labels", "input_ids", "attention_mask", "pixel_values"])
def test_a_column_cannot_take_the_name_of_a_batchs_own(name: str) -> None:
    (t,) = taught(model(), 1)
    with pytest.raises(
        ValueError, match=rf"column '{name}': that is one of the batch's own fields \(input_ids, .*group"
    ):
        rows_of(examples([Example(t, (1.0,) * len(t.ids), {name: 1.0})]))


def test_weights_must_fit() -> None:
    (t,) = taught(model(), 1)
    with pytest.raises(ValueError, match=r"1 weights for the \d+ tokens"):
        Example(t, (1.0,))
    with pytest.raises(ValueError, match="0 or more, got -1"):
        Example(t, (-1.0,) * len(t.ids))


# --- predictions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_predictions_are_the_models_own_row_by_row(family: str) -> None:
    m = model(family)
    told = taught(m, 3)
    with torch.no_grad():
        given = batch(m, told, {"thinking": 1.0, "answer": 3.0})
        more = {"grade": torch.tensor([2.0, 0.5, 1.0]), "token_type_ids": torch.zeros_like(given["input_ids"])}
        found = predict(m.module, given | more)
    assert set(found.columns) == {"grade"}  # a number a sequence, and not what another collator gives the tokens
    at = 0
    for row, t in enumerate(told):
        own = log_probabilities(m, t)
        for token in range(1, len(t.ids)):
            weight = next(
                (w for s, w in (("answer", 3.0), ("thinking", 1.0)) if t.spans[s][0] <= token < t.spans[s][1]), 0
            )
            if weight:
                assert (int(found.targets[at]), int(found.row[at]), float(found.weights[at])) == (
                    t.ids[token],
                    row,
                    weight,
                )
                torch.testing.assert_close(found.logits[at].log_softmax(-1), own[token - 1], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(-found.nll[at], own[token - 1, t.ids[token]], rtol=1e-4, atol=1e-4)
                at += 1
    assert at == len(found.targets)
    assert torch.equal(found.per_row(torch.ones(at)), torch.bincount(found.row).float())
    with torch.no_grad():  # what all rows begin with may reach into what is learnt, to the end
        one, alike = (predict(m.module, batch(m, told[:1] * count)) for count in (1, 2))
        torch.testing.assert_close(alike.nll, one.nll.repeat(2), rtol=1e-4, atol=1e-4)
        low = predict(m.module.bfloat16(), batch(m, told[:1]))
    assert low.raw.dtype == (torch.float32 if family == "gemma2" else torch.bfloat16)  # which caps its logits


def test_a_weighted_loss_by_hand() -> None:
    m = model()
    told = taught(m, 4)
    nats = total = 0.0
    for t in told:
        own = log_probabilities(m, t)
        for span, weight in (("thinking", 0.25), ("answer", 2.0)):
            for token in range(*t.spans[span]):
                nats -= weight * float(own[token - 1, t.ids[token]])
                total += weight
    done = tune(m, told, over={"thinking": 0.25, "answer": 2.0}, steps=1, batch_size=4, autocast=False)
    assert done.losses == [pytest.approx(nats / total, rel=1e-5)]


# --- the mixin ------------------------------------------------------------------------------------------------------------


def arguments(folder: str, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": folder, "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
        "weight_decay": 0.0, "seed": 0, "data_seed": 0, "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "remove_unused_columns": False, "dataloader_pin_memory": False, "logging_nan_inf_filter": False,
    } | options  # fmt: skip


def host_of(
    m: Model, data: Any, trl: bool, folder: str, *, lift: bool = False, eval_dataset: bool = False, objective: Any = nll,
    per_device_eval_batch_size: int = 8, **options: Any,
) -> Any:  # fmt: skip
    """A plain Trainer, or TRL's."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    Host, Arguments = (SFTTrainer, SFTConfig) if trl else (Trainer, TrainingArguments)
    more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "bf16": False} if trl else {}

    class Hosted(Surgical, Host):  # type: ignore[misc, valid-type]
        pass

    matrices = [(n, p) for n, p in m.module.named_parameters() if p.ndim == 2 and "proj" in n]
    rows = Dataset.from_list(rows_of(examples(data)))
    return Hosted(
        model=m.module,
        args=Arguments(**arguments(folder, per_device_eval_batch_size=per_device_eval_batch_size, **more)),
        train_dataset=rows,
        eval_dataset=rows if eval_dataset else None,
        data_collator=Collate(m.pad_id),
        processing_class=m.tokenizer,
        optimizers=(LIFT(matrices, lr=1e-3, density=0.1), None) if lift else (None, None),
        objective=objective,
        **options,
    )


def hosted(m: Model, data: Any, *, trl: bool = False, **options: Any) -> list[float]:
    """Losses of a short run in a plain Trainer, or in TRL's."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = host_of(m, data, trl, scratch, **options)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("trl", [False, True])
def test_a_plain_trainer_and_trls_give_what_tune_gives(trl: bool) -> None:
    ours, theirs = model(), model()
    done = tune(ours, taught(ours), method="full", lr=1e-3, steps=3, batch_size=4, accumulate=2, autocast=False)
    assert hosted(theirs, taught(theirs), trl=trl) == pytest.approx(done.losses, rel=1e-5)
    for (name, a), b in zip(ours.module.named_parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_lift_works_in_a_plain_trainer() -> None:
    m = model()
    start = {name: p.detach().clone() for name, p in m.module.named_parameters()}
    losses = hosted(m, taught(m), lift=True)
    assert len(losses) == 3
    for name, p in m.module.named_parameters():
        share = float((p != start[name]).float().mean())
        assert share <= 0.1 + 1e-6
        assert (share > 0) == (p.ndim == 2 and "proj" in name), name


STAGE_0 = {"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}


@pytest.mark.parametrize(
    ("config", "with_lift", "with_drift"),
    [
        *(({"zero_optimization": {"stage": n}}, rf"ZeRO stage {n} .*LIFT works on.*stage to 0", None) for n in (1, 2, 3)),
        ({"bf16": {"enabled": True}}, r"DeepSpeed's bf16 .* load the model with dtype='bfloat16'", r"bf16 at ZeRO stage 0 .*stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "ZeRO stage 2", None),
        ({"fp16": {"enabled": True}}, r"DeepSpeed's fp16 .* Turn fp16 off", "fp16 keeps scaled gradients.* bf16 or fp32"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"offload_optimizer .* Leave it out with LIFT",
            "offload_optimizer keeps gradients on the host.*Leave it out",
        ),
        ({"optimizer": {"type": "AdamW"}}, r"an optimizer of its own beside LIFT\. Leave optimizer out", None),
    ],
)  # fmt: skip
def test_deepspeed_is_refused_where_it_steps_on_pieces_or_copies(
    config: dict[str, Any], with_lift: str, with_drift: str | None
) -> None:
    for require in (require_whole_steps, require_bare_gradients):
        require({})  # no DeepSpeed
        require(STAGE_0)
    with pytest.raises(ValueError, match=with_lift):
        require_whole_steps(config)
    with pytest.raises(ValueError, match=with_drift) if with_drift else nullcontext():
        require_bare_gradients(config)


def test_lift_meets_deepspeed_in_a_trainer_that_knows_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    lift = LIFT([(n, p) for n, p in m.module.named_parameters() if "proj" in n], density=0.1)
    loss = m.module(**batch(m, taught(m, 2))).loss
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"DeepSpeed .* train nothing\. Put .*Surgical .* DDP .* or FSDP2"):
        loss.backward()
    lift.close()


def test_a_term_is_added_once_a_step_whatever_the_accumulation() -> None:
    seen: list[int] = []

    def term(module: torch.nn.Module, step: int) -> Tensor:
        seen.append(step)
        return 0.5 * sum(((p - 0.1) ** 2).sum() for p in module.parameters())

    found = {}
    for accumulate in (1, 2):
        m = model()
        tune(
            m,
            taught(m),
            method="full",
            steps=3,
            batch_size=4,
            accumulate=accumulate,
            terms=[term],
            lr=1e-3,
            autocast=False,
        )
        found[accumulate] = {name: p.detach() for name, p in m.module.named_parameters()}
    assert seen == [0, 1, 2] * 2
    for name, p in found[1].items():
        torch.testing.assert_close(p, found[2][name], rtol=1e-3, atol=1e-4)
    without = model()
    tune(without, taught(without), method="full", steps=3, batch_size=4, lr=1e-3, autocast=False)
    assert any(not torch.allclose(p, found[1][name], atol=1e-4) for name, p in without.module.named_parameters())


@pytest.mark.parametrize("said", [False, None], ids=["by the host's word", "as the model takes no count"])
def test_a_term_counts_once_where_the_host_divides_by_micro_batches(said: bool | None, tmp_path: Path) -> None:
    """As TRL's preference trainers do, and the Trainer with a model whose loss takes no count of tokens; the host's own loss is here nothing."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    breaks = False

    class Silent(Trainer):
        loss_is_scaled_for_ga = said

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Tensor:
            if breaks:
                raise KeyboardInterrupt
            return 0.0 * sum(p.sum() for p in model.parameters())

    class Host(Surgical, Silent):
        pass

    norms, seen = [], []

    def term(module: torch.nn.Module, step: int) -> Tensor:
        seen.append(step)
        return 1e-3 * sum((p**2).sum() for p in module.parameters())

    for accumulate in (1, 2):
        m = model()
        m.module.accepts_loss_kwargs = said is not None
        given = arguments(str(tmp_path / str(accumulate))) | {
            "gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate, "max_steps": 2
        }  # fmt: skip
        trainer = Host(
            model=m.module, args=TrainingArguments(**given), train_dataset=Dataset.from_list(rows_of(examples(taught(m)))),
            data_collator=Collate(m.pad_id), processing_class=m.tokenizer, terms=[term],
        )  # fmt: skip
        trainer.train()
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
        trainer.args.max_steps = 1
        breaks = True
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        breaks = False
        for _ in range(2):  # a step that was broken off, or was made before in another run, is begun anew
            trainer.train()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0][0] > 0
    assert seen == [0, 1, 0, 0] * 2


def test_an_evaluation_between_micro_batches_leaves_the_step_as_it_was(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    def term(module: torch.nn.Module, step: int) -> Tensor:
        return 1e-3 * sum((p**2).sum() for p in module.parameters())

    norms = []
    for looks in (False, True):
        m = model()
        trainer = host_of(
            m, taught(m, 5), False, str(tmp_path), eval_dataset=True, terms=[term], compute_metrics=lambda p: {"rows": len(p.predictions)}
        )  # fmt: skip

        class Looks(TrainerCallback):
            def on_substep_end(self, *_: Any, trainer: Any = trainer, **__: Any) -> None:
                trainer.evaluate()

        if looks:
            trainer.add_callback(Looks())
        trainer.train()
        assert any("eval_rows" in entry for entry in trainer.state.log_history) == looks
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_checksum_tells_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """By it processes find that their weights differ, also past the entries that are widened at once."""
    monkeypatch.setattr("finetune.distributed._PIECE", 4)
    assert len({int(_checksum(row)) for row in torch.eye(10, dtype=torch.bfloat16)}) == 10


@pytest.mark.parametrize("autocast", [True, False])
def test_terms_are_computed_in_the_precision_of_the_run(autocast: bool) -> None:
    m = model()
    seen: list[torch.dtype] = []
    hook = m.module.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    source = [Example(t, (1.0,) * len(t.ids)) for t in taught(m, 4)]

    def kept(module: torch.nn.Module, step: int) -> Tensor:
        seen.clear()
        found = Replay(source, batch_size=2)(module, step)
        assert set(seen) == {torch.bfloat16 if autocast else torch.float32}
        return found

    tune(m, taught(m), method="full", steps=2, batch_size=4, terms=[kept], autocast=autocast)
    assert seen
    hook.remove()


def test_answers_of_the_learner_leave_the_term_its_gradient() -> None:
    """They are generated without gradients: casts of the weights made then may not serve the pass that has them."""
    norms = {}
    for autocast in (True, False):
        m, start = model(), model()
        shake(start)
        term = Kickstarting(
            m, start, [q.question for q in QUESTIONS[:2]], batch_size=2, max_new_tokens=6, temperature=1e-3
        )
        done = tune(
            m, taught(m), method="full", steps=1, batch_size=4, objective=objective(lambda p: 0 * nll(p), name="nothing"), terms=[term],
            autocast=autocast, max_grad_norm=0.0,
        )  # fmt: skip
        norms[autocast] = done.gradient_norms[0]
    assert norms[False] > 0
    assert norms[True] == pytest.approx(norms[False], rel=0.2)


def test_what_keeps_the_weights_is_added_up_in_full_precision() -> None:
    m = model()
    fisher = fisher_diagonal(m, taught(m, 4))
    found: list[float] = []
    term = EWC(fisher, weight=3.0)

    def kept(module: torch.nn.Module, step: int) -> Tensor:
        found.append(float(term(module, step)))
        return term(module, step)

    states = []

    def look(p: Predictions) -> Tensor:
        states.append({n: w.detach().clone() for n, w in m.module.named_parameters()})
        return nll(p)

    tune(m, taught(m), method="full", steps=3, batch_size=4, terms=[kept], objective=look, lr=1e-3, autocast=True)
    for value, weights in zip(found, states, strict=True):
        own = sum(
            float((f.double() * (weights[n].double() - fisher.start[n].double()).square()).sum())
            for n, f in fisher.diagonal.items()
        )
        assert value == pytest.approx(1.5 * own, rel=1e-5)
    assert found[-1] > 0


@pytest.mark.parametrize("measured", [False, True], ids=["the loss alone", "with metrics of its own"])
@pytest.mark.parametrize("trl", [False, True])
def test_the_loss_of_an_evaluation_is_the_objective(trl: bool, measured: bool, tmp_path: Path) -> None:
    m = model()
    told = taught(m, 4)
    data = [Example(t, tuple(0.5 if i % 2 else 2.0 for i in range(len(t.ids)))) for t in told]

    def doubled(p: Predictions) -> Tensor:
        return 2 * nll(p)

    with torch.no_grad():
        expected = float(doubled(predict(m.module, batch(m, data))))
    more: dict[str, Any] = {"compute_metrics": lambda p: {"rows": len(p.predictions)}} if measured else {}
    trainer = host_of(
        m, data, trl, str(tmp_path), objective=doubled, eval_dataset=True, per_device_eval_batch_size=4, corrupt=MaskedThought(m.pad_id, 1, 0), **more
    )  # fmt: skip
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert not measured or found["eval_rows"] == 4


@pytest.mark.parametrize("kind", ["tokens", "groups"])
def test_the_loss_of_an_evaluation_is_that_of_all_its_data_however_it_is_batched(kind: str, tmp_path: Path) -> None:
    m = model()
    told = taught(m, 10)
    nats, tokens, scores = 0.0, 0, []
    for t in told:
        own, begin = log_probabilities(m, t), t.spans["completion"][0]
        mine = [-float(own[k - 1, t.ids[k]]) for k in range(begin, len(t.ids))]
        nats, tokens = nats + sum(mine), tokens + len(mine)
        scores.append(-sum(mine) / len(mine))
    expected, data, loss = nats / tokens, told, nll
    if kind == "groups":
        pairs = [examples([a, b]) for a, b in zip(told[::2], told[1::2], strict=True)]
        data = [[replace(e, columns={"positive": 1.0 - i}) for i, (e,) in enumerate(pair)] for pair in pairs]
        gaps = [worse - better for better, worse in zip(scores[::2], scores[1::2], strict=True)]
        expected = sum(math.log1p(math.exp(gap)) for gap in gaps) / 5 + nats / tokens
        loss = nll + aft(likelihood=0.0)
    found = {}
    for size in (1, 2, 3, 8):
        trainer = host_of(
            m, data, False, str(tmp_path), objective=loss, eval_dataset=True, per_device_eval_batch_size=size,
            compute_metrics=None if size < 8 else lambda p: {"rows": 0},
        )  # fmt: skip
        found[size] = trainer.evaluate()["eval_loss"]
    assert found == {size: pytest.approx(expected, rel=1e-5) for size in found}


@pytest.mark.parametrize("method", ["lift", "full", "lora"])
def test_the_reference_is_the_starting_model_at_every_step(method: Any) -> None:
    m = model()
    told = taught(m, 4)
    with torch.no_grad():
        start = predict(m.module, batch(m, told)).nll
    means: list[float] = []

    def watched(p: Predictions) -> Tensor:
        assert p.reference is not None
        assert not p.reference().requires_grad
        means.append(float(torch.nn.functional.cross_entropy(p.reference(), p.targets)))
        return nll(p)

    def hidden(found: dict[str, Tensor], step: int, steps: int) -> dict[str, Tensor]:
        return found | {"input_ids": torch.where(found["labels"] != -100, m.pad_id, found["input_ids"])}

    watched.reference = True  # type: ignore[attr-defined]
    done = tune(
        m, told, method=method, objective=watched, corrupt=hidden, steps=3, batch_size=4, lr=1e-2, autocast=False
    )
    assert means == [pytest.approx(float(start.mean()), rel=1e-4)] * 3
    assert done.losses[-1] < done.losses[0]


def test_inputs_may_be_corrupted_and_labels_stay() -> None:
    m = model()
    calls: list[tuple[int, int]] = []

    def swap(found: dict[str, Tensor], step: int, steps: int) -> dict[str, Tensor]:
        calls.append((step, steps))
        return found | {"input_ids": torch.where(found["labels"] != -100, m.pad_id, found["input_ids"])}

    losses = tune(m, taught(m), corrupt=swap, steps=2, batch_size=4, lr=0.0, autocast=False).losses
    assert calls == [(0, 2), (1, 2)]
    plain = model()
    assert losses != tune(plain, taught(plain), steps=2, batch_size=4, lr=0.0, autocast=False).losses


def test_an_objective_says_what_the_data_must_have() -> None:
    m = model()

    def compares(p: Predictions) -> Tensor:
        return nll(p)

    compares.grouped = True  # type: ignore[attr-defined]
    compares.columns = ("positive",)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="compares needs the column 'positive'"):
        tune(m, taught(m), objective=compares)
    lone = [Example(t, (1.0,) * len(t.ids), {"positive": 1.0}) for t in taught(m)]
    with pytest.raises(ValueError, match="compares the members of a group, but 12 of the 12 items are alone"):
        tune(m, lone, objective=compares)
    with pytest.raises(ValueError, match="need an objective"):
        hosted(m, taught(m), objective=None, corrupt=lambda b, s, n: b)


class Counting:
    """An objective with a memory: how many micro-batches it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, p: Predictions) -> Tensor:
        self.seen += 1
        return nll(p) * self.seen

    def __repr__(self) -> str:
        return "Counting()"

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_what_an_objective_remembers_survives_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "batch_size": 4, "autocast": False}
    whole = tune(m := model(), taught(m), objective=Counting(), **options)

    def stop(module: torch.nn.Module, step: int) -> Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return torch.zeros(())

    stop.__name__ = "nothing"
    saved: dict[str, Any] = {"checkpoints": tmp_path, "save_every": 2, **options}
    with pytest.raises(KeyboardInterrupt):
        tune(m := model(), taught(m), objective=Counting(), terms=[stop], **saved)

    def nothing(module: torch.nn.Module, step: int) -> Tensor:
        return torch.zeros(())

    again = tune(m := model(), taught(m), objective=Counting(), terms=[nothing], **saved)
    assert again.losses == pytest.approx(whole.losses, rel=1e-6)
    with pytest.raises(ValueError, match=r"another run \(objective was 'Counting\(\)', now 'nll'"):
        tune(m := model(), taught(m), terms=[nothing], **saved)


@pytest.mark.parametrize("method", ["lift", "full"])
def test_a_gradient_that_is_not_finite_names_step_and_parameter(method: Any, tmp_path: Path) -> None:
    m = model()

    def term(module: torch.nn.Module, step: int) -> Tensor:
        weight = m.weights.parameter("1.mlp.down")
        return (weight * 0).sqrt().sum() if step == 2 else torch.zeros(())  # finite, with a gradient of 0 * inf

    with pytest.raises(
        FloatingPointError, match=r"gradient of 1\.mlp\.down is not finite at step 3.*good checkpoint is .*checkpoint-2"
    ):
        tune(
            m,
            taught(m),
            method=method,
            terms=[term],
            steps=4,
            batch_size=4,
            checkpoints=tmp_path,
            save_every=2,
            autocast=False,
        )


# --- a trainer's own data and settings --------------------------------------------------------------------------------------


def plain(m: Model, folder: Path, *, trl: bool = False, rows: Any = None, settings: Any = None, **options: Any) -> Any:
    """A host with other data, another collator or other settings than ours."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    class Hosted(Surgical, SFTTrainer if trl else Trainer):  # type: ignore[misc]
        pass

    Arguments = SFTConfig if trl else TrainingArguments
    own = {} if rows is not None else {"data_collator": Collate(m.pad_id)}
    given: Any = {"objective": nll, "processing_class": m.tokenizer, **own, **options}
    data = Dataset.from_list(rows or rows_of(examples(taught(m))))
    args = Arguments(**arguments(str(folder), **({"bf16": False} if trl else {}), **(settings or {})))
    return Hosted(model=given.pop("model", m.module), args=args, train_dataset=data, **given)


def told_plainly(count: int = 8) -> list[dict[str, str]]:
    return [{"prompt": q.question, "completion": f" {q.answer}"} for q in QUESTIONS[:count]]


def test_noise_on_the_embeddings_is_drawn_for_whole_rows(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    seen: list[Tensor] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            def look(embed: Any, given: Any, found: Tensor) -> None:
                seen.append(found.detach() - torch.nn.functional.embedding(given[0], embed.weight.detach()))

            model.get_input_embeddings().register_forward_hook(look)

    m = model()
    settings = {"neftune_noise_alpha": 5.0, "max_steps": 1}
    plain(m, tmp_path, settings=settings, callbacks=[Look()]).train()
    assert len(seen) == 2  # micro-batches
    for noise in seen:
        rows, tokens, width = noise.shape
        bound = 5 / (tokens * width) ** 0.5
        assert rows == 2
        assert 0.99 * bound < float(noise.abs().max()) <= bound * 1.001
        assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("beside", ["weights", "what the adapter took", "an adapter that knows something"])
def test_the_reference_is_the_start_where_that_is_not_the_model_without_its_adapter(
    beside: str, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    m = model()
    began: Any = {"what the adapter took": "pissa", "an adapter that knows something": False}.get(beside, True)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=began)
    wrapped: Any = get_peft_model(m.module, config)  # type: ignore[arg-type]
    trained = [(n, p) for n, p in wrapped.named_parameters() if "down_proj" in n] if beside == "weights" else []
    for _, p in trained:
        p.requires_grad_(True)
    data = taught(m, 4)
    with torch.no_grad():
        start = float(predict(m.module, batch(m, data)).nll.mean())
    means: list[float] = []

    @objective(reference=True)
    def watched(p: Predictions) -> Tensor:
        assert p.reference is not None
        means.append(float(torch.nn.functional.cross_entropy(p.reference(), p.targets)))
        return nll(p)

    plain(
        m,
        tmp_path,
        model=wrapped,
        objective=watched,
        rows=rows_of(examples(data)),
        data_collator=Collate(m.pad_id),
        optimizers=(LIFT(trained, lr=1e-2, density=0.5) if trained else None, None),
        settings={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    ).train()
    assert means == [pytest.approx(start, rel=1e-5)] * 3


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "LoraConfig"])
def test_an_objective_refuses_adapters_that_read_the_whole_text(kind: str, tmp_path: Path) -> None:
    import peft

    own: Any = (
        {"num_virtual_tokens": 4}
        if kind[0] == "P"
        else {"r": 2, "alora_invocation_tokens": [5, 6], "target_modules": ["q_proj"]}
    )
    with pytest.raises(ValueError, match=rf"{kind}.* beside layers.*Leave objective and terms out"):
        plain(
            model(),
            tmp_path,
            trl=True,
            rows=told_plainly(),
            peft_config=getattr(peft, kind)(task_type="CAUSAL_LM", **own),
        )


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def trainer(steps: int, **own: Any) -> Any:
        m = model()
        config = LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | own))
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1}
        return plain(m, tmp_path, model=get_peft_model(m.module, config), settings=settings)  # type: ignore[arg-type]

    trainer(1).train()
    half = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"checkpoint-1 .*target_modules was \['q_proj'\], now \['v_proj'\]"):
        trainer(2, target_modules=["v_proj"]).train(resume_from_checkpoint=half)
    with pytest.raises(ValueError, match=r"checkpoint-1 .*lora_alpha was 8, now 2\D"):
        trainer(2, lora_alpha=2).train(resume_from_checkpoint=half)
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=half)
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("what", ["glow", "masked thought"])
def test_what_knows_sequences_again_needs_their_numbers(what: str, tmp_path: Path) -> None:
    m = model()
    options: Any = {"objective": Glow()} if what == "glow" else {"corrupt": MaskedThought(m.pad_id)}
    with pytest.raises(ValueError, match=r"number in the data.*'sample'.*rows_of and Collate"):
        plain(m, tmp_path, trl=True, rows=told_plainly(), **options).train()


def test_an_evaluation_by_glow_knows_nothing_of_the_training_sequences(tmp_path: Path) -> None:
    from datasets import Dataset

    m = model()
    data, others = taught(m)[:4], taught(m)[6:10]  # numbered from 0, both
    trainer = plain(
        m,
        tmp_path,
        rows=rows_of(examples(data)),
        data_collator=Collate(m.pad_id),
        eval_dataset=Dataset.from_list(rows_of(examples(others))),
        objective=Glow(),
        settings={"max_steps": 4, "learning_rate": 1e-2},
    )
    trainer.train()
    means = []
    for t in others:
        own, begin = log_probabilities(m, t), t.spans["completion"][0]
        means.append(-sum(float(own[k - 1, t.ids[k]]) for k in range(begin, len(t.ids))) / (len(t.ids) - begin))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(means) / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"packing": True, "max_length": 64}, r"several texts in one row.*packing=False.*padding_free=False"),
        ({"padding_free": True, "max_length": None}, r"several texts in one row"),
    ],
)
def test_an_objective_refuses_packed_rows(settings: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        plain(model(), tmp_path, trl=True, rows=told_plainly(), settings=settings).train()


def test_a_length_that_cuts_no_row_is_refused(tmp_path: Path) -> None:
    """TRL's own default is nobody's wish, and rows that are no longer are as they were asked for."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Hosted(Surgical, SFTTrainer):
        pass

    m = model()
    data = taught(m)
    longest = max(len(t.ids) for t in data)

    def made(data: Any, **settings: Any) -> Any:
        args = SFTConfig(
            **arguments(str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, bf16=False, **settings)
        )
        rows = Dataset.from_list(rows_of(examples(data)))
        given = {"data_collator": Collate(m.pad_id), "processing_class": m.tokenizer, "objective": nll}
        return Hosted(model=m.module, args=args, train_dataset=rows, **given)

    with pytest.raises(
        ValueError, match=rf"max_length={longest - 1} .* has {longest} tokens.*recipes.cut.*max_length=None"
    ):
        made(data, max_length=longest - 1)
    made(data, max_length=longest)
    made(data, max_length=None)
    endless = replace(data[0], ids=(*data[0].ids, *[5] * 1100))
    made([Example(endless, (0.0, 1.0, *[0.0] * (len(endless.ids) - 2)))])


def test_an_objective_refuses_rows_padded_on_the_left(tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq

    m = model("gpt2")
    m.tokenizer.padding_side = "left"
    rows = [{"input_ids": list(t.ids), "labels": list(t.ids)} for t in taught(m)]
    collator = DataCollatorForSeq2Seq(m.tokenizer)
    with pytest.raises(ValueError, match=r"padded on the left.*padding_side = 'right'"):
        plain(m, tmp_path, rows=rows, data_collator=collator).train()


def test_an_objective_needs_labels(tmp_path: Path) -> None:
    m = model()
    rows = [{"input_ids": list(t.ids)} for t in taught(m)]
    with pytest.raises(ValueError, match=r"no labels.*attention_mask, input_ids.*Leave objective out"):
        plain(m, tmp_path, rows=rows, data_collator=lambda r: dict(m.tokenizer.pad(r, return_tensors="pt"))).train()


def test_a_step_without_a_token_to_learn_is_named(tmp_path: Path) -> None:
    m = model()
    trainer = host_of(m, taught(m, 4), False, str(tmp_path))
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: (b := collate(rows)) | {"labels": torch.full_like(b["labels"], -100)}
    with pytest.raises(ValueError, match=r"Step 1 has no token to learn: .* Leave such rows out"):
        trainer.train()


def test_columns_that_a_trainer_drops_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lack 'token_weights'.*remove_unused_columns=False"):
        plain(model(), tmp_path, settings={"remove_unused_columns": True}).train()


@pytest.mark.parametrize("what", ["label_smoothing_factor", "compute_loss_func", "loss_type", "router_aux_loss_coef"])
def test_a_loss_that_the_objective_would_replace_is_refused(what: str, tmp_path: Path) -> None:
    m = model("mixtral" if what == "router_aux_loss_coef" else "llama")
    if what == "router_aux_loss_coef":
        m.module.config.output_router_logits = True
    own: Any = {"compute_loss_func": lambda *_, **__: 0.0} if what == "compute_loss_func" else {}
    settings: Any = {"label_smoothing_factor": 0.1} if what == "label_smoothing_factor" else {}
    if what == "loss_type":
        settings = {"loss_type": "dft"}
    with pytest.raises(ValueError, match=rf"{what} .*objective"):
        plain(m, tmp_path, trl=what == "loss_type", rows=told_plainly(), settings=settings, **own)


def test_rows_of_like_length_go_together(tmp_path: Path) -> None:
    m = model()
    rows = rows_of(examples([(t, taught(m)[0]) for t in taught(m)]))
    assert [row["length"] for row in rows] == [max(len(i) for i in row["input_ids"]) for row in rows]
    trainer = plain(
        m, tmp_path, rows=rows, data_collator=Collate(m.pad_id), settings={"train_sampling_strategy": "group_by_length"}
    )
    sampler = trainer._get_train_sampler()
    assert sampler.lengths == [row["length"] for row in rows]


def test_lift_and_a_scaler_of_the_loss_are_refused_together(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    class Scaling(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu")  # as fp16 has on an accelerator

    class Hosted(Surgical, Scaling):
        pass

    m = model()
    rows = Dataset.from_list(rows_of(examples(taught(m))))
    lift = LIFT([(n, p) for n, p in m.module.named_parameters() if "proj" in n], density=0.1)
    args = TrainingArguments(**arguments(str(tmp_path)))
    with pytest.raises(ValueError, match=r"fp16 .* bf16=True"):
        Hosted(
            m.module, args, train_dataset=rows, data_collator=Collate(m.pad_id), objective=nll, optimizers=(lift, None)
        )
