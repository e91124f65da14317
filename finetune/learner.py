"""What a trainer is given to train, and what is given back: matrices through LIFT, everything, or an adapter (LoRA, SHiRA).

What is borrowed is given back, after an error too: the module's forward and settings, its training mode, ``requires_grad``, its hooks and
the random state are afterwards as before; only the weights have changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from inspect import signature
from typing import Any, Literal, get_args

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn

from finetune.lift import LIFT, budget, matrices_of
from finetune.lift.optimizer import require_tiles
from finetune.lift.selection import check_select
from surgery.borrowing import own_draws, own_modes
from surgery.model import Model
from surgery.weights import linear_sites, require_numbers

Adapter = Literal["lora", "shira"]
Trains = Literal["lift", "full", "lora", "shira"]
DENSITY = 0.05  # of LIFT, where no budget is given
RANK = 16  # of an adapter, likewise
_OPTIONS = sorted(signature(LIFT).parameters.keys() - {"params", "lr", "density", "lora_rank", "weight_decay", "seed"})


@dataclass(frozen=True)
class Learner:
    """module: what the trainer gets, with the adapter where there is one. lift: the optimizer, where it is LIFT. trainable: how many
    numbers are free to move."""

    module: Any
    lift: LIFT | None
    trainable: int

    def merge(self) -> None:
        """Put what an adapter learnt into the weights."""
        if hasattr(self.module, "merge_and_unload"):
            self.module.merge_and_unload()


@contextmanager
def learner(
    model: Model, trains: Trains, *, lr: float, seed: int, density: float | None = None, lora_rank: int | None = None, weight_decay: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Learner]:  # fmt: skip
    """A model made ready for training, for the length of a ``with`` block. options: further ones of `LIFT`."""
    with ExitStack() as borrowed:
        module: Any = borrowed.enter_context(as_before(model.module))
        chosen = _choose(model, trains)
        if trains == "lift":
            given = DENSITY if density is None and lora_rank is None else density
            lift = borrowed.enter_context(
                LIFT(
                    chosen,
                    lr=lr,
                    density=given,
                    lora_rank=lora_rank,
                    weight_decay=weight_decay,
                    seed=seed,
                    **options or {},
                )
            )
            for _, parameter in chosen:  # what an override leaves out of the budget stays as it is
                parameter.requires_grad_(parameter in lift.state)
            yield Learner(module, lift, sum(len(state["indices"]) for state in lift.state.values()))
            return
        if trains == "lora" or trains == "shira":
            torch.manual_seed(seed)  # a LoRA begins at random
            module = with_adapter(model, trains, RANK if lora_rank is None else lora_rank, seed)
            borrowed.callback(module.unload)  # after a merge there is nothing left to unload
        yield Learner(module, None, sum(p.numel() for p in module.parameters() if p.requires_grad))


def check_budget(
    model: Model, trains: str, density: float | None, lora_rank: int | None, options: Mapping[str, Any]
) -> None:
    """Raises ValueError where what is trained, its budget and LIFT's options do not go together, or the weights are too coarse for it."""
    if trains not in get_args(Trains):
        raise ValueError(f"There is nothing called {trains!r} to train. Choose {', '.join(get_args(Trains))}.")
    if trains != "lift" and (density is not None or options):
        named = ", ".join(["density"] * (density is not None) + list(options))
        budgeted = "" if trains == "full" else " Its budget is lora_rank."
        raise ValueError(
            f"density, filter_rank, refresh, select and the like are LIFT's; {trains} does not have them: leave out {named}.{budgeted}"
        )
    if trains == "full" and lora_rank is not None:
        raise ValueError("lora_rank is a budget of lift, lora and shira; full trains everything.")
    if density is not None or lora_rank is not None:
        budget((1, 1), density, lora_rank)
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise ValueError(f"LIFT has no option {unknown[0]!r} to be given here. Choose from {', '.join(_OPTIONS)}.")
    refresh, select = options.get("refresh"), options.get("select", "largest")
    if refresh is not None and refresh < 1:
        raise ValueError(f"refresh={refresh}: choose anew every 1 or more steps, or None to keep the first choice.")
    check_select(select)
    if trains == "lift" and options.get("block", 1) != 1:
        require_tiles(matrices_of(model.weights), options["block"], options.get("overrides"))
    if trains != "lift" and any(p.dtype != torch.float32 for p in model.module.parameters()):
        raise ValueError(
            f"{trains} tuning needs fp32 weights, or its steps vanish in rounding. Load the model with dtype='float32'."
        )
    for site in linear_sites(model.weights):
        require_numbers(model.weights, site, "`finetune.overlay.overlay_` lays trainable values beside them.")
    if trains == "shira":
        _check_room(model, adapted_layers(model), RANK if lora_rank is None else lora_rank)


def one_device(arguments: Any, ours: torch.device) -> None:
    """Keep a trainer to one device: with several accelerators in sight it would deal each batch out to all of them, and learn as many times as
    much in a step. Under torchrun each process has a device of its own, to which its trainer carries the model.

    Raises ValueError where a single process would carry the model from the device that it was loaded on to another, and where a launcher
    asks for FSDP1.
    """
    if arguments.world_size > 1 and fsdp_is_asked() and os.environ.get("FSDP_VERSION", "1") == "1":
        raise ValueError(
            "The launcher asks for FSDP1, which keeps weights in flat pieces of no matrix. Ask for FSDP2 (accelerate launch --use_fsdp "
            "--fsdp_version 2), or start it with torchrun (DDP)."
        )
    theirs = arguments.device
    if arguments.world_size == 1 and (theirs.type, theirs.index or 0) != (ours.type, ours.index or 0):
        raise ValueError(
            f"The model is on {ours}, and training happens on {theirs}: load it there, or choose with CUDA_VISIBLE_DEVICES."
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)


def fsdp_is_asked() -> bool:
    """Whether a launcher asks for FSDP, which accelerate grants where several accelerators train."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def require_no_engine(who: str) -> None:
    """Raises ValueError where a launcher asks for an engine that deals weights out, for what needs them whole while they train."""
    asked = {
        "DeepSpeed": parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"),
        "FSDP": int(os.environ.get("WORLD_SIZE", 1)) > 1 and fsdp_is_asked(),
    }
    if engine := next((name for name, is_asked in asked.items() if is_asked), None):
        raise ValueError(
            f"The launcher asks for {engine}, and {who} needs the weights whole while they train. Start it without: torchrun (DDP), or python."
        )


def deepspeed_asked() -> dict[str, Any] | None:
    """What a launcher asks of DeepSpeed, as a configuration: how things are dealt out, and all else a trainer's to say. None where none does.

    Raises ValueError where weights or what an optimizer keeps are to lie on the host or a disk.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    from accelerate import DeepSpeedPlugin

    zero = dict(DeepSpeedPlugin().deepspeed_config["zero_optimization"])
    for part in ("offload_optimizer", "offload_param"):
        if (place := (zero.pop(part, None) or {}).get("device", "none")) != "none":
            raise ValueError(
                f"The launcher has DeepSpeed keep things on the {place} ({part}), with which no training here was tried. Leave it out."
            )
    zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero} | dict.fromkeys(auto, "auto")


def require_one_process(who: str) -> None:
    """Raise RuntimeError under a launcher of several processes, for what trains in one alone."""
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise RuntimeError(
            f"{who} works in one process; here are {processes}. Start it with python, not with a launcher."
        )


def require_norm(max_grad_norm: float) -> None:
    """Raises ValueError for what gradients cannot be clipped to: a trainer would go on without clipping."""
    if not max_grad_norm >= 0:
        raise ValueError(
            f"max_grad_norm={max_grad_norm}: the joint norm that gradients are clipped to is above 0; 0 does not clip."
        )


def require_versions(*names: str) -> None:
    """Raises ValueError where a library is not of the versions that this distribution asks for, and says how to get one that is."""
    from packaging.requirements import Requirement

    asked = {r.name: r for r in map(Requirement, metadata.requires("model-surgery") or ())}
    for name in names:
        here = metadata.version(name)
        if name in asked and not asked[name].specifier.contains(here, prereleases=True):
            raise ValueError(
                f"{name}{asked[name].specifier} is needed; here is {name} {here}. pip install '{asked[name]}'"
            )


def _choose(model: Model, trains: Trains) -> list[tuple[str | tuple[str, ...], nn.Parameter]]:
    """Freeze what is left alone; the named parameters of the matrices LIFT tunes."""
    found = matrices_of(model.weights)
    for parameter in model.module.parameters():
        parameter.requires_grad_(trains == "full")
    for _, parameter in found:
        parameter.requires_grad_(True)
    return found


def with_adapter(model: Model, kind: Adapter, rank: int, seed: int = 0) -> Any:
    """A PEFT model around the module, with an adapter on every attention and MLP matrix that changes nothing yet.

    kind: ``lora``, two factors of `rank` with alpha twice it (drawn from torch's random state); ``shira``, ``rank * (rows + columns)`` entries
    of each matrix, as many numbers as that LoRA has, drawn once by `seed` (matrices of one shape get the same places), which train densely
    stored and are added to the matrix. PEFT counts SHiRA's entries by rank alone, without a density, and adapts linear layers alone.
    Raises ValueError where SHiRA would have more entries than a matrix, or for a matrix that is no linear layer.
    Source: Hu et al., arXiv 2106.09685; Bhardwaj et al., "Sparse High Rank Adapters", arXiv 2406.13175 (SHiRA-Rand).
    """
    from peft import LoraConfig, ShiraConfig, get_peft_model

    layers = adapted_layers(model)
    if kind == "shira":
        _check_room(model, layers, rank)
        config: Any = ShiraConfig(
            r=rank, target_modules=layers, mask_type="random", random_seed=seed, task_type="CAUSAL_LM"
        )
    else:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(model.module, config)  # type: ignore[arg-type]


def adapted_layers(model: Model) -> list[str]:
    """The layers that an adapter lies beside: those of every attention and MLP matrix. Raises ValueError for experts that are one tensor."""
    packed = [s for s in linear_sites(model.weights) if model.anatomy.places[s].expert is not None]
    if packed:
        raise ValueError(
            f"An adapter lies beside a layer, and the experts of this model are one tensor together ({packed[0]} and {len(packed) - 1} others "
            "are no layers): use lift or full."
        )
    return sorted({model.anatomy.places[s].name.removesuffix(".weight") for s in linear_sites(model.weights)})


def _check_room(model: Model, layers: list[str], rank: int) -> None:
    """Raises ValueError for what PEFT's SHiRA has no adapter for."""
    for name in layers:
        layer = model.module.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"SHiRA adapts linear layers alone; {name} is a {type(layer).__name__}. Use method='lora', or LIFT with select='random'."
            )
        rows, columns = layer.weight.shape
        if rank * (rows + columns) > rows * columns:
            raise ValueError(
                f"SHiRA of rank {rank} has {rank * (rows + columns)} entries of each {rows}x{columns} matrix, which has {rows * columns} "
                f"({name}). Give lora_rank of at most {rows * columns // (rows + columns)}."
            )


@contextmanager
def as_before(module: nn.Module) -> Iterator[nn.Module]:
    """Give back what a trainer puts on a module (its forward, its marks, settings of its config), the mode, what had a gradient, and
    the random state."""
    free = [(p, p.requires_grad) for p in module.parameters()]
    own = dict(module.__dict__)
    held: Any = module
    said = {id(c): (c, dict(vars(c))) for c in (held.config, held.config.get_text_config(), held.generation_config)}
    try:
        with own_draws(), own_modes(module):
            yield module
    finally:
        for name in module.__dict__.keys() - own.keys():
            del module.__dict__[name]
        if "forward" in own:
            module.forward = own["forward"]
        for config, before in said.values():
            vars(config).clear()
            vars(config).update(before)
        for parameter, needed in free:
            parameter.requires_grad_(needed)
            parameter.grad = None


def bar() -> Any:
    """A progress bar of optimizer steps with the loss beside it."""
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            first = state.is_world_process_zero
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="tuning", leave=False, disable=not first
            )

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return Bar()
