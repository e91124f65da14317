"""From a plan to a folder: through `write`, or through mergekit's executor and then the same verification."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.borrowing import own_draws
from surgery.checkpoint import INDEX, Checkpoint, load_module, point_hash, read_headers
from surgery.hashing import hash_bytes
from surgery.headers import SINGLE
from surgery.merging.planning import Plan, Road, loaders, plan, quiet, spans
from surgery.merging.point import Merged
from surgery.merging.recipe import DTYPES, Recipe, RecipeError, read_recipe
from surgery.proof import Loops, VerificationError, judge_generation, prove_found
from surgery.record import hash_folder
from surgery.reverse import NO_UNDO
from surgery.side_files import copy_file, side_files
from surgery.tensorfile import TensorFile, header_bytes
from surgery.whole import new_folder, require_new
from surgery.writing import Written, write

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

RECIPE = "mergekit_config.yml"  # mergekit's name for the copy of the recipe beside the merged model
_TOKENIZER = {  # mergekit's, where it makes one
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
_SHARD = 5_000_000_000  # bytes, of a model whose layers no input has


@dataclass(frozen=True)
class MergedModel(Written):
    """What `merge` did. road: ``stream`` or ``executor``, and sources: each model's folder and adapter, as in `Plan`."""

    road: Road = "stream"
    sources: Mapping[str, tuple[Path, Path | None]] = field(default_factory=dict)

    def input_hashes(self) -> dict[str, str]:
        """For each model as written, the hash of its tensors, and of its adapter's where it has one. Reads them all."""
        found: dict[str, str] = {}
        for name, (folder, adapter) in self.sources.items():
            found[name], _ = _hashes(folder)
            if adapter is not None:
                words = json.dumps([found[name], hash_folder(adapter)], sort_keys=True)
                found[name] = hash_bytes(words.encode())
        return found

    def unlisted(self) -> str:
        by = "our stream" if self.road == "stream" else "mergekit's executor"
        return f"{len(self.hashes)} tensors merged by {by}"

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "road": self.road}


def merge(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    to: str | os.PathLike[str],
    *,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    multi_gpu: bool = False,
    loops: Loops = "ignore",
    seal: Callable[[Path, MergedModel], object] | None = None,
    progress: bool = False,
) -> MergedModel:
    """Merge models into a new folder: whole or not at all, and verified. Memory is about one tensor of each input.

    recipe:    a `Recipe`, or what `read_recipe` reads.
    seed:      of the random methods, 0 to 2^32 - 1; by default the recipe's own, else 0. The result depends on it, on the tensor and
               on the model's reference, not on the order of tensors or on threads (on mergekit's executor it does).
    dtype:     in which to store; by default the recipe's ``out_dtype``, else its ``dtype``, else what the inputs promote to.
    multi_gpu: let mergekit's executor use all GPUs.
    loops:     as in `write`: what to do when a short generation falls into a loop that the base's does not.
    seal:      as in `write`: called with the finished folder before it appears.

    Beside the model lies the recipe as mergekit keeps it (``mergekit_config.yml``). Raises as `read_recipe`, `plan` and `write` do.
    """
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    to = Path(to)
    require_new(to)
    made = plan(read, seed=seed, dtype=dtype, multi_gpu=multi_gpu)
    chosen = read.seed if seed is None else seed
    how = _in_words(made, chosen)
    finished: list[MergedModel] = []

    def finish(folder: Path, written: Written) -> None:
        _set_template(made.config, folder)
        (folder / RECIPE).write_text(read.text, encoding="utf-8")
        values = {f.name: getattr(written, f.name) for f in fields(Written)}
        merged = MergedModel(
            **{**values, "folder": to, "checks": [how, *written.checks]}, road=made.road, sources=made.sources
        )
        if seal is not None:
            seal(folder, merged)
        finished.append(merged)

    source = None if made.road == "executor" else Checkpoint(made.layout)
    if source is not None and made.layers is None and made.vocabulary is None:
        write(Merged(made, source), to, dtype=made.dtype, loops=loops, seal=finish, progress=progress)
        return finished[0]
    with new_folder(to) as partial:
        inner = partial / "made" / to.name  # apart from the merge's own folders, whatever it is called
        inner.parent.mkdir()
        if source is None:
            written = _executed(made, partial, inner, chosen, multi_gpu, progress)
            no_way_back = "mergekit's executor wrote every tensor anew, and kept nothing of the base"
        else:
            layout = Checkpoint(_skeleton(made, source, partial / "layout"))
            written = write(Merged(made, layout), inner, dtype=made.dtype, undo_limit=0, progress=progress)
            # asked and kept would be against a model that does not exist, and so would the way back
            checks = [check for check in written.checks if not check.startswith(NO_UNDO)]
            written = replace(written, kept={}, base_hash=source.hash(), checks=checks)
            own = "layers" if made.layers is not None else "rows"
            no_way_back = f"no model has these {own}, so that there is none to go back to"
        written.checks.append(f"{NO_UNDO}{no_way_back}")
        _lift(inner, partial)
        if loops != "ignore" and (source or made.is_known):
            written.checks.append(judge_generation(partial, source or Checkpoint(made.layout), loops))
        finish(partial, written)
    return finished[0]


def _in_words(made: Plan, seed: int) -> str:
    from importlib.metadata import version

    rule = f"{made.recipe.method} by the rule of mergekit {version('mergekit')}"
    road = "streamed tensor by tensor" if made.road == "stream" else f"by mergekit's executor, because {made.why}"
    own = f"; {len(made.carried)} tensors outside the rule are the base's own" if made.carried else ""
    layers = f"; {len(made.layers)} layers from {spans(made.layers)}" if made.layers is not None else ""
    left = "".join(f"; {words}" for words in made.left_behind)
    return f"{rule}, {road}, seed {seed}{layers}{own}{left}"


def _lift(inner: Path, partial: Path) -> None:
    """Move the finished model's files up and drop everything else, so that the folder can be renamed into place."""
    for entry in partial.iterdir():
        if entry != inner.parent:
            shutil.rmtree(entry)
    moved = inner.parent.rename(partial / ".done")
    for path in (moved / inner.name).iterdir():
        path.rename(partial / path.name)
    shutil.rmtree(moved)


def _skeleton(made: Plan, source: Checkpoint, folder: Path) -> Path:
    """A checkpoint of the output's layers and rows without contents, for `write` to imitate: files of holes that take no room on the disk."""
    folder.mkdir()
    shards: list[dict[str, tuple[torch.dtype, torch.Size]]] = [{}]
    size = 0
    for name, (dtype, shape) in _kinds(made, source).items():
        length = shape.numel() * dtype.itemsize
        if shards[-1] and size + length > _SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += length
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(names, shards, strict=True):
        _hollow(folder / file, shard)
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=2), encoding="utf-8")
    for name in side_files(source.folder):
        if made.vocabulary is None or name not in _TOKENIZER:
            copy_file(source.folder, folder, name)
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    if made.layers is not None:
        config = _relayered(config, made.layers)
    if made.vocabulary is not None:
        config = _recounted(config, made.vocabulary.rows)
        for name, content in made.vocabulary.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _kinds(made: Plan, source: Checkpoint) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """The dtype and the shape of each of the output's tensors, as they are before it is stored in another dtype."""
    if made.layers is None:
        homes = {name: source.anatomy.places[site].name for name, site in source.anatomy.copies.items()}
        rules = {name: made.rules.get(homes.get(name, name)) for name in source.tensors}
        return {n: (t.dtype, t.shape if (rule := rules[n]) is None else rule.shape) for n, t in source.tensors.items()}
    first = {name: (rule, *next(iter(rule.inputs.values()))) for name, rule in made.rules.items()}
    return {name: (of.layout.tensors[found].dtype, rule.shape) for name, (rule, of, found) in first.items()}


def _hollow(path: Path, tensors: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
    text, size = header_bytes(((name, *kind) for name, kind in tensors.items()), {"format": "pt"})
    with path.open("wb") as sink:
        sink.write(text)
        sink.truncate(size)


def _relayered(config: dict[str, Any], layers: tuple[int, ...]) -> dict[str, Any]:
    """A configuration for other layers: their number, and lists with an entry for each layer."""
    keys = ("num_hidden_layers", "n_layer", "num_layers")
    made: dict[str, Any] = {}
    count = next((config[key] for key in keys if key in config), None)
    for key, value in config.items():
        if key in keys:
            made[key] = len(layers)
        elif isinstance(value, list) and "layer" in key and len(value) == count and max(layers) < len(value):
            made[key] = [value[layer] for layer in layers]
        elif key == "text_config" and isinstance(value, dict):
            made[key] = _relayered(value, layers)
        else:
            made[key] = value
    return made


def _set_template(config: MergeConfiguration, folder: Path) -> None:
    """The chat template the recipe asks for, resolved by mergekit, as the file that transformers reads first."""
    if not config.chat_template:
        return
    from mergekit.merge import _set_chat_template

    holder = SimpleNamespace(chat_template=None)
    try:
        with quiet():
            _set_chat_template(holder, config)  # type: ignore[arg-type] - it only sets the attribute
    except RuntimeError as error:
        raise RecipeError(
            f"chat_template: {error}. Give auto, a name mergekit knows (chatml, llama3, ...) or a template."
        ) from error
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        raise RecipeError("chat_template: the base model has no tokenizer to carry a template.")
    if holder.chat_template is None:
        return  # auto, and no model has one
    words = json.loads(settings.read_text(encoding="utf-8"))
    if words.pop("chat_template", None) is not None:
        settings.write_text(json.dumps(words, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(holder.chat_template, encoding="utf-8")


def _executed(made: Plan, partial: Path, inner: Path, seed: int, multi_gpu: bool, progress: bool) -> Written:
    """The merge by mergekit itself, then judged as `write` judges its own."""
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(
        lora_merge_cache=str(partial / "adapters"),
        lazy_unpickle=False,
        write_model_card=False,
        clone_tensors=True,
        quiet=not progress,
        random_seed=seed,
        multi_gpu=multi_gpu,
        cuda=multi_gpu,
    )
    config = made.config.model_copy(deep=True)
    if made.dtype is not None:
        config.out_dtype = str(made.dtype).removeprefix("torch.")
    if made.recipe.compute == "float32" and config.dtype != "float64":
        config.out_dtype = config.out_dtype or _config_dtype(made.layout)
        config.dtype = "float32"
    try:
        # mergekit draws some of its bars whatever it is told
        with quiet(), loaders(()), own_draws(), nullcontext() if progress else redirect_stderr(io.StringIO()):
            run_merge(config, str(inner), options, config_source=made.recipe.text)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError, ImportError) as error:
        raise RecipeError(
            f"mergekit's executor cannot run this recipe: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    tokenizer_made = bool(config.tokenizer or config.tokenizer_source)
    its_own = {"config.json", *(_TOKENIZER if tokenizer_made else ())}
    kept = [name for name in side_files(made.layout) if name not in its_own]
    for name in kept:
        copy_file(made.layout, inner, name)
    return _judged(inner, made, kept)


def _recounted(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A configuration for an embedding of other rows: of a vision-language model's they are in the language model's part."""
    inner = config.get("text_config")
    parts = {"text_config": inner | {"vocab_size": rows}} if isinstance(inner, dict) else {}
    return config | parts | ({"vocab_size": rows} if not parts or "vocab_size" in config else {})


def _config_dtype(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said = config.get("dtype") or config.get("torch_dtype")
    return said if said in DTYPES else None


def _judged(folder: Path, made: Plan, kept: list[str]) -> Written:
    """Our verification of a folder that somebody else wrote. kept: the side files that are the layout's."""
    for path in sorted(folder.glob("*.safetensors")):
        file = TensorFile(path)
        for name in file.tensors:
            _require_finite(file[name], name)
    (point, hashes), (base, _) = _hashes(folder), _hashes(made.layout)
    checks = prove_found(folder, hashes, Checkpoint(made.layout), kept) if made.is_known else _by_name(folder)
    return Written(folder, point, base, hashes, {}, ["every value finite", *checks])


def _hashes(folder: Path) -> tuple[str, dict[str, str]]:
    """The hash of a folder's point, and of each of its tensors; its family need not be known."""
    tensors, _ = read_headers(folder)
    files = sorted({tensor.file for tensor in tensors.values()})
    hashes = {name: digest for file in files for name, digest in TensorFile(folder / file).hashes().items()}
    return point_hash(tensors, hashes), hashes


def _by_name(folder: Path) -> list[str]:
    """What can be checked of a family whose anatomy is not known: it loads, and what loading does not rename is as in the files."""
    module = load_module(folder, "auto")
    state = dict(module.named_parameters(remove_duplicate=False))
    tensors, _ = read_headers(folder)
    found = 0
    for path in sorted(folder.glob("*.safetensors")):
        file = TensorFile(path)
        for name in file.tensors:
            loaded = state.get(name, state.get(f"{module.base_model_prefix}.{name}"))
            if loaded is not None and not torch.equal(loaded, file[name]):
                raise VerificationError(f"{name} as loaded differs from {name} on disk.")
            found += loaded is not None
    return [f"{found} of {len(tensors)} tensors as loaded by transformers equal those in the files"]


def _require_finite(tensor: Tensor, name: str) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise VerificationError(f"{name} has values that are NaN or infinite; nothing was written.")
