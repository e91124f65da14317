"""Critical tokens: those whose replacement ruins the answer, found by trying."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from finetune.examples import Example
from finetune.predictions import logits_at
from finetune.recipes.retelling import Grader, noted, require_some
from surgery.decoding import decode, pad_after_prefix, prefix_cache
from surgery.model import Model
from surgery.transcript import Transcript, end_tokens, positions, read_transcript

Trial = tuple[int, int]  # the position replaced, and the token put there


def critical_tokens(
    model: Model,
    transcripts: Sequence[Transcript],
    right: Grader,
    *,
    alternatives: int = 2,
    over: str | Sequence[str] = "completion",
    max_new_tokens: int = 64,
    batch_size: int = 64,
    confirm: bool = True,
) -> list[Example]:
    """The model's own right answers, with a loss at the critical tokens alone.

    Each token of `over` is replaced in turn by each of the likeliest other tokens, and the model continues greedily from there. The token is
    critical where every continuation fails: a wrong answer, or none within `max_new_tokens` more tokens (counted as ``unanswered``).
    Weights are 1 at critical tokens and 0 elsewhere, so the loss is the mean over critical tokens.

    transcripts:  greedy answers of this very model; those that are not right are left out, and so are those without a critical token.
    alternatives: likeliest other tokens that are tried, 1 or more.
    batch_size:   continuations at once. They share the computation of what precedes the replaced token, where the family allows.
    confirm:      a critical token is tried once more, each text computed from its beginning, and counts if it fails again: arg max in a
                  batch depends on rounding.

    ``meta["recipes"]`` says how many of how many tokens are critical, which share of them lies outside the answer (its own tokens are
    trivially critical), how many failures were for want of an answer, and the share of tokens that are the model's own first choice: below
    1 the transcript was not its greedy answer, and the paper's reading does not apply. Raises ValueError where nothing is left.
    Source: Ruan et al. 2025 (arXiv 2510.10974), Critical Token Fine-tuning: the second and the third likeliest token, greedy continuations.
    """
    if alternatives < 1 or max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"alternatives={alternatives}, max_new_tokens={max_new_tokens}, batch_size={batch_size}: each at least 1."
        )
    good = [t for t in transcripts if right(t)]
    require_some(good, len(transcripts), "none is right.")
    found = []
    for transcript in good:
        tried = [p for p in positions(transcript, over) if p >= max(1, transcript.require("prompt")[1])]
        if not tried:
            continue
        rivals, greedy = _rivals(model, transcript, tried, alternatives)
        search = _Search(model, transcript, right, max_new_tokens, batch_size)
        left, unanswered = tried, 0
        for rank in range(alternatives):
            grades = search.grades([(p, rivals[p][rank]) for p in left], share=True)
            left, unanswered = _failing(left, grades, unanswered)
        if confirm and left:
            again = [p for p in left for _ in range(alternatives)]
            grades = search.grades([(p, r) for p in left for r in rivals[p]], share=False)
            saved = {p for p, grade in zip(again, grades, strict=True) if grade}
            left = [p for p in left if p not in saved]
        if left:
            answer, critical = range(*transcript.spans.get("answer", (0, 0))), set(left)
            told = noted(
                transcript, "critical_tokens", alternatives=alternatives, critical=len(left), tried=len(tried),
                outside_answer=sum(p not in answer for p in left) / len(left), unanswered=unanswered, greedy=greedy,
            )  # fmt: skip
            found.append(Example(told, tuple(float(i in critical) for i in range(len(transcript.ids)))))
    require_some(found, len(transcripts), "no token of a right answer is critical.")
    return found


def _failing(tried: Sequence[int], grades: Sequence[bool | None], unanswered: int) -> tuple[list[int], int]:
    failed = [p for p, grade in zip(tried, grades, strict=True) if not grade]
    return failed, unanswered + sum(grade is None for grade in grades)


@torch.no_grad()
def _rivals(model: Model, transcript: Transcript, tried: list[int], count: int) -> tuple[dict[int, list[int]], float]:
    """The likeliest tokens at each position other than its own, likeliest first, and the share of positions whose own is likeliest."""
    ids = torch.tensor([transcript.ids], device=model.device)
    at = torch.tensor(tried, device=model.device)
    logits = logits_at(
        model.module,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        torch.zeros_like(at),
        at - 1,
        share=False,
    )
    best: Int[Tensor, "token rank"] = logits.topk(count + 1, dim=1).indices
    own = ids[0, at]
    rivals = {
        p: [t for t in row if t != mine][:count]
        for p, row, mine in zip(tried, best.tolist(), own.tolist(), strict=True)
    }
    return rivals, float((best[:, 0] == own).double().mean())


class _Search:
    """Greedy continuations of one transcript, from any of its positions on, with another token there."""

    def __init__(self, model: Model, transcript: Transcript, right: Grader, length: int, batch_size: int):
        self.model, self.transcript, self.right, self.length, self.batch_size = (
            model,
            transcript,
            right,
            length,
            batch_size,
        )
        self.ends = end_tokens(model.tokenizer)
        self._cache: Any = None
        self._shares = True

    @torch.no_grad()
    def grades(self, trials: Sequence[Trial], share: bool) -> list[bool | None]:
        """What the grader says of each trial's continuation; `share`: compute what precedes the replaced tokens once for all."""
        done: dict[Trial, bool | None] = {}
        going = []
        for trial in trials:
            if trial[1] in self.ends:
                done[trial] = self._grade(trial, [])
            else:
                going.append(trial)
        going.sort()
        for start in range(0, len(going), self.batch_size):
            batch = going[start : start + self.batch_size]
            for trial, written in zip(batch, self._continued(batch, share), strict=True):
                done[trial] = self._grade(trial, written)
        return [done[trial] for trial in trials]

    def _grade(self, trial: Trial, written: list[int]) -> bool | None:
        at, token = trial
        start = self.transcript.require("prompt")[1]
        ids = [*self.transcript.ids[start:at], token, *written]
        told = read_transcript(
            self.model.tokenizer, self.transcript.question, self.transcript.ids[:start], ids, self.model.markers
        )
        if self.ends and not told.finished:
            return None
        return self.right(replace(told, meta=self.transcript.meta))

    def _continued(self, batch: Sequence[Trial], share: bool) -> list[list[int]]:
        ids, width = self.transcript.ids, batch[-1][0]
        past = self._past(width, len(batch)) if share else None
        if past is None:
            apart, mask, _ = pad_after_prefix(
                [[*ids[:at], token] for at, token in batch], self.model.pad_id, share=False
            )
            return decode(self.model, apart, mask, self.length)
        rows = torch.tensor([[*ids[:width], token] for _, token in batch])
        begin = torch.tensor([at for at, _ in batch])
        seen = (torch.arange(width) < begin[:, None]).long()  # of a row, what stands before its own replaced token
        mask = torch.cat([seen, torch.ones(len(batch), 1, dtype=torch.long)], dim=1)
        return decode(self.model, rows, mask, self.length, past)

    def _past(self, width: int, rows: int) -> Any:
        """The cache of the transcript's first `width` tokens, for so many rows; None where the family's cannot be shared."""
        if self._cache is None and self._shares:
            self._cache = prefix_cache(self.model.module, self.transcript.ids[:-1], 1)
            self._shares = self._cache is not None
        if not self._shares:
            return None
        past: Any = copy.deepcopy(self._cache)
        if beyond := past.get_seq_length() - width:
            past.crop(-beyond)
        past.batch_repeat_interleave(rows)
        return past
