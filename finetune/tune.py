"""`tune` puts an optimizer, an objective and monitors into TRL's SFTTrainer. No trainer of our own.

What is borrowed is given back, after an error too: the module's forward and settings, its training mode, ``requires_grad``, its hooks and
the random state are afterwards as before; only the weights have changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from finetune.examples import Collate, Item, Over, examples, rows_of
from finetune.hosts import Corruption, Surgical, Term
from finetune.lift import LIFT, Select, budget
from finetune.objectives import Objective, nll
from surgery.model import Model
from surgery.weights import linear_sites

Method = Literal["lift", "full", "lora"]
LEARNING_RATES: dict[Method, float] = {"lift": 1e-3, "full": 1e-4, "lora": 1e-3}
_COMPLETE = "complete.json"


@dataclass(frozen=True)
class Tuned:
    """What a run did. losses: training loss of every optimizer step. trainable: how many numbers were free to move.

    refreshes: for LIFT with a refresh interval, the mask overlap at each refresh (of a resumed run: since then). seconds: the training loop's own time.
    """

    method: Method
    steps: int
    losses: list[float]
    gradient_norms: list[float]
    trainable: int
    seconds: float
    settings: dict[str, Any]
    refreshes: list[Any] = field(default_factory=list)


def tune(
    model: Model,
    data: Sequence[Item | Sequence[Item]],
    *,
    method: Method = "lift",
    steps: int = 60,
    lr: float | None = None,
    batch_size: int = 16,
    accumulate: int = 1,
    density: float | None = None,
    lora_rank: int | None = None,
    filter_rank: int = 16,
    refresh: int | None = None,
    select: Select = "largest",
    weight_decay: float = 0.0,
    schedule: str = "linear",
    warmup: int = 0,
    max_grad_norm: float = 1.0,
    over: Over = "completion",
    objective: Objective = nll,
    corrupt: Corruption | None = None,
    terms: Sequence[Term] = (),
    callbacks: Sequence[Any] = (),
    autocast: bool = True,
    seed: int = 0,
    watch: Sequence[Any] = (),
    log: str | Path | None = None,
    checkpoints: str | Path | None = None,
    save_every: int | None = None,
    progress: bool = False,
) -> Tuned:
    """Fine-tune a model on transcripts, in place.

    method:      ``lift`` trains the principal entries of every attention and MLP matrix; ``full`` all parameters with AdamW; ``lora`` a
                 PEFT adapter on the same matrices, merged into them at the end.
    steps:       optimizer steps. batch_size: transcripts a step, in `accumulate` micro-batches.
    lr:          peak learning rate; by default 1e-3 for lift and lora, 1e-4 for full, which suit the specimen (its weights are large).
    density:     lift's budget, fraction of each matrix in (0, 1], default 0.05; or lora_rank: a LoRA's count of parameters (for
                 ``lora`` itself its rank, default 16).
    filter_rank, refresh, select: see `LIFT`. weight_decay: decoupled. schedule, warmup: of the learning rate, transformers' names.
    max_grad_norm: gradients are clipped to this joint norm; 0 does not clip.
    data:        transcripts, or examples with weights of their own, or groups of them for an objective that compares (see
                 `finetune.examples`). batch_size counts these.
    over:        the span whose tokens have a loss, several, or {span: weight}; examples know it themselves.
    objective:   what is minimised, a function of `Predictions` (see `finetune.objectives`). corrupt: changes inputs before the model sees
                 them. terms: further losses, added once a step. callbacks: of the trainer, such as `DRIFT`.
    autocast:    compute in bf16 with the weights as they are.
    watch, log:  `every(n, monitor)` watches, and the file their lines go to.
    checkpoints, save_every: where to save, and how often, to be able to resume; a folder with a complete checkpoint is resumed from,
                 bit for bit. Incomplete ones, left by a kill, are discarded.

    Raises ValueError for settings out of range, for transcripts without the span, and for full or lora tuning of weights that are not
    fp32 (their steps would vanish in rounding: load with dtype="float32"); FloatingPointError when the loss is not finite, naming the step.
    """
    _check(method, steps, batch_size, accumulate, save_every, checkpoints, watch, log)
    _check_budget(method, density, lora_rank, filter_rank, refresh, select)
    if method != "lift" and any(p.dtype != torch.float32 for p in model.module.parameters()):
        raise ValueError(
            f"{method} tuning needs fp32 weights, or its steps vanish in rounding. Load the model with dtype='float32'."
        )
    peak = LEARNING_RATES[method] if lr is None else lr
    settings = {
        "method": method, "steps": steps, "lr": peak, "batch_size": batch_size, "accumulate": accumulate, "density": density,
        "lora_rank": lora_rank, "filter_rank": filter_rank, "refresh": refresh, "select": select, "weight_decay": weight_decay,
        "schedule": schedule, "warmup": warmup, "max_grad_norm": max_grad_norm, "over": over, "autocast": autocast, "seed": seed,
        "objective": _named(objective), "corrupt": corrupt and _named(corrupt), "terms": [_named(t) for t in terms],
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }  # fmt: skip
    rows = rows_of(examples(data, over))
    _check_columns(objective, rows)
    settings["data"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer

    sparse = {"density": 0.05 if density is None and lora_rank is None else density, "lora_rank": lora_rank}

    class Trainer(Surgical, SFTTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if self.state.global_step >= steps:
                return  # nothing is left to resume, and resuming there would take one step more
            super()._save_checkpoint(*args, **kwargs)
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            part = folder / f".{_COMPLETE}.partial"
            part.write_text(json.dumps(settings), encoding="utf-8")
            part.replace(folder / _COMPLETE)

    with ExitStack() as borrowed:
        module = borrowed.enter_context(_as_before(model.module))
        chosen = _choose(model, method)
        folder = Path(checkpoints) if checkpoints else Path(borrowed.enter_context(tempfile.TemporaryDirectory()))
        resume = _last_complete(folder, settings)
        args = SFTConfig(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size // accumulate,
            gradient_accumulation_steps=accumulate, learning_rate=peak, lr_scheduler_type=schedule, warmup_steps=warmup,
            weight_decay=weight_decay, max_grad_norm=max_grad_norm, seed=seed, data_seed=seed, bf16=autocast,
            use_cpu=model.device.type == "cpu", activation_checkpointing=False, logging_steps=1, logging_nan_inf_filter=False,
            save_strategy="steps" if save_every else "no", save_steps=save_every or steps, save_total_limit=2, report_to=[],
            disable_tqdm=not progress, remove_unused_columns=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_pin_memory=model.device.type == "cuda",
        )  # fmt: skip
        learner: Any = module
        lift: Any = None
        if method == "lift":
            lift = borrowed.enter_context(
                LIFT(
                    chosen, lr=peak, **sparse, filter_rank=filter_rank, refresh=refresh, select=select,
                    weight_decay=weight_decay, seed=seed,
                )
            )  # fmt: skip
        if method == "lora":
            torch.manual_seed(seed)  # an adapter begins at random
            learner = _with_adapter(module, model, lora_rank or 16)
            borrowed.callback(learner.unload)  # after a merge there is nothing left to unload
        trainer = Trainer(
            model=learner,
            args=args,
            train_dataset=_dataset(rows),
            data_collator=Collate(model.pad_id),
            processing_class=model.tokenizer,
            optimizers=(lift, None),
            callbacks=list(callbacks),
            objective=objective,
            corrupt=corrupt,
            terms=terms,
        )
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(_bar())
        if watch and log:
            from finetune.monitors import Recorder

            trainer.add_callback(Recorder(model, watch, log))
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        trainable = (
            sum(len(state["indices"]) for state in lift.state.values())
            if lift
            else sum(p.numel() for p in learner.parameters() if p.requires_grad)
        )
        if method == "lora":
            learner.merge_and_unload()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        seconds = next(
            (e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e), float("nan")
        )
    return Tuned(
        method,
        trainer.state.global_step,
        [e["loss"] for e in history],
        [float(e["grad_norm"]) for e in history],
        trainable,
        seconds,
        settings,
        list(lift.refreshes) if lift else [],
    )


def _check(
    method: str, steps: int, batch_size: int, accumulate: int, save_every: int | None, checkpoints: object, watch: Sequence[Any],
    log: object,
) -> None:  # fmt: skip
    if method not in get_args(Method):
        raise ValueError(f"There is no method {method!r}. Choose {', '.join(get_args(Method))}.")
    if steps < 1 or batch_size < 1 or accumulate < 1 or batch_size % accumulate:
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}, accumulate={accumulate}: all at least 1, and the batch divisible by accumulate."
        )
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every={save_every}: a checkpoint every 1 or more steps, or None for none.")
    if save_every and not checkpoints:
        raise ValueError("save_every needs checkpoints, the folder to save to.")
    if bool(watch) != bool(log):
        raise ValueError("watch and log go together: the monitors, and the file their lines are written to.")


def _check_budget(
    method: str, density: float | None, lora_rank: int | None, filter_rank: int, refresh: int | None, select: str
) -> None:
    if method != "lift" and (density, filter_rank, refresh, select) != (None, 16, None, "largest"):
        raise ValueError(f"density, filter_rank, refresh and select are LIFT's; {method} does not have them.")
    if method == "full" and lora_rank is not None:
        raise ValueError("lora_rank is a budget of lift and lora; full trains everything.")
    if density is not None or lora_rank is not None:
        budget((1, 1), density, lora_rank)
    if refresh is not None and refresh < 1:
        raise ValueError(f"refresh={refresh}: choose anew every 1 or more steps, or None to keep the first choice.")
    if select not in get_args(Select):
        raise ValueError(f"There is no select {select!r}. Choose {', '.join(get_args(Select))}.")


def _check_columns(objective: Objective, rows: list[dict[str, Any]]) -> None:
    here = rows[0]["columns"]
    missing = [name for name in getattr(objective, "columns", ()) if name not in here]
    if missing:
        raise ValueError(
            f"{_named(objective)} needs the column {missing[0]!r} of every example; these have {', '.join(here) or 'none'}."
        )
    alone = sum(len(row["input_ids"]) < 2 for row in rows)
    if getattr(objective, "grouped", False) and alone:
        raise ValueError(
            f"{_named(objective)} compares the members of a group, but {alone} of the {len(rows)} items are alone. Give groups: "
            "[[better, worse], ...]."
        )


def _named(function: Any) -> str:
    return getattr(function, "__name__", None) or repr(function)


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _choose(model: Model, method: Method) -> list[tuple[str, nn.Parameter]]:
    """Freeze what the method leaves alone; the named parameters of the matrices LIFT tunes."""
    weights = model.weights
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for site in linear_sites(weights):
        parameter = weights.parameter(site)
        found.setdefault(id(parameter), (str(site), parameter))
    for parameter in model.module.parameters():
        parameter.requires_grad_(method == "full" or id(parameter) in found)
    return list(found.values())


def _with_adapter(module: nn.Module, model: Model, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    names = sorted({model.anatomy.places[s].name.removesuffix(".weight") for s in linear_sites(model.weights)})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(module, config)  # type: ignore[arg-type]


@contextmanager
def _as_before(module: nn.Module) -> Iterator[nn.Module]:
    """Give back what a trainer puts on a module (its forward, its marks, settings of its config), the mode, what had a gradient, and
    the random state."""
    training, free = module.training, [(p, p.requires_grad) for p in module.parameters()]
    own, config = dict(module.__dict__), dict(vars(module.config))
    draws = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield module
    finally:
        random.setstate(draws[0])
        np.random.set_state(draws[1])
        for name in module.__dict__.keys() - own.keys():
            del module.__dict__[name]
        if "forward" in own:
            module.forward = own["forward"]
        vars(module.config).clear()
        vars(module.config).update(config)
        module.train(training)
        for parameter, needed in free:
            parameter.requires_grad_(needed)
            parameter.grad = None


def _last_complete(folder: Path, settings: dict[str, Any]) -> Path | None:
    """The latest whole checkpoint of this very run. Halves left by a kill are removed; another run's checkpoint is an error."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[-1]))
    whole = [p for p in found if (p / _COMPLETE).is_file()]
    for half in set(found) - set(whole):
        shutil.rmtree(half)
    if not whole:
        return None
    saved = json.loads((whole[-1] / _COMPLETE).read_text(encoding="utf-8"))
    differing = [f"{k} was {saved.get(k)!r}, now {v!r}" for k, v in settings.items() if saved.get(k) != v]
    if differing:
        raise ValueError(
            f"{folder} holds a checkpoint of another run ({'; '.join(differing[:3])}). Choose another folder, or remove it."
        )
    return whole[-1]


def _bar() -> Any:
    """A progress bar of optimizer steps with the loss beside it."""
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="tuning", leave=False)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return Bar()
