"""A table of a family's tensors made from the files, for models whose files name them otherwise than mergekit's own table does.

mergekit plans a merge by a table: which tensors come before, in and after the layers. Its tables name some families' tensors as other
versions of transformers saved them, ask for buffers that files no longer have, or take all experts of a layer for one tensor. An
element-wise rule needs no more than the like tensors of each model, and those the anatomies of the files know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mergekit.architecture import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from surgery.checkpoint import Checkpoint
from surgery.sites import Site

MAIN = "default"  # mergekit's word for the one part of a plain model
_NUMBER = re.compile(r"\.(\d+)\.")
_EMBED, _HEAD = Site(None, "embed"), Site(None, "head")
_LAST = ("norm", "norm.bias", "head.bias")


class Part(ModuleArchitecture):
    """The tensors of one part of a model, as mergekit asks for them: before its layers, in each, after them."""

    def __init__(self) -> None:
        self.before: list[WeightInfo] = []
        self.layers: dict[int, list[WeightInfo]] = {}
        self.after: list[WeightInfo] = []

    def pre_weights(self, config: Any) -> list[WeightInfo]:
        return self.before

    def post_weights(self, config: Any) -> list[WeightInfo]:
        return self.after

    def layer_weights(self, index: int, config: Any) -> list[WeightInfo]:
        """The tensors of a layer; of one past the last, as in a model with more layers, those of the first with its number."""
        if index < self.num_layers(config):
            return self.layers.get(index, [])
        return [_numbered(weight, index) for weight in self.layers[0]]

    def num_layers(self, config: Any) -> int:
        return max(self.layers, default=-1) + 1

    def alike(self) -> bool:
        """Whether every layer has the like of the first layer's tensors."""
        kinds = [[_numbered(weight, 0).name for weight in layer] for layer in self.layers.values()]
        return all(kind == kinds[0] for kind in kinds)


def table(layout: Checkpoint, others: Iterable[Checkpoint]) -> ModelArchitecture:
    """mergekit's table of the models' tensors, with the names that `layout` and then the others have in their files.

    Tensors are alike where they hold the same sites. One's name, which filters of parameters see, is the live module's where that only
    renames the file's (``mlp`` for Mixtral's ``block_sparse_moe``), as in mergekit's tables. What the family's table does not name is
    left out, except in a vision-language model, where it is a weight like others, and each stack of layers outside the language model
    is a part of its own.
    """
    models = [layout, *others]
    names: dict[tuple[Site, ...], list[str]] = {}
    for model in models:
        for name, sites in model.anatomy.stored_in().items():
            if name not in model.anatomy.copies:
                names.setdefault(tuple(sites), []).append(name)
    parts = {MAIN: Part()}
    for name, sites in layout.anatomy.stored_in().items():
        first = sites[0]
        if name in layout.anatomy.copies or first == _HEAD or not is_weight(layout, name, sites):
            continue
        weight = WeightInfo(
            name=_in_module(layout, name),
            aliases=tuple(dict.fromkeys(names[tuple(sites)])),
            vocabulary_axis=0 if first in (_EMBED, Site(None, "head.bias")) else None,
        )
        stack = _NUMBER.search(name) if first.is_unnamed else None
        if first.layer is not None:
            parts[MAIN].layers.setdefault(first.layer, []).append(weight)
        elif stack is not None:
            parts.setdefault(name[: stack.start()], Part()).layers.setdefault(int(stack[1]), []).append(weight)
        else:
            (parts[MAIN].after if first.part in _LAST else parts[MAIN].before).append(weight)
    parts[MAIN].after += _heads(layout, names)
    modules = {key: ModuleDefinition(architecture=part) for key, part in parts.items()}
    return ModelArchitecture(modules=modules, architectures=[], model_type=layout.config.model_type)


def is_weight(model: Checkpoint, name: str, sites: list[Site]) -> bool:
    """Whether a tensor is a weight of the model's: one that its family's table names, or one of what sees in a vision-language model."""
    if not all(site.is_unnamed for site in sites):
        return True
    return model.anatomy.tower is not None and model.tensors[name].dtype.is_floating_point


def _heads(layout: Checkpoint, names: dict[tuple[Site, ...], list[str]]) -> list[WeightInfo]:
    """The head, optional as in mergekit's tables: where a model ties it, its embedding stands for it.

    mergekit cannot look for an optional tensor under several names: all but the first are among those that stand for it.
    """
    heads, embeds = dict.fromkeys(names.get((_HEAD,), ())), dict.fromkeys(names[(_EMBED,)])
    if _HEAD in layout.anatomy.ties:
        return [WeightInfo(name=name, optional=True, vocabulary_axis=0, tied_names=tuple(embeds)) for name in heads]
    first, *rest = heads
    return [WeightInfo(name=first, optional=True, vocabulary_axis=0, tied_names=(*rest, *embeds))]


def _numbered(weight: WeightInfo, layer: int) -> WeightInfo:
    """The same tensor of another layer."""

    def moved(name: str) -> str:
        return _NUMBER.sub(f".{layer}.", name, count=1)

    return weight.model_copy(update={"name": moved(weight.name), "aliases": tuple(map(moved, weight.aliases or ()))})


def _in_module(model: Checkpoint, name: str) -> str:
    for step in get_checkpoint_conversion_mapping(model.config.model_type) or ():
        if isinstance(step, WeightRenaming):
            name, _ = step.rename_source_key(name)
    return name
