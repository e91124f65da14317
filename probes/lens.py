"""The logit lens: what a model would say if its last block came earlier.

Each stream goes through the model's own final norm, head and, where the family has one, soft cap. At the last site these are the
model's own logits. What it shows at earlier sites is how much can be read off linearly in the vocabulary's terms, no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.activations import as_spans
from probes.passes import Batch, batches, run
from probes.results import interval, load_tensors, save_tensors
from surgery.model import Model
from surgery.numbers import require_whole
from surgery.rows import rows_are
from surgery.sites import Patterns, Site, match
from surgery.transcript import Transcript, nobody_has, positions

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 1 << 24  # logits in work at a time
_LIKE_LOGITS = 1e-3  # of the largest logit: beyond rounding in fp32


@dataclass(frozen=True, eq=False)
class Lens:
    """What each stream says of the next token, token by token.

    sites:       the streams, in the order of the forward pass.
    transcript:  for each row the index of its transcript; position: its token position; token: the token there; following: the one
                 after it, -1 after a transcript's last.
    kl:          ``[row, site]``: KL divergence of the lens's distribution from the model's own, ``KL(final || lens)``, in nats.
    nll:         ``[row, site]``: negative log-likelihood of the token that follows, in nats; NaN where none does.
    top:         ``[row, site, k]``: ids of the likeliest tokens, the likeliest first. probability: theirs.
    final:       for each row the model's own likeliest token.
    words:       the text of every id in these tables.
    question:    of each transcript: rows of one question are not independent.
    """

    sites: tuple[Site, ...]
    transcript: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    token: Int[Tensor, " row"]
    following: Int[Tensor, " row"]
    kl: Float[Tensor, "row site"]
    nll: Float[Tensor, "row site"]
    top: Int[Tensor, "row site k"]
    probability: Float[Tensor, "row site k"]
    final: Int[Tensor, " row"]
    words: Mapping[int, str]
    question: tuple[str, ...]
    over: tuple[str, ...]

    @property
    def agrees(self) -> Float[Tensor, "row site"]:
        """1 where the likeliest token is the model's own, else 0."""
        return (self.top[:, :, 0] == self.final[:, None]).float()

    @property
    def committed(self) -> Int[Tensor, " row"]:
        """For each row the number of the first site from which on the likeliest token is the model's own; ``len(sites)`` where none is."""
        return len(self.sites) - self.agrees.flip(1).cumprod(1).sum(1).long()

    def frame(self, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
        """A row a site and measure: layer, site, measure (kl, nll, agreement), value, low, high, n (questions).

        Means within transcripts first, so that each weighs the same; low, high: percentile bootstrap over questions.
        """
        import pandas as pd

        kept, place = self.transcript.unique(return_inverse=True)
        question = [self.question[i] for i in kept.tolist()]
        tables = []
        for measure, values in (("kl", self.kl), ("nll", self.nll), ("agreement", self.agrees)):
            sums, counts = (torch.zeros(len(kept), len(self.sites), dtype=torch.float64) for _ in range(2))
            sums.index_add_(0, place, values.double().nan_to_num())
            counts.index_add_(0, place, (~values.isnan()).double())
            means = sums / counts
            heard = ~means.isnan().any(1)  # a transcript of one last token has nothing that follows
            if not heard.any():
                continue
            low, high, n = interval(
                means[heard],
                [q for q, h in zip(question, heard, strict=True) if h],
                draws=draws,
                seed=seed,
                level=level,
            )
            rows = [{"layer": s.layer, "site": str(s), "measure": measure} for s in self.sites]
            tables.append(pd.DataFrame(rows).assign(value=means[heard].mean(0).numpy(), low=low, high=high, n=n))
        return pd.concat(tables, ignore_index=True)

    def table(self, transcript: int = 0) -> pd.DataFrame:
        """One transcript's tokens and what each stream says comes next: position, token, following, layer, site, word, probability, kl.

        Raises ValueError for a transcript that has no rows.
        """
        import pandas as pd

        mine = (self.transcript == transcript).nonzero().flatten().tolist()
        if not mine:
            raise ValueError(
                f"There is no transcript {transcript} here; there are {self.transcript.unique().tolist()}."
            )
        rows = [
            {
                "position": int(self.position[r]),
                "token": self.words[int(self.token[r])],
                "following": self.words.get(int(self.following[r]), ""),
                "layer": site.layer,
                "site": str(site),
                "word": self.words[int(self.top[r, s, 0])],
                "probability": float(self.probability[r, s, 0]),
                "kl": float(self.kl[r, s]),
            }
            for r in mine
            for s, site in enumerate(self.sites)
        ]
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """One safetensors file, whole or not at all."""
        said = {"sites": [str(s) for s in self.sites], "words": {str(i): w for i, w in self.words.items()}}
        said |= {"question": self.question, "over": self.over}
        save_tensors(path, {name: getattr(self, name) for name in _TENSORS}, said)

    @classmethod
    def load(cls, path: str | Path) -> Lens:
        """What `save` wrote."""
        tensors, said = load_tensors(path, *_TENSORS)
        return cls(
            sites=tuple(Site.parse(s) for s in said["sites"]),
            words={int(i): w for i, w in said["words"].items()},
            question=tuple(said["question"]),
            over=tuple(said["over"]),
            **tensors,
        )


_TENSORS = ("transcript", "position", "token", "following", "kl", "nll", "top", "probability", "final")


@torch.no_grad()
def unembed(model: Model, stream: Float[Tensor, "row d"]) -> Float[Tensor, "row vocab"]:
    """The logits a stream has as if it left the last block: final norm, head and the family's soft cap, in the model's own dtype; fp32.

    Raises ValueError for rows of another width.
    """
    anatomy, module = model.anatomy, model.module
    if stream.shape[-1] != anatomy.d_model:
        raise ValueError(f"These rows have width {stream.shape[-1]}, and this model's stream {anatomy.d_model}.")
    norm = module.get_submodule(anatomy.tap(Site(anatomy.n_layers, "resid")).path)
    head: Any = module.get_output_embeddings()
    logits = head.forward(norm.forward(stream.to(head.weight.dtype))).float()  # hooks have had their say
    cap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def lens(
    model: Model,
    transcripts: Sequence[Transcript],
    *,
    at: Patterns = "*.resid",
    over: str | Sequence[str] = "completion",
    top: int = 5,
    batch_size: int = 16,
    progress: bool = False,
) -> Lens:
    """Read each stream at each token of a span through the final norm and the head.

    at:  stream sites, ``resid`` or ``mid``. A row is the token a stream is read *at*; what it predicts is the token after it.
    top: how many of the likeliest tokens are kept, at least 1.
    Raises ValueError for other sites, where no transcript has the span, and for a family whose logits are made otherwise: on the
    first batch the last stream's are compared with the model's own.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    from tqdm.auto import tqdm

    anatomy = model.anatomy
    sites = match(at, anatomy.activation_sites())
    other = [s for s in sites if s.part not in ("resid", "mid") or s.head is not None]
    if other:
        raise ValueError(f"{other[0]} is no stream: the lens reads resid and mid.")
    require_whole("top", top)
    if not 1 <= top <= anatomy.vocab:
        raise ValueError(f"top={top}: keep 1 to {anatomy.vocab} tokens.")
    wanted = [positions(t, over) for t in transcripts]
    spans = as_spans(over)
    if not any(wanted):
        raise ValueError(nobody_has(transcripts, spans))
    final = Site(anatomy.n_layers, "resid")
    found: list[tuple[Tensor, ...]] = []
    with tqdm(total=sum(map(bool, wanted)), desc="reading", disable=not progress, leave=False) as bar:
        for batch in batches(model, transcripts, wanted, batch_size):
            rows: dict[Site, Tensor] = {}
            keep = [(anatomy.tap(s), _keeper(rows, s, batch)) for s in {*sites, final}]
            run(model, batch, keep)
            if not found:
                _require_own_logits(model, batch, rows[final][:1])
            following = batch.following()
            seen = [
                _read(model, [rows[s][piece] for s in sites], rows[final][piece], following[piece], top)
                for piece in _pieces(model, len(following))
            ]
            whose = torch.tensor(batch.members, device=batch.row.device)[batch.row]
            said = (
                whose,
                batch.at,
                batch.ids[batch.row, batch.at],
                following,
                *(torch.cat(x) for x in zip(*seen, strict=True)),
            )
            found.append(tuple(x.cpu() for x in said))
            bar.update(len(batch.members))
    columns = [torch.cat(x) for x in zip(*found, strict=True)]
    order = torch.argsort(columns[0] * (1 + max(len(t.ids) for t in transcripts)) + columns[1])
    tensors = dict(zip(_TENSORS, (x[order] for x in columns), strict=True))
    used = torch.cat([tensors[name].flatten() for name in ("token", "following", "top", "final")]).unique().tolist()
    words = {i: str(model.tokenizer.decode([i])) for i in used if i >= 0}
    return Lens(sites=tuple(sites), words=words, question=tuple(t.question for t in transcripts), over=spans, **tensors)


def next_token_losses(
    model: Model, before: Float[Tensor, "row d"], after: Float[Tensor, "row d"], following: Int[Tensor, " row"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """For two streams that leave the last block: ``KL(before || after)`` of the next token, and the rise of its negative log-likelihood.

    In nats. following: the tokens that came, -1 where none did: the rise is then NaN.
    """
    kl, rise = [], []
    for piece in _pieces(model, len(before)):
        was, now = (unembed(model, stream[piece]).log_softmax(-1) for stream in (before, after))
        kl.append((was.exp() * (was - now)).sum(-1))
        rise.append(_nll(now, following[piece]) - _nll(was, following[piece]))
    return torch.cat(kl), torch.cat(rise)


def _keeper(rows: dict[Site, Tensor], site: Site, batch: Batch) -> Callable[[Tensor], None]:
    return lambda activation: rows.update({site: batch.rows(activation)})


def _read(model: Model, streams: Sequence[Tensor], final: Tensor, following: Tensor, top: int) -> tuple[Tensor, ...]:
    own = unembed(model, final).log_softmax(-1)
    kl, nll, ids, shares = [], [], [], []
    for stream in streams:
        said = unembed(model, stream).log_softmax(-1)
        kl.append((own.exp() * (own - said)).sum(-1))
        nll.append(_nll(said, following))
        best = said.topk(top, -1)
        ids.append(best.indices)
        shares.append(best.values.exp())
    return torch.stack(kl, 1), torch.stack(nll, 1), torch.stack(ids, 1), torch.stack(shares, 1), own.argmax(-1)


def _nll(logp: Float[Tensor, "row vocab"], following: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    picked = -logp.gather(1, following.clamp_min(0)[:, None])[:, 0]
    return torch.where(following >= 0, picked, math.nan)


def _pieces(model: Model, rows: int) -> Iterator[slice]:
    size = max(1, _ROWS // model.anatomy.vocab)
    return (slice(start, start + size) for start in range(0, rows, size))


@torch.no_grad()
def _require_own_logits(model: Model, batch: Batch, final: Float[Tensor, "1 d"]) -> None:
    """Compare the lens on the first row's last stream with what the model itself says there."""
    ids = batch.ids[:1, : int(batch.at[0]) + 1]
    with rows_are([min(batch.prompts[0], ids.shape[1])], batch.members[:1]):
        own = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1:].float()
    apart = float((unembed(model, final) - own).abs().max() / own.abs().max())
    allowed = max(_LIKE_LOGITS, 8 * torch.finfo(model.module.dtype).eps)
    if not apart <= allowed:
        raise ValueError(
            f"The logits of this {model.anatomy.family} are not its final norm and head alone: they differ by {apart:.2g} of the largest."
        )
