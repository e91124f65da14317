"""What lies beside a model's weights and goes where they go: configuration, tokenizer, templates, processor, generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from surgery.headers import ANOTHER_FORMAT, INDEX, RECORD, TEMPLATES

HUB_FILES: dict[str, Any] = {  # of a repository, what a model is loaded from
    "allow_patterns": ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
    "ignore_patterns": [ANOTHER_FORMAT],
}

PATCH = "undo.patch"  # the way back to what a model was made from
UNDO_LIMIT = 32 << 20  # bytes: an edit that needs more keeps none, and says so
_WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
}  # a copy would be stale
_ITS_OWN = {RECORD, INDEX, PATCH, "pytorch_model.bin.index.json", "provenance.json"}  # true of the original only


def files_in(folder: Path) -> list[str]:
    """The files of a model's folder, those of its named chat templates among them: names relative to it, with ``/``, in order."""
    named = [path for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file()]
    return sorted([p.name for p in folder.iterdir() if p.is_file()] + [f"{TEMPLATES}/{p.name}" for p in named])


def side_files(folder: Path) -> list[str]:
    """Those that every copy of the model must have: neither hidden files, nor weights of any format, nor what is true of the original only."""
    names = ((name, Path(name)) for name in files_in(folder))
    return [n for n, p in names if not p.name.startswith(".") and p.suffix not in _WEIGHTS and n not in _ITS_OWN]


def copy_file(source: Path, target: Path, name: str) -> None:
    """A file of one folder under the same name in another, over what may be there."""
    (target / name).parent.mkdir(exist_ok=True)
    with (
        (source / name).open("rb") as read,
        (target / name).open("wb") as sink,
    ):  # not copy2: the umask decides the mode
        shutil.copyfileobj(read, sink)
