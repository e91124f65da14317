"""Where each site is: its tensor in a file or a live module, the rows or columns a head owns, the hook point of an activation.

Families are data (`anatomies.toml`). Code here only binds a family's table to a config and to the names that are really there.
Past this border a weight is always ``[out, in]``, whatever the family stores.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from surgery.sites import Site, nothing_matched

if TYPE_CHECKING:  # torch takes seconds to import, and a family's table needs none of it
    import torch
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle
    from transformers import PretrainedConfig

LINEAR_PARTS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
_DENSE = ("mlp.gate", "mlp.up", "mlp.down")
STREAMS = ("resid", "attn.z", "attn.out", "mid", "mlp.out")  # activation sites of a block, in the order they come about
_EXPERT = re.compile(r"^mlp\.(e\d+|shared)\.")


@dataclass(frozen=True)
class Place:
    """Where a site's tensor is stored: a tensor's name, which piece of it, and how it lies.

    rows: index of the piece along the output dimension, or None for the whole tensor.
    transposed: stored ``[in, out]``.
    expert: index along the first dimension where all experts are stored as one ``[experts, out, in]``, or None.
    """

    name: str
    rows: slice | Tensor | None = None
    transposed: bool = False
    expert: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the site's tensor is the stored one, as it lies."""
        return self.rows is None and not self.transposed and self.expert is None

    def take(self, stored: Tensor) -> Tensor:
        """The site's tensor, ``[out, in]`` (or ``[out]``), from the tensor as stored."""
        if self.expert is not None:
            return replace(self, expert=None).take(stored[self.expert])
        tensor = stored.T if self.transposed and stored.ndim == 2 else stored
        return tensor if self.rows is None else tensor[self.rows]

    def find(self, at: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of ascending flat positions in a stored tensor of `shape`, which are this site's, and where each is in the site's tensor, flat.

        Of packed experts only the one's own entries are looked at.
        """
        import torch

        if self.expert is not None:
            count = math.prod(shape[1:])
            ends = torch.tensor([self.expert * count, (self.expert + 1) * count - 1], dtype=at.dtype, device=at.device)
            first, last = int(torch.searchsorted(at, ends[0])), int(torch.searchsorted(at, ends[1], right=True))
            mine, where = replace(self, expert=None).find(at[first:last] - ends[0], shape[1:])
            return first + mine, where
        if self.is_whole:
            return torch.arange(len(at), device=at.device), at
        own = self.take(torch.arange(math.prod(shape), device=at.device).view(*shape)).reshape(-1)
        where = torch.full(
            (math.prod(shape),), -1, device=at.device
        )  # stored position -> position in the site's tensor
        where[own] = torch.arange(len(own), device=at.device)
        where = where.index_select(0, at)
        mine = (where >= 0).nonzero().squeeze(1)
        return mine, where[mine]

    def put(self, stored: Tensor, value: Tensor) -> Tensor:
        """The stored tensor with the site's value in its place: new, in the stored orientation and dtype."""
        if self.expert is not None:
            whole = stored.clone()
            whole[self.expert] = replace(self, expert=None).put(stored[self.expert], value)
            return whole
        if self.rows is None:
            whole = value.T if self.transposed and value.ndim == 2 else value
            return whole.to(stored.dtype).contiguous()
        whole = stored.clone()
        self.take(whole)  # raises on a shape that cannot hold the piece
        (whole.T if self.transposed and whole.ndim == 2 else whole)[self.rows] = value.to(stored.dtype)
        return whole


@dataclass(frozen=True)
class Tap:
    """Where an activation is in a live module: what goes into a module, or what comes out of it.

    path: the module's path. side: which of the two. head: the part of the last dimension that one head has, or None for all.
    """

    path: str
    side: Literal["input", "output"]
    head: slice | None = None

    def attach(self, module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `see` on the activation, ``[batch, token, width]``, at every forward pass; what it returns, unless None, goes on instead.

        A block's output may be a tensor or a tuple that begins with one, and an input may come by position or by name: both are
        handled here and nowhere else. Remove the handle to end it.
        """
        inner = module.get_submodule(self.path)

        def shown(whole: Tensor) -> Tensor | None:
            if self.head is None:
                return see(whole)
            new = see(whole[..., self.head])
            if new is None:
                return None
            whole = whole.clone()
            whole[..., self.head] = new
            return whole

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            new = shown(args[0] if args else kwargs["hidden_states"])
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            packed = isinstance(output, tuple)
            new = shown(output[0] if packed else output)
            return (new, *output[1:]) if packed and new is not None else new

        if self.side == "input":
            return inner.register_forward_pre_hook(before, with_kwargs=True)
        return inner.register_forward_hook(after)


@dataclass(frozen=True)
class Anatomy:
    """A family's table bound to one config and to the tensor names found.

    places:   site -> Place, for every tensor found; tensors the table does not name are at ``file:NAME`` (in a vision-language
              model less the prefixes in which file layouts differ, so that one tensor has one site in all of them).
    ties:     site -> the site it shares its tensor with (``head`` -> ``embed``).
    copies:   names of tensors that merely repeat a tied site's, where a file holds both.
    streams:  activation parts of a block, in the order they come about -> the module inside the block, and whether its input or output.
    head_dim: width of one attention head, read from the config, divided out only where the model itself does so.
    tower:    module path of the language model inside a vision-language model, whose sites have the plain names; else None.
    n_experts: experts of a sparse layer, at ``mlp.e0.down`` and so on; 0 in a dense model.
    gain_offset: what the norms add to the gains as they are stored: 1 where a family stores them less one, else 0.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    blocks: str
    streams: Mapping[str, tuple[str, Literal["input", "output"]]]
    places: Mapping[Site, Place]
    ties: Mapping[Site, Site]
    copies: Mapping[str, Site]
    tower: str | None = None
    n_experts: int = 0
    gain_offset: float = 0.0

    @classmethod
    def of(cls, config: PretrainedConfig, names: Iterable[str], where: str = "the model") -> Anatomy:
        """Bind the family of `config.model_type` to the tensor `names` of a file set or a live module.

        A vision-language model is bound by the table of its text config, found inside it by the table of its own. Raises ValueError
        for a family without a table, and for a required tensor that is not there.
        """
        text = config.get_text_config()
        host: dict[str, Any] = {} if text is config else _table(config.model_type, where, "tower")[1]
        family, table = _table(text.model_type, where, "tensors")
        if host:
            family, table = config.model_type, _inside(table, host)
        shape = _Shape.of(text)
        tied = bool(getattr(config, "tie_word_embeddings", False))
        names = set(names)
        tensors = table["tensors"]
        heads = [spec["name"] for spec in _specs(tensors["head"]) if tied and spec["name"] in names]
        if heads and not any(_named(spec["name"], names) for spec in _specs(tensors["embed"])):
            tensors = {**tensors, "embed": heads.pop()}  # tied, and under the head's name only
        copies = {name: Site(None, "embed") for name in heads}
        places, missing = _bind(tensors, shape, names - set(copies), tied, host.get("aside", ()))
        if missing:
            raise ValueError(
                f"{where} is a {config.model_type} of {shape.n_layers} layers but lacks {len(missing)} of its tensors, "
                f"first {', '.join(missing[:3])}. The download or the index may be incomplete, or config.json belongs to another model."
            )
        flag = table.get("no_mid_if")
        streams: dict[str, tuple[str, Literal["input", "output"]]] = {
            "resid": ("", "input"),
            "attn.z": (table["z"], "input"),
            "attn.out": (table["attn_out"], "output"),
            "mid": (table["mid"], "input"),
            "mlp.out": (table["mlp_out"], "output"),
        }
        if flag and getattr(text, flag, False):
            del streams["mid"]
        return cls(
            family=family,
            n_layers=shape.n_layers,
            d_model=text.hidden_size,
            n_heads=shape.heads,
            n_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab=text.vocab_size,
            blocks=table["blocks"],
            streams=streams,
            places=places,
            ties={Site(None, "head"): Site(None, "embed")} if tied else {},
            copies=copies,
            tower=host["tower"][0] if host else None,
            n_experts=shape.experts if any("{e}" in pattern for pattern in table["tensors"]) else 0,
            gain_offset=float(table.get("gain_offset", 0)),
        )

    def resolve(self, site: Site | str) -> Site:
        """The site that holds the tensor: parses text, follows ties, drops the head."""
        whole = Site.parse(site).whole
        return self.ties.get(whole, whole)

    def stored_in(self) -> dict[str, list[Site]]:
        """Tensor name -> the sites that live in it (several where q, k and v are fused)."""
        names: dict[str, list[Site]] = {}
        for site, place in self.places.items():
            names.setdefault(place.name, []).append(site)
        for name, site in self.copies.items():
            names[name] = [site]
        return names

    def linear_sites(self) -> list[Site]:
        """The attention and MLP matrices of every layer, experts' too: what LIFT tunes and geometry measures."""
        return [s for s in self.places if s.layer is not None and _EXPERT.sub("mlp.", s.part) in LINEAR_PARTS]

    def heads(self, site: Site) -> int:
        """How many heads the tensor at a site has. Raises ValueError where a tensor has none."""
        counts = {"attn.q": self.n_heads, "attn.o": self.n_heads, "attn.k": self.n_kv_heads, "attn.v": self.n_kv_heads}
        part = site.part.removesuffix(".bias")
        if part not in counts or site.part == "attn.o.bias":
            raise ValueError(
                f"{site.whole} has no heads. Heads are at attn.q, attn.k, attn.v (rows) and attn.o (columns)."
            )
        return counts[part]

    def head_slice(self, site: Site) -> tuple[slice, ...]:
        """Index of one head in its whole tensor: rows of q, k, v; columns of o. Under GQA k and v count key/value heads."""
        count = self.heads(site)
        if site.head is None or not 0 <= site.head < count:
            raise ValueError(f"{site} does not exist: {site.whole} has heads h0 to h{count - 1}.")
        span = slice(site.head * self.head_dim, (site.head + 1) * self.head_dim)
        return (slice(None), span) if site.part == "attn.o" else (span,)

    def norm_after(self, site: Site) -> Site | None:
        """The norm that what a matrix (or its bias) writes passes on its way to the stream; None where it is added as it is."""
        part = _EXPERT.sub("mlp.", site.part.removesuffix(".bias"))
        name = {"attn.o": "attn.out_norm", "mlp.down": "mlp.out_norm"}.get(part, "")
        norm = Site(site.layer, name)
        return norm if norm in self.places else None

    def offset(self, site: Site) -> float:
        """What the model adds to the numbers stored at a site before it multiplies by them: 0 except at some families' norms."""
        return self.gain_offset if site.part.endswith("norm") and not site.is_unnamed else 0.0

    def activation_sites(self) -> list[Site]:
        """What can be captured, in the order it comes about: in each layer `resid`, `attn.z`, `attn.out`, `mid` (where there is one) and
        `mlp.out`; then ``{n_layers}.resid``, which leaves the last block.
        """
        inside = [Site(layer, part) for layer in range(self.n_layers) for part in self.streams]
        return [*inside, Site(self.n_layers, "resid")]

    def order(self, site: Site) -> tuple[int, int]:
        """When an activation comes about in a forward pass: a key to sort by."""
        return site.layer or 0, STREAMS.index(site.part)

    def width(self, site: Site) -> int:
        """The last dimension of an activation."""
        if site.part != "attn.z":
            return self.d_model
        return self.head_dim * (self.n_heads if site.head is None else 1)

    def tap(self, site: Site) -> Tap:
        """Where an activation site is in the live module. Raises ValueError, listing what exists, for any other site."""
        if site.whole not in self.activation_sites():
            raise ValueError(nothing_matched(str(site), self.activation_sites()))
        head = None
        if site.head is not None:
            if site.part != "attn.z" or site.head >= self.n_heads:
                raise ValueError(
                    f"{site} does not exist: activations have heads at attn.z, h0 to h{self.n_heads - 1}, before attn.o mixes them."
                )
            head = slice(site.head * self.head_dim, (site.head + 1) * self.head_dim)
        if site.layer == self.n_layers:
            norm = self.places[Site(None, "norm")].name.split(".")[-2]  # a file may call what is around it otherwise
            return Tap(f"{self.blocks.rpartition('.')[0]}.{norm}", "input")
        inner, side = self.streams[site.part]
        return Tap(f"{self.blocks}.{site.layer}.{inner}".rstrip("."), side, head)

    def check(self, module: nn.Module, seed: int = 0) -> None:
        """Prove the map on a live module: perturb each site in turn and see what moves.

        The logits must; of the streams, those before the site must not, and the one between attention and MLP must move for
        attention alone; on a single token, whose attention is 1 whatever q and k are, v must matter and q and k must not. (What
        this cannot tell apart: q from k where they have equally many heads, gate from up, one expert from another.) What a
        vision-language model has beside its language tower must not move the logits of a text. Raises RuntimeError naming the first site
        that behaves otherwise, or whose shape contradicts the config. Weights are restored bit for bit.
        """
        import torch

        parameters = dict(module.named_parameters())
        generator = torch.Generator().manual_seed(seed)
        length = 8 * max(1, self.n_experts)  # so that every expert is asked
        ids = torch.randint(0, self.vocab, (1, length), generator=generator).to(next(module.parameters()).device)
        seen: dict[Site, Tensor] = {}

        def run(tokens: Tensor) -> Tensor:
            return module(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits

        def keep(site: Site) -> Callable[[Tensor], None]:
            return lambda activation: seen.update({site: activation})

        hooks = [self.tap(site).attach(module, keep(site)) for site in self.activation_sites()]
        try:
            with torch.no_grad():
                alone, before, streams = run(ids[:, :1]), run(ids), dict(seen)
                for site, place in self.places.items():
                    parameter = parameters[place.name]
                    tensor = place.take(parameter)
                    self._check_shape(site, tensor.shape)
                    original = parameter.detach().clone()
                    spread = tensor.float().std(unbiased=False) + 0.5
                    noise = torch.randn(tensor.shape, generator=generator).to(tensor) * spread
                    used = tensor + noise
                    if site.part == "embed":
                        used = tensor.clone()
                        used[ids[0]] += noise[ids[0]]
                    try:
                        parameter.copy_(place.put(parameter, used))
                        single, moved = not torch.equal(run(ids[:, :1]), alone), not torch.equal(run(ids), before)
                    finally:
                        parameter.copy_(original)
                    wrong = self._behaves(
                        site, moved, single, {s for s in streams if not torch.equal(seen[s], streams[s])}
                    )
                    if wrong:
                        raise RuntimeError(f"{site} (stored as {place.name}) was perturbed and {wrong}.")
        finally:
            for hook in hooks:
                hook.remove()

    def _check_shape(self, site: Site, found: torch.Size) -> None:
        d, q, kv = self.d_model, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int | None, ...]] = {
            "embed": (self.vocab, d), "head": (self.vocab, d), "norm": (d,), "attn.q": (q, d), "attn.k": (kv, d),
            "attn.v": (kv, d), "attn.o": (d, q), "mlp.gate": (None, d), "mlp.up": (None, d), "mlp.down": (d, None),
            "mlp.router": (self.n_experts, d),
        }  # fmt: skip
        said = shapes.get(_EXPERT.sub("mlp.", site.part), (None,) * len(found))
        if len(said) != len(found) or any(n not in (None, m) for n, m in zip(said, found, strict=True)):
            raise RuntimeError(f"{site} has shape {tuple(found)} where the config of this {self.family} says {said}.")

    def _behaves(self, site: Site, moved: bool, single: bool, streams: set[Site]) -> str | None:
        """What is wrong with what a perturbed site moved: the logits, those of a single token, the streams."""
        kind, _, name = site.part.removesuffix(".bias").partition(".")
        if site.is_unnamed and self.tower:
            return "the logits of a text moved" if moved else None
        if not moved and site.part != "attn.k.bias":  # which cancels in the softmax of an unrotated query
            return "the logits did not move"
        if site.layer is None:
            return None
        last = "mid" if kind == "mlp" else "attn.z" if name in ("o", "out_norm") else "resid"
        early = [s for s in streams if self.order(s) <= self.order(Site(site.layer, last))]
        if early:
            return f"{min(early, key=self.order)}, which comes before it, moved"
        after = [Site(site.layer, f"{kind}.out"), Site(site.layer + 1, "resid")]
        if kind == "attn":
            after += [Site(site.layer, part) for part in ("mid", "attn.z") if part in self.streams and part != last]
        still = [s for s in after if s not in streams]
        if moved and still:
            return f"{min(still, key=self.order)}, which comes after it, did not move"
        if kind == "attn" and name in ("q", "k", "q_norm", "k_norm") and single:
            return "the logits of a single token moved"
        if site.part == "attn.v" and not single:
            return "the logits of a single token did not move"
        return None


@dataclass(frozen=True)
class _Shape:
    n_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    experts: int
    expert_mlp: int
    dense: frozenset[int]

    @classmethod
    def of(cls, text: PretrainedConfig) -> _Shape:
        heads, mlp = text.num_attention_heads, getattr(text, "intermediate_size", None) or 0
        only, step = getattr(text, "mlp_only_layers", None) or (), getattr(text, "decoder_sparse_step", None) or 1
        return cls(
            n_layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            mlp=mlp,
            experts=getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0,
            expert_mlp=getattr(text, "moe_intermediate_size", None) or mlp,
            dense=frozenset(i for i in range(text.num_hidden_layers) if i in only or (i + 1) % step),
        )

    def rows(self, piece: str, of: str) -> slice | Tensor:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        match of:
            case "qkv":
                return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}[piece]
            case "qkv-by-head":
                start = "qkv".index(piece) * self.head_dim
                import torch

                rows = torch.arange(self.heads * 3 * self.head_dim).view(self.heads, 3 * self.head_dim)
                return rows[:, start : start + self.head_dim].reshape(-1)
            case "gate-up":
                return {"gate": slice(0, self.mlp), "up": slice(self.mlp, 2 * self.mlp)}[piece]
            case "expert-gate-up":
                return {"gate": slice(0, self.expert_mlp), "up": slice(self.expert_mlp, 2 * self.expert_mlp)}[piece]
        raise ValueError(f"anatomies.toml: a tensor of {of!r} pieces is not known")


@cache
def _families() -> dict[str, dict]:
    tables = tomllib.loads(files("surgery").joinpath("anatomies.toml").read_text(encoding="utf-8"))

    def resolved(name: str) -> dict:
        table = dict(tables[name])
        if "like" in table:
            parent = resolved(table["like"])
            kept = {k: v for k, v in parent["tensors"].items() if k not in table.get("without", ())}
            table = {**parent, **table, "tensors": {**kept, **table.get("tensors", {})}}
        return table

    return {name: resolved(name) for name in tables}


def _table(model_type: str, where: str, kind: Literal["tensors", "tower"]) -> tuple[str, dict]:
    """The name and the table of a family: of language models, or of the vision-language models around them."""
    known = {word: name for name, table in _families().items() if kind in table for word in table["model_types"]}
    if model_type not in known:
        raise ValueError(
            f"{where} is a {model_type!r} model, a family without a table. Known: {', '.join(sorted(known))}. "
            "A family is added as data, in surgery/anatomies.toml."
        )
    return known[model_type], _families()[known[model_type]]


def _specs(entry: str | dict | list) -> list[dict[str, Any]]:
    """The places an entry of a table allows, in order: most have one, and a list holds several."""
    entries = entry if isinstance(entry, list) else [entry]
    return [spec if isinstance(spec, dict) else {"name": spec} for spec in entries]


def _inside(table: dict, host: dict) -> dict:
    """A language model's table as it reads inside a vision-language model, in every layout of the latter."""
    backbone, _, blocks = table["blocks"].partition(".")

    def moved(name: str) -> list[str]:
        root, _, rest = name.partition(".")
        return [f"{path}.{rest}" for path in host["tower" if root == backbone else "head"]]

    tensors = {
        pattern: [{**spec, "name": name} for spec in _specs(entry) for name in moved(spec["name"])]
        for pattern, entry in table["tensors"].items()
    }
    return {**table, "blocks": f"{host['tower'][0]}.{blocks}", "tensors": tensors}


def _named(name: str, names: set[str]) -> str | None:
    """What a file calls the tensor: one saved from the bare backbone lacks its prefix, ``h.0.ln_1.weight`` for ``transformer.h.0.ln_1.weight``."""
    return next((n for n in (name, name.split(".", 1)[1]) if n in names), None)


def _bind(
    table: dict, shape: _Shape, names: set[str], tied: bool, aside: Iterable[str]
) -> tuple[dict[Site, Place], list[str]]:
    places: dict[Site, Place] = {}
    missing: list[str] = []

    sparse = any("{e}" in pattern for pattern in table)
    for pattern, entry in table.items():
        for layer, expert in _indices(pattern, shape, sparse):
            site = Site.parse(pattern.replace("{l}", str(layer)).replace("{e}", str(expert)))
            if site.part == "head" and tied:
                continue
            specs = [
                {**spec, "name": spec["name"].replace("{l}", str(layer)).replace("{e}", str(expert))}
                for spec in _specs(entry)
            ]
            spec = next((spec for spec in specs if _named(spec["name"], names)), None)
            if spec is None:
                missing.append(specs[0]["name"])
                continue
            rows = shape.rows(spec["piece"], spec["of"]) if "of" in spec else None
            packed = expert if spec.get("packed") else None
            places[site] = Place(str(_named(spec["name"], names)), rows, spec.get("transposed", False), packed)
            bias = _named(spec["name"].removesuffix("weight") + "bias", names)
            if bias is not None:
                places[Site(site.layer, site.part + ".bias")] = Place(bias, rows)
    named = {p.name for p in places.values()}
    for name in sorted(names - named):
        short = Site.unnamed(".".join(part for part in name.split(".") if part not in aside))
        places[Site.unnamed(name) if short in places else short] = Place(name)
    return dict(sorted(places.items())), missing


def _indices(pattern: str, shape: _Shape, sparse: bool) -> list[tuple[int | None, int | None]]:
    """The (layer, expert) pairs for which a pattern stands; in a sparse family some layers may be dense, with one MLP as elsewhere."""
    part = pattern.removeprefix("{l}.")
    layers: list[int | None] = [*range(shape.n_layers)] if "{l}" in pattern else [None]
    if sparse and part.startswith("mlp.") and not part.endswith("norm"):
        layers = [layer for layer in layers if (layer in shape.dense) == (part in _DENSE)]
    return [(layer, e) for layer in layers for e in (range(shape.experts) if "{e}" in pattern else [None])]
