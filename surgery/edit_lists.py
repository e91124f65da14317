"""Edit lists: a small YAML that says what is done to a model, one edit a line, in order.

    edits:
      - remove: {direction: directions/brief.safetensors, at: "*.attn.o", strength: 1.0}
      - add: {direction: [0.1, -0.2, 0.3], at: "12.attn.o.bias"}
      - scale: {factor: 0.5, at: ["12.mlp.down", "13.attn.o.h3"]}
      - truncate: {rank: 64, at: "0-3.mlp.*"}
      - swap: {layers: [3, 4]}
      - replace: {layers: {3: 7}, from: runs/tuned}

A direction is a ``.safetensors`` file of one vector (or ``FILE:NAME``), a ``.json`` file of numbers, or the numbers themselves. What is
removed may also be a direction of the stream with a vector for each layer: a file whose tensors are named by sites, ``14.mid``, or the
folder that `surgery direction` wrote. Files and donors are looked for beside the list. Every edit takes a ``strength``, 1 unless said.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.edits import AddDirection, RemoveDirection, ReplaceLayers, Scale, SwapLayers, TruncateRank
from surgery.headers import require_shallow
from surgery.sites import Site
from surgery.weights import Edit, Rewiring, Weights, apply

_LONGEST = 1 << 18  # bytes: a list is short, and what is longer is not one
_LONGEST_VECTOR = 1 << 26
DIRECTION = "direction.safetensors"  # in the folder of one


@dataclass(frozen=True, eq=False)
class Step:
    """One edit of a list, and where it goes. Called, it takes a point to a point.

    at:    patterns of sites, or None for edits of whole layers.
    text:  the edit in words. where: the list and the number in it, for messages.
    files: what it was read from: vectors, and donors' folders.
    """

    edit: Edit | Rewiring
    at: tuple[str, ...] | None
    text: str
    where: str
    files: tuple[Path, ...] = ()

    def __call__(self, weights: Weights) -> Weights:
        try:
            return apply(self.edit, weights, self.at)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def sites(self, weights: Weights) -> list[Site]:
        """The whole tensors of `weights` that it changes."""
        return sorted(self(weights).changed_from(weights))


def read_edits(source: str | Path) -> list[Step]:
    """The edits of a list, in order.

    source: a file, or the YAML itself (a string with a line break). Raises ValueError, naming the list, the edit's number and what would
    be right, for text that is no YAML, an unknown edit or field, a missing or mistyped one, and a vector that cannot be read.
    """
    where, text, folder = _text(source)
    found = _parsed(text, where)
    if not isinstance(found, Mapping) or list(found) != ["edits"] or not isinstance(found["edits"], list):
        raise ValueError(
            f"{where} is not an edit list: it holds `edits:` and below it one edit a line, `- {_EXAMPLES['scale']}`."
        )
    if not found["edits"]:
        raise ValueError(f"{where} lists no edit. An edit is a line such as `- {_EXAMPLES['scale']}`.")
    return [read_edit(entry, f"{where}, edit {i}", folder) for i, entry in enumerate(found["edits"], 1)]


def read_edit(entry: Any, where: str, folder: Path = Path()) -> Step:
    """One edit: a mapping of its name to its fields. where: what messages call it. folder: where relative files are looked for."""
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(
            f"{where}: expected one edit with its fields, such as {_EXAMPLES['scale']}; found {_short(entry)}."
        )
    ((name, fields),) = entry.items()
    if name not in _EXAMPLES:
        near = difflib.get_close_matches(str(name), _EXAMPLES, n=1)
        raise ValueError(
            f"{where}: there is no edit {_short(name)}.{f' Did you mean {near[0]}?' if near else ''} Edits are {', '.join(_EXAMPLES)}."
        )
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: {name} takes fields, as in {_EXAMPLES[name]}; found {_short(fields)}.")
    form = _Form(name, dict(fields), where, folder)
    try:
        edit = _READERS[name](form)
        at = form.patterns() if name in _PLACED else None
    except (ValueError, OSError) as error:
        raise ValueError(f"{where} ({name}): {error}") from error
    if form.fields:
        raise ValueError(
            f"{where} ({name}): there is no field {_short(next(iter(form.fields)))}. {name} looks like {_EXAMPLES[name]}; any edit takes strength."
        )
    words = ", ".join(f"{key} {_short(value)}" for key, value in fields.items())
    return Step(edit, at, f"{name}: {words}", f"{where} ({name})", tuple(form.files))


def read_numbers(ref: str | Path) -> Tensor:
    """The numbers of one direction, fp32, from ``FILE.safetensors`` (which holds a single one), ``FILE.safetensors:NAME``, or a ``.json`` list of
    numbers.

    Raises ValueError for another kind of file, a file without such a vector, and a vector that is not finite; FileNotFoundError where
    there is no file.
    """
    path, name = _vector_file(ref)
    if path.suffix == ".json":
        if path.stat().st_size > _LONGEST_VECTOR:
            raise ValueError(f"{path} is too long for a list of numbers.")
        try:
            return _vector(json.loads(path.read_text(encoding="utf-8")), str(path))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    from safetensors import safe_open

    from surgery.tensorfile import read_header

    stored = {t.name: t for t in read_header(path)[0]}
    if name is None and len(stored) != 1:
        raise ValueError(
            f"{path} holds {len(stored)} tensors ({_some(stored)}): say which, as in {path}:{next(iter(stored), 'NAME')}."
        )
    name = next(iter(stored)) if name is None else name
    if name not in stored:
        raise ValueError(f"{path} has no tensor {name!r}; it has {_some(stored)}.")
    if len(stored[name].shape) != 1 or not stored[name].dtype.is_floating_point:
        dtype = str(stored[name].dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} in {path} is {dtype} of shape {tuple(stored[name].shape)}: a direction is one vector of real numbers."
        )
    with safe_open(path, framework="pt") as file:
        return _finite(file.get_tensor(name).float(), f"{name} in {path}")


def read_direction(ref: str | Path) -> dict[Site, Tensor]:
    """Directions of the stream, fp32, by site: every tensor of a ``.safetensors`` file that names them so, such as ``14.mid``.

    ref: the file, or a folder with ``direction.safetensors`` in it. Raises ValueError for tensors with other names, or that are no vectors.
    """
    path = direction_file(ref)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    from surgery.tensorfile import read_header

    sites = _by_site(path)
    if not sites:
        names = [t.name for t in read_header(path)[0]]
        raise ValueError(
            f"{path} is no direction of the stream: its tensors are not named by sites such as 14.mid, but {', '.join(names[:6])}."
        )
    return {site: read_numbers(f"{path}:{name}") for site, name in sites.items()}


def direction_file(ref: str | os.PathLike[str]) -> Path:
    """The file of a direction: the one in its folder, or what was named."""
    path = Path(ref)
    return path / DIRECTION if (path / DIRECTION).is_file() else path


def _by_site(path: Path) -> dict[Site, str]:
    """Site -> tensor of a file all of whose tensors are named by sites in a layer; else none."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    from surgery.tensorfile import read_header

    named: dict[Site, str] = {}
    for tensor in read_header(path)[0]:
        try:
            named[Site.parse(tensor.name)] = tensor.name
        except ValueError:
            return {}
    return named if named and all(site.layer is not None for site in named) else {}


@dataclass
class _Form:
    """The fields of one edit as they are taken out of it, each checked for its type; `files` gathers what was read."""

    name: str
    fields: dict[Any, Any]
    where: str
    folder: Path
    files: list[Path] = field(default_factory=list)

    def take(self, key: str, *default: Any) -> Any:
        if key not in self.fields and not default:
            raise ValueError(f"the field {key} is missing: {_EXAMPLES[self.name]}.")
        return self.fields.pop(key, *default)

    def number(self, key: str, *default: float) -> float:
        value = self.take(key, *default)
        try:
            number = float("nan" if isinstance(value, bool) else value)
        except (ValueError, TypeError, OverflowError):
            number = float("nan")
        if not math.isfinite(number):
            raise ValueError(f"{key} must be a finite number, not {_short(value)}.")
        return number

    def strength(self) -> float:
        return self.number("strength", 1.0)

    def count(self, key: str) -> int:
        return _whole(self.take(key), key)

    def patterns(self) -> tuple[str, ...]:
        value = self.take("at")
        wanted = [value] if isinstance(value, str) else value
        if not isinstance(wanted, list) or not wanted or not all(isinstance(p, str) and p for p in wanted):
            raise ValueError(
                f"at must be a pattern of sites such as '*.attn.o', or a list of them, not {_short(value)}."
            )
        return tuple(wanted)

    def vector(self, key: str) -> Tensor:
        value = self.take(key)
        if isinstance(value, list):
            return _vector(value, key)
        if not isinstance(value, str):
            raise ValueError(
                f"{key} must name a .safetensors or .json file, or be a list of numbers, not {_short(value)}."
            )
        ref = str(self.folder / value)
        self.files.append(_vector_file(ref)[0])
        return read_numbers(ref)

    def direction(self, key: str) -> Tensor | dict[Site, Tensor]:
        """A vector, or a direction of the stream with one for each layer."""
        value = self.fields.get(key)
        path = direction_file(self.folder / value) if isinstance(value, str) else None
        if path is None or not _by_site(path):
            return self.vector(key)
        self.fields.pop(key)
        self.files.append(path)
        return read_direction(path)

    def layers(self) -> list[int] | dict[int, int]:
        value = self.take("layers")
        if isinstance(value, list) and value:
            return [_whole(layer, "a layer") for layer in value]
        if isinstance(value, Mapping) and value and self.name == "replace":
            return {_whole(k, "a layer"): _whole(v, "a layer") for k, v in value.items()}
        raise ValueError(f"layers must be layer numbers, as in {_EXAMPLES[self.name]}; found {_short(value)}.")

    def donor(self) -> Weights:
        from surgery.checkpoint import Checkpoint
        from surgery.model import find

        ref = self.take("from")
        if not isinstance(ref, str) or not ref:
            raise ValueError(f"from must name a model: a folder, a hub id or 'specimen'; found {_short(ref)}.")
        beside = self.folder / ref
        checkpoint = Checkpoint(beside if beside.is_dir() else find(ref))
        self.files.append(checkpoint.folder)
        return checkpoint


def _swap(form: _Form) -> SwapLayers:
    layers = form.layers()
    if not isinstance(layers, list) or len(layers) != 2:
        raise ValueError(f"a swap is of two layers: {_EXAMPLES['swap']}.")
    return SwapLayers(layers[0], layers[1], form.strength())


_READERS: dict[str, Callable[[_Form], Any]] = {
    "remove": lambda form: RemoveDirection(form.direction("direction"), form.strength()),
    "add": lambda form: AddDirection(
        form.vector("direction"), form.strength(), form.vector("reads") if "reads" in form.fields else None
    ),
    "scale": lambda form: Scale(form.number("factor"), form.strength()),
    "truncate": lambda form: TruncateRank(form.count("rank"), form.strength()),
    "swap": _swap,
    "replace": lambda form: ReplaceLayers(form.donor(), form.layers(), form.strength()),
}
_EXAMPLES = {
    "remove": "remove: {direction: FILE, at: '*.attn.o'}",
    "add": "add: {direction: FILE, at: '12.attn.o'} (and perhaps reads: FILE)",
    "scale": "scale: {factor: 0.5, at: '12.mlp.down'}",
    "truncate": "truncate: {rank: 64, at: '0-3.mlp.*'}",
    "swap": "swap: {layers: [3, 4]}",
    "replace": "replace: {layers: [3, 4], from: MODEL}",
}
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 60, 60
_PLACED = ("remove", "add", "scale", "truncate")


def _text(source: str | Path) -> tuple[str, str, Path]:
    """What messages call the list, its text, and the folder that its files are relative to."""
    if isinstance(source, str) and "\n" in source:
        return "the edit list", source, Path()
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. An edit list is a YAML file with `edits:` and one edit a line.")
    if path.stat().st_size > _LONGEST:
        raise ValueError(f"{path} is {path.stat().st_size} bytes long: an edit list is a short YAML file.")
    try:
        return str(path), path.read_text(encoding="utf-8"), path.parent
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error


def _parsed(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's safe loader, which lets a second field of the same name win, made to refuse it."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            mapping = super().construct_mapping(node, deep)
            if len(mapping) < len(node.value):
                raise yaml.YAMLError(f"a field is given twice, line {node.start_mark.line + 1}")
            return mapping

    # 1e-3 is a number to everybody but YAML 1.1, which wants 1.0e-3
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))
    try:
        require_shallow(text)
        return yaml.load(text, Loader)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # a bad date is a ValueError
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where} is not YAML: {said}") from error


def _vector_file(ref: str | Path) -> tuple[Path, str | None]:
    """The file of a vector's reference, and the tensor's name in it where one is given."""
    path, name = Path(ref), None
    if not path.exists() and ".safetensors:" in str(ref):
        file, _, name = str(ref).partition(".safetensors:")
        path = Path(f"{file}.safetensors")
    if path.suffix not in (".safetensors", ".json"):
        there = "" if path.exists() else "; there is no such file or folder"
        raise ValueError(
            f"{path} is no vector: a direction is read from a .safetensors or a .json file, or the folder of `surgery direction`{there}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    return path, name


def _vector(numbers: Any, where: str) -> Tensor:
    if (
        not isinstance(numbers, list)
        or not numbers
        or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers)
    ):
        raise ValueError(f"{where} is not a list of numbers: {_short(numbers)}.")
    try:
        return _finite(torch.tensor(numbers, dtype=torch.float32), where)
    except (OverflowError, RuntimeError) as error:
        raise ValueError(f"{where} holds a number too large: {error}") from error


def _finite(vector: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(f"{where} holds values that are NaN or infinite.")
    return vector


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{what} must be a whole number, not {_short(value)}.")
    return value


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:6]) + (", ..." if len(names) > 6 else "")


def _short(value: Any) -> str:
    """What was found, in few words, however large or deep it is: aliases make a short list a huge one."""
    return _SHORT.repr(value)
