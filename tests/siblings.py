"""Tiny siblings of one random model, recipes over them for every deterministic method of mergekit, and mergekit's own run of a recipe."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from surgery.checkpoint import Checkpoint
from surgery.merging import Merged, plan, read_recipe
from tests.families import save_tiny, save_tiny_vlm

FAMILIES = ("llama", "qwen2")
NAMES = ("a", "b", "c")
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}


def sibling(base: Path, to: Path, seed: int, share: float = 0.05, dtype: torch.dtype | None = None) -> Path:
    """A copy of a checkpoint, every tensor moved by Gaussian noise of `share` times its RMS."""
    shutil.copytree(base, to)
    generator = torch.Generator().manual_seed(seed)
    for path in to.glob("*.safetensors"):
        tensors = load_file(path)
        for name, w in sorted(tensors.items()):
            noise = torch.randn(w.shape, generator=generator)
            tensors[name] = (w.float() + share * w.float().square().mean().sqrt() * noise).to(dtype or w.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return to


def siblings(family: str, home: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """A folder with base, a, b and c: three siblings near one random model, or vision-language model as in ``llava (vision)``."""
    name, vision, _ = family.partition(" (vision)")
    (save_tiny_vlm if vision else save_tiny)(name, home / "base", dtype=dtype, **options)
    for seed, name in enumerate(NAMES, 1):
        sibling(home / "base", home / name, seed)
    return home


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def by_mergekit(recipe: dict, to: Path, seed: int | None = None) -> dict[str, torch.Tensor]:
    config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe)))
    logging.disable(logging.WARNING)
    try:
        options = MergeOptions(quiet=True, lazy_unpickle=False, write_model_card=False, random_seed=seed)
        run_merge(config, str(to), options)
    finally:
        logging.disable(logging.NOTSET)
    return tensors_of(to)


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype for name in a)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def of(home: Path, method: str, names=NAMES, *, base: bool = True, parameters=None, each=None, **extra) -> dict:
    """A recipe over some of the siblings; `each`: name -> its own parameters."""
    each = each or {}
    models = [{"model": str(home / n)} | ({"parameters": each[n]} if n in each else {}) for n in names]
    recipe = {"merge_method": method, "models": models, **extra}
    if base:
        recipe["base_model"] = str(home / "base")
    if parameters:
        recipe["parameters"] = parameters
    return recipe


WEIGHTS = {"a": {"weight": 0.5}, "b": {"weight": 0.3}, "c": {"weight": 0.4}}
DENSE = {n: {**w, "density": d} for (n, w), d in zip(WEIGHTS.items(), (0.6, 0.35, 1.0), strict=True)}
GRADIENT = {
    "weight": [{"filter": "mlp", "value": [0.1, 0.9]}, {"filter": "self_attn", "value": [0.8, 0.2]}, {"value": 0.5}]
}

DETERMINISTIC = {
    "linear": lambda h: of(h, "linear", base=False, each=WEIGHTS),
    "linear-not-normalised": lambda h: of(h, "linear", base=False, each=WEIGHTS, parameters={"normalize": False}),
    "linear-gradient": lambda h: of(h, "linear", base=False, each=dict.fromkeys(NAMES, GRADIENT)),
    "task_arithmetic": lambda h: of(h, "task_arithmetic", each=WEIGHTS),
    "task_arithmetic-normalised": lambda h: of(
        h, "task_arithmetic", each=WEIGHTS, parameters={"normalize": True, "lambda": 0.7}
    ),
    "task_arithmetic-gradient": lambda h: of(h, "task_arithmetic", each={"a": GRADIENT, "b": GRADIENT, "c": WEIGHTS["c"]}),
    "slerp": lambda h: of(h, "slerp", ("base", "a"), parameters={"t": 0.3}),
    "slerp-gradient": lambda h: of(
        h,
        "slerp",
        ("a",),
        parameters={"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]},
    ),
    "nuslerp": lambda h: of(h, "nuslerp", ("a", "b"), base=False, each=WEIGHTS),
    "nuslerp-base": lambda h: of(h, "nuslerp", ("a", "b"), each=WEIGHTS, parameters={"nuslerp_flatten": False}),
    "nuslerp-row-wise": lambda h: of(
        h, "nuslerp", ("a", "b"), each=WEIGHTS, parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}
    ),
    "multislerp": lambda h: of(h, "multislerp", base=False, each=WEIGHTS),
    "multislerp-base": lambda h: of(h, "multislerp", each=WEIGHTS),
    "karcher": lambda h: of(h, "karcher", base=False),
    "passthrough": lambda h: of(h, "passthrough", ("a",), base=False),
    "passthrough-scale": lambda h: of(
        h, "passthrough", ("a",), base=False, parameters={"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}
    ),
    "ties": lambda h: of(h, "ties", each=DENSE),
    "ties-int8-lambda": lambda h: of(h, "ties", each=DENSE, parameters={"int8_mask": True, "lambda": 1.3, "normalize": False}),
    "ties-rescale": lambda h: of(h, "ties", each=DENSE, parameters={"rescale": True}),
    "ties-gradient": lambda h: of(h, "ties", each={**WEIGHTS, "b": {"weight": 0.5, "density": [0.1, 0.9]}}),
    "breadcrumbs": lambda h: of(h, "breadcrumbs", each={n: {**p, "gamma": 0.02} for n, p in DENSE.items()}),
    "breadcrumbs_ties": lambda h: of(h, "breadcrumbs_ties", each=DENSE),
    "sce": lambda h: of(h, "sce", parameters={"select_topk": 0.4}),
    "ram": lambda h: of(h, "ram"),
    "ramplus_tl": lambda h: of(h, "ramplus_tl", parameters={"r": 0.2}),
    "model_stock": lambda h: of(h, "model_stock"),
    "model_stock-filter-wise": lambda h: of(h, "model_stock", parameters={"filter_wise": True}),
    "nearswap": lambda h: of(h, "nearswap", ("a",), parameters={"t": 0.003}),
    "arcee_fusion": lambda h: of(h, "arcee_fusion", ("a",)),
}  # fmt: skip


def point_of(recipe: dict, seed: int = 0) -> Merged:
    made = plan(read_recipe(recipe), seed=seed)
    return Merged(made, Checkpoint(made.layout))
