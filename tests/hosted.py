"""Small runs of a hosted trainer, which engines of several processes must train as one process does; and what any training borrows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import astuple
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from analyses.tasks import chained_sums
from finetune.distributed import steps_apart
from finetune.examples import Collate, examples, rows_of
from finetune.hosts import Surgical
from finetune.lift import LIFT, matrices_of
from finetune.objectives import nll
from finetune.rules import DRIFT
from surgery.model import Model
from surgery.weights import linear_sites
from tests.families import tiny

OPTIONS: dict[str, Any] = {"lr": 1e-3, "filter_rank": 4, "weight_decay": 0.1, "refresh": 2}
KINDS = ("lift", "bf16", "movement", "whole", "adamw", "drift", "update", "both")
STEPS, CLIP = 4, 0.5


class Hosted(Surgical, Trainer):
    pass


class Seen(TrainerCallback):
    """Whole gradients as they are before each optimizer step, and whole weights at the end, wherever their parts lie."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.weights: dict[str, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if not steps_apart(optimizer):
            return
        found = {n: whole_gradient(p) for n, p in model.named_parameters()}
        self.steps.append({n: grad.clone() for n, grad in found.items() if grad is not None})

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights = {n: whole(p).clone() for n, p in model.named_parameters()}


def whole_gradient(p: Any) -> Tensor | None:
    if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(p)
    return p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad


def whole(p: Any) -> Tensor:
    if hasattr(p, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([p]):
            return p.detach().clone()
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


def model(kind: str, family: str = "llama") -> Model:
    m = Model(*tiny(family, dtype=torch.bfloat16 if kind == "bf16" else torch.float32))
    for dropout in (part for part in m.module.modules() if isinstance(part, torch.nn.Dropout)):
        dropout.p = 0.0  # what is drawn depends on which process has the row
    matrices = {id(m.weights.parameter(site)) for site in linear_sites(m.weights)}
    for name, p in m.module.named_parameters():  # a key's bias has no gradient but rounding, which Adam makes steps of
        p.requires_grad_((kind in ("drift", "update") and not name.endswith("bias")) or id(p) in matrices)
    return m


def prior(family: str = "llama") -> Any:
    return Model(*tiny(family, seed=4)).weights - Model(*tiny(family)).weights


def stepper(kind: str, m: Model) -> LIFT | None:
    more: dict[str, Any] = {"movement": {"select": "movement"}, "whole": {"density": 1.0, "refresh": None}}
    options = OPTIONS | {"density": 0.1} | more.get(kind, {})
    return None if kind in ("adamw", "drift", "update") else LIFT(matrices_of(m.weights), **options)


def arguments(folder: Any, world: int = 1, **more: Any) -> TrainingArguments:
    """A batch of 4 rows whatever the number of processes, accumulated over two micro-batches and clipped, with a falling lr."""
    options: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
        "weight_decay": 0.1, "max_grad_norm": CLIP, "seed": 1, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "remove_unused_columns": False, "dataloader_pin_memory": False, "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(str(folder), **(options | more))


def trainer_of(
    m: Model, args: TrainingArguments, lift: LIFT | None, host: Any = Hosted, callbacks: Any = (), **own: Any
) -> Any:
    from datasets import Dataset

    rows = rows_of(examples([m.transcript(q.question, q.completion(m.markers)) for q in chained_sums(16, seed=5)]))
    if issubclass(host, Surgical):
        own = {"objective": nll} | own
    return host(
        m.module, args, train_dataset=Dataset.from_list(rows), data_collator=Collate(m.pad_id), optimizers=(lift, None),
        callbacks=list(callbacks), **own,
    )  # fmt: skip


def run(
    kind: str,
    args: Callable[[str], TrainingArguments] = arguments,
    host: Any = Hosted,
    family: str = "llama",
    **drifting: Any,
) -> dict[str, Any]:
    """What a run of a kind gave. args: of the folder that it may write to. drifting: options of DRIFT."""
    m = model(kind, family)
    lift, before, after = stepper(kind, m), Seen(), Seen()
    form: Any = "update" if kind == "update" else "gradient"
    pulled = kind in ("drift", "update", "both")
    drift = DRIFT(prior(family), m, form=form, log_every=1, **drifting) if pulled else None
    with TemporaryDirectory() as folder:
        trainer = trainer_of(m, args(folder), lift, host, [before, *([drift] if drift else []), after])
        trainer.train()
    found = {
        "weights": after.weights,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "chosen": {},
        "before": before.steps,
        "after": after.steps,
        "readings": [astuple(line) for line in drift.readings.lines if line.site == "all"] if drift else [],
    }
    if lift is not None:
        found["chosen"] = {i: lift.state[p]["indices"].clone() for i, p in enumerate(lift.param_groups[0]["params"])}
        lift.close()
    return found


def belongings(m: Model) -> dict[str, Any]:
    """Everything of a model and of the process that tuning borrows."""
    hooks = [len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in m.module.parameters()]
    modules = [
        (
            name,
            type(part),
            part.training,
            len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks),
        )
        for name, part in m.module.named_modules()
    ]
    return {
        "names": sorted(m.module.__dict__),
        "parameters": [(n, id(p), p.requires_grad, p.grad is None) for n, p in m.module.named_parameters()],
        "modules": modules,
        "hooks": hooks,
        "config": copy.deepcopy(m.module.config.to_dict()),
        "generation": copy.deepcopy(m.module.generation_config.to_dict()),
        "forward": m.module.forward.__func__,
        "tokenizer": (m.tokenizer.padding_side, m.tokenizer.pad_token, m.tokenizer.eos_token, m.tokenizer.model_max_length),
        # not Python's own random state: the type checker of these tests draws from it
        "random": (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
    }  # fmt: skip
