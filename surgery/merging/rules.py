"""How one output tensor comes about: mergekit's rule, called on tensors read by file name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint
from surgery.merging.recipe import RecipeError
from surgery.merging.vocabulary import Vocabulary, gathered
from surgery.seeds import seed_from_words
from surgery.sites import Site
from surgery.weights import Weights, some_rows

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

_BY_ENTRY = frozenset(
    {"linear", "task_arithmetic", "nearswap", "ram", "passthrough"}
)  # an entry depends on its like alone
_ROWS = 1 << 18  # entries looked at in one go


class Source:
    """A model to merge, its tensors by the file's names for them: a checkpoint, or one with an adapter added."""

    def __init__(self, point: Weights, layout: Checkpoint):
        self.point, self.layout = point, layout
        self._changed = frozenset() if point is layout else frozenset(point.changed_from(layout))
        self._homes = layout.anatomy.stored_in() if self._changed else {}
        self._last: tuple[str, Tensor] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a checkpoint and nothing more."""
        return self.point is self.layout

    def find(self, names: Iterable[str]) -> str | None:
        """The first of the names that the files have."""
        return next((name for name in names if name in self.layout.tensors), None)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Rows of a tensor as a file would have it; fp32 where the adapter moves it."""
        moved = self._moved(name)
        if not moved:
            return some_rows(self.layout.stored(name), rows)
        if self.by_rows(name):
            return self.point.rows(moved[0], rows).float()
        if self._last is None or self._last[0] != name:  # a walk in strips asks for the same one many times
            self._last = None
            self._last = name, self._put_together(name, moved)
        return some_rows(self._last[1], rows)

    def by_rows(self, name: str) -> bool:
        """Whether some rows of a tensor can be had without the others, and by several threads at once."""
        moved, places = self._moved(name), self.layout.anatomy.places
        return not moved or (len(moved) == 1 and places[moved[0]].is_whole and self.point.by_rows(moved[0]))

    def _moved(self, name: str) -> list[Site]:
        return [site for site in self._homes.get(name, ()) if site in self._changed]

    def _put_together(self, name: str, moved: list[Site]) -> Tensor:
        tensor = self.layout.stored(name).float()
        for site in moved:
            tensor = self.layout.anatomy.places[site].put(tensor, self.point[site])
        return tensor


@dataclass(frozen=True, eq=False)
class Rule:
    """How one output tensor comes about: mergekit's task, which holds method and parameters, and where its inputs are.

    dtype:   of the arithmetic; None is what the inputs promote to, as in mergekit.
    literal: leave all arithmetic to mergekit's rule as it stands.
    names:   each model as written, for seeding.
    vocabulary: by which the inputs' rows are lined up first, where they are tokens'; None where the models have one and the same.
    """

    task: ExecuteMergeMethodTask
    inputs: Mapping[ModelReference, tuple[Source, str]]
    dtype: torch.dtype | None
    literal: bool
    seed: int
    names: Mapping[ModelReference, str]
    vocabulary: Vocabulary | None = None

    @cached_property
    def method(self) -> Any:
        from mergekit.merge_methods import get

        return get(self.task.method_name)

    @property
    def name(self) -> str:
        return self.task.output_weight.name

    @cached_property
    def shape(self) -> torch.Size:
        source, name = next(iter(self.inputs.values()))
        shape = source.layout.tensors[name].shape
        return (
            torch.Size((self.vocabulary.rows, *shape[1:])) if self.vocabulary is not None and self._of_tokens else shape
        )

    @property
    def _of_tokens(self) -> bool:
        """Whether the rows are tokens' that a new vocabulary lines up."""
        return self.task.gather_tensors is not gathered(self.task)

    @property
    def found(self) -> torch.dtype:
        """What the dtypes of the inputs promote to."""
        return reduce(torch.promote_types, (source.layout.tensors[name].dtype for source, name in self.inputs.values()))

    @cached_property
    def _complete(self) -> bool:
        return len(self.inputs) == len(self.task.model_order)

    @cached_property
    def _parameters(self) -> dict[str, Any]:
        """The method's shared parameters, and the others by model."""
        own: dict[str, Any] = {}
        for ref in self.inputs:
            for name, value in self.task.input_parameters[ref].items():
                own.setdefault(name, {})[ref] = value
        return {**dict(self.task.parameters.items()), **own}

    @cached_property
    def sum(self) -> dict[Any, float] | None:
        """Coefficients that add up to one, where the rule is a weighted mean or a base plus weighted differences; else None."""
        if self.literal or self.dtype is not torch.float32 or not self._complete or self._of_tokens:
            return None
        p, base = self._parameters, self.task.base_model
        if self.method.spec.name == "linear" and p["normalize"]:
            total = sum(p["weight"].values())
            if total == 0:
                raise RecipeError(
                    f"The weights of {self.name} add up to zero; linear divides by their sum. Change a weight, or write normalize: false under "
                    "parameters:."
                )
            return {ref: weight / total for ref, weight in p["weight"].items()}
        if self.method.spec.name == "task_arithmetic" and base in self.inputs:
            weights = p.get("weight", {})  # none where the base is merged alone
            total = sum(weights.values())
            share = p["lambda"] / (total if p["normalize"] and abs(total) >= 1e-8 else 1.0)
            return {base: 1.0 - share * total, **{ref: share * weight for ref, weight in weights.items()}}
        return None

    @cached_property
    def by_rows(self) -> bool:
        """Whether some rows can be had without computing the others."""
        alike = self._complete and not self._of_tokens and (self.task.method_name in _BY_ENTRY or self._trims)
        return alike and all(source.by_rows(name) for source, name in self.inputs.values())

    def rows(self, rows: slice) -> Tensor:
        """Rows of the merged tensor as the file lays it out. Only where `by_rows` says so."""
        if self._trims:
            return self._from_pieces([self._trimmed(ref, rows) for ref in self._others], rows)
        with _mergekits_words(self.name):
            made = self._execute(rows)
        assert made is not None  # only an incomplete set of inputs is skipped
        return made

    def whole(self) -> Tensor | None:
        """The merged tensor; None where mergekit skips an optional one."""
        try:
            return self._made()
        finally:
            self.__dict__.pop("_lined_up", None)  # as large as all the inputs together

    def _made(self) -> Tensor | None:
        if self._complete and self._drops:
            with _one_thread():  # the sums that rescale must not depend on how many share them
                return self._from_pieces([self._dropped(ref) for ref in self._others])
        if self._complete and self._trims:
            return self._from_pieces([self._trimmed(ref, slice(None)) for ref in self._others])
        with _seeded(self.seed, self.name), _mergekits_words(self.name):
            return self._execute(slice(None))

    def _execute(self, rows: slice) -> Tensor | None:
        return self.task.execute(tensors={ref: self._input(ref, rows) for ref in self.inputs})

    def _input(self, ref: ModelReference, rows: slice = slice(None)) -> Tensor:
        return some_rows(self._lined_up[ref], rows) if self._of_tokens else self._read(ref, rows)

    @cached_property
    def _lined_up(self) -> Mapping[ModelReference, Tensor]:
        """The inputs whole, a row for each token of the new vocabulary."""
        assert self.vocabulary is not None
        with _mergekits_words(self.name):
            return self.vocabulary.line_up(self.task, {ref: self._read(ref, slice(None)) for ref in self.inputs})

    def _read(self, ref: ModelReference, rows: slice) -> Tensor:
        source, name = self.inputs[ref]
        tensor = source.rows(name, rows)
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    # Generalised task arithmetic is a thinning of each model's difference from the base and a sum of what is left. Thinned here, by
    # mergekit's own function or exactly like it, the differences go through mergekit's sum with a base of zero.

    @property
    def _others(self) -> list[ModelReference]:
        return [ref for ref in self.inputs if ref != self.task.base_model]

    def _thins(self, *ways: str) -> bool:
        way = getattr(self.method, "sparsification_method", None)
        return way is not None and way.value in ways and self.task.base_model in self.inputs

    @cached_property
    def _drops(self) -> bool:
        return self._thins("random", "della_magprune")

    @cached_property
    def _trims(self) -> bool:
        own = not self.literal and self.dtype is torch.float32
        return own and self._thins("magnitude") and not self._parameters["rescale"]

    def _dropped(self, ref: ModelReference) -> Tensor:
        """A model's difference from the base thinned at random, by mergekit's function; it depends on seed, tensor and model alone."""
        from mergekit.sparsify import RescaleNorm, sparsify

        p = self._parameters
        extra = {key: p[key][ref] for key in ("gamma", "epsilon") if key in p}
        with _seeded(self.seed, self.name, self.names[ref]), _mergekits_words(self.name):
            return sparsify(
                self._difference(ref, slice(None)),
                density=p["density"][ref],
                method=self.method.sparsification_method,
                rescale_norm=RescaleNorm.l1 if p["rescale"] else None,
                **extra,
            )

    def _from_pieces(self, deltas: list[Tensor], rows: slice = slice(None)) -> Tensor:
        from mergekit.merge_methods import merge_tensors

        assert self.task.base_model is not None
        base, p = self._input(self.task.base_model, rows), self._parameters
        if not deltas:
            return base
        asked = {key: p[key] for key in ("int8_mask", "normalize", "lambda")}
        weights = [p["weight"][ref] for ref in self._others]
        none = torch.zeros_like(base)
        mixed = merge_tensors(
            [none, *deltas], self.method, parameters={**asked, "weight": weights, "rescale": False}, base_index=0
        )
        return base + mixed

    def _trimmed(self, ref: ModelReference, rows: slice) -> Tensor:
        """Rows of a model's difference from the base, without all but the largest entries of the whole tensor."""
        density = self._parameters["density"][ref]
        if density >= 1:
            return self._difference(ref, rows)
        if density <= 0 or not self.shape.numel():
            return torch.zeros_like(self._difference(ref, rows))
        cut = self._cuts(ref)
        if not self.shape:
            delta = self._difference(ref, rows)
            return delta * cut.mask(delta, 0)
        first, last, _ = rows.indices(self.shape[0])
        height = _height(self.shape)
        start = first // height * height  # where a strip begins it is known how many of the equals came before
        delta = self._difference(ref, slice(start, last))
        return (delta * cut.mask(delta, start // height))[first - start :]

    def _difference(self, ref: ModelReference, rows: slice) -> Tensor:
        assert self.task.base_model is not None
        return self._input(ref, rows) - self._input(self.task.base_model, rows)

    def _cuts(self, ref: ModelReference) -> Cut:
        found = self._found_cuts.get(ref)
        if found is None:
            keep = max(1, int(self._parameters["density"][ref] * self.shape.numel()))
            strips = _strips(self.shape)
            found = self._found_cuts[ref] = Cut.of(lambda: (self._difference(ref, rows) for rows in strips), keep)
        return found

    @cached_property
    def _found_cuts(self) -> dict[ModelReference, Cut]:
        return {}


def _height(shape: torch.Size) -> int:
    """How many rows a strip of a tensor has."""
    return max(1, _ROWS // max(1, shape[1:].numel()))


def _strips(shape: torch.Size) -> list[slice]:
    return [slice(i, i + _height(shape)) for i in range(0, shape[0], _height(shape))] if shape else [slice(None)]


@dataclass(frozen=True)
class Cut:
    """Which entries of a tensor are among its largest by magnitude: all above `bits`, and `keep` of the `equal` ones at it.

    bits: a magnitude, as the bits of its float32. before: for each strip, how many of the equal ones come before it.
    """

    bits: int
    keep: int
    equal: int
    before: tuple[int, ...]

    @classmethod
    def of(cls, strips: Callable[[], Iterable[Tensor]], keep: int) -> Cut:
        """The cut that keeps `keep` entries of a tensor that `strips` gives in order, float32, as often as asked.

        Exact, in two histograms of 2^15 and 2^16 bins: no more than a strip is held.

        Differs: between bf16 models many changes have the same magnitude. mergekit leaves the choice among them to an unstable sort,
        which takes most from the last rows; here they are taken evenly from the first to the last.
        """
        high = np.zeros(1 << 15, dtype=np.int64)
        for bits in map(_bits, strips()):
            high += np.bincount(bits >> 16, minlength=1 << 15)
        top, keep = _bin(high, keep)
        low = np.zeros(1 << 16, dtype=np.int64)
        for bits in map(_bits, strips()):
            low += np.bincount(bits[(bits >> 16) == top] & 0xFFFF, minlength=1 << 16)
        bottom, keep = _bin(low, keep)
        cut, equal = (top << 16) | bottom, int(low[bottom])
        counts = [int(np.count_nonzero(bits == cut)) for bits in map(_bits, strips())]
        return cls(cut, keep, equal, tuple(accumulate(counts[:-1], initial=0)))

    def mask(self, strip: Tensor, number: int) -> Tensor:
        """0 or 1 for each entry of what begins where strip `number` does."""
        bits = _bits(strip)
        kept = bits > self.bits
        equal = np.flatnonzero(bits == self.bits)
        order = np.arange(len(equal)) + self.before[number]
        kept[equal[(order + 1) * self.keep // self.equal > order * self.keep // self.equal]] = True
        return torch.from_numpy(kept).view(strip.shape).to(strip.dtype)


def _bits(piece: Tensor) -> np.ndarray:
    """The bits of each magnitude: as whole numbers they are in the order of the magnitudes."""
    return piece.abs().reshape(-1).view(torch.int32).numpy()


def _bin(counts: np.ndarray, keep: int) -> tuple[int, int]:
    """The bin, from the top, in which the `keep`-th entry lies, and how many of that bin are kept."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, keep))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, keep - before


@contextmanager
def _seeded(*key: object) -> Iterator[None]:
    """torch's own generator, seeded by the key, for the length of a block; then as it was."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed_from_words(*key))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _mergekits_words(name: str) -> Iterator[None]:
    """What a rule of mergekit's raises, as one clear error that names the tensor."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise RecipeError(
            f"mergekit cannot merge {name}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
