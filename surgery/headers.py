"""What a folder of safetensors files says of itself: headers and index, without torch and without a byte of a weight.

One reader serves everybody. `read_folder` collects all that is wrong, as `Fault`s; `Checkpoint` raises the first, the preflight
shows them all. A claim is checked against the file's size before anything is allocated for it.

Links: a file may be a link to somewhere inside its own folder, or, in the hub's cache, inside the repository the snapshot belongs
to (``models--owner--name/snapshots/REVISION/x -> ../../blobs/y``). A link that leads elsewhere is refused by name: whoever made
the folder would otherwise decide which file of this machine is read, and copied into what is published.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ANOTHER_FORMAT = "consolidated*.safetensors"  # Mistral's own, the same weights once more
DELTA = "delta.safetensors"  # of a change, see `surgery.delta`
DELTA_FORMAT = "model-surgery delta 3"  # the current one, as the file says it
RECORD = "record.json"  # of the command that made a folder
TEMPLATES = "additional_chat_templates"  # a folder: transformers' place for chat templates that have names
UNTIE = "load it, clone the embedding into lm_head, set tie_word_embeddings to false, save"
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
MAX_HEADER = 100_000_000  # the format's own limit
MAX_JSON = 100_000_000
MAX_DIMENSION = 1 << 48
_MAX_CONFIG = 16_000_000
_MOST = {  # counts that become lists as soon as a config is read
    "num_hidden_layers": 4096, "n_layer": 4096, "num_layers": 4096, "n_layers": 4096, "depth": 4096, "num_labels": 1_000_000,
    "num_experts": 4096, "num_local_experts": 4096, "n_routed_experts": 4096,
}  # fmt: skip
_AGAIN = "Download it again"


class CheckpointError(ValueError):
    """A folder that is not a readable checkpoint: the message says what was looked for, what is there and what to do."""


class PickleFoundError(CheckpointError):
    """A pickle where a safetensors file was promised."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file, as its header describes it. begin, end: absolute byte range. code: dtype, ``BF16``."""

    file: str
    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file or folder, and what to do about it. kind: link, shards, index, file, pickle or tie."""

    kind: str
    where: Path
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where} {self.found}. {self.fix}."


@dataclass(frozen=True)
class Folder:
    """What the headers of a folder say: tensors by name, each file's metadata, and all that is wrong."""

    tensors: dict[str, Entry]
    metadata: dict[str, dict[str, str]]
    faults: list[Fault]


def read_folder(folder: Path, sizes: Mapping[str, int] = {}) -> Folder:
    """The headers of a checkpoint folder, single or sharded. What is wrong is in `faults`, in the order it was come upon.

    sizes: in bytes, of files that are whole elsewhere, and of which no more than the header is here.
    """
    faults = stray_links(folder)
    linked = {fault.where.name for fault in faults}
    present = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in linked)
    wanted: dict[str, str] | None = None
    if (folder / INDEX).is_file() and INDEX not in linked:
        try:
            wanted = read_index(folder / INDEX)
        except CheckpointError as error:
            return Folder({}, {}, [*faults, _as_fault("index", error, folder / INDEX)])
        files = sorted(set(wanted.values()))
        missing = [f for f in files if f not in present and f not in linked]
        if missing:
            more = "" if len(missing) == 1 else f" ({', '.join(missing[:6])})"
            faults.append(
                Fault(
                    "shards", folder, f"lacks {len(missing)} of {len(files)} shards, first {missing[0]}{more}", _AGAIN
                )
            )
        extra = [f for f in present if f not in files and not fnmatch(f, ANOTHER_FORMAT)]
        if extra:
            found = f"has {', '.join(extra[:3])}, which {INDEX} does not mention: the folder mixes two checkpoints"
            faults.append(Fault("index", folder, found, "Remove the stray files"))
        files = [f for f in files if f in present]
    elif [f for f in present if not fnmatch(f, ANOTHER_FORMAT)] == [SINGLE]:
        files = [SINGLE]
    else:
        files = []
        if not linked:
            faults.append(_no_weights(folder, present))
    tensors: dict[str, Entry] = {}
    metadata: dict[str, dict[str, str]] = {}
    broken: set[str] = set()
    for file in files:
        try:
            entries, metadata[file] = read_header(folder / file, sizes.get(file))
        except CheckpointError as error:
            faults.append(_as_fault("pickle" if isinstance(error, PickleFoundError) else "file", error, folder / file))
            broken.add(file)
            continue
        for entry in entries:
            if wanted is not None and wanted.get(entry.name) != file:
                said = f"says it is in {wanted[entry.name]}" if entry.name in wanted else "does not mention it"
                fix = "Index and shards are of different checkpoints: download it again"
                faults.append(Fault("index", folder / file, f"contains {entry.name}, but {INDEX} {said}", fix))
                break
            tensors[entry.name] = entry
    readable = set(files) - broken
    absent = [name for name, file in (wanted or {}).items() if file in readable and name not in tensors]
    if absent and wanted:
        found = f"promises {absent[0]} in {wanted[absent[0]]}, which does not contain it ({len(absent)} such)"
        faults.append(Fault("index", folder / INDEX, found, _AGAIN))
    return Folder(tensors, metadata, faults)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard. Raises CheckpointError for what is no index, and for shards outside the folder itself."""
    try:
        wanted = read_json(path)["weight_map"]
        if not all(isinstance(file, str) for file in wanted.values()):
            raise TypeError("a file that is not text")
    except (LookupError, TypeError, AttributeError, CheckpointError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors index: it has no weight_map of names to files. {_AGAIN}."
        ) from error
    outside = [f for f in wanted.values() if Path(f).name != f or "\\" in f or not f.endswith(".safetensors")]
    if outside:
        raise CheckpointError(
            f"{path} points to {_short(repr(outside[0]))}: shards must be safetensors files inside the folder itself. {_AGAIN}."
        )
    return wanted


def read_header(path: Path, size: int | None = None) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a safetensors file, in file order, and its metadata. Raises CheckpointError where the file is damaged.

    size: of the whole file in bytes, where no more than its header is here.
    """
    _require_file(path, "a safetensors file")
    size = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and length > size):
            raise PickleFoundError(
                f"{path} is a pickle under a safetensors name, which can run code when opened and is refused. Convert the original "
                "once, where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
            )
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is not a complete safetensors file: {size} bytes, with a header that claims {length}. {_AGAIN}."
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unrepeated, parse_constant=_no_constant)
            metadata = header.pop("__metadata__", {})
            if not all(isinstance(v, str) for v in metadata.values()):
                raise TypeError("metadata that is not text")
            rows = sorted(_row(name, entry) for name, entry in header.items())
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged header: {_short(error)}. {_AGAIN}.") from error
    start, at = 8 + length, 0
    entries = []
    for begin, end, name, code, shape in rows:
        if begin != at or end - begin != math.prod(shape) * SIZES[code]:
            raise CheckpointError(
                f"{path} has a damaged header: {_short(name)} claims bytes {begin} to {end}, which do not fit its shape or its "
                f"neighbours. {_AGAIN}."
            )
        at = end
        entries.append(Entry(path.name, name, code, shape, start + begin, start + end))
    if start + at != size:
        raise CheckpointError(
            f"{path} is truncated or padded: {size} bytes where its header promises {start + at}. {_AGAIN}."
        )
    return entries, metadata


def is_whole(folder: Path) -> bool:
    """Whether the weights of a model or adapter are in a folder: all the shards of its index, or the single file."""
    if not (folder / INDEX).is_file():
        return any((folder / name).is_file() for name in (SINGLE, "adapter_model.safetensors"))
    try:
        return all((folder / file).is_file() for file in set(read_index(folder / INDEX).values()))
    except CheckpointError:  # nothing to go by, and whoever reads the folder will say so
        return True


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """The content of a JSON file. Raises CheckpointError for one that is absent, no file, too large, or no JSON, in one line."""
    _require_file(path, "a JSON file")
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(f"{path} has {size} bytes, more than any such file ({limit}). {_AGAIN}.")
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no text, or a number of too many digits
        raise CheckpointError(f"{path} is not JSON: {_short(error)}. {_AGAIN}.") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json as it stands. Raises CheckpointError in one line for a folder that has none, or one that cannot be.

    A class of transformers believes what it is told, and makes a list as long as a count that it reads; so counts are bounded here.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder. A checkpoint is a folder with config.json and safetensors files."
        )
    faults = stray_links(folder)
    if faults:
        raise CheckpointError(str(faults[0]))
    path = folder / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise CheckpointError(
            f"{folder} has no config.json (there is: {found}). A checkpoint is a folder with config.json and safetensors files."
        )
    config = read_json(path, _MAX_CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no object of names and values. {_AGAIN}.")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key, value in ((key, value) for part in parts for key, value in part.items()):
        if isinstance(value, int) and value > _MOST.get(key, MAX_DIMENSION):
            raise CheckpointError(f"{path} says {_short(key)} {_short(value)}, which no model has. {_AGAIN}.")
    return config


def require_shallow(text: str, most: int = 60) -> None:
    """Raise ValueError for YAML nested deeper than anything a person writes: the time PyYAML takes grows with the square of the depth."""
    depth = deepest = 0
    for mark in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if mark in "[{" else -1))
        deepest = max(deepest, depth)
    run, indent = rf"(?:[-?:][ \t]+){{{most}}}", rf"^ {{{20 * most}}}"
    if deepest > most or re.search(run, text) or re.search(indent, text, re.MULTILINE):
        raise ValueError(f"it is nested more than {most} deep")


def stray_links(folder: Path) -> list[Fault]:
    """The links to files in a folder that lead out of it, and, in the hub's cache, out of its repository too."""
    present = [*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")] if folder.is_dir() else []
    links = [p for p in present if p.is_symlink() and (p.name == TEMPLATES or not p.is_dir())]
    return [fault for link in sorted(links) if (fault := stray_link(link, folder))]


def stray_link(path: Path, folder: Path | None = None) -> Fault | None:
    """What is wrong with a file that is a link out of a folder, by default its own; None for any other."""
    if not path.is_symlink():
        return None
    fix = "Put the file itself there: a link may lead only into its own folder or hub-cache repository"
    try:
        home, target = (folder or path.parent).resolve(), path.resolve(strict=False)
    except (OSError, RuntimeError):
        return Fault("link", path, "is a link that leads in a circle", fix)
    homes = [home, home.parent.parent] if home.parent.name == "snapshots" else [home]
    if any(target.is_relative_to(h) for h in homes):
        return None
    return Fault("link", path, f"is a link out of the folder, to {target}, and is refused", fix)


def two_heads(folder: Path, head: Any, embed: Any) -> Fault | None:
    """What is wrong with a folder whose config ties `head` to `embed`, two entries of its files, where they are not the same numbers in the same dtype; else None.

    transformers then keeps the two apart, and whoever takes one for the other destroys it.
    """
    if (head.shape, head.code) == (embed.shape, embed.code) and _same_bytes(folder, head, embed):
        return None
    found = (
        f"says that head and embedding are tied, but the files hold {head.name} and {embed.name}, which differ: "
        "loading keeps the two apart"
    )
    return Fault("tie", folder / "config.json", found, "Set tie_word_embeddings to false in it")


def _same_bytes(folder: Path, one: Any, other: Any) -> bool:
    if one.end - one.begin != other.end - other.begin:
        return False
    with (folder / one.file).open("rb") as first, (folder / other.file).open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        left = one.end - one.begin
        while left:
            size = min(left, 1 << 20)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _require_file(path: Path, what: str) -> None:
    fault = stray_link(path)
    if fault:
        raise CheckpointError(str(fault))
    if not path.is_file():  # a pipe would wait for ever
        raise CheckpointError(f"{path} is {_kind(path)}, where {what} should be. {_AGAIN}.")


def _no_weights(folder: Path, present: list[str]) -> Fault:
    if present:
        found = f"has {len(present)} safetensors files ({', '.join(present[:3])}) but no {INDEX} to say which belong"
        return Fault("file", folder, found, _AGAIN)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        found = f"holds pickles ({', '.join(pickles[:3])}), which can run code when opened and are refused"
        fix = "Convert once, where you trust the file: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        return Fault("pickle", folder, found, fix)
    return Fault("file", folder, f"has no weights: neither {SINGLE} nor {INDEX} is there", _AGAIN)


def _row(name: str, entry: dict[str, Any]) -> tuple[int, int, str, str, tuple[int, ...]]:
    begin, end = entry["data_offsets"]
    code, shape = entry["dtype"], tuple(entry["shape"])
    if code not in SIZES:
        raise ValueError(f"dtype {code!r} is not known")
    if not all(type(n) is int and 0 <= n < MAX_DIMENSION for n in (begin, end, *shape)):
        raise ValueError(f"{name} has an impossible shape or offset")
    return begin, end, name, code, shape


def _unrepeated(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _as_fault(kind: str, error: CheckpointError, where: Path) -> Fault:
    said, _, fix = str(error).removesuffix(".").rpartition(". ")
    return Fault(kind, where, said.removeprefix(f"{where} "), fix)


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    if path.is_symlink() and not path.exists():
        return "a link to nothing"
    return "a pipe or device" if path.exists() else "not there"


def _short(error: object) -> str:
    """A message in one short line, whatever was in the file."""
    text = " ".join(str(error).split())
    return (text if text.isprintable() else ascii(text))[:160]
