"""Rows of activations at sites over spans. No padding, ever: each row is one real token, or one pooled span, and knows whose it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.accumulators import Moments
from probes.capture import Keep, forward, only_activations, pad_right, require_seen, tapped
from probes.engines import Engine, reader
from probes.shards import Folder, Stored
from surgery.model import Model
from surgery.numbers import require_whole
from surgery.rows import are_apart, has_hooks, rows_are
from surgery.sites import Patterns, Site, match, nothing_matched
from surgery.tensorfile import save_whole
from surgery.transcript import Transcript, nobody_has, positions, require_several

Pool = Literal["mean", "last"]
Scalar = Callable[[Float[Tensor, "token vocab"], Transcript], Float[Tensor, ""]]


@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """Activations of transcripts at some sites.

    values:     site -> rows ``[row, d]``, fp32. Read from disk site by site where they were collected to a folder.
    transcript: for each row the index of the transcript it comes from.
    position:   for each row its token position in that transcript, 0-based; -1 where the row is a mean of several.
    span:       for each row the index in `over` of its span. Unpooled, a token in several has one row, under the first of them.
    over:       the spans that were collected.
    """

    values: Mapping[Site, Float[Tensor, "row d"]]
    transcript: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    span: Int[Tensor, " row"]
    over: tuple[str, ...]

    @property
    def sites(self) -> list[Site]:
        """Where rows were taken."""
        return list(self.values)

    def __getitem__(self, site: Site | str) -> Float[Tensor, "row d"]:
        wanted = Site.parse(site)
        if wanted not in self.values:
            raise ValueError(nothing_matched(str(site), self.sites))
        return self.values[wanted]

    def __len__(self) -> int:
        return len(self.transcript)

    def where(self, rows: Bool[Tensor, " row"]) -> Activations:
        """The rows a mask keeps."""
        values = {site: v[rows] for site, v in self.values.items()}
        return Activations(values, self.transcript[rows], self.position[rows], self.span[rows], self.over)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_whole(path, self._tensors(), {"over": "\n".join(self.over), "sites": "\n".join(map(str, self.sites))})

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        """What `save` wrote, or the folder that `collect` wrote to. Raises ValueError for a folder that is not complete, and for a file of something else."""
        if Path(path).is_dir():
            folder = Folder.open(Path(path))
            folder.require_complete()
            transcript, position, span = map(folder.read, _LABELS)
            return cls(Stored(folder), transcript, position, span, tuple(folder.about["over"]))
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                said = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from error
        if not {"over", "sites"} <= said.keys():
            raise ValueError(
                f"{path} holds no activations: give what Activations.save wrote, or the folder of collect."
            )
        over, sites = (said[name].split("\n") for name in ("over", "sites"))
        return cls._from(tensors, sites, over)

    @classmethod
    def shards(cls, path: str | Path) -> Iterator[Activations]:
        """The folder that `collect` wrote to, a part at a time and none of them kept: to feed statistics."""
        folder = Folder.open(Path(path))
        folder.require_complete()
        for number in range(len(folder.shards)):
            yield cls._from(folder.read_whole(number), folder.about["sites"], folder.about["over"])

    def _tensors(self) -> dict[str, Tensor]:
        labels = {name: getattr(self, name) for name in _LABELS}
        return {name: t.contiguous() for name, t in {**{str(s): v for s, v in self.values.items()}, **labels}.items()}

    @classmethod
    def _from(cls, tensors: Mapping[str, Tensor], sites: Iterable[str], over: Iterable[str]) -> Activations:
        transcript, position, span = (tensors[name] for name in _LABELS)
        return cls({Site.parse(name): tensors[name] for name in sites}, transcript, position, span, tuple(over))

    def __repr__(self) -> str:
        sites, texts = self.sites, len(self.transcript.unique())
        named = ", ".join(map(str, sites)) if len(sites) < 4 else f"{sites[0]}, {sites[1]}, ... {sites[-1]}"
        return f"<Activations: {len(self):,} rows of {texts:,} transcripts over {', '.join(self.over)}, at {named}>"


_LABELS = ("transcript", "position", "span")


def collect(
    model: Model,
    transcripts: Sequence[Transcript],
    *,
    at: Patterns = "*.resid",
    over: str | Sequence[str] = "completion",
    pool: Pool | None = None,
    to: str | Path | None = None,
    batch_size: int = 16,
    engine: Engine = "torch",
    remote: bool | str = False,
    progress: bool = False,
) -> Activations:
    """The activations of transcripts at sites over spans, as rows without padding.

    at:     patterns of activation sites: ``*.resid`` (the stream entering each block; ``{n_layers}.resid`` leaves the last), ``*.mid``,
            ``*.attn.z`` and its heads ``*.attn.z.h3``, ``*.attn.out`` and ``*.mlp.out`` (what attention and MLP add to the stream).
    over:   one span or several: ``prompt``, ``thinking``, ``answer``, ``completion``, ``all``, ``thinking[-1]``, ``sentence[2]``,
            ``/regex/`` and what else `surgery.transcript.positions` knows. A transcript without a span gives no rows for it.
    pool:   None gives a row for each token, each token once; ``mean`` and ``last`` give one for each transcript and span, its tokens'
            mean or its last token.
    to:     a folder to write to while collecting, for rows that memory does not hold. Interrupted, the same call goes on where it
            stopped; a folder made for another model, transcripts, sites or spans is refused. (What is steered or swapped in by
            hooks is no part of the model's weights: give each its own folder.)
    engine: who runs the forward pass; the rows are the same, but that the others know no hooks on the module: inside `steered`, say, only
            ``torch`` will do. remote: on NDIF, with ``nnsight`` only.

    The same tokens after the same tokens have the same row, to the bit, whatever follows them and whichever batch they are in, unless somebody
    has hooks on the module: answers to one question do not differ over their prompt.

    The forward pass stops at the last site asked for. Rows come transcript by transcript, in token order (pooled: in the order of
    `over`), on the CPU. Raises ValueError for an unknown site or head, and when no transcript has any of the spans.
    """
    run = _Run(model, transcripts, at, over, pool, batch_size)
    if engine != "torch" or remote:
        run.use(engine, remote)
    return run.gather(range(len(transcripts)), progress) if to is None else run.to_folder(Path(to), progress)


def stream(
    model: Model,
    transcripts: Sequence[Transcript],
    *,
    at: Patterns = "*.resid",
    over: str | Sequence[str] = "completion",
    pool: Pool | None = None,
    batch_size: int = 16,
    engine: Engine = "torch",
    remote: bool | str = False,
    progress: bool = False,
) -> Iterator[Activations]:
    """What `collect` gives, a batch of transcripts at a time and none of them kept: to feed statistics.

    Short transcripts come first; `transcript` counts among all. The same tokens in two batches have rows that roundings tell apart. Arguments and errors as `collect`.
    """
    run = _Run(model, transcripts, at, over, pool, batch_size)
    if engine != "torch" or remote:
        run.use(engine, remote)
    return run.batches(range(len(transcripts)), progress)


def moments(
    model: Model,
    transcripts: Sequence[Transcript],
    *,
    at: Patterns = "*.resid",
    over: str | Sequence[str] = "completion",
    pool: Pool | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[Site, Moments]:
    """Mean, covariance and extremes at each site, from one pass over the transcripts that keeps no rows. Arguments and errors as `collect`."""
    found: dict[Site, Moments] = {}
    for batch in stream(model, transcripts, at=at, over=over, pool=pool, batch_size=batch_size, progress=progress):
        for site, rows in batch.values.items():
            found.setdefault(site, Moments.empty(rows.shape[1])).add_(rows)
    return found


def completion_nll(logits: Float[Tensor, "token vocab"], transcript: Transcript) -> Float[Tensor, ""]:
    """The mean negative log-likelihood of the completion's tokens, each given all before it, in nats."""
    begin, end = transcript.require("completion")
    begin = max(begin, 1)  # the first token of all is given nothing before it
    targets = torch.tensor(transcript.ids[begin:end], device=logits.device)
    wide = logits[begin - 1 : end - 1].to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, targets)


def gradients(
    model: Model,
    transcripts: Sequence[Transcript],
    *,
    of: Scalar = completion_nll,
    at: Patterns = "*.resid",
    over: str | Sequence[str] = "completion",
    pool: Pool | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> Activations:
    """The gradient of a number with respect to the activations: rows exactly as `collect` gives them, of gradients.

    of: ``(logits [token, vocab], transcript) -> number``, called for each transcript with its own logits, without padding; the
        gradient at a site is the whole derivative, through everything that comes after it.

    Parameters get no gradient and keep the ones they have. Other arguments and errors as `collect`; ValueError also where `of` gives
    something else than one number that depends on the logits, and inside ``torch.inference_mode``.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() allows no gradient: leave it. torch.no_grad() is no hindrance here.")
    run = _Run(model, transcripts, at, over, pool, batch_size)
    run.through = lambda batch, keep: _backward(model, [transcripts[i] for i in batch], run.sites, of, keep)
    run.apart = True
    return run.gather(range(len(transcripts)), progress)


def _backward(
    model: Model, texts: Sequence[Transcript], sites: Sequence[Site], of: Scalar, keep: Keep
) -> dict[Site, Tensor]:
    seen: dict[Site, Tensor] = {}
    ids, mask = (t.to(model.device) for t in pad_right([t.ids for t in texts], model.pad_id))
    model.require_room(ids.shape[1])
    with only_activations(model.module):
        with tapped(model, [*dict.fromkeys(site.whole for site in sites)], seen.__setitem__):
            logits = model.module(input_ids=ids, attention_mask=mask, use_cache=False).logits
        numbers = [of(logits[i, : len(t.ids)], t) for i, t in enumerate(texts)]
        wrong = [n for n in numbers if not isinstance(n, Tensor) or n.shape != () or not n.requires_grad]
        if wrong:
            raise ValueError(
                f"The gradient needs one number that depends on the logits; the function gave {_described(wrong[0])}."
            )
        require_seen(model, [site.whole for site in sites], seen)
        wholes = list(seen)
        # each number depends on its own row of the batch, so the sum's gradient is each one's own
        found = torch.autograd.grad(
            torch.stack(numbers).sum(), [seen[s] for s in wholes], allow_unused=True, materialize_grads=True
        )
    whole = dict(zip(wholes, found, strict=True))
    heads = {site: model.anatomy.tap(site).head for site in sites}
    return {s: keep(whole[s.whole] if head is None else whole[s.whole][..., head]) for s, head in heads.items()}


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.shape else repr(value)


# --- which rows, and getting them ------------------------------------------------------------------------------------------------


def as_spans(over: str | Sequence[str]) -> tuple[str, ...]:
    """One span or several, as several. Raises ValueError for none."""
    spans = (over,) if isinstance(over, str) else tuple(over)
    if not spans:
        raise ValueError("No span is named. Say which tokens: prompt, thinking, answer, completion or all.")
    return spans


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows transcripts give.

    transcript, position, span: as in `Activations`.
    starts: for each transcript its first row, and at the end the number of rows.
    tokens: for each transcript the positions that are read, row after row. counts: how many of them make each row.
    """

    transcript: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    span: Int[Tensor, " row"]
    starts: Sequence[int]
    tokens: Sequence[Sequence[int]]
    counts: Sequence[Sequence[int]]

    @classmethod
    def of(cls, transcripts: Sequence[Transcript], over: Sequence[str], pool: Pool | None) -> Rows:
        """Raises ValueError when no transcript has any of the spans."""
        if pool not in (None, "mean", "last"):
            raise ValueError(
                f"pool={pool!r} is no way to pool: None keeps every token, 'mean' and 'last' give a row a span."
            )
        wanted = [_rows_of(t, over, pool) for t in transcripts]
        if not any(wanted):
            raise ValueError(nobody_has(transcripts, over))
        return cls(
            torch.tensor([i for i, rows in enumerate(wanted) for _ in rows]),
            torch.tensor([tokens[-1] if pool != "mean" else -1 for rows in wanted for _, tokens in rows]),
            torch.tensor([span for rows in wanted for span, _ in rows]),
            [0, *accumulate(map(len, wanted))],
            [[p for _, tokens in rows for p in tokens] for rows in wanted],
            [[len(tokens) for _, tokens in rows] for rows in wanted],
        )

    def within(self, transcripts: range) -> slice:
        """The rows of a range of transcripts."""
        return slice(self.starts[transcripts.start], self.starts[transcripts.stop])

    def alike(self, ids: Sequence[Sequence[int]]) -> Int[Tensor, " row"]:
        """For each row, the transcripts having these token ids, the first row that reads the same tokens after the same tokens."""
        order = sorted(range(len(ids)), key=lambda i: tuple(ids[i]))
        shared = [0] * len(ids)  # tokens that another transcript begins with too: the rest is nobody else's
        for a, b in pairwise(order):
            common = next((k for k, (x, y) in enumerate(zip(ids[a], ids[b], strict=False)) if x != y), None)
            common = min(len(ids[a]), len(ids[b])) if common is None else common
            shared[a], shared[b] = max(shared[a], common), max(shared[b], common)
        beginnings: dict[tuple[int, int], int] = {}  # the beginning without its last token, that token -> its number
        seen: dict[tuple[int, ...], int] = {}
        first = np.arange(self.starts[-1])
        for i, both in enumerate(shared):
            ends, last = [], -1
            for token in ids[i][:both]:
                last = beginnings.setdefault((last, token), len(beginnings))
                ends.append(last)
            read = iter(self.tokens[i])
            for row, count in enumerate(self.counts[i], self.starts[i]):
                tokens = tuple(islice(read, count))
                if max(tokens) < both:
                    first[row] = seen.setdefault(tuple(ends[p] for p in tokens), row)
        return torch.from_numpy(first)

    def taker(self, batch: Sequence[int], width: int) -> Keep:
        """A function from values ``[batch, width, d]`` of some transcripts to their rows ``[row, d]``, fp32, on the CPU."""
        flat = torch.tensor([k * width + p for k, i in enumerate(batch) for p in self.tokens[i]])
        counts = [n for i in batch for n in self.counts[i]]
        single = all(n == 1 for n in counts)

        def take(value: Tensor) -> Tensor:
            rows = value.detach().flatten(0, 1)[flat.to(value.device)]
            if single:
                return rows.float().cpu()
            rows = rows.cpu() if rows.device.type == "mps" else rows  # which has no float64
            return torch.stack([part.mean(0, dtype=torch.float64) for part in rows.split(counts)]).float().cpu()

        return take


def _rows_of(transcript: Transcript, over: Sequence[str], pool: Pool | None) -> list[tuple[int, list[int]]]:
    """For each row of a transcript the index of its span and the token positions it is made of."""
    held = [(k, tokens) for k, name in enumerate(over) if (tokens := positions(transcript, name))]
    if pool == "mean":
        return held
    if pool == "last":
        return [(k, tokens[-1:]) for k, tokens in held]
    owner = {p: k for k, tokens in reversed(held) for p in tokens}  # the first span has the last word
    return [(owner[p], [p]) for p in sorted(owner)]


Through = Callable[[Sequence[int], Keep], Mapping[Site, Tensor]]


class _Run:
    """Forward passes over transcripts.

    through: takes a batch of them to rows, where it is not by a plain forward pass. apart: whether what follows a token has a say in its row.
    """

    apart = False

    def __init__(
        self,
        model: Model,
        transcripts: Sequence[Transcript],
        at: Patterns,
        over: str | Sequence[str],
        pool: Pool | None,
        batch_size: int,
    ):
        require_several(transcripts)
        require_whole("batch_size", batch_size, 1)
        self.model, self.transcripts, self.pool, self._size = model, transcripts, pool, batch_size
        self.sites = match(at, model.anatomy.activation_sites())
        for site in self.sites:
            model.anatomy.tap(site)  # raises where there is no such head
        self.over = as_spans(over)
        self.rows = Rows.of(transcripts, self.over, pool)
        self.through: Through = self._torch

    def use(self, engine: Engine, remote: bool | str) -> None:
        """Read through another library from now on."""

        read = reader(self.model, engine, remote)

        def through(batch: Sequence[int], keep: Keep) -> dict[Site, Tensor]:
            seen = read([self.transcripts[i].ids for i in batch], self.sites)
            return {site: keep(seen[site]) for site in self.sites}

        self.through = through

    def _torch(self, batch: Sequence[int], keep: Keep) -> dict[Site, Tensor]:
        return forward(self.model, [self.transcripts[i].ids for i in batch], self.sites, keep)

    def batches(self, chosen: range, progress: bool) -> Iterator[Activations]:
        """Batch after batch, transcripts of like length together, those without rows left out."""
        from tqdm.auto import tqdm

        rows, texts = self.rows, self.transcripts
        order = sorted((i for i in chosen if rows.counts[i]), key=lambda i: len(texts[i].ids))
        with tqdm(total=len(order), desc="collecting", disable=not progress, leave=False) as bar:
            for start in range(0, len(order), self._size):
                batch = sorted(order[start : start + self._size])
                keep = rows.taker(batch, max(len(texts[i].ids) for i in batch))
                with rows_are([texts[i].spans.get("prompt", (0, 0))[1] for i in batch], batch):
                    values = self.through(batch, keep)
                mine = torch.cat([torch.arange(rows.starts[i], rows.starts[i + 1]) for i in batch])
                yield Activations(values, rows.transcript[mine], rows.position[mine], rows.span[mine], self.over)
                bar.update(len(batch))

    @cached_property
    def _first(self) -> Int[Tensor, " row"]:
        return self.rows.alike([text.ids for text in self.transcripts])

    def gather(self, chosen: range, progress: bool, before: Folder | None = None) -> Activations:
        """All rows of a range of transcripts, in order. before: where the rows of the transcripts before them are."""
        rows, part = self.rows, self.rows.within(chosen)
        values: dict[Site, Tensor] = {}
        for batch in self.batches(chosen, progress):
            owners = batch.transcript.unique().tolist()
            into = torch.cat([torch.arange(rows.starts[i], rows.starts[i + 1]) for i in owners]) - part.start
            for site, found in batch.values.items():
                values.setdefault(site, torch.empty(part.stop - part.start, found.shape[1]))[into] = found
        if not (self.apart or are_apart() or has_hooks(self.model.module)):
            first = self._first[part] - part.start
            (again,) = torch.nonzero((first != torch.arange(len(first))) & (first >= 0), as_tuple=True)
            for found in values.values():
                found[again] = found[first[again]]
            if before:
                self._repeat_(values, self._first[part], part.start, before)
        return Activations(values, rows.transcript[part], rows.position[part], rows.span[part], self.over)

    def _repeat_(self, values: Mapping[Site, Tensor], first: Int[Tensor, " row"], start: int, folder: Folder) -> None:
        """Changes the values: rows that are there in earlier shards already, before row `start`, are those."""
        (mine,) = torch.nonzero(first < start, as_tuple=True)
        begins = torch.tensor([self.rows.starts[begin] for begin, _ in folder.shards])
        number = torch.searchsorted(begins, first[mine], right=True) - 1
        for shard in number.unique().tolist():
            there = mine[number == shard]
            for site, found in values.items():
                found[there] = folder.read_shard(shard, str(site))[first[there] - begins[shard]]

    def to_folder(self, to: Path, progress: bool) -> Activations:
        """All rows, shard by shard."""
        from tqdm.auto import tqdm

        rows = self.rows
        folder = Folder.prepare(
            to,
            self.model,
            texts=[list(t.ids) for t in self.transcripts],
            tokens=[[rows.tokens[i], rows.counts[i]] for i in range(len(self.transcripts))],
            about={"sites": [str(s) for s in self.sites], "over": list(self.over), "pool": self.pool},
            rows=[len(counts) for counts in rows.counts],
            row_bytes=4 * sum(self.model.anatomy.width(site) for site in self.sites),
        )
        with tqdm(total=len(folder.shards), desc="collecting", disable=not progress, leave=False) as bar:
            for number, (begin, end) in enumerate(folder.shards):
                if not folder.has(number):
                    found = self.gather(range(begin, end), progress=False, before=folder)
                    folder.write(number, found._tensors())
                bar.update()
        return Activations.load(to)
