"""Rows of activations at sites over spans. No padding, ever: each row is one real token, and knows whose it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from surgery.model import Model
from surgery.sites import Site, match
from surgery.transcript import Transcript


@dataclass(frozen=True)
class Activations:
    """Activations of transcripts at some sites.

    values:     site -> rows ``[row, d]``, fp32.
    transcript: for each row the index of the transcript it comes from.
    position:   for each row its token position in that transcript, 0-based.
    over:       the spans that were collected.
    """

    values: Mapping[Site, Float[Tensor, "row d"]]
    transcript: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    over: tuple[str, ...]

    @property
    def sites(self) -> list[Site]:
        return list(self.values)

    def __getitem__(self, site: Site | str) -> Float[Tensor, "row d"]:
        wanted = Site.parse(site)
        return self.values[wanted if wanted in self.values else match(str(site), self.values)[0]]

    def __len__(self) -> int:
        return len(self.transcript)

    def where(self, rows: Bool[Tensor, " row"]) -> Activations:
        """The rows a mask keeps."""
        values = {site: v[rows] for site, v in self.values.items()}
        return Activations(values, self.transcript[rows], self.position[rows], self.over)

    def save(self, path: str | Path) -> None:
        from safetensors.torch import save_file

        tensors = {str(site): v for site, v in self.values.items()}
        save_file(
            {**tensors, "transcript": self.transcript, "position": self.position},
            path,
            metadata={"over": ",".join(self.over)},
        )

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            over = tuple(file.metadata()["over"].split(","))
        transcript, position = tensors.pop("transcript"), tensors.pop("position")
        return cls(dict(sorted((Site.parse(name), v) for name, v in tensors.items())), transcript, position, over)


class _EnoughError(Exception):
    """Raised inside a forward pass once the last wanted site has been seen."""


@contextmanager
def streams(
    module: nn.Module, points: Mapping[Site, str], into: dict[Site, Tensor], stop_after: Site | None = None
) -> Iterator[None]:
    """Keep, on every forward pass inside the block, the input of the modules at `points`; hooks are gone on leaving.

    With `stop_after`, a forward pass ends (silently for `forward_until`) once that site was seen.
    """
    handles = []

    def keep(site: Site):
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into[site] = args[0] if args else kwargs["hidden_states"]
            if site == stop_after:
                raise _EnoughError

        return hook

    try:
        for site, path in points.items():
            handles.append(module.get_submodule(path).register_forward_pre_hook(keep(site), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect(
    model: Model,
    transcripts: Sequence[Transcript],
    *,
    at: str | Site | Iterable[str | Site] = "*.resid",
    over: str | Sequence[str] = "completion",
    batch_size: int = 16,
    progress: bool = False,
) -> Activations:
    """The activations of transcripts at sites over spans, as rows without padding.

    at:   patterns of activation sites: ``*.resid`` (the stream entering each block; ``{n_layers}.resid`` leaves the last), ``*.mid``.
    over: one span or several: ``prompt``, ``thinking``, ``answer``, ``completion``, ``all``. A transcript without a span gives no rows for it.

    The forward pass stops at the last site asked for. Rows come transcript by transcript, in token order, each token once. Raises
    ValueError for an unknown site, and when no transcript has any of the spans.
    """
    from tqdm.auto import tqdm

    sites = match(at, model.anatomy.activation_sites())
    spans = (over,) if isinstance(over, str) else tuple(over)
    wanted = [_positions(t, spans) for t in transcripts]
    if not any(wanted):
        held = sorted({name for t in transcripts for name in t.spans})
        raise ValueError(
            f"None of the {len(transcripts)} transcripts has a span {' or '.join(spans)}; they have {', '.join(held) or 'nothing'}."
        )
    points = {site: model.anatomy.hook_point(site) for site in sites}
    order = sorted((i for i in range(len(transcripts)) if wanted[i]), key=lambda i: len(transcripts[i].ids))
    rows: dict[int, dict[Site, Tensor]] = {}
    with tqdm(total=len(order), desc="collecting", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            seen = forward_until(model, [transcripts[i].ids for i in batch], points)
            for row, i in enumerate(batch):
                at_positions = torch.tensor(wanted[i], device=model.device)
                rows[i] = {site: seen[site][row, at_positions].float().cpu() for site in sites}
            bar.update(len(batch))
    kept = sorted(rows)
    return Activations(
        {site: torch.cat([rows[i][site] for i in kept]) for site in sites},
        torch.cat([torch.full((len(wanted[i]),), i) for i in kept]),
        torch.cat([torch.tensor(wanted[i]) for i in kept]),
        spans,
    )


@torch.no_grad()
def forward_until(model: Model, rows: Sequence[Sequence[int]], points: Mapping[Site, str]) -> dict[Site, Tensor]:
    """One forward pass of right-padded rows, as far as the last of `points`: site -> ``[batch, token, d]``.

    Padding is on the right, where causal attention keeps it out of every real token.
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), model.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    seen: dict[Site, Tensor] = {}
    backbone = model.module.base_model  # no need of the vocabulary
    last = max(points, key=lambda s: (s.layer or 0, s.part == "mid"))
    prefix = model.module.base_model_prefix + "."
    inner = {s: p.removeprefix(prefix) for s, p in points.items()}
    with suppress(_EnoughError), streams(backbone, inner, seen, stop_after=last):
        backbone(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    return seen


def _positions(transcript: Transcript, spans: Sequence[str]) -> list[int]:
    return sorted({i for name in spans if name in transcript.spans for i in range(*transcript.spans[name])})
