"""What merging a recipe will do, from configurations and headers: mergekit's own plan, checked against what the files hold."""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from surgery.checkpoint import Checkpoint
from surgery.headers import UNTIE, read_config
from surgery.merging.recipe import (
    Recipe,
    RecipeError,
    one_spelling,
    read_recipe,
    references,
    require_inputs,
    swapped,
    valid_seed,
)
from surgery.merging.rules import Rule, Source
from surgery.merging.vocabulary import Vocabulary, gathered, vocabulary_of
from surgery.sites import Site
from surgery.tensorfile import CheckpointError
from surgery.weights import Weights, require_summable

if TYPE_CHECKING:
    from mergekit.architecture import ModelArchitecture, WeightInfo
    from mergekit.common import ModelPath, ModelReference
    from mergekit.config import MergeConfiguration, OutputSliceDefinition
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
    from transformers import PretrainedConfig

Road = Literal["stream", "executor"]
_LAYER = re.compile(r"\.\d+\.")
_NUMBER = re.compile(r"(^|\.)\d+\.")  # of a layer, in a tensor's name or a site
_HEAD = Site(None, "head")
# what a configuration calls tokens that stand for what is seen
_OF_SIGHT = ("image_", "video_", "vision_", "boi_", "eoi_")


@dataclass(frozen=True)
class Plan:
    """What merging a recipe will do, known from configurations and headers alone.

    road:    ``stream``: tensor by tensor through `write`. ``executor``: by mergekit's own executor, into a temporary folder.
    why:     why not by stream; empty where it is.
    layout:  the checkpoint whose configuration, tokenizer and other files the output takes: the base, or the first model.
    layers:  for each layer of the output, the layer it takes from its first source; None where the output's layers are the layout's.
    dtype:   in which the output is stored; None where each tensor keeps the layout's.
    sources: each model as written -> its folder, and its adapter's.
    carried: tensors that mergekit's table of the architecture does not list: they are the layout's own.
    left:    each model as written -> its tensors that no family's table names and the layout lacks: the output is without them.
    rules:   how each output tensor is computed, by its name.
    vocabulary: the tokens of the result, where the recipe asks for a tokenizer; None where they are the layout's, or the executor builds them.
    """

    recipe: Recipe
    config: MergeConfiguration
    road: Road
    why: str
    layout: Path
    layers: tuple[int, ...] | None
    dtype: torch.dtype | None
    sources: Mapping[str, tuple[Path, Path | None]]
    carried: tuple[str, ...]
    left: Mapping[str, tuple[str, ...]]
    rules: Mapping[str, Rule] = field(repr=False)
    vocabulary: Vocabulary | None = field(default=None, repr=False)

    @property
    def is_known(self) -> bool:
        """Whether the layout's family has an anatomy."""
        try:
            Checkpoint(self.layout)
        except ValueError:
            return False
        return True

    @property
    def left_behind(self) -> list[str]:
        """What the output lacks of a model, a line for each."""
        return [
            f"{len(tensors)} tensors of {name} are left behind, first {', '.join(tensors[:3])}"
            for name, tensors in self.left.items()
        ]

    def __str__(self) -> str:
        how = "tensor by tensor" if self.road == "stream" else f"by mergekit's executor, because {self.why}"
        stored = "as found" if self.dtype is None else f"in {str(self.dtype).removeprefix('torch.')}"
        lines = [
            f"{self.recipe.method} of {len(self.recipe.models)} models, {how}; stored {stored}, like {self.layout}",
            *(f"  {ref}{' (base)' if ref == self.recipe.base else ''}" for ref in self.recipe.models),
        ]
        if self.layers is not None:
            lines.append(f"{len(self.layers)} layers, from {spans(self.layers)}")
        if self.vocabulary is not None:
            lines.append(
                f"a vocabulary of {len(self.vocabulary.ids)} tokens, and {self.vocabulary.rows} rows in its embedding"
            )
        if self.carried:
            lines.append(
                f"{len(self.carried)} tensors that the rule does not reach stay the base's, first {self.carried[0]}"
            )
        lines += self.left_behind
        if self.recipe.unused:
            lines.append(
                f"{self.recipe.method} has no parameter {', '.join(self.recipe.unused)}: ignored, as by mergekit"
            )
        return "\n".join(lines)


def plan(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    *,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    multi_gpu: bool = False,
) -> Plan:
    """What `merge` would do; configurations and headers are read, no tensor is.

    recipe: a `Recipe`, or what `read_recipe` reads. Other arguments as of `merge`.

    Raises RecipeError for models that do not fit together (a tensor that one lacks, shapes that differ), layers that one does not have and
    parameters whose filters leave a tensor without a value; FileNotFoundError and CheckpointError for models that are not there or damaged;
    and as `read_recipe`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    chosen = recipe.seed if seed is None else valid_seed(seed, "merge")
    local = {ref: _local(ref) for ref in references(recipe.config)}
    same = one_spelling(local.values())
    labels = {ref: same[here] for ref, here in local.items()}
    config = swapped(recipe.config, lambda ref: labels.get(ref) or _local(ref))  # those of a tokenizer are no inputs
    require_inputs(config, labels, "The recipe")  # `specimen` or a hub id may be a folder that is named too
    names: dict[ModelReference, str] = {}
    for ref, here in labels.items():  # the first, which is the base's
        names.setdefault(here, str(ref))
    order = references(config)
    main = config.base_model or order[0]
    folders = {names[r]: (Path(r.model.path), Path(r.lora.path) if r.lora else None) for r in order}
    sources, why = _open(order, names)
    aligned = bool(config.tokenizer or config.tokenizer_source)
    if multi_gpu:
        if torch.cuda.device_count() == 0:
            raise RecipeError("multi_gpu: there is no GPU here. Leave it out: the merge then runs on the processor.")
        why = why or "several GPUs are asked for"
    _require_layers(config, sources, names)
    left = _left(sources, main, names, layered=bool(_pieces(config)))
    with quiet(), loaders(order):
        architecture = _architecture(config)
        try:
            planned = _planned(config, architecture)
            misfit = _misfit(config, planned, sources, main, names, why) if len(sources) == len(order) else None
        except RecipeError as error:
            planned, misfit = [], error
        if misfit is not None and why:
            raise misfit
        if misfit is not None:
            architecture = _table(config, architecture, sources, main, misfit)
            planned = _planned(config, architecture)
    said = _dtype(config.out_dtype or config.dtype) if dtype is None else dtype

    def executor(why: str) -> Plan:
        _require_heads(planned, sources, main, names, {})
        return Plan(recipe, config, "executor", why, Path(main.model.path), None, said, folders, (), left, {})

    _require_tokens(config, sources, {ref: names[ref] for ref in order})
    if aligned and main in sources:
        _require_placeholders(config, sources[main].layout, names[main])
        if why and sources[main].layout.anatomy.tower is not None:
            raise RecipeError(
                f"mergekit's executor, needed because {why}, does not find how many tokens {names[main]} has beside its tower. "
                "Leave that out: our stream then lines up its tokens."
            )
    if why:
        return executor(why)
    if any(weight.force_dtype for weight, _ in planned):
        return executor("the architecture fixes the dtype of some tensors")
    arithmetic = _dtype(config.dtype)
    if recipe.compute == "float32":
        arithmetic = torch.promote_types(torch.float32, arithmetic or torch.float32)
    literal = recipe.compute == "mergekit"
    vocabulary = vocabulary_of((task for _, task in planned), sources, names) if aligned else None
    rules = {
        weight.name: Rule(task, _inputs(task, sources, names), arithmetic, literal, chosen, names, vocabulary)
        for weight, task in planned
    }
    _require_heads(planned, sources, main, names, rules)
    layout = sources[main].layout
    layers = _layers(config, layout.anatomy.n_layers)
    if layers is not None:
        if len(architecture.modules) != 1:
            return executor("the layers of a model of several parts are stacked anew")
        head = layout.anatomy.places.get(_HEAD)
        if head is not None and head.name not in rules:
            raise RecipeError(
                f"{names[main]}, like which the result is laid out, has a head of its own, and the model of the last layers, whose head the result "
                f"would have, ties its to the embedding. Untie that one first: {UNTIE}."
            )
        known = {_LAYER.sub(".", name) for name in layout.tensors}
        stacked = {_as_stored(rule.task.output_weight, known): rule for rule in rules.values()}
        out = said or _promoted_by_role(stacked)
        return Plan(recipe, config, "stream", "", layout.folder, layers, out, folders, (), left, stacked, vocabulary)
    placed: dict[str, Rule] = {}
    for name, rule in rules.items():
        weight = rule.task.output_weight
        here = sources[main].find((name, *(weight.aliases or ())))
        if here is None or here in layout.anatomy.copies:
            if weight.optional:  # a head that the layout ties
                continue
            return executor(f"{layout.folder} has no tensor {name}")
        placed[here] = rule
    reached = {*placed, *layout.anatomy.copies}
    carried = tuple(name for name in layout.tensors if name not in reached)
    out = said or _promoted(placed, layout)
    return Plan(recipe, config, "stream", "", layout.folder, None, out, folders, carried, left, placed, vocabulary)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name.removeprefix("torch."))


def _promoted(rules: Mapping[str, Rule], layout: Checkpoint) -> torch.dtype | None:
    """What the inputs' dtypes and the layout's promote to, where they are not the layout's own."""
    found = {name: {rule.found, layout.tensors[name].dtype} for name, rule in rules.items()}
    wider = {dtype for dtypes in found.values() if len(dtypes) > 1 for dtype in dtypes}
    return reduce(torch.promote_types, wider) if wider else None


def _promoted_by_role(rules: Mapping[str, Rule]) -> torch.dtype | None:
    """The same for layers stacked anew, where what is stored differently is a tensor of one layer and its like of another."""
    found: dict[str, set[torch.dtype]] = {}
    for name, rule in rules.items():
        source, first = next(iter(rule.inputs.values()))
        found.setdefault(_LAYER.sub(".", name), set()).update({rule.found, source.layout.tensors[first].dtype})
    wider = {dtype for dtypes in found.values() if len(dtypes) > 1 for dtype in dtypes}
    return reduce(torch.promote_types, wider) if wider else None


def _layers(config: MergeConfiguration, count: int) -> tuple[int, ...] | None:
    """For each layer of the output the layer of its first source; None where they are the layout's, in order."""
    pieces = _pieces(config)
    if not pieces:
        return None
    layers = tuple(layer for piece in pieces for layer in range(*piece.sources[0].layer_range))
    return None if layers == tuple(range(count)) else layers


def _pieces(config: MergeConfiguration) -> list[OutputSliceDefinition]:
    """The ranges of layers that a recipe stacks; none where it merges whole models."""
    return config.slices or [piece for module in (config.modules or {}).values() for piece in module.slices or ()]


def spans(layers: tuple[int, ...]) -> str:
    """``(0, 1, 2, 1, 2)`` -> ``0-2, 1-2``."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in spans)


def _local(ref: ModelReference) -> ModelReference:
    """The same reference with folders for hub ids and for ``specimen``; what is a folder already keeps its spelling."""
    from mergekit.common import ModelPath

    def folder(path: ModelPath | None) -> ModelPath | None:
        return None if path is None else ModelPath(path=_folder(path.path, path.revision))

    return ref.model_copy(update={"model": folder(ref.model), "lora": folder(ref.lora)})


def _folder(path: str, revision: str | None) -> str:
    from surgery.model import find

    if Path(path).is_dir():
        return path
    found = find(path if revision is None else f"{path}@{revision}")
    if not found.is_dir():
        raise FileNotFoundError(f"{path} is not a folder. A model is a folder, 'specimen', or a hub id.")
    return str(found)


def _open(
    references: Iterable[ModelReference], names: Mapping[ModelReference, str]
) -> tuple[dict[ModelReference, Source], str]:
    """Each model, and why some could not be read: a family or an adapter that only mergekit knows. RecipeError for a quantised one."""
    opened: dict[ModelReference, Source] = {}
    refused = ""
    for ref in references:
        try:
            layout = Checkpoint(ref.model.path)
            opened[ref] = Source(layout if ref.lora is None else _adapted(layout, ref.lora.path), layout)
        except CheckpointError as error:
            raise type(error)(f"model {names[ref]}: {error}") from error
        except ValueError as error:
            refused = refused or str(error)
    for ref, source in opened.items():
        try:
            for site in source.layout:
                require_summable(source.layout, site)
        except ValueError as error:
            raise RecipeError(f"model {names[ref]}: {error}") from error
    return opened, refused


def _require_layers(
    config: MergeConfiguration, sources: Mapping[ModelReference, Source], names: Mapping[ModelReference, str]
) -> None:
    """Raise RecipeError for ranges that run beyond a model's layers."""
    for asked in (source for piece in _pieces(config) for source in piece.sources if source.model in sources):
        (first, last), layers = asked.layer_range, sources[asked.model].layout.anatomy.n_layers
        if last > layers:
            raise RecipeError(
                f"{names[asked.model]} is asked for layers {first} to {last - 1}, but has 0 to {layers - 1}. Write layer_range: "
                f"[{min(first, layers - 1)}, {layers}] or less."
            )


def _left(
    sources: Mapping[ModelReference, Source],
    main: ModelReference,
    names: Mapping[ModelReference, str],
    *,
    layered: bool,
) -> dict[str, tuple[str, ...]]:
    """Each model's tensors that no family's table names and the layout lacks; RecipeError for weights that it lacks, or more layers.

    layered: whether ranges of layers are stacked, so that their numbers are not compared. A head is judged by `_require_heads`.
    """
    from surgery.merging.table import is_weight

    def kind(site: Site) -> str:
        return _NUMBER.sub(".", str(site)) if layered else str(site)

    left: dict[str, tuple[str, ...]] = {}
    layout = sources[main].layout if main in sources else None
    for ref, source in sources.items():
        its = source.layout
        if layout is None or its.config.model_type != layout.config.model_type:  # mergekit says that
            continue
        if its.anatomy.n_layers != layout.anatomy.n_layers and not layered:
            raise RecipeError(
                f"{names[ref]} has {its.anatomy.n_layers} layers, and {names[main]} {layout.anatomy.n_layers}. Take ranges of layers (slices: with "
                "layer_range:), or another model."
            )
        places = {kind(site) for site in layout.anatomy.places}
        more = {
            name: sites
            for name, sites in its.anatomy.stored_in().items()
            if name not in its.anatomy.copies and sites != [_HEAD] and not places.intersection(map(kind, sites))
        }
        lost = sorted(str(sites[0]) for name, sites in more.items() if is_weight(its, name, sites))
        if lost:
            raise RecipeError(
                f"{names[ref]} has {len(lost)} weights that {names[main]}, like which the result is laid out, has no place for, first "
                f"{', '.join(lost[:3])}: without them it is another model. Use models with the same tensors."
            )
        if more:
            left[names[ref]] = tuple(sorted(more))
    return left


def _adapted(layout: Checkpoint, folder: str) -> Weights:
    from surgery.lowrank import Adapter

    return layout + Adapter(folder, layout)


@contextmanager
def loaders(references: Iterable[ModelReference]) -> Iterator[None]:
    """mergekit's cache of open models, without what an earlier call left and with adapters' base models for their names; and each model's
    configuration is read once, which mergekit reads anew for every slice, parameter and question."""
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    cache, configured = LoaderCache.loaders, ModelReference.config
    kept, read = dict(cache), functools.cache(configured)
    cache.clear()

    def config(self: ModelReference, trust_remote_code: bool = False) -> PretrainedConfig:
        return copy.deepcopy(read(self, trust_remote_code))  # the output's is made of one

    ModelReference.config = config
    try:
        for ref in references:
            if ref.lora is not None:
                cache[ref] = ModelReference(model=ref.model).lazy_loader(lazy_unpickle=False)
        yield
    finally:
        ModelReference.config = configured
        cache.clear()
        cache.update(kept)


def _architecture(config: MergeConfiguration) -> ModelArchitecture:
    """mergekit's own table of the models' tensors."""
    from mergekit.architecture import get_architecture_info
    from mergekit.options import MergeOptions

    with _planning():
        return get_architecture_info(config, MergeOptions(lazy_unpickle=False))


def _planned(
    config: MergeConfiguration, architecture: ModelArchitecture
) -> list[tuple[WeightInfo, ExecuteMergeMethodTask]]:
    """mergekit's own plan: for each output tensor what it is and the task that holds its rule, inputs and parameters."""
    from mergekit.io.tasks import SaveTensor
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    options = MergeOptions(lazy_unpickle=False)
    with _planning():
        planner = MergePlanner(
            config.model_copy(deep=True), architecture, options, _model_out_config(config, architecture)
        )
        tasks = planner.plan_to_disk(out_path=os.devnull)  # plans only; its writer opens nothing before it runs
    rules: list[Any] = [task.tensor_task for task in tasks if isinstance(task, SaveTensor)]
    return [(rule.output_weight, rule) for rule in rules]


@contextmanager
def _planning() -> Iterator[None]:
    """What mergekit raises while it plans, as one clear error."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        said = (
            lines[0] if len(lines) == 1 else f"{lines[0]} [...] {lines[-1].strip()}"
        )  # a whole configuration may be between
        raise RecipeError(f"mergekit cannot plan this recipe: {said}") from error


def _misfit(
    config: MergeConfiguration,
    planned: Iterable[tuple[WeightInfo, ExecuteMergeMethodTask]],
    sources: Mapping[ModelReference, Source],
    main: ModelReference,
    names: Mapping[ModelReference, str],
    executor: str,
) -> RecipeError | None:
    """Why a plan by mergekit's table does not fit the files: it names a tensor that they lack, or leaves weights out.

    executor: why mergekit's own executor is to run it, which makes some tensors of others, all experts of a layer one; else empty.
    """
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    from surgery.merging.table import is_weight

    rest = ""
    if executor:
        rest = f" mergekit's executor goes by that table, and is needed because {executor}. Leave that out: then the files' own names do."
    reached: set[str] = set()
    made = False
    for _, task in planned:
        for ref, weight in gathered(task).weight_info.items():
            found = _find(sources[ref], weight)
            if found is not None:
                reached.add(_LAYER.sub(".", found))
            elif not weight.optional:
                there = sources[ref].layout
                if not executor or not can_convert_checkpoint_keys(
                    there.config.model_type, set(there.tensors), weight.name
                ):
                    return RecipeError(f"{_lacks(names[ref], weight)}{rest}")
                made = True
    layout = sources[main].layout
    homes = layout.anatomy.stored_in()
    left = [
        name
        for name, sites in homes.items()
        if _LAYER.sub(".", name) not in reached
        and name not in layout.anatomy.copies
        and sites != [_HEAD]
        # of a recipe by parts of the model, what is in none of them stays the base's
        and (not all(site.is_unnamed for site in sites) or (config.modules is None and is_weight(layout, name, sites)))
    ]
    if made:  # of experts, which have another name in one
        left = [name for name in left if not all(site.part.startswith("mlp.") for site in homes[name])]
    if not left:
        return None
    return RecipeError(
        f"mergekit's table of {layout.anatomy.family} does not reach {len(left)} weights, first {left[0]}.{rest}"
    )


def _table(
    config: MergeConfiguration,
    theirs: ModelArchitecture,
    sources: Mapping[ModelReference, Source],
    main: ModelReference,
    misfit: RecipeError,
) -> ModelArchitecture:
    """A table of the files' own tensors, where mergekit's does not fit them; RecipeError where the recipe needs mergekit's."""
    from surgery.merging.table import MAIN, Part, table

    layout = sources[main].layout
    if set(config.modules or {MAIN: None}) != {MAIN}:
        raise RecipeError(
            f"{str(misfit).rstrip('.')}. What modules: names are the parts in mergekit's table of {layout.anatomy.family} "
            f"({', '.join(theirs.modules)}), and it does not fit the files. Name the models under models: instead."
        ) from misfit
    if any(source.layout.config.model_type != layout.config.model_type for source in sources.values()):
        raise misfit
    made = table(layout, [source.layout for ref, source in sources.items() if ref != main])
    pieces = _pieces(config)
    if pieces and len(made.modules) > 1:
        raise RecipeError(
            f"{layout.folder} is a model of several parts, and slices: are of one stack of layers. Name the models under models: instead."
        )
    part = made.modules[MAIN].architecture
    assert isinstance(part, Part)
    at = 0
    for piece in pieces:
        if not part.alike() and any(source.layer_range[0] != at for source in piece.sources):
            raise RecipeError(
                f"The layers of {layout.folder} are not all alike (some are dense, some have experts), so that none can take another's place. "
                "Merge whole models, or ranges that stay where they are."
            )
        at += piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
    return made


def _find(source: Source, weight: WeightInfo) -> str | None:
    """What a model's files call the tensor that mergekit asks for."""
    return source.find((weight.name, *(weight.aliases or ()), *(weight.tied_names or ())))


def _lacks(name: str, weight: WeightInfo) -> RecipeError:
    return RecipeError(f"{name} has no tensor {weight.name}, which the merge needs from it.")


def _as_stored(weight: WeightInfo, known: set[str]) -> str:
    """What the layout's files call an output tensor; known: their names without the numbers of layers."""
    names = (weight.name, *(weight.aliases or ()))
    return next((name for name in names if _LAYER.sub(".", name) in known), weight.name)


def _inputs(
    task: ExecuteMergeMethodTask, sources: Mapping[ModelReference, Source], names: Mapping[ModelReference, str]
) -> dict[ModelReference, tuple[Source, str]]:
    """Where the inputs of one output tensor are, found in the files' headers, and their shapes compared."""
    inputs: dict[ModelReference, tuple[Source, str]] = {}
    for ref, weight in gathered(task).weight_info.items():
        name = _find(sources[ref], weight)
        if name is not None:
            inputs[ref] = (sources[ref], name)
        elif not weight.optional:
            raise _lacks(names[ref], weight)
    shapes = {ref: source.layout.tensors[name].shape for ref, (source, name) in inputs.items()}
    lined_up = task.gather_tensors is not gathered(task)  # their numbers of rows may differ
    if len({shape[1:] if lined_up else shape for shape in shapes.values()}) > 1:
        said = ", ".join(f"{names[ref]} {tuple(shape)}" for ref, shape in shapes.items())
        fix = (
            "Their vocabularies differ: say which tokenizer to use, as in tokenizer: {source: base}."
            if task.output_weight.vocabulary_axis is not None
            else "Only models of one architecture and size can be merged."
        )
        raise RecipeError(f"{task.output_weight.name} has different shapes: {said}. {fix}")
    return inputs


def _require_heads(
    planned: Iterable[tuple[Any, ExecuteMergeMethodTask]],
    sources: Mapping[ModelReference, Source],
    main: ModelReference,
    names: Mapping[ModelReference, str],
    rules: Mapping[str, Rule],
) -> None:
    """Raise RecipeError for a trained head that would be lost: an input has one of its own, and `main`, like which the output is laid out, ties its.

    An input whose weight is 0 loses nothing; `rules` may be empty, and then nothing is known of weights.
    """
    if main not in sources or _HEAD not in sources[main].layout.anatomy.ties:
        return
    for weight, task in planned:
        if not (weight.optional and weight.tied_names):
            continue
        shared = [rules[name] for name in (weight.name, *weight.tied_names) if name in rules]
        for ref in task.model_order:
            found = sources[ref].find((weight.name, *(weight.aliases or ()))) if ref in sources else None
            if found is None or found in sources[ref].layout.anatomy.copies:
                continue
            if not shared or any(rule.sum is None or rule.sum.get(ref, 0) != 0 for rule in shared):
                raise RecipeError(
                    f"{names[ref]} has a head of its own ({found}), and {names[main]}, like which the result is laid out, ties its head to the "
                    f"embedding: the trained head would be lost. Make {names[ref]} the base_model, or untie {names[main]} first: {UNTIE}."
                )


def _require_tokens(
    config: MergeConfiguration, sources: Mapping[ModelReference, Source], names: Mapping[ModelReference, str]
) -> None:
    """Raise RecipeError for a token of the recipe's own that is to come from a model or a row that is not there."""
    from mergekit.tokenizer.config import ModelTokenEmbedding, ZeroEmbedding

    for token, asked in ((config.tokenizer and config.tokenizer.tokens) or {}).items():
        row = asked.source
        if row is None or isinstance(row, ZeroEmbedding):
            continue
        ref = row.model if isinstance(row, ModelTokenEmbedding) else row
        said = f"tokenizer: token {token!r} is to come from {names.get(ref, ref)}"
        if ref not in names:
            raise RecipeError(f"{said}, which is not among the merged models. Name one of {', '.join(names.values())}.")
        if isinstance(row, ModelTokenEmbedding) and row.token_id is not None:
            rows = sources[ref].layout.anatomy.vocab if ref in sources else None
            if rows is not None and not 0 <= row.token_id < rows:
                raise RecipeError(
                    f"{said}, whose embedding has {rows} rows and none of id {row.token_id}. Write an id from 0 to {rows - 1}."
                )
            continue
        wanted = row.token if isinstance(row, ModelTokenEmbedding) else token
        if wanted not in _vocabulary(ref.model.path, names[ref]):
            raise RecipeError(
                f"{said}, whose tokenizer has no {wanted!r}. Name a model that has it, or another token: "
                "{kind: model_token, model: MODEL, token: TOKEN}."
            )


def _require_placeholders(config: MergeConfiguration, layout: Checkpoint, name: str) -> None:
    """Raise RecipeError where a new vocabulary would move or drop the tokens in whose places a vision-language model puts what it sees."""
    if layout.anatomy.tower is None:
        return
    said = read_config(layout.folder)
    places = {
        key: value
        for key, value in said.items()
        if key.startswith(_OF_SIGHT) and key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    own = _vocabulary(str(layout.folder), name)
    tokens = {i: token for token, i in own.items()}
    lost = next((key for key, i in places.items() if i not in tokens), None)
    if lost is not None:
        raise RecipeError(
            f"{name} says {lost} {places[lost]}, and of the {len(own)} tokens that its tokenizer has none has that id: an embedding built anew would "
            "have no row for it. Leave the tokenizer out of the recipe, or add that token to the model's tokenizer first."
        )
    if source is None or isinstance(source, str):  # the base's ids, and others after them
        return
    its = _vocabulary(source.model.path, str(source))
    moved = next((key for key, i in places.items() if its.get(tokens[i]) != i), None)
    if moved is not None:
        token = tokens[places[moved]]
        there = f"is {its[token]} in" if token in its else "is not in"
        raise RecipeError(
            f"{name} says {moved} {places[moved]}, which is {token}, and that token {there} the tokenizer of {source}: what the model sees would be "
            "put in the wrong place. Write tokenizer: {source: base}, or union."
        )


def _vocabulary(folder: str, name: str) -> dict[str, int]:
    """Token -> id, as mergekit reads them."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")
        raise RecipeError(
            f"The tokenizer of {name} cannot be read: {said}. Leave the tokenizer out of the recipe."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines below errors, and none of the handlers that logging would install by itself."""
    root, before = logging.getLogger(), logging.root.manager.disable
    silent = logging.NullHandler()
    root.addHandler(silent)
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(silent)
