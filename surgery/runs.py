"""Transcripts as a file: JSON Lines, one transcript a line after a first line that says what made them.

    {"runs": 1, "model": "5f1c...", "about": {"samples": 4, "seed": 0}, "count": 240}
    {"question": "...", "text": "...", "ids": [...], "offsets": [...], "spans": {"thinking": [9, 40], ...}, "finished": true, "meta": {...}}

What is read is what was written: token ids, spans and all. Nothing is decoded or tokenised again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from surgery.hashing import Digest
from surgery.tensorfile import raw_bytes
from surgery.transcript import Transcript
from surgery.whole import write_whole

if TYPE_CHECKING:
    from surgery.model import Model

_FORMAT = 1
_PIECE = 1 << 20  # entries that are hashed at once
_KEYS = {"question": str, "text": str, "ids": list, "offsets": list, "spans": dict, "finished": bool, "meta": dict}


@dataclass(frozen=True)
class Runs(Sequence[Transcript]):
    """Transcripts, and the model that wrote them.

    model: its `fingerprint`, or None where it is not known. about: how they were made: questions, samples,
           temperature, seed, the cap on new tokens.
    """

    transcripts: tuple[Transcript, ...]
    model: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.transcripts)

    def __iter__(self) -> Iterator[Transcript]:
        return iter(self.transcripts)

    @overload
    def __getitem__(self, index: int) -> Transcript: ...
    @overload
    def __getitem__(self, index: slice) -> Runs: ...
    def __getitem__(self, index: int | slice) -> Transcript | Runs:
        found = self.transcripts[index]
        return Runs(found, self.model, self.about) if isinstance(found, tuple) else found

    @property
    def questions(self) -> list[str]:
        """The questions, each once, in order."""
        return list(dict.fromkeys(t.question for t in self.transcripts))

    def of(self, questions: Iterable[str]) -> Runs:
        """The runs of some questions. Raises ValueError where there are none."""
        wanted = set(questions)
        kept = tuple(t for t in self.transcripts if t.question in wanted)
        if not kept:
            raise ValueError(
                f"None of the {len(self)} transcripts answers any of the {len(wanted)} questions asked for."
            )
        return Runs(kept, self.model, self.about)

    def require(self, model: Model) -> None:
        """Raise ValueError where they were written by other weights than the model's; where that is not known, do nothing."""
        if self.model is not None and self.model != (here := fingerprint(model)):
            raise ValueError(
                f"These transcripts were written by another model: its fingerprint is {self.model[:16]}, this one's {here[:16]}. "
                "Generate them again with this model, or load the model that wrote them."
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, whole or not at all. Raises ValueError for a `meta` or `about` that JSON would not give back."""
        head = {"runs": _FORMAT, "model": self.model, "about": _plain(self.about, "about"), "count": len(self)}
        lines = (head, *(_as_line(t) for t in self.transcripts))
        return write_whole(
            path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Runs:
        """Read a file that `save` wrote. Raises FileNotFoundError, and ValueError naming the line that is not as it should be."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; transcripts are a .jsonl file that `surgery generate` writes."
            )
        lines = path.read_bytes().split(b"\n")
        head = _read(lines[0], f"{path}, line 1")
        if head.get("runs") != _FORMAT or not isinstance(head.get("about"), dict):
            raise ValueError(
                f'{path} does not begin with the line that transcripts have: {{"runs": {_FORMAT}, "model": ..., "about": ...}}. '
                "Questions are not transcripts: `surgery generate` makes these from them."
            )
        rows = [_from_line(line, f"{path}, line {i}") for i, line in enumerate(lines[1:], 2) if line.strip()]
        if len(rows) != head.get("count"):
            raise ValueError(
                f"{path} holds {len(rows)} transcripts where its first line says {head.get('count')}: it is not whole."
            )
        return cls(tuple(rows), head.get("model"), head["about"])

    def __repr__(self) -> str:
        return f"<Runs: {len(self)} transcripts of {len(self.questions)} questions>"


def fingerprint(model: Model) -> str:
    """What a model is known by: BLAKE3 of its parameters' names, shapes and values rounded to bfloat16.

    It is the same on any device and in any dtype that holds bfloat16's values, and another once weights were edited or tuned. Of a module with
    an adapter in it, which of its adapters are in use counts too, and how much.
    """
    digest = Digest()
    for name, parameter in sorted(model.module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        for piece in parameter.detach().reshape(-1).split(_PIECE):  # an embedding is large
            digest.update(raw_bytes(piece.to("cpu", torch.bfloat16)))
    for name, part in model.module.named_modules():
        layer: Any = part
        if isinstance(getattr(layer, "disable_adapters", None), bool):  # of a whole model it is a method
            used = [] if layer.disable_adapters else layer.active_adapters
            digest.update(f"{name} {[(a, getattr(layer, 'scaling', {}).get(a)) for a in used]}".encode())
    return digest.hexdigest()


def _as_line(transcript: Transcript) -> dict[str, Any]:
    t = transcript
    return {
        "question": t.question,
        "text": t.text,
        "ids": list(t.ids),
        "offsets": [list(span) for span in t.offsets],
        "spans": {name: list(span) for name, span in t.spans.items()},
        "finished": t.finished,
        "meta": _plain(t.meta, f"meta of {t.question[:40]!r}"),
    }


def _from_line(line: bytes, where: str) -> Transcript:
    row = _read(line, where)
    wrong = [key for key, kind in _KEYS.items() if not isinstance(row.get(key), kind)]
    if wrong:
        raise ValueError(
            f"{where}: {wrong[0]} is {'not there' if wrong[0] not in row else 'not what it should be'}; a transcript has {', '.join(_KEYS)}."
        )
    ids, offsets, spans = (
        row["ids"],
        [_pair(o, where) for o in row["offsets"]],
        {n: _pair(s, where) for n, s in row["spans"].items()},
    )
    if len(ids) != len(offsets) or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(
            f"{where}: {len(ids)} token ids and {len(offsets)} offsets; each token has one, and an id is a whole number."
        )
    outside = [name for name, (begin, end) in spans.items() if not 0 <= begin <= end <= len(ids)]
    backward = any(not 0 <= begin <= end for begin, end in offsets) or any(a[0] > b[0] for a, b in pairwise(offsets))
    if outside or backward:
        raise ValueError(
            f"{where}: {f'the span {outside[0]} is' if outside else 'the offsets are'} not within its {len(ids)} tokens."
        )
    return Transcript(row["question"], tuple(ids), row["text"], tuple(offsets), spans, row["finished"], row["meta"])


def _pair(value: Any, where: str) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value)):
        raise ValueError(f"{where}: a span is two whole numbers, not {str(value)[:40]}.")
    return value[0], value[1]


def _read(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{where}: not JSON ({error}). Transcripts are a .jsonl file that `surgery generate` writes."
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON object is needed, found {type(row).__name__}.")
    return row


def _plain(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The mapping as a dict, or ValueError where JSON would give back something else."""
    found = dict(value)
    try:
        if json.loads(json.dumps(found, allow_nan=False)) == found:
            return found
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"The {what} holds what JSON does not give back as it was (a tuple, a tensor, NaN, a number as a key): {str(found)[:120]}."
    )
