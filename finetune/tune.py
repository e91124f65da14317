"""`tune` puts an optimizer, an objective and monitors into TRL's trainers. No trainer of our own.

What is borrowed is given back, after an error too (see `finetune.learner`); only the weights have changed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from finetune.checkpoints import digest, last_complete, require_somewhere
from finetune.dealt import dealt_out
from finetune.examples import Collate, Item, Over, examples, rows_of
from finetune.hosts import Corruption, Surgical, Term, reports_in_runs
from finetune.learner import (
    Trains,
    bar,
    check_budget,
    deepspeed_asked,
    fsdp_is_asked,
    learner,
    one_device,
    require_norm,
    require_versions,
)
from finetune.lift import Select
from finetune.monitors import Recorder
from finetune.objectives import Objective, nll
from finetune.rewards import Reward
from finetune.rules import DRIFT
from surgery.model import Model
from surgery.runs import fingerprint

Method = Literal["lift", "full", "lora", "shira", "grpo"]
LEARNING_RATES: dict[Trains, float] = {"lift": 1e-3, "full": 1e-4, "lora": 1e-3, "shira": 1e-3}
DEFAULTS = {"filter_rank": 16, "refresh": None, "select": "largest"}  # of LIFT


@dataclass(frozen=True)
class Tuned:
    """What a run did. losses: training loss of every optimizer step. trainable: how many numbers were free to move.

    refreshes: for LIFT with a refresh interval, what each refresh did, a `finetune.lift.Refresh`. seconds: the training loop's own time.
    shares: name -> a share in [0, 1] at every optimizer step, for an objective that names some (``improbable`` of `dft`).
    """

    method: Method
    steps: int
    losses: list[float]
    gradient_norms: list[float]
    trainable: int
    seconds: float
    settings: dict[str, Any]
    refreshes: list[Any] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)


def tune(
    model: Model,
    data: Sequence[Item | Sequence[Item]] | Sequence[Any],
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
    options: Mapping[str, Any] | None = None,
    weight_decay: float = 0.0,
    schedule: str | None = None,
    warmup: int = 0,
    max_grad_norm: float = 1.0,
    over: Over = "completion",
    objective: Objective = nll,
    reward: Reward | None = None,
    corrupt: Corruption | None = None,
    terms: Sequence[Term] = (),
    callbacks: Sequence[Any] = (),
    autocast: bool = True,
    seed: int = 0,
    watch: Sequence[Any] = (),
    log: str | Path | None = None,
    budget: float = 0.03,
    page: Callable[[Path], object] | None = None,
    report_to: Sequence[str] = (),
    checkpoints: str | Path | None = None,
    save_every: int | None = None,
    progress: bool = False,
) -> Tuned:
    """Fine-tune a model, in place: on transcripts, or by rewards.

    method:      ``lift`` trains the principal entries of every attention and MLP matrix; ``full`` all parameters with AdamW; ``lora`` and
                 ``shira`` a PEFT adapter on the same matrices, merged into them at the end (`finetune.learner.with_adapter`). ``grpo``
                 reinforces what is rewarded: the data are questions, and reward is
                 ``(question, transcript) -> number``; see `finetune.grpo.grpo`, whose result it gives.
    options:     further ones of the method: of `LIFT` (block, scope, overrides, min_change, grow_to, agreement), and for ``grpo`` its own too
                 (trains, groups, samples, beta, temperature, max_new_tokens, log for the completions, ...).
    steps:       optimizer steps. batch_size: transcripts a step, in `accumulate` micro-batches.
    lr:          peak learning rate; by default 1e-3 for lift, lora and shira, 1e-4 for full, which suit the specimen (its weights are large).
    density:     lift's budget, fraction of each matrix in (0, 1], default 0.05; or lora_rank: a LoRA's count of parameters (for
                 ``lora`` itself its rank, for ``shira`` as many entries, default 16).
    filter_rank, refresh, select: see `LIFT`. weight_decay: decoupled. schedule, warmup: of the learning rate, transformers' names (by
                 default linear decay; for grpo constant).
    max_grad_norm: gradients are clipped to this joint norm; 0 does not clip.
    data:        transcripts, or examples with weights of their own, or groups of them for an objective that compares (see
                 `finetune.examples`). batch_size counts these.
    over:        the span whose tokens have a loss, several, or {span: weight}; examples know it themselves.
    objective:   what is minimised, a function of `Predictions` (see `finetune.objectives`), and nothing that balances a mixture's experts,
                 whatever its config has of a router_aux_loss_coef. corrupt: changes inputs before the model sees
                 them. terms: further losses, added once a step. callbacks: of the trainer, such as `DRIFT`.
    autocast:    compute in bf16 with the weights as they are.
    watch, log, budget, page: the monitors of a `finetune.monitors.Recorder`, the file their lines go to, the share of the training time that
                 those without a cadence of their own may take, and what is called with the file at the end: ``analyses.flight.write_page``
                 makes the page with the run's story. (A recorder made before, as by ``analyses.flight_recorder``, is one of the callbacks.)
    report_to:   where else the loss and the headline numbers of every recorder go: "tensorboard", "wandb" and what else transformers
                 knows. TensorBoard's files are in ``runs`` of the working folder, or where TENSORBOARD_LOGGING_DIR says;
                 a resumed run goes on in the folder it began. A run of W&B that this begins is ended too.
    checkpoints, save_every: where to save, and how often, to be able to resume; a folder with a complete checkpoint is resumed from,
                 bit for bit. Incomplete ones, left by a kill, are discarded.

    Under torchrun (DDP) all processes call this alike, and every one has the tuned weights in the end. batch_size stays what is learnt in a
    step, all processes together, so that the run is that of one process (an epoch's last batch, where it falls short, is filled up with the
    epoch's first examples); terms count once; the first process alone writes log and checkpoints. Of ``grpo``, see there.

    A launcher that asks for FSDP2 (accelerate launch --use_fsdp --fsdp_version 2) or DeepSpeed (accelerate launch --use_deepspeed --zero_stage 2)
    has the weights, their gradients and what the optimizer keeps of them dealt out while they train; before and afterwards each process has an
    ordinary model, whole, of the same parameters (see `finetune.dealt`; in between they lie on the CPU as they were, which after an error they
    are again). It is the same run, also resumed, with `DRIFT`. Under FSDP2 without watch, terms and what of `LIFT` needs whole matrices, under
    DeepSpeed without `LIFT` from ZeRO stage 1 on and without watch at stage 3; these are refused, as are FSDP1 and what is to be kept on the CPU
    or a disk. The launcher says how things are dealt out; precision, batch, clipping and optimizer are those given here.
    accelerate shards on accelerators alone: on CPUs such a launcher gets DDP. Tried with two processes on a CPU that were told otherwise, and
    DeepSpeed 0.19.8.

    Raises ValueError for settings out of range or without use for the method, for transcripts without the span, for SHiRA where a
    matrix has too few entries for its rank, and for any method but lift on weights that are not fp32 (their steps would vanish
    in rounding: load with dtype="float32"); RuntimeError for a report_to whose library is not installed; FloatingPointError when the loss,
    a gradient or the weights to be saved are not finite, naming step and site.
    """
    require_versions("trl", "peft")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    shared = 1 if method == "grpo" else processes  # which deals out groups
    batch = accumulate if method == "grpo" else batch_size  # whose batches are groups of samples
    _check(method, steps, batch, accumulate, shared, save_every, checkpoints, watch, log, budget, page, max_grad_norm)
    chosen = {"filter_rank": filter_rank, "refresh": refresh, "select": select}
    more = {name: value for name, value in chosen.items() if value != DEFAULTS[name]} | dict(options or {})
    recorders = [Recorder(model, watch, log, budget=budget, page=page)] if watch and log else []
    if method == "grpo" or reward is not None:
        idle = {
            "batch_size": batch_size != 16, "over": over != "completion", "objective": objective is not nll,
            "corrupt": corrupt is not None, "reward": method != "grpo",
        }  # fmt: skip
        if useless := [name for name, given in idle.items() if given]:
            raise ValueError(f"{useless[0]} has no use with method={method!r}: leave it out.")
        return _reinforced(
            model, data, reward, more, steps=steps, accumulate=accumulate, lr=lr, density=density, lora_rank=lora_rank, weight_decay=weight_decay,
            warmup=warmup, max_grad_norm=max_grad_norm, autocast=autocast, terms=terms, callbacks=[*callbacks, *recorders], seed=seed,
            checkpoints=checkpoints, save_every=save_every, progress=progress, report_to=report_to, **({"schedule": schedule} if schedule else {}),
        )  # fmt: skip
    trains = cast(Trains, method)
    check_budget(model, trains, density, lora_rank, more)
    peak = LEARNING_RATES[trains] if lr is None else lr
    schedule = schedule or "linear"
    sharded = processes > 1 and fsdp_is_asked()
    zero = deepspeed_asked()
    settings = {
        "method": method, "steps": steps, "lr": peak, "batch_size": batch_size, "accumulate": accumulate, "density": density,
        "lora_rank": lora_rank, "filter_rank": filter_rank, "refresh": refresh, "select": select, "weight_decay": weight_decay,
        "schedule": schedule, "warmup": warmup, "max_grad_norm": max_grad_norm, "over": over, "autocast": autocast, "seed": seed,
        "options": dict(options or {}), "objective": named(objective), "corrupt": corrupt and named(corrupt),
        "terms": [named(t) for t in terms], "DRIFT": any(isinstance(c, DRIFT) for c in callbacks),
        "processes": processes, "FSDP": sharded or None, "DeepSpeed": zero and zero["zero_optimization"],
    }  # fmt: skip
    rows = rows_of(examples(data, over))
    _check_columns(objective, rows)
    if checkpoints:
        settings["start"] = fingerprint(model)
    settings["data"] = digest(rows)

    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer

    class Trainer(Surgical, SFTTrainer):
        pass

    with ExitStack() as borrowed:
        folder = Path(checkpoints) if checkpoints else Path(borrowed.enter_context(tempfile.TemporaryDirectory()))
        args = SFTConfig(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size // (accumulate * processes),
            gradient_accumulation_steps=accumulate, learning_rate=peak, lr_scheduler_type=schedule, warmup_steps=warmup,
            weight_decay=weight_decay, max_grad_norm=max_grad_norm, seed=seed, data_seed=seed, bf16=autocast and zero is None,
            deepspeed=zero, use_cpu=model.device.type == "cpu", activation_checkpointing=False, logging_steps=1, logging_nan_inf_filter=False,
            save_strategy="steps" if save_every else "no", save_steps=save_every or steps, save_total_limit=2, report_to=list(report_to),
            disable_tqdm=not progress, remove_unused_columns=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_pin_memory=model.device.type == "cuda",
            router_aux_loss_coef=0.0,  # the objective is the loss
        )  # fmt: skip
        if sharded or zero or not autocast:
            # a launcher may ask for bf16, by which FSDP2 would also reduce gradients and 16-bit weights be widened, and DeepSpeed step on copies
            args.mixed_precision = "no"
        if zero:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            borrowed.callback(unset_hf_deepspeed_config)  # at stage 3 no model would be made whole afterwards
        one_device(args, model.device)
        if args.world_size > 1:
            # as the trainer will, but LIFT meets the other processes before
            model.module.to(args.device)  # type: ignore[arg-type]
        with args.main_process_first(local=False):  # which may remove halves
            resume = last_complete(folder, settings)
        student = borrowed.enter_context(
            learner(
                model, trains, lr=peak, seed=seed, density=density, lora_rank=lora_rank, weight_decay=weight_decay, options=more
            )
        )  # fmt: skip
        borrowed.enter_context(reports_in_runs(report_to, folder, resume))
        trainer = Trainer(
            model=student.module,
            args=args,
            train_dataset=Dataset.from_list(rows),
            data_collator=Collate(model.pad_id),
            processing_class=model.tokenizer,
            optimizers=(student.lift, None),
            callbacks=[*callbacks, *recorders],
            objective=objective,
            corrupt=corrupt,
            terms=terms,
            autocast=torch.bfloat16 if autocast and (sharded or zero) else None,
            settings=settings,
        )
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(bar())
        with dealt_out(trainer):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        student.merge()
        history = trainer.state.log_history
        refreshes = list(student.lift.refreshes) if student.lift else []
    return Tuned(
        method,
        trainer.state.global_step,
        trainable=student.trainable,
        settings=settings,
        refreshes=refreshes,
        shares={name: [entry[name] for entry in history if name in entry] for name in getattr(objective, "shares", {})},
        **course(history),
    )


def course(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a trainer's log says of a run: the losses and gradient norms of its steps, and its seconds (NaN where it did not finish)."""
    steps = [entry for entry in history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in steps],
        "gradient_norms": [float(entry["grad_norm"]) for entry in steps],
        "seconds": next((e["train_runtime"] for e in reversed(history) if "train_runtime" in e), float("nan")),
    }


def _reinforced(
    model: Model, questions: Sequence[Any], reward: Reward | None, options: Mapping[str, Any], **shared: Any
) -> Tuned:
    from finetune.grpo import grpo

    if reward is None:
        raise ValueError("method='grpo' needs a reward, (question, transcript) -> number: see finetune.rewards.")
    own = signature(grpo).parameters.keys() - shared.keys() - {"model", "questions", "reward", "options"}
    mine = {name: value for name, value in options.items() if name in own}
    lifts = {name: value for name, value in options.items() if name not in own}
    return grpo(model, questions, reward, options=lifts, **shared, **mine)


def _check(
    method: str, steps: int, batch_size: int, accumulate: int, processes: int, save_every: int | None, checkpoints: object,
    watch: Sequence[Any], log: object, budget: float, page: object, max_grad_norm: float,
) -> None:  # fmt: skip
    if method not in get_args(Method):
        raise ValueError(f"There is no method {method!r}. Choose {', '.join(get_args(Method))}.")
    if steps < 1 or batch_size < 1 or accumulate < 1 or batch_size % accumulate:
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}, accumulate={accumulate}: all at least 1, and the batch divisible by accumulate."
        )
    if batch_size % (accumulate * processes):
        raise ValueError(
            f"batch_size={batch_size} is what all processes learn in a step together: {accumulate} micro-batches in each of {processes} "
            f"processes need a multiple of {accumulate * processes}."
        )
    require_norm(max_grad_norm)
    require_somewhere(save_every, checkpoints)
    if bool(watch) != bool(log):
        raise ValueError("watch and log go together: the monitors, and the file their lines are written to.")
    if not watch and (page is not None or budget != 0.03):
        raise ValueError("budget and page belong to watch: without it, nothing is recorded.")


def _check_columns(objective: Objective, rows: list[dict[str, Any]]) -> None:
    here = rows[0]["columns"]
    missing = [name for name in getattr(objective, "columns", ()) if name not in here]
    if missing:
        raise ValueError(
            f"{named(objective)} needs the column {missing[0]!r} of every example; these have {', '.join(here) or 'none'}."
        )
    alone = sum(len(row["input_ids"]) < 2 for row in rows)
    if getattr(objective, "grouped", False) and alone:
        raise ValueError(
            f"{named(objective)} compares the members of a group, but {alone} of the {len(rows)} items are alone. Give groups: "
            "[[better, worse], ...]."
        )
    fault = getattr(objective, "fault", None)
    for index, row in enumerate(rows if fault else ()):
        if fault and (wrong := fault(row["columns"])):
            raise ValueError(f"Item {index} of the data: {wrong}")


def named(function: Any) -> str:
    """A function, an objective or a term in words, the same in every process: by them a run knows its checkpoints."""
    return getattr(function, "__name__", None) or repr(function)
