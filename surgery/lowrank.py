"""Changes of low rank: held as factor pairs, read from PEFT's LoRA adapters, cut from any vector, written as adapters.

``base + 0.5 * Adapter("runs/lora", base)`` is a point like any other. The product of the factors is the change; adding or
averaging factors is not adding changes, so nothing here does that: `joined` stacks them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from surgery.adapter_config import lora_pair, read_adapter_config, unusable
from surgery.adapter_names import CONFIG, WEIGHTS, Names, split_key
from surgery.headers import UNTIE
from surgery.linalg import low_rank_factors
from surgery.numbers import require_whole
from surgery.sites import Site
from surgery.tensorfile import CheckpointError, Stored, TensorFile, TensorSink, read_header
from surgery.weights import Delta, Weights, pieces, require_vector
from surgery.whole import new_folder

if TYPE_CHECKING:
    from surgery.anatomy import Anatomy
    from surgery.checkpoint import Checkpoint

_STRIP = 1 << 18  # entries of a product formed at a time


class Factored(Delta):
    """A change held as factor pairs: at each site ``left @ right``, with left ``[out, r]`` and right ``[r, in]``, fp32.

    pairs: site -> (left, right). The rank may differ from site to site. Raises ValueError for a pair that does not fit together.
    """

    def __init__(self, pairs: Mapping[Site, tuple[Tensor, Tensor]]):
        for site, (left, right) in pairs.items():
            if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
                raise ValueError(
                    f"The factors at {site} are {tuple(left.shape)} and {tuple(right.shape)}: they must be [out, r] and [r, in]."
                )
        self._pairs = dict(pairs)

    def shapes(self) -> Mapping[Site, torch.Size]:
        return {site: torch.Size((len(left), right.shape[1])) for site, (left, right) in self._pairs.items()}

    def factored(self) -> list[Site]:
        """The sites held as factors: all of them here; an `Adapter` or a stored vector may hold some dense."""
        return list(self._pairs)

    def factors(self, site: Site | str) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        """Left and right at a site, scaling included, in fp32. Raises ValueError where the change is not held as factors."""
        left, right = self._pairs[self._existing(site)]
        return left.float(), right.float()

    def scaling(self, site: Site | str) -> float:
        """What is in the left factor already: ``alpha / r`` of an adapter, 1 where factors are held as they are."""
        self._existing(site)
        return 1.0

    def rank(self, site: Site | str) -> int:
        """How many columns the left factor has; the true rank may be less."""
        return self.factors(site)[0].shape[1]

    def _read(self, site: Site, rows: slice) -> Tensor:
        left, right = self.factors(site)
        return left[rows] @ right


def joined(delta: Delta) -> Factored:
    """A sum of factored vectors as one, exactly: factors side by side, so ranks add up.

    ``joined(0.8 * a + 0.2 * b)`` for two adapters. Raises ValueError where a term is not held as factors, TypeError for a model.
    """
    require_vector(delta)
    pairs: dict[Site, tuple[list[Tensor], list[Tensor]]] = {}
    for coefficient, leaf in delta.terms():
        sites = leaf.factored() if isinstance(leaf, Factored) else []
        dense = [s for s in leaf if s not in set(sites) and s in delta]
        if dense or not isinstance(leaf, Factored):
            raise ValueError(
                f"{leaf!r} is not held as factors at {_listed(dense)}: only sums of factored vectors can be joined. Use truncated()."
            )
        for site in sites:
            left, right = leaf.factors(site)
            lefts, rights = pairs.setdefault(site, ([], []))
            lefts.append(coefficient * left)
            rights.append(right)
    return Factored({site: (torch.cat(lefts, 1), torch.cat(rights)) for site, (lefts, rights) in pairs.items()})


def factor_pair(W: Float[Tensor, "out in"], rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"], float]:
    """The best factors of a matrix at a rank, in fp32, and the relative error of their product, ``|W - left right| / |W|``.

    rank: 1 or more; the short side at most is used. The error is in the Frobenius norm, 0 where W is zero, measured on the fp32
    factors themselves. Source: Eckart and Young 1936.
    """
    require_whole("rank", rank)
    long, short = low_rank_factors(W, min(rank, *W.shape))
    left, right = long.float(), short.T.contiguous().float()
    rows = max(1, _STRIP // W.shape[1])
    lost = whole = 0.0
    for start in range(0, len(W), rows):
        strip = W[start : start + rows].double()
        whole += float(strip.square().sum())
        lost += float((strip - left[start : start + rows].double() @ right.double()).square().sum())
    return left, right, math.sqrt(lost / whole) if whole else 0.0


def truncated(delta: Delta, rank: int) -> tuple[Factored, dict[Site, float]]:
    """The best vector of rank at most `rank` at every site, and what it loses there.

    Gives the factors, and for every site of `delta` the relative Frobenius error in [0, 1]. What is no matrix (norms, biases) has no
    factors and is left out, with error 1; so is a change that is zero, with error 0. Raises ValueError for a rank below 1, or
    where there is no matrix at all. Source: Eckart and Young 1936.
    """
    require_vector(delta)
    require_whole("rank", rank)
    if rank < 1:
        raise ValueError(f"rank {rank}: a rank is 1 or more.")
    pairs: dict[Site, tuple[Tensor, Tensor]] = {}
    errors: dict[Site, float] = {}
    for site, shape in delta.shapes().items():
        if len(shape) != 2:
            errors[site] = 1.0 if bool(delta[site].any()) else 0.0
            continue
        value = delta[site]
        if not bool(value.any()):
            errors[site] = 0.0
            continue
        left, right, errors[site] = factor_pair(value, rank)
        pairs[site] = left, right
    if not pairs:
        raise ValueError(
            f"{delta!r} changes no matrix ({_listed(list(delta))}): vectors of numbers have no low-rank form."
        )
    return Factored(pairs), errors


# --- adapters on disk ---------------------------------------------------------------------------------------------------------

_UNTIE = f"Untie the model first: {UNTIE}."


@dataclass(frozen=True)
class _Pair:
    """One module's LoRA as stored: down ``[r, in]``, up ``[out, r]``; of an embedding ``[r, vocabulary]`` and ``[d, r]``."""

    down: Stored
    up: Stored
    scale: float
    of_embedding: bool
    magnitude: Stored | None


_Rows = slice | Tensor | None  # which rows of a module's tensor are a site's


class Adapter(Factored):
    """A PEFT LoRA folder as a vector, read lazily and keyed on the sites of `base`.

    At each site the change is exactly ``(alpha / r) B A`` (``alpha / sqrt(r)`` for rsLoRA), with alpha and r by PEFT's own pattern
    rules. Whatever form `target_modules` takes, the names come from the tensors themselves. A module that holds several sites (a fused
    q, k, v) gives each its rows. Biases, fully trained modules and DoRA are exact too, but held dense, relative to `base`.

    base:  the point the adapter was trained on: it says where sites are, and what DoRA and trained modules are relative to.
    notes: what a reader should know, in words: where a model with the adapter and a merged model cannot be the same.

    Raises CheckpointError for a folder that is no LoRA adapter, is damaged or pickled, uses a variant whose tensors mean something
    else (named), does not fit the shapes of `base`, or has tensors for modules that `base` lacks (listed).
    Source: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353, Eq. 5.
    Differs: an adapter that is tied as its model is (`ensure_weight_tying`) PEFT 0.21 merges into the shared tensor twice; here it
    counts once, as it does while training.
    """

    def __init__(self, folder: str | os.PathLike[str], base: Weights):
        self.folder, self.base = Path(folder), base
        self.config = read_adapter_config(self.folder)
        self.notes: list[str] = []
        self._file = TensorFile(self.folder / WEIGHTS)
        self._pairs_at: dict[Site, list[tuple[_Pair, _Rows]]] = {}
        self._biases: dict[Site, tuple[Stored, float, _Rows]] = {}
        self._saved: dict[Site, Stored] = {}
        self._columns: dict[Site, Tensor] = {}
        self._bind(self._file.tensors)
        found = {*self._pairs_at, *self._biases, *self._saved}
        if not found:
            raise CheckpointError(f"{self.folder / WEIGHTS} holds no tensors.")
        self._shapes = {site: base.shape(site) for site in sorted(found)}

    @property
    def anatomy(self) -> Anatomy:
        """That of the base."""
        return self.base.anatomy

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def factored(self) -> list[Site]:
        """The sites whose change is a product of factors; DoRA, biases and fully trained modules are not among them."""
        return [site for site in self._shapes if self._is_product(site)]

    def factors(self, site: Site | str) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        site = self._existing(site)
        if not self._is_product(site):
            raise ValueError(f"The change of {self.folder} at {site} is no product of factors: read it whole.")
        return self._product(site)

    def taken_from(self) -> Weights:
        return self.base

    def scaling(self, site: Site | str) -> float:
        return self._pairs_at[self._existing(site)][0][0].scale

    def by_rows(self, site: Site) -> bool:
        return self._is_product(site) or self.base.by_rows(site)

    def _read(self, site: Site, rows: slice) -> Tensor:
        if self._is_product(site):
            left, right = self._product(site, rows)
            return left @ right
        start = self.base.rows(site, rows).float().cpu()
        after = self._before_stretch(site, rows, start)
        if self._magnitude(site) is not None:
            after = after * self._stretch(site, rows, after)
        return after - start

    def _read_stored(self, tensor: Stored) -> Tensor:
        return self._file[tensor.name]

    def _is_product(self, site: Site) -> bool:
        return site in self._pairs_at and site not in self._saved and self._magnitude(site) is None

    def _magnitude(self, site: Site) -> Stored | None:
        return next((pair.magnitude for pair, _ in self._pairs_at.get(site, ()) if pair.magnitude), None)

    def _product(self, site: Site, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The factors, the left one's rows asked for, scale included."""
        lefts, rights = [], []
        for pair, piece in self._pairs_at[site]:
            up, down = self._read_stored(pair.up), self._read_stored(pair.down)
            left, right = (down.T, up.T) if pair.of_embedding else (up, down)
            lefts.append(_piece(left, piece)[rows].float() * pair.scale)
            rights.append(right.float())
        return torch.cat(lefts, 1), torch.cat(rights)

    def _before_stretch(self, site: Site, rows: slice, start: Tensor) -> Tensor:
        """The rows as trained, but for DoRA's magnitudes."""
        after = start
        if site in self._saved:
            after = self.base.anatomy.places[site].take(self._read_stored(self._saved[site]))[rows].float()
        if site in self._biases:
            bias, scale, piece = self._biases[site]
            after = after + scale * _piece(self._read_stored(bias).float(), piece)[rows]
        if site in self._pairs_at:
            left, right = self._product(site, rows)
            after = after + left @ right
        return after

    def _stretch(self, site: Site, rows: slice, after: Tensor) -> Tensor:
        """DoRA's factor: the trained magnitude over the norm, of each output; an embedding's outputs are its columns."""
        (pair, piece) = self._pairs_at[site][0]
        assert pair.magnitude is not None
        magnitude = self._read_stored(pair.magnitude).float()
        if not pair.of_embedding:
            return (_piece(magnitude, piece)[rows] / after.norm(dim=1))[:, None]
        if site not in self._columns:
            squares = torch.zeros(after.shape[1], dtype=torch.float64)
            for strip in pieces(self._shapes[site]):
                squares += (
                    self._before_stretch(site, strip, self.base.rows(site, strip).float().cpu())
                    .double()
                    .square()
                    .sum(0)
                )
            self._columns[site] = squares.sqrt().float()
        return magnitude / self._columns[site]

    # what the names in the file mean

    def _bind(self, stored: Mapping[str, Stored]) -> None:
        homes = _Homes(self.base)
        modules: dict[str, dict[str, Stored]] = {}
        whole: dict[Site, list[Stored]] = {}
        lost: list[str] = []
        for key, tensor in stored.items():
            if not tensor.dtype.is_floating_point:
                raise self._error(f"{key} is {tensor.dtype}, but weights are floating point.")
            module, kind = split_key(key)
            if kind is None:
                home = homes.name(key)
                if home is None:
                    lost.append(key)
                    continue
                self._bind_saved(key, home, tensor, homes, whole)
            elif kind in modules.setdefault(module, {}):
                raise self._error(f"it holds two adapters: {module} has {kind} twice.")
            else:
                modules[module][kind] = tensor
        tied: dict[Site, list[_Pair]] = {site: [] for site in self.anatomy.ties.values()}
        for module, kinds in modules.items():
            home = homes.name(module + ".weight")
            if home is None:
                lost.append(module)
                continue
            pair = self._pair(module, kinds, homes.shape(home))
            for site in homes.sites(home):
                self._pairs_at.setdefault(site, []).append((pair, homes.rows(site)))
                if site in tied:
                    tied[site].append(pair)
            if "lora_B.bias" in kinds:
                self._bind_bias(module, kinds["lora_B.bias"], pair.scale, homes)
        if lost:
            raise self._error(
                f"{len(lost)} of its modules or tensors are not in {self.base!r}: {_listed(lost)}. It belongs to another model."
            )
        for site, pairs in tied.items():
            if len(whole.get(site, ())) == 1 and site in self._saved:
                raise self._error(
                    f"it trains {whole[site][0].name} alone, which {self.base!r} ties to another module. {_UNTIE}"
                )
            if pairs:
                self._bind_tied(site, pairs)

    def _pair(self, module: str, kinds: Mapping[str, Stored], shape: torch.Size) -> _Pair:
        """A module's factors, their shapes checked against the base's matrix."""
        shapes = {kind: tuple(tensor.shape) for kind, tensor in kinds.items()}
        first, second, scale = lora_pair(self.config, module, shapes, tuple(shape), repr(self.base), self.folder)
        return _Pair(
            kinds[first], kinds[second], scale, first == "lora_embedding_A", kinds.get("lora_magnitude_vector")
        )

    def _bind_bias(self, module: str, bias: Stored, scale: float, homes: _Homes) -> None:
        home = homes.name(module + ".bias")
        if home is None:
            raise self._error(f"it adds a bias to {module}, which has none in {self.base!r}, so it cannot be merged.")
        for site in homes.sites(home):
            self._biases[site] = (bias, scale, homes.rows(site))

    def _bind_saved(self, key: str, home: str, tensor: Stored, homes: _Homes, whole: dict[Site, list[Stored]]) -> None:
        """A tensor of the base itself: trained whole, or an embedding that PEFT saves along. whole: those of each site so far."""
        shape = homes.shape(home)
        if tensor.shape != (shape[::-1] if homes.transposed(home) else shape):
            raise self._error(
                f"{key} is {tuple(tensor.shape)}, which does not fit {home}, {tuple(shape)}, of {self.base!r}."
            )
        for site in homes.sites(home):
            now = self._read_stored(tensor)
            found = whole.setdefault(site, [])
            if found and not torch.equal(self._read_stored(found[0]), now):
                raise self._error(f"it trains {site} twice, as {found[0].name} and as {key}, and differently. {_UNTIE}")
            found.append(tensor)
            if not torch.equal(self.base.anatomy.places[site].take(now).float(), self.base[site].float().cpu()):
                self._saved[site] = tensor

    def _bind_tied(self, site: Site, pairs: list[_Pair]) -> None:
        """One tensor, two modules: embedding and head. What was trained on one of them a merged model has in both."""
        names = " and ".join(pair.up.name.partition(".lora_")[0] for pair in pairs)
        if len(pairs) == 1:
            self.notes.append(
                f"The adapter changes {names} alone, which the base ties to another module: a merged model has the change in both."
            )
            return
        (embedding, head) = sorted(pairs, key=lambda pair: not pair.of_embedding)
        read = self._read_stored
        alike = torch.equal(read(embedding.down).T, read(head.up)) and torch.equal(
            read(embedding.up).T, read(head.down)
        )
        if self.config.get("ensure_weight_tying") and alike:
            self._pairs_at[site] = [entry for entry in self._pairs_at[site] if entry[0] is embedding]
            return
        if any(pair.magnitude for pair in pairs):
            raise self._error(f"DoRA changes {names} apart, which the base ties. {_UNTIE}")
        self.notes.append(
            f"The adapter changes {names} apart, which the base ties: a merged model has both changes in both."
        )

    def _error(self, what: str) -> CheckpointError:
        return unusable(self.folder, what)


class _Homes:
    """Under which of a point's own names, and at which sites, it has what an adapter calls by a module's name."""

    def __init__(self, base: Weights):
        self._base = base
        self._stored_in = base.anatomy.stored_in()
        tied = base.anatomy.ties.get(Site(None, "head"))
        self._names = Names(self._stored_in, None if tied is None else base.anatomy.places[tied].name)

    def name(self, key: str) -> str | None:
        return self._names.find(key)

    def sites(self, name: str) -> list[Site]:
        return self._stored_in[name]

    def rows(self, site: Site) -> _Rows:
        return self._base.anatomy.places[site].rows

    def transposed(self, name: str) -> bool:
        return self._base.anatomy.places[self.sites(name)[0]].transposed and len(self.shape(name)) == 2

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor, ``[out, in]``: the sites in it share its rows."""
        shapes = [self._base.shape(site) for site in self.sites(name)]
        return torch.Size((sum(shape[0] for shape in shapes), *shapes[0][1:])) if len(shapes) > 1 else shapes[0]


def _piece(tensor: Tensor, rows: _Rows) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _listed(names: Iterable[object], most: int = 12) -> str:
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f", ... ({len(texts)} in all)" if len(texts) > most else "")


# --- writing an adapter -------------------------------------------------------------------------------------------------------


def lora_sites(base: Checkpoint) -> list[Site]:
    """The sites whose change a LoRA of `base` can hold: matrices of linear layers and embeddings that are not tied to another."""
    module = _skeleton(base)
    return _lora_sites(base, module, _anatomy_of(base, module))


def save_adapter(
    delta: Factored,
    to: str | os.PathLike[str],
    base: Checkpoint,
    *,
    seal: Callable[[Path], object] | None = None,
) -> Path:
    """Write factors as a PEFT LoRA folder for `base`, whole or not at all; PEFT's names and shapes are checked, and every byte is read back.

    Values are fp32, alpha equals the rank, so the scale is 1; ranks that differ go into `rank_pattern`. Sites that share a module (a
    fused q, k, v) share its adapter: where their right factors differ, its rank is their sum.

    seal: called with the finished folder before it appears under its name: the place to add a record.

    Raises ValueError for a vector that is empty, is not all factors, or moves what a LoRA cannot hold (see `lora_sites`: an embedding tied
    to its head is among it, since PEFT merges the change of tied modules twice), or holds what is not finite; FileExistsError if `to` exists; CheckpointError where
    PEFT would not find the same modules.
    """
    if not isinstance(delta, Factored):
        raise ValueError("A LoRA holds factors, and this change has whole matrices: give truncated(delta, rank)[0].")
    dense = sorted(set(delta) - set(delta.factored()))
    if not len(delta):
        raise ValueError("The vector has no site: there is no change to save.")
    if dense:
        raise ValueError(
            f"{_listed(dense)} are not held as factors, which is all a LoRA can hold. Keep the others, as factors again: truncated(delta.keep(...), rank)[0]."
        )
    unfit = [site for site, shape in delta.shapes().items() if base.shapes().get(site) != shape]
    if unfit:
        raise ValueError(f"{base!r} has no site of the same shape for {_listed(unfit)}.")
    module = _skeleton(base)
    anatomy = _anatomy_of(base, module)
    fit = set(_lora_sites(base, module, anatomy))
    unheld = [site for site in delta if site not in fit]
    if unheld:
        tied = [site for site in unheld if site in base.anatomy.ties.values()]
        why = f" ({tied[0]} is tied, and PEFT merges an adapter of tied modules into them twice)" if tied else ""
        raise ValueError(
            f"No LoRA of {base!r} can hold {_listed(unheld)}{why}. Leave them out: truncated(delta.keep(...), rank)[0]."
        )
    for site in delta:
        if not all(bool(torch.isfinite(factor).all()) for factor in delta.factors(site)):
            raise ValueError(f"{site} holds values that are NaN or infinite; nothing was written.")
    loras = {
        name.removesuffix(".weight"): _module_factors(delta, anatomy, sites, base.shapes())
        for name, sites in anatomy.stored_in().items()
        if any(site in delta for site in sites)
    }
    with new_folder(Path(to)) as partial:
        config = _config({name: right.shape[0] for name, (_, right) in loras.items()}, base)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = _adapter_tensors(module, loras)
        with TensorSink(partial / WEIGHTS, tensors) as sink:
            for name, tensor in tensors.items():
                sink.add(name, tensor)
            sink.metadata = {"format": "pt"}
        _require_loads(partial, module)
        if seal is not None:
            seal(partial)
    return Path(to)


def _config(ranks: Mapping[str, int], base: Checkpoint) -> dict[str, Any]:
    """PEFT's config of modules with these ranks and scale 1."""
    counts = list(ranks.values())
    usual = max(sorted(set(counts)), key=counts.count)
    others = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    transposed = {place.name for place in base.anatomy.places.values() if place.transposed}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.folder), "inference_mode": True,
        "r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others, "target_modules": sorted(ranks),
        "bias": "none", "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
        "fan_in_fan_out": any(name + ".weight" in transposed for name in ranks),
    }  # fmt: skip


def _anatomy_of(base: Checkpoint, module: nn.Module) -> Anatomy:
    return type(base.anatomy).of(base.config, (name for name, _ in module.named_parameters()), where=str(base.folder))


def _lora_sites(base: Checkpoint, module: nn.Module, anatomy: Anatomy) -> list[Site]:
    from transformers.pytorch_utils import Conv1D

    def holds(site: Site) -> bool:
        place = anatomy.places.get(site)
        if place is None or site in anatomy.ties.values() or not place.name.endswith(".weight"):
            return False
        return isinstance(module.get_submodule(place.name.removesuffix(".weight")), nn.Linear | nn.Embedding | Conv1D)

    return [site for site, shape in base.shapes().items() if len(shape) == 2 and holds(site)]


def _skeleton(base: Checkpoint) -> nn.Module:
    """The module that transformers makes of the base's config, without memory for its weights."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForCausalLM if base.config.get_text_config() is base.config else AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(base.config)


def _module_factors(
    delta: Factored, anatomy: Anatomy, sites: list[Site], shapes: Mapping[Site, torch.Size]
) -> tuple[Tensor, Tensor]:
    """The factors of one module, ``[out, r]`` and ``[r, in]``, from those of the sites that share its rows."""
    present = [site for site in sites if site in delta]
    factors = {site: delta.factors(site) for site in present}
    if len(sites) == 1:
        return factors[sites[0]]
    rights = [right for _, right in factors.values()]
    shared = all(right.shape == rights[0].shape and torch.equal(right, rights[0]) for right in rights)
    rank = rights[0].shape[0] if shared else sum(right.shape[0] for right in rights)
    whole = torch.zeros(sum(shapes[site][0] for site in sites), rank)
    column = 0
    for site, (left, _) in factors.items():
        whole[anatomy.places[site].rows, column : column + left.shape[1]] = left
        column += 0 if shared else left.shape[1]
    return whole, rights[0] if shared else torch.cat(rights)


def _adapter_tensors(module: nn.Module, loras: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (left, right) in loras.items():
        key = f"base_model.model.{name}"
        if isinstance(module.get_submodule(name), nn.Embedding):
            tensors[f"{key}.lora_embedding_A"], tensors[f"{key}.lora_embedding_B"] = left.T, right.T
        else:
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = right, left
    return tensors


def _require_loads(folder: Path, module: nn.Module) -> None:
    """Raise CheckpointError unless PEFT, given the folder's config, makes exactly the tensors that the folder holds."""
    import warnings

    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(module, PeftConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)  # type: ignore[arg-type]
        made = {k: v.shape for k, v in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()}
    held = {t.name: t.shape for t in read_header(folder / WEIGHTS)[0]}
    differing = sorted(name for name in made.keys() | held.keys() if made.get(name) != held.get(name))
    if differing:
        raise CheckpointError(f"PEFT would not load this adapter as it is meant: {_listed(differing, 3)} differ.")
