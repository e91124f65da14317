"""One forward pass of a batch of transcripts, read at some places while it runs: nothing is kept but what the readers keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.capture import pad_right, read
from surgery.anatomy import Tap
from surgery.model import Model
from surgery.numbers import require_whole
from surgery.rows import rows_are
from surgery.transcript import Transcript


@dataclass(frozen=True, eq=False)
class Batch:
    """Some transcripts, padded on the right, and the tokens asked for.

    members: which transcripts. prompts: how many tokens of each are its prompt. row, at: of each token asked for, its row and position.
    """

    members: list[int]
    prompts: list[int]
    ids: Int[Tensor, "batch token"]
    mask: Int[Tensor, "batch token"]
    row: Int[Tensor, " asked"]
    at: Int[Tensor, " asked"]

    def rows(self, activation: Float[Tensor, "batch token width"]) -> Float[Tensor, "asked width"]:
        return activation[self.row, self.at].float()

    def announced(self) -> AbstractContextManager[None]:
        """Passes inside the block are of these transcripts, for whoever follows them (steering over a span)."""
        return rows_are(self.prompts, self.members)

    def following(self) -> Int[Tensor, " asked"]:
        """The token after each, or -1 after the last of a transcript."""
        there = self.at + 1 < self.mask.sum(1)[self.row]
        return torch.where(there, self.ids[self.row, (self.at + 1).clamp_max(self.ids.shape[1] - 1)], -1)


def run(model: Model, batch: Batch, watched: Sequence[tuple[Tap, Callable[[Tensor], None]]]) -> None:
    """A forward pass of the batch that ends when every tap has been seen (`capture.read`)."""
    with batch.announced():
        read(model, batch.ids, batch.mask, watched)


def batches(
    model: Model, transcripts: Sequence[Transcript], wanted: Sequence[Sequence[int]], size: int
) -> Iterator[Batch]:
    """The transcripts of which something is wanted, those of like length together."""
    require_whole("batch_size", size, 1)
    order = sorted((i for i in range(len(transcripts)) if wanted[i]), key=lambda i: len(transcripts[i].ids))
    for start in range(0, len(order), size):
        members = order[start : start + size]
        ids, mask = pad_right([transcripts[i].ids for i in members], model.pad_id)
        row = torch.tensor([r for r, i in enumerate(members) for _ in wanted[i]])
        at = torch.tensor([p for i in members for p in wanted[i]])
        prompts = [transcripts[i].spans.get("prompt", (0, 0))[1] for i in members]
        yield Batch(members, prompts, *(x.to(model.device) for x in (ids, mask, row, at)))
