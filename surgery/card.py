"""The model card of a written model: what it was made from, how, and what was checked. It names folders, never where they lie."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.record import Record
    from surgery.writing import Written

CARD = "README.md"


def model_card(record: Record, written: Written, source: Path) -> str:
    """The text of ``README.md`` for a model that a command wrote: YAML front matter as model hubs read it, then words.

    source: the folder whose layout was imitated; its card's licence is carried over.
    """
    models = {"model": record.inputs["model"]} if "model" in record.inputs else record.inputs
    parents = [_public(entry["ref"]) for role, entry in models.items() if role != "recipe"]
    front = [
        "base_model:",
        *(f"- {json.dumps(name)}" for name in dict.fromkeys(parents)),
        "library_name: transformers",
        *_licence(source),
        "tags:",
        "- model-surgery",
        f"- {record.command}",
    ]
    inputs = "\n".join(
        f"| {_public(role)} | {_public(entry['ref'])} | `{entry['hash'][:16]}` |"
        for role, entry in record.inputs.items()
    )
    unlisted = written.unlisted()
    changed = f"{unlisted[0].upper()}{unlisted[1:]}."
    if written.moved:
        t = written.total()
        changed = (
            f"{written.moved} tensor{'' if written.moved == 1 else 's'} changed. Asked for a change of norm {t.asked:.4g}, kept {t.kept:.4g} after rounding to the stored "
            f"dtype (cosine {t.cosine:.4f}); {t.unmoved:.1%} of {t.entries:,} entries asked to move were too small to."
        )
    checks = "\n".join(f"- {check}" for check in written.checks)
    return f"""---
{chr(10).join(front)}
---

# {written.folder.name}

Made by `{" ".join(_public(word) for word in record.typed) or record.command}`.

{changed}

| input | name | hash |
| --- | --- | --- |
{inputs}

Checked after writing:

{checks}

`record.json` holds every argument, hash, seed and version. `surgery verify` reads the files again, `surgery replay` makes them again,
`surgery undo` gives the original back where a way back was kept.
"""


def _public(word: str) -> str:
    """A word without the folders above it: a hub id stays, a path keeps its last part, and a path with a strength its strength."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("--"):
        return f"{option}={_public(value)}"
    path, colon, strength = word.rpartition(":")
    if colon and re.fullmatch(r"-?[\d.]+(e-?\d+)?", strength):
        return f"{_public(path)}:{strength}"
    if (
        word.startswith("-")
        or "/" not in word
        or (word.count("/") == 1 and not Path(word).exists() and word[0] not in "./~")
    ):
        return word
    return Path(word).name or word


def _licence(source: Path) -> list[str]:
    card = source / CARD
    if not card.is_file():
        return []
    front = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return [line for line in front[1].splitlines() if re.match(r"license(_name|_link)?:", line)] if front else []
