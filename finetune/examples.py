"""What a training step is given: transcripts with a weight for every token, in batches padded on the right.

`examples` reads spans ("answer", "thinking[:16]", {"thinking": 0.5, "answer": 2}); `collate` makes a batch. An item of the data may also
be a group (two answers to one question, say): a group is never split over micro-batches, so that an objective may compare its members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.transcript import Transcript, nobody_has, positions

Over = str | Sequence[str] | Mapping[str, float]
IGNORED = -100  # a label without a loss: the convention of transformers
OWN = (
    "input_ids",
    "attention_mask",
    "labels",
    "token_weights",
    "sample",
    "group",
    "pixel_values",
)  # of a batch, never a column


@dataclass(frozen=True)
class Example:
    """One transcript and what is to be learnt of it.

    weights: for each token, the weight of the loss of predicting it, 0 or more; 0 is no loss. columns: numbers that an objective asks for.
    """

    transcript: Transcript
    weights: tuple[float, ...]
    columns: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.transcript.ids):
            raise ValueError(
                f"{len(self.weights)} weights for the {len(self.transcript.ids)} tokens of {self.transcript!r}."
            )
        wrong = next((w for w in self.weights if not (math.isfinite(w) and w >= 0)), None)
        if wrong is not None:
            raise ValueError(f"The weight of a token is 0 or more, got {wrong} in {self.transcript!r}.")


Item = Transcript | Example
Group = tuple[Example, ...]


def examples(data: Sequence[Item | Sequence[Item]], over: Over = "completion") -> list[Group]:
    """The data as groups of examples; a transcript alone is a group of one. Examples stay as they are, transcripts learn `over`.

    over: a span as in `surgery.transcript.positions`, several, or {span: weight}, where the last span that names a token decides. The
    first token of a transcript has nothing before it and is never learnt.
    Raises ValueError where there is no data, where a transcript lacks every one of the spans, and where an example has nothing to learn.
    """
    if isinstance(data, str) or not data:
        raise ValueError("There are no transcripts to tune on.")
    spans = (
        {over: 1.0} if isinstance(over, str) else dict(over) if isinstance(over, Mapping) else dict.fromkeys(over, 1.0)
    )
    if not spans:
        raise ValueError("over names no span: say which tokens have a loss, as in over='completion'.")
    groups: list[Group] = []
    for index, item in enumerate(data):
        members = [item] if isinstance(item, (Transcript, Example)) else list(item)
        if not members:
            raise ValueError(f"Group {index} of the data is empty.")
        groups.append(tuple(_example(index, member, spans) for member in members))
    return groups


def _example(index: int, item: object, spans: Mapping[str, float]) -> Example:
    if isinstance(item, Example):
        example = item
    elif isinstance(item, Transcript):
        weights, named = [0.0] * len(item.ids), False
        for span, weight in spans.items():
            for token in positions(item, span):
                weights[token], named = float(weight), True
        if not named:
            raise ValueError(f"Transcript {index}: {nobody_has([item], list(spans))}")
        example = Example(item, tuple(weights))
    else:
        raise TypeError(f"Item {index} of the data is a {type(item).__name__}, not a Transcript or an Example.")
    if not any(example.weights[1:]):
        raise ValueError(f"Item {index} of the data leaves no token with a loss: {example.transcript!r}.")
    return example


def rows_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The groups as plain rows, as a data set keeps them: lists of one entry a member, each member's number (`sample`), and the tokens of the
    longest (`length`), by which a trainer may put rows of like length together.

    Rows stay whole whatever a trainer is told of lengths: TRL's ``max_length`` cuts lists of tokens, and here each member of a group has its
    own. Where texts are too long, `finetune.recipes.cut` the transcripts first.
    Raises ValueError for a column that some of the examples lack, or that has the name of one of a batch's own fields.
    """
    names = sorted({name for group in groups for example in group for name in example.columns})
    if taken := [name for name in names if name in OWN]:
        raise ValueError(
            f"The data has a column {taken[0]!r}: that is one of the batch's own fields ({', '.join(OWN)}). Give it another name."
        )
    rows, sample = [], 0
    for index, group in enumerate(groups):
        for name in names:
            if any(name not in example.columns for example in group):
                raise ValueError(f"Item {index} of the data lacks the column {name!r}, which others have.")
        rows.append(
            {
                "input_ids": [list(e.transcript.ids) for e in group],
                "token_weights": [list(e.weights) for e in group],
                "sample": [sample + k for k in range(len(group))],
                "columns": {name: [float(e.columns[name]) for e in group] for name in names},
                "length": max(len(e.transcript.ids) for e in group),
            }
        )
        sample += len(group)
    return rows


@dataclass(frozen=True)
class Collate:
    """Rows of `rows_of` to a batch.

    Gives input_ids, attention_mask and labels ``[batch, token]`` (labels unshifted, -100 where the weight is 0), token_weights ``[batch,
    token]``, sample ``[batch]`` (the sequence's number in the data: the same in every epoch), group ``[batch]`` (counted within the
    batch), and each column ``[batch]``. Raises ValueError for rows that are not, or not whole, those of `rows_of`.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if lacking := [name for name in ("input_ids", "token_weights", "sample", "columns") if name not in rows[0]]:
            raise ValueError(
                f"The rows lack {lacking[0]!r}; they have {', '.join(sorted(rows[0])) or 'nothing'}. Collate takes the rows of rows_of, and a "
                "trainer drops columns that the model does not know: give its arguments remove_unused_columns=False."
            )
        ids = [torch.tensor(i) for row in rows for i in row["input_ids"]]
        weights = [torch.tensor(w, dtype=torch.float32) for row in rows for w in row["token_weights"]]
        pad = torch.nn.utils.rnn.pad_sequence
        padded = pad(weights, batch_first=True)
        padded[:, 0] = 0
        tokens = pad(ids, batch_first=True, padding_value=self.pad_id)
        batch = {
            "input_ids": tokens,
            "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": torch.where(padded != 0, tokens, IGNORED),
            "token_weights": padded,
            "sample": torch.tensor([s for row in rows for s in row["sample"]]),
            "group": torch.tensor([k for k, row in enumerate(rows) for _ in row["input_ids"]]),
        }
        return batch | {
            name: torch.tensor([v for row in rows for v in row["columns"][name]]) for name in rows[0]["columns"]
        }


def require_rows(batch: Any) -> None:
    """Raises ValueError for what is no batch of labelled rows, one text each, padded on the right."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        found = ", ".join(sorted(batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ValueError(
            f"An objective looks at labelled tokens, and the trainer's batches have no labels: {found}. Leave objective out where the trainer "
            "has a loss of its own (preferences, rewards), or give it the data of rows_of and the collator Collate."
        )
    if "attention_mask" not in batch or "position_ids" in batch:
        raise ValueError(
            f"An objective looks at one text a row, and the trainer's batches ({', '.join(sorted(batch))}) have several texts in one row, or no "
            "attention_mask. Give the trainer packing=False and padding_free=False, or leave objective out."
        )
    if not bool(batch["attention_mask"][:, 0].all()):
        raise ValueError(
            "An objective looks at rows padded on the right, and these are padded on the left. Set the tokenizer's padding_side = 'right'."
        )


def require_numbers(who: str, numbered: bool) -> None:
    """Raises ValueError where a batch does not say which sequences of the data it has."""
    if not numbered:
        raise ValueError(
            f"{who} knows a sequence again by its number in the data, and the trainer's batches have none ('sample'). Give it the data of "
            "rows_of and Collate as its collator."
        )
