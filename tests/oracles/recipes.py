"""Data recipes restated literally, for tests. Slow, and close to the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from surgery.model import Model
from surgery.transcript import Transcript, end_tokens, read_transcript


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Levenshtein 1966, by the recursion itself: d(i, j) from d(i-1, j), d(i, j-1) and d(i-1, j-1)."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        edit_distance(a[1:], b) + 1,
        edit_distance(a, b[1:]) + 1,
        edit_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def greedy(model: Model, ids: Sequence[int], length: int) -> list[int]:
    """A text continued greedily, one token at a time, each computed from the text's beginning."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < length and not (written and written[-1] in end_tokens(model.tokenizer)):
            logits = model.module(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1]
            written.append(int(logits.argmax()))
    return written


def critical(
    model: Model, transcript: Transcript, right: Callable[[Transcript], bool | None], alternatives: int, length: int
) -> set[int]:
    """Critical positions (arXiv 2510.10974): c_t = 1 where the continuations from all of the likeliest other tokens fail."""
    start, found = transcript.spans["prompt"][1], set()
    ends = end_tokens(model.tokenizer)
    for t in range(start, len(transcript.ids)):
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([transcript.ids[:t]])).logits[0, -1]
        order = [i for i in logits.argsort(descending=True).tolist() if i != transcript.ids[t]]
        failures = 0
        for token in order[:alternatives]:
            said = [*transcript.ids[start:t], token]
            if token not in ends:
                said += greedy(model, [*transcript.ids[:t], token], length)
            told = read_transcript(model.tokenizer, transcript.question, transcript.ids[:start], said, model.markers)
            failures += not (told.finished and right(told))
        if failures == alternatives:
            found.add(t)
    return found
