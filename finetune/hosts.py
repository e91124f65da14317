"""`Surgical`: what the toolkit adds to transformers.Trainer and to the trainers of TRL.

    class Trainer(Surgical, SFTTrainer): ...

Data of `rows_of` and the collator `Collate` go in as for any trainer, with ``remove_unused_columns=False``; `tune` puts it all together.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from transformers import PreTrainedModel
from transformers.integrations.integration_utils import default_logdir
from transformers.trainer import SCHEDULER_NAME

from finetune.checkpoints import checkpoints, is_complete, mark_complete
from finetune.distributed import (
    deepspeed_config,
    exempt_from_ddp,
    is_sharded,
    local_part,
    require_bare_gradients,
    require_fsdp2,
    require_whole_steps,
    step_apart_,
    steps_apart,
    under_deepspeed,
    under_fsdp,
)
from finetune.examples import IGNORED, Collate, require_rows
from finetune.lift import LIFT, lift_of
from finetune.monitors import Recorder, reporters_last
from finetune.objectives import Objective
from finetune.pieces import are_pieces, cut, in_pieces, may_cut
from finetune.predictions import Predictions, Totals, logits_at, predict
from finetune.rules import DRIFT
from finetune.shares import Share, clip_shares_, norm_of, shares_of
from surgery.adapter_names import ADDING
from surgery.anatomy import Anatomy
from surgery.borrowing import evaluating, without_adapter
from surgery.whole import write_whole

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object

_STATE = "objective.pt"
_REPORTS = "TENSORBOARD_LOGGING_DIR"
_TOLD = "tensorboard.txt"  # beside the checkpoints: the folder that the run's numbers are in


@runtime_checkable
class Term(Protocol):
    """A loss of its own, beside the objective: ``(module, step) -> scalar``, added once an optimizer step."""

    def __call__(self, module: nn.Module, step: int, /) -> Tensor: ...


@runtime_checkable
class Corruption(Protocol):
    """What is done to the inputs of a micro-batch before the model sees them; `step` of `steps` optimizer steps are done."""

    def __call__(self, batch: dict[str, Tensor], step: int, steps: int, /) -> dict[str, Tensor]: ...


class Surgical(_Host):
    """A mixin for transformers.Trainer and TRL's trainers; write it before the trainer among the bases.

    objective: what is minimised, by totals of the whole optimizer step; None leaves the trainer its own loss (as GRPO's must). It takes
               labelled rows of one text each, padded on the right: of `Collate`, or of the trainer's own collator without packing.
    corrupt:   changes the inputs of a micro-batch. terms: losses added once an optimizer step (in every
               process the same one, of which the mean over processes is one).
    reference: the frozen starting model, for an objective that asks for it; by default the adapter switched off where nothing trains but one
               that adds nothing yet, else (and under FSDP2) a copy made now. Nothing is copied for an objective that does not ask.
    autocast:  compute by this dtype with the weights as they are, whatever the arguments' bf16 would have accelerate do; None leaves it to them.
    The loss of an evaluation is the objective too, by the totals of all its data, so that it does not matter how they are batched (with
    several processes, the mean over batches by their items, each by its own totals). What an objective remembers of training sequences has
    no part in it.
    The shares that the objective names (`finetune.objectives.Objective`) are logged beside the loss, of the same steps; so is
    ``mask_overlap``, in [0, 1], where `LIFT` has chosen anew since: intersection over union of the old mask and the new one.
    A `Recorder` among the callbacks sends its headline numbers through this trainer's log, and so to what its ``report_to`` names.
    settings:  of the run, written into each checkpoint when it is whole, for `finetune.checkpoints.last_complete`; none is then written at
               the last step, where nothing is left to resume.

    Under DeepSpeed (tried with 0.19.8, on the CPU, one process and two) full tuning works at every ZeRO stage, with `finetune.rules.DRIFT` too
    (in fp32 or, from stage 1 on, bf16; the form "update" at stage 0); `LIFT` at stage 0 and without DeepSpeed's own bf16 and fp16 (a bf16
    model is welcome). Under FSDP2 (accelerate's, tried on the CPU with two processes) full tuning, `LIFT` and `DRIFT` work. All train as without
    them, clipped by ``max_grad_norm``; where weights are dealt out without recorders, and under FSDP2 without terms. What is not said here to
    work with `LIFT` or `DRIFT` is refused. fp16's scaled loss is refused with `LIFT` everywhere.

    With `LIFT` as the optimizer (``optimizers=(lift, None)``) gradients are clipped and measured through it. A loss or a gradient that is
    not finite raises FloatingPointError with the step and the site, and so do weights that are not when they would be saved; checkpoints
    written before stay.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        corrupt: Corruption | None = None,
        terms: Sequence[Term] = (),
        reference: nn.Module | None = None,
        autocast: torch.dtype | None = None,
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        if objective is None and (corrupt or reference):
            raise ValueError("corrupt and reference need an objective: the trainer's own loss knows neither.")
        args, kwargs, self._given = _lift_apart(super().__init__, args, kwargs)
        super().__init__(*args, **kwargs)
        self._require_engine(terms)
        self._require_short_rows()
        if self._given:
            self.optimizer = self._given
            require_whole_steps(deepspeed_config())
            if self.accelerator.scaler is not None:
                raise ValueError(
                    "fp16 scales the loss, and its scaler looks for gradients where LIFT keeps none. Compute in bf16: bf16=True, fp16=False."
                )
        if objective is not None:
            self._require_no_other_loss(objective)
        if objective is not None or terms:
            _require_beside_layers(self.accelerator.unwrap_model(self.model))
        self._objective, self._corrupt, self._terms = objective, corrupt, tuple(terms)
        self._totals: Totals | None = None
        self._evaluated: tuple[Totals, list[Tensor]] | None = (
            None  # an evaluation's totals, and what each batch adds to its loss
        )
        self._owed = False  # the coming optimizer step's terms
        self._reference, self._autocast, self._settings = reference, autocast, settings
        self._counted: dict[str, Tensor] = {}  # since the last log: the weight of what is learnt, and of each share
        if objective is not None:
            self.loss_is_scaled_for_ga = True  # it was divided by the totals of the whole step
            if getattr(objective, "reference", False) and reference is None and not self._has_the_start():
                self._reference = copy.deepcopy(self._bare()).requires_grad_(False).eval()
                if under_fsdp():  # which carries what it deals out
                    self._reference.to(self.args.device)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Recorder):
                callback.send_through(self)
        reporters_last(self)

    def _require_engine(self, terms: Sequence[Term]) -> None:
        """Raises ValueError for what cannot be computed over weights that FSDP deals out."""
        if not under_fsdp():
            return
        require_fsdp2()
        if terms:
            raise ValueError(
                "A term computes on whole weights, and FSDP2 gathers them for the objective's own pass alone. Leave terms out, or use DDP."
            )

    def _has_the_start(self) -> bool:
        """Whether the starting model is this one without its adapter, and can be asked beside it: FSDP2 gathers weights for one pass a step."""
        return _adapter_alone(self._bare()) and not under_fsdp()

    def _require_short_rows(self) -> None:
        """Raises ValueError for a ``max_length``, other than the arguments' own default, that training rows of `rows_of` exceed: nothing cuts them."""
        defaults = {f.name: f.default for f in fields(self.args)}
        limit = getattr(self.args, "max_length", None)
        rows: Any = self.train_dataset
        if limit in (None, defaults.get("max_length")) or not isinstance(self.data_collator, Collate):
            return
        longest = (
            max((len(ids) for row in rows for ids in row["input_ids"]), default=0) if hasattr(rows, "__len__") else 0
        )
        if longest > limit:
            raise ValueError(
                f"max_length={limit} cuts no row of rows_of, and the longest has {longest} tokens. Cut the transcripts first "
                "(finetune.recipes.cut), or give max_length=None."
            )

    def _require_no_other_loss(self, objective: Objective) -> None:
        """Raises ValueError for settings of a loss that the objective takes the place of."""
        text = self._bare().config.get_text_config()
        balanced = getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 0.0)
        if balanced:
            raise ValueError(
                f"router_aux_loss_coef ({balanced:g}) adds what balances the experts to the trainer's own loss, and the objective {objective!r} is "
                "minimised in its place. Go without: SFTConfig(router_aux_loss_coef=0.0), or model.config.output_router_logits = False for a "
                "plain Trainer; or leave objective out."
            )
        given = {
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.args.label_smoothing_factor != 0,
            "loss_type": getattr(self.args, "loss_type", "nll") == "dft",
        }
        if idle := [name for name, there in given.items() if there]:
            raise ValueError(
                f"{idle[0]} is of the trainer's own loss, and the objective {objective!r} is minimised in its place: give one of the two."
            )

    def _bends(self) -> bool:
        return any(isinstance(callback, DRIFT) for callback in self.callback_handler.callbacks)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._bends():
            require_bare_gradients(deepspeed_config())
        if reset := getattr(self._objective, "reset", None):
            reset()  # a checkpoint brings its own past
        return super().train(*args, **kwargs)

    def _bare(self) -> Any:
        """The transformers module inside whatever wraps it."""
        return without_adapter(self.accelerator.unwrap_model(self.model))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, counted = super().get_batch_samples(*args, **kwargs)
        self._owed = bool(self._terms)  # asked once a step, also of one that is made again
        if self._objective is not None and batches:
            for batch in batches:
                require_rows(batch)
            sums = functools.reduce(lambda a, b: a + b, map(Totals.of, batches))
            if self.args.world_size > 1:
                mine = torch.tensor(
                    [sums.tokens, sums.sequences, sums.groups], dtype=torch.float64, device=self.args.device
                )
                gathered: Any = self.accelerator.gather(mine[None])
                sums = Totals(*gathered.sum(0).tolist())
            self._totals = sums
        return batches, counted

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with in_pieces(self._may_cut(model)):
            return self._loss(model, inputs, return_outputs, num_items_in_batch)

    def _may_cut(self, model: nn.Module) -> bool:
        """Whether the coming backward pass is several: LIFT gathers each gradient as it arrives, and nobody waits for the one arrival of it."""
        lift = self._lift()
        if lift is None or not model.training or under_deepspeed() or under_fsdp():
            return False
        return may_cut(self._bare(), [p for group in lift.param_groups for p in group["params"]])

    def _loss(self, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        step = self.state.global_step
        loss: Any
        outputs = None
        if self._objective is None:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            if return_outputs:  # for the metrics of an evaluation; a host may add to what it is given
                _, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
            predictions = self._predictions(model, inputs, step)
            loss = self._objective(predictions)
            if model.training:
                self._count(predictions)
            elif self._evaluated is not None:
                whole, shares = self._evaluated
                shares.append(self._objective(replace(predictions, totals=whole)).detach().double())
            if model.training and self._objective_is_shared():
                loss = loss * self.args.world_size  # the processes' gradients are averaged
        if self._owed and model.training and not return_outputs:
            self._owed = False
            # a term counts once
            times = self.current_gradient_accumulation_steps if self._is_divided(num_items_in_batch) else 1
            loss = loss + times * self._added(step)
        return loss if outputs is None else (loss, outputs)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if self._objective is None or not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad():  # without the host's pass over the whole vocabulary
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        if self._objective is None or self.args.world_size > 1:
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        whole = Totals(0, 0, 0)
        for batch in dataloader:
            require_rows(batch)
            whole += Totals.of(batch)
        shares: list[Tensor] = []
        self._evaluated = whole, shares
        try:
            found: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._evaluated = None
        if shares:
            found.metrics[f"{metric_key_prefix}_loss"] = float(torch.stack(shares).sum())
        return found

    def _added(self, step: int) -> Any:
        """The sum of the terms, computed as the objective is."""
        module = self._bare()
        with self._computing():
            losses = [term(module, step) for term in self._terms]
        return sum(cut(losses) if are_pieces() else losses)

    def _computing(self) -> Any:
        """The precision of a pass through the model."""
        if self._autocast is None:
            return self.accelerator.autocast()
        return torch.autocast(self.args.device.type, self._autocast)

    def _is_divided(self, num_items_in_batch: Any) -> bool:
        """Whether the step divides what `compute_loss` gives by the number of micro-batches: as the Trainer itself decides it."""
        if self.loss_is_scaled_for_ga is not None:
            return not self.loss_is_scaled_for_ga
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return not counted and self.compute_loss_func is None

    def _count(self, p: Predictions) -> None:
        shares = getattr(self._objective, "shares", {})
        weights = {name: (p.weights * which(p)).sum() for name, which in shares.items()}
        for name, weight in ({"": p.weights.sum()} | weights if shares else {}).items():
            self._counted[name] = self._counted.get(name, 0) + weight.detach().double()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._counted:
            sums = torch.stack(list(self._counted.values()))
            if self.args.world_size > 1:
                gathered: Any = self.accelerator.gather(sums[None])
                sums = gathered.sum(0)
            shares = dict(zip(self._counted, (sums / sums[0]).tolist(), strict=True))
            logs |= {name: share for name, share in shares.items() if name}
            self._counted = {}
        if "loss" in logs and (lift := self._lift()):
            told = next((entry["step"] for entry in reversed(self.state.log_history) if "loss" in entry), 0)
            if fresh := [refresh.overlap for refresh in lift.refreshes if refresh.step > told]:
                logs["mask_overlap"] = sum(fresh) / len(fresh)
        super().log(logs, *args, **kwargs)

    def _is_reduced(self, model: nn.Module) -> bool:
        """Whether DistributedDataParallel reduces the gradients, which it makes ready for in a forward pass of its own."""
        return isinstance(model, DistributedDataParallel) and self._lift() is None

    def _objective_is_shared(self) -> bool:
        return self.args.world_size > 1 and self._totals is not None

    def _predictions(self, model: nn.Module, inputs: Mapping[str, Tensor], step: int) -> Predictions:
        batch, module = dict(inputs), self._bare()
        original = batch
        if self._corrupt and model.training:
            batch = self._corrupt(batch, step, self.state.max_steps)
        totals = self._totals if model.training else None
        reference = None
        if getattr(self._objective, "reference", False):
            reference = functools.cache(lambda: self._reference_logits(original))
        engine, sharded = under_deepspeed() and model is not self.model, under_fsdp()
        reduced = model.training and (engine or self._is_reduced(model))
        through = module if self.args.world_size == 1 or self._lift() or reduced or engine or sharded else model
        with self._computing():
            if reduced or sharded:
                share = not sharded  # FSDP2 gathers a layer's weights for one pass through it
                made: list[Predictions] = []

                def logits() -> Tensor:
                    made.append(predict(through, batch, share, totals, reference))
                    return made[0].raw

                raw = within(model, logits)
                found = replace(made[0], raw=raw)
            else:
                found = predict(through, batch, totals=totals, reference=reference, pieces=are_pieces())
            # an evaluation's numbers are those of other data
            return found if model.training else replace(found, numbered=False)

    @torch.no_grad()
    def _reference_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        row, column = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
        module = self._bare()
        off = nullcontext() if self._reference is not None else _adapter_off(self.accelerator.unwrap_model(self.model))
        with off, self._computing(), evaluating(module):
            return logits_at(self._reference if self._reference is not None else module, batch, row, column)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            if self._totals is not None and not self._totals.tokens:
                raise ValueError(
                    f"Step {self.state.global_step + 1} has no token to learn: none of its rows has a label, as when they are cut before their "
                    "answer. Leave such rows out of the data."
                )
            place = self._not_finite(self._bare().named_parameters())
            where = f": the weights of {place} are not finite" if place else ", though all weights are finite"
            raise FloatingPointError(
                f"The training loss became {float(loss)} at step {self.state.global_step + 1}{where}. "
                f"Try a smaller lr than {self.args.learning_rate:g}." + self._kept()
            )
        return loss

    def _lift(self) -> LIFT | None:
        return lift_of(self.optimizer)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:  # a Trainer under DeepSpeed drops what it was given
            self.optimizer = self._given
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.world_size > 1 and self.model is not None and (lift := self._lift()):
            exempt_from_ddp(self.model, lift)  # before it is wrapped
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        if under_deepspeed() and self.optimizer is not None:
            step_apart_(self.accelerator, self.optimizer, self._given, self._bends())
        return super().create_scheduler(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._require_finite(model)  # clipping spreads one NaN over all
        norm = self._clipped(model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self._require_finite(model)
            grad_norm = self._clipped(model, math.inf)  # measured, not clipped
        return super()._get_grad_norm(model, grad_norm)

    def _clipped(self, model: nn.Module, norm: float) -> Tensor | None:
        """The norm that the gradients had, clipped to one, where that is not left to accelerate."""
        if lift := self._lift():
            return lift.clip_grad_norm_(norm)
        if not (under_deepspeed() and steps_apart(self.optimizer)):
            return None
        if shares := self._shares():
            return clip_shares_(list(shares.values()), norm)
        return clip_grad_norm_(model.parameters(), norm)

    def _shares(self) -> dict[str, Share]:
        """Of each parameter what this process steps on, where ZeRO deals gradients out and they lie between backward and step."""
        return shares_of(self._bare()) if under_deepspeed() and steps_apart(self.optimizer) else {}

    def _require_finite(self, model: nn.Module) -> None:
        lift, shares = self._lift(), self._shares()
        if lift:
            named = list(lift.gradients())
        elif shares:
            named = [(name, grad) for name, share in shares.items() if (grad := share.gradient()) is not None]
        else:
            named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        norm = norm_of(list(shares.values())) if shares else get_total_norm([grad for _, grad in named])
        if torch.isfinite(norm):
            return
        raise FloatingPointError(
            f"The gradient of {self._not_finite(named) or 'some parameter'} is not finite at step {self.state.global_step + 1}, though the loss was. "
            f"Try a smaller lr than {self.args.learning_rate:g}, or fp32 without autocast." + self._kept()
        )

    def _not_finite(self, named: Iterable[tuple[str, Tensor]]) -> str | None:
        """The site, or the name where there is none, of the first of some parameters (or their gradients) that is not finite."""
        found = next(((name, x) for name, x in named if not torch.isfinite(local_part(x.detach())).all()), None)
        if found is None:
            return None
        name, tensor = found[0].removeprefix("base_model.model.").replace(".base_layer.", "."), found[1].detach()
        names = [own.replace(".base_layer.", ".") for own, _ in self._bare().named_parameters()]
        try:
            places = Anatomy.of(self._bare().config, names).places
        except ValueError:  # a family without a table
            return name
        own = [(site, place) for site, place in places.items() if place.name == name]
        if len(own) > 1 and not is_sharded(tensor):
            own = [(site, place) for site, place in own if not torch.isfinite(place.take(tensor)).all()]
        return str(own[0][0]) if own else name

    def _kept(self) -> str:
        found = checkpoints(Path(str(self.args.output_dir)))
        if self._settings is not None:
            found = [checkpoint for checkpoint in found if is_complete(checkpoint)]
        return f" The last good checkpoint is {found[-1]}." if found and self.args.save_strategy != "no" else ""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._settings is not None and self.state.global_step >= self.state.max_steps:
            return
        if place := self._not_finite((n, p) for n, p in self._bare().named_parameters() if p.requires_grad):
            raise FloatingPointError(
                f"The weights of {place} are not finite after step {self.state.global_step}. "
                f"Try a smaller lr than {self.args.learning_rate:g}." + self._kept()
            )
        with _own_names(self.model):
            super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()  # each process has put its random state there
        if not self.args.should_save:
            return
        checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if save := getattr(self._objective, "state_dict", None):
            torch.save(save(), checkpoint / _STATE)
        if self._settings is not None:
            mark_complete(checkpoint, self._settings)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _require_same_adapters(Path(resume_from_checkpoint), self.accelerator.unwrap_model(model or self.model))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint holds {len(load_result.unexpected_keys)} tensors that the model has no place for, first "
                f"{load_result.unexpected_keys[0]}: it is of another model, or of an older version. Begin anew in another folder."
            )
        super()._issue_warnings_after_load(load_result)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        lift = self._lift()
        if lift is None or not under_fsdp():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_model

        # the entries chosen here are this process's own: FSDP would keep the first process's for all
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # which the first process makes for itself
        torch.save(lift.state_dict(), Path(output_dir) / self._own_state())
        save_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _own_state(self) -> str:
        return f"lift-{self.args.process_index + 1}-of-{self.args.world_size}.pt"

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        lift = self._lift()
        if checkpoint and lift is not None and under_fsdp():
            if not (own := Path(checkpoint) / self._own_state()).is_file():
                raise ValueError(
                    f"{checkpoint} has no {own.name}: it was written by another number of processes, or without FSDP. Go on with as many."
                )
            lift.load_state_dict(torch.load(own, map_location="cpu", weights_only=True))
            scheduler: Any = self.lr_scheduler
            scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        load: Callable[[Any], None] | None = getattr(self._objective, "load_state_dict", None)
        if checkpoint and load:
            load(torch.load(Path(checkpoint) / _STATE, weights_only=True))


@contextmanager
def reports_in_runs(report_to: Sequence[str], checkpoints: Path, resume: Path | None) -> Iterator[None]:
    """A trainer made inside writes for TensorBoard to a new folder in ``runs``, not beside its checkpoints, unless the environment says where, and
    goes on in it where it is resumed: what it had told beyond the checkpoint is taken back. A run of W&B that it begins ends with it, while one
    that was there stays open."""
    chosen, before = os.environ.get(_REPORTS), _wandb_run()
    folder, told = chosen or os.path.abspath(_new_folder(default_logdir())), checkpoints / _TOLD
    if "tensorboard" in report_to and int(os.environ.get("RANK", 0)) == 0:
        if resume is not None:
            folder = chosen or (told.read_text(encoding="utf-8") if told.is_file() else folder)
            _take_back(folder, int(resume.name.rsplit("-", 1)[-1]))
        write_whole(told, folder)
    os.environ[_REPORTS] = folder
    failed = True
    try:
        yield
        failed = False
    finally:
        if chosen is None:
            del os.environ[_REPORTS]
        if (run := _wandb_run()) is not before:
            run.finish(exit_code=int(failed))


def _take_back(folder: str, step: int) -> None:
    """TensorBoard shows nothing of what was written to a folder so far of later steps."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # what is asked for is not installed, which the trainer says
        return
    SummaryWriter(folder, purge_step=step + 1).close()


def _new_folder(path: str) -> str:
    """The path, numbered where another run of the same second has it."""
    numbered = (f"{path}_{n}" for n in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not Path(one).exists())


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


@contextmanager
def _own_names(model: Any) -> Iterator[None]:
    """A checkpoint is saved by the names of the live module, by which a trainer loads it again; a family that is converted on loading (packed
    experts, vision-language models) would be saved by the hub's otherwise, and nothing of it would be found.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    live: Any = model
    live.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del live.save_pretrained


def within(wrapper: nn.Module, compute: Callable[[], Any]) -> Any:
    """What `compute` gives, a tensor or several, as the forward pass of a DistributedDataParallel or a DeepSpeed engine, which there makes ready
    to reduce the gradients, or of a module that FSDP2 has sharded, which there gathers its weights."""
    inner: Any = wrapper if under_fsdp() else wrapper.module
    own = inner.__dict__.get("forward")
    inner.forward = compute
    try:
        return wrapper()
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own


def _lift_apart(make: Callable[..., None], args: Any, kwargs: Any) -> tuple[Any, Any, LIFT | None]:
    """What a trainer is made with, and the LIFT that was among it: a Trainer under FSDP takes no optimizer that is made already."""
    given = inspect.signature(make).bind_partial(*args, **kwargs)
    optimizer, *rest = given.arguments.get("optimizers") or (None,)
    if lift := lift_of(optimizer):
        given.arguments["optimizers"] = (None, *rest)
    return given.args, given.kwargs, lift


_ADDED = ("lora_B", "lora_embedding_B", "shira_weight")  # where these are zero, it adds nothing


def _adapter_alone(module: nn.Module) -> bool:
    """Whether what trains is an adapter, without which the module is the starting model: one that was trained before, or has taken a part of
    the weights (PiSSA), belongs to the start."""
    names = {name: p.requires_grad for name, p in module.named_parameters()}
    adapted = getattr(module, "_hf_peft_config_loaded", False) or any(part in name for name in names for part in ADDING)
    others = (
        trains for name, trains in names.items() if not any(part in name for part in (*ADDING, "modules_to_save"))
    )
    adds = any(bool(p.detach().any()) for name, p in module.named_parameters() if any(part in name for part in _ADDED))
    return adapted and not adds and not any(others)


@contextmanager
def _adapter_off(module: Any) -> Iterator[None]:
    """A module without its adapter, PEFT's own around it or one that was added to it (``add_adapter``)."""
    if hasattr(module, "disable_adapter"):
        with module.disable_adapter():
            yield
        return
    module.disable_adapters()
    try:
        yield
    finally:
        module.enable_adapters()


_OF_A_FILE = (
    "inference_mode",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
)  # no part of what an adapter does


def _require_same_adapters(checkpoint: Path, model: Any) -> None:
    """Raises ValueError where a checkpoint's adapter is not that of the PEFT model which is to take it up: PEFT leaves out what does not fit."""
    for name, config in getattr(model, "peft_config", {}).items() if hasattr(model, "get_base_model") else ():
        folder = next((f for f in (checkpoint / name, checkpoint) if (f / "adapter_config.json").is_file()), None)
        if folder is None:
            continue
        then, now = type(config).from_pretrained(str(folder)).to_dict(), config.to_dict()
        told = [
            f"{key} was {_in_order(then.get(key))}, now {_in_order(now.get(key))}"
            for key in {**now, **then}
            if key not in _OF_A_FILE and then.get(key) != now.get(key)
        ]
        if told:
            raise ValueError(
                f"{checkpoint} is of another adapter: {'; '.join(told[:3])}. Give the adapter of that run, or begin anew in another folder."
            )


def _in_order(setting: Any) -> Any:
    return sorted(setting) if isinstance(setting, set) else getattr(setting, "value", setting)


def _require_beside_layers(model: Any) -> None:
    """Raises ValueError for an adapter whose part is done by PEFT's model around the module, which no pass of ours goes through."""
    config: Any = getattr(model, "active_peft_config", None)
    if config is not None and (config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None)):
        raise ValueError(
            f"This {type(config).__name__} has PEFT read or lengthen each text before the model runs, which the passes of an objective or a term "
            "leave out. Use an adapter that only lies beside layers, such as LoRA's. Leave objective and terms out where it must be this one."
        )
