"""What the config of a PEFT adapter makes of its tensors, and which pairs of them are a LoRA: headers alone, without torch."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.adapter_names import CONFIG, WEIGHTS
from surgery.headers import CheckpointError, read_json

_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights",
    "ensure_weight_tying", "modules_to_save", "bias", "lora_bias",
}  # fmt: skip
_SAY_NOTHING = {  # of what the stored tensors mean: which modules were meant, how they were trained and saved
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # as they begin, so that B A alone is not the change
MERGE = "PEFT can merge it into a model, PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload().save_pretrained(NEW): then take NEW - BASE."
_MOST = 1e30  # an alpha beyond it is damage


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The config of a LoRA folder whose tensors mean ``(alpha / r) B A``; a CheckpointError that says what else it is."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: it is not a PEFT adapter.")
    if not (folder / WEIGHTS).is_file():
        pickle = next(folder.glob("adapter_model.*"), None)
        if pickle is None:
            raise CheckpointError(f"{folder} has no {WEIGHTS}. Download it again.")
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} but a pickle ({pickle.name}), which can run code when opened and is refused. Convert it once, where you "
            "trust it: PeftModel.from_pretrained(MODEL, FOLDER).save_pretrained(NEW_FOLDER)."
        )
    config = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        found = f"is an adapter of type {reprlib.repr(kind)}" if kind else "does not say that it is a LoRA"
        raise CheckpointError(f"{path} {found}, and only LoRA is a difference of low rank. {MERGE}")
    for name, value in config.items():
        if value and name not in _READ | _SAY_NOTHING:
            raise CheckpointError(f"{path} sets {name}, with which the tensors are not the change. {MERGE}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise CheckpointError(
            f"{path}: training began with {start}, which changes the base itself, so the adapter alone is not the change. "
            "Save it with PEFT's path_initial_model_for_weight_conversion."
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{path}: {name} is {config[name]!r}, not a mapping of names to numbers.")
    return config


def lora_pair(
    config: Mapping[str, Any],
    module: str,
    kinds: Mapping[str, tuple[int, ...]],
    shape: tuple[int, ...],
    base: str,
    folder: Path,
) -> tuple[str, str, float]:
    """Of a module's tensors, kind -> shape, which is down and which is up, and the factor before their product.

    shape: of the base's matrix, ``[out, in]``. base: what the base is called. Raises CheckpointError where they are no pair that fits it.
    """
    of_embedding = any(kind.startswith("lora_embedding") for kind in kinds)
    first, second = ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A", "lora_B")
    if kinds.keys() - {"lora_magnitude_vector", "lora_B.bias"} != {first, second}:
        raise unusable(folder, f"{module} has {', '.join(sorted(kinds))}; {first} and {second} belong together.")
    if len(shape) != 2:
        raise unusable(folder, f"{module} is {shape} in {base}: only matrices are supported. {MERGE}")
    dora = bool(config.get("use_dora"))
    if dora != ("lora_magnitude_vector" in kinds):
        raise unusable(folder, f"the config says use_dora {dora}, but {module} has {'no' if dora else 'a'} magnitude.")
    rank, scale = _rank_and_scale(config, module, folder)
    out, into = shape
    expected: dict[str, tuple[int, ...]] = {
        first: (rank, out if of_embedding else into),
        second: (into if of_embedding else out, rank),
        "lora_magnitude_vector": (into if of_embedding else out,),
        "lora_B.bias": (out,),
    }
    for kind, found in kinds.items():
        if found != expected[kind]:
            raise unusable(
                folder,
                f"{kind} of {module} is {found} but must be {expected[kind]}: the matrix is {(out, into)} in {base}, and the config says "
                f"rank {rank}.",
            )
    return first, second, scale


def unusable(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{folder} is not an adapter that can be used here: {what}")


def _rank_and_scale(config: Mapping[str, Any], module: str, folder: Path) -> tuple[int, float]:
    """A module's rank and the factor before B A, by PEFT's rules for the patterns."""
    name = module.removeprefix("base_model.model.")
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8), folder)
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8), folder)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(
            f"{folder / CONFIG}: the rank of {module} is {reprlib.repr(rank)}, not a whole number from 1."
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not -_MOST < alpha < _MOST:
        raise CheckpointError(
            f"{folder / CONFIG}: the alpha of {module} is {reprlib.repr(alpha)}, not a finite number."
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any, folder: Path) -> Any:
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key

    slow = [p for p in patterns if len(p) > 500 or re.search(r"\)[*+{]", p) or len(re.findall(r"[*+{]", p)) > 4]
    if slow:
        raise CheckpointError(
            f"{folder / CONFIG}: the pattern {reprlib.repr(slow[0])} of its ranks or alphas repeats a group, or repeats too often, and may take for "
            "ever to match. Write out the modules it means."
        )
    try:
        return patterns.get(get_pattern_key(list(patterns), name), default)
    except re.error as error:
        raise CheckpointError(f"{folder / CONFIG}: a pattern of its ranks or alphas is malformed: {error}") from error
