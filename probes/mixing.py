"""Two models speaking as one: their logits mixed at every token, from the one to the other and beyond.

``with mixed(base, tuned, 0.5): base.generate(questions)``. At a scale s the mixture says ``softmax(l_base + s (l_tuned - l_base))``, which is
p_base^(1-s) p_tuned^s, normalised: the base at 0, the tuned model at 1, past it what tuning changed, exaggerated.

Source: reinforcement learning guidance, there of diffusion models. For text the mixture holds token by token; the sequences are only
near those of a model trained with the KL weight that s stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from surgery.model import Model, changed_parameters, swapped
from surgery.rows import may_leave, rows_apart, rows_now
from surgery.weights import Weights

Swap = Callable[[], AbstractContextManager[Any]]

_TWIN = "mixed_cache"  # the attribute under which the base's cache keeps the other model's


@contextmanager
def mixed(
    base: Model, tuned: Model | Weights, scale: float | Sequence[float] | Tensor, *, floor: float = 0.0
) -> Iterator[Model]:
    """`base` with the logits of the mixture: generation and readings of finished texts alike.

    tuned: another model with the same tokenizer, or weights of this one, which are swapped in for each of its passes.
    scale: s, one number, or one for each question (of `Model.generate`) or row; 0 is the base and 1 the tuned model, bit for bit.
    floor: tokens the base gives less than this share of its likeliest token's probability are ruled out, in [0, 1); beyond s = 1 tokens
           the base all but excludes would otherwise win. 0 rules out none.

    Logits come in fp32. Both models keep a cache, and both share the computation of a common prefix. What is steered in the base acts on its
    module: on both, where the other is weights of this one; another model is steered in a block of its own. What is recorded are the base's
    activations. Leaving the block, by an exception too, gives everything back. Raises ValueError for a scale that is not finite, a floor out of
    range, and models with other tokens.
    """
    scales = torch.as_tensor(scale, dtype=torch.float32).detach().cpu().reshape(-1)
    _require_scale(scales)
    _require_floor(floor)
    module: Any = base.module
    swap: Swap = nullcontext
    if isinstance(tuned, Model):
        _require_same_tokens(base, tuned)
        module = tuned.module
    else:
        swap = partial(swapped, base, changed_parameters(tuned, base))
    with ExitStack() as stack:
        if not _plain_cache(module):
            stack.enter_context(rows_apart())
        mixture = _Mixture(module, swap, scales, floor)
        handles = (
            base.module.register_forward_pre_hook(mixture.begin, with_kwargs=True),
            base.module.register_forward_hook(mixture.mix, with_kwargs=True, always_call=True),
            base.module.base_model.register_forward_hook(mixture.fill, with_kwargs=True),
        )
        for handle in handles:
            stack.callback(handle.remove)
        stack.enter_context(may_leave(handles))
        yield base


def mix_logits(
    base: Float[Tensor, "*rows vocab"],
    tuned: Float[Tensor, "*rows vocab"],
    scale: float | Float[Tensor, "#*rows 1"],
    *,
    floor: float = 0.0,
) -> Float[Tensor, "*rows vocab"]:
    """``base + scale (tuned - base)`` in fp32: logits of the normalised ``p_base^(1 - scale) p_tuned^scale``.

    scale: 0 gives the base's logits and 1 the tuned's, bit for bit. floor: where the base's probability is below this share of its
    largest the logit is minus infinity. Raises ValueError as `mixed`.
    """
    _require_floor(floor)
    low, high = base.float(), tuned.float()
    weight = torch.as_tensor(scale, dtype=torch.float32, device=low.device)
    _require_scale(weight)
    mixed = torch.where(weight == 0, low, torch.where(weight == 1, high, low + weight * (high - low)))
    if floor == 0:
        return mixed
    return mixed.masked_fill(low < low.amax(-1, keepdim=True) + math.log(floor), -math.inf)


def _require_scale(scale: Tensor) -> None:
    if not scale.numel() or not bool(torch.isfinite(scale).all()):
        raise ValueError(f"A scale is a finite number, or one for each question; this is {scale.tolist()}.")


def _require_floor(floor: float) -> None:
    if not 0 <= floor < 1:
        raise ValueError(f"A floor is a share of the likeliest token's probability, in [0, 1); this is {floor}.")


class _Mixture:
    """What the hooks of `mixed` share: the other module's passes beside the base's, each with its own cache."""

    def __init__(self, module: Any, swap: Swap, scales: Tensor, floor: float):
        self._module, self._swap, self._scales, self._floor = module, swap, scales, floor
        self._given: dict[str, Any] | None = None  # of the base's pass that runs now
        self._past = 0
        self._inside = False  # a pass of the other module

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The base begins a pass: keep what it is given, and how long its cache is before it."""
        if not self._inside:
            names = ("input_ids",)  # all that anybody gives by position
            self._given = {**dict(zip(names, args, strict=False)), **kwargs}
            self._past = _length(self._given.get("past_key_values"))

    def mix(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The base has ended a pass: run the other, and mix. output: None where the pass failed."""
        given = self._given
        if self._inside or given is None:
            return None
        self._given = None
        if output is None:
            return None
        if given.get("labels") is not None:
            raise ValueError("The loss would be the base's alone. Read the mixture's logits, and give no labels.")
        other = self._run(self._module, given, self._past, getattr(output, "past_key_values", None))
        scales = _of_rows(self._scales, len(output.logits)).to(output.logits.device)
        output.logits = mix_logits(output.logits, other.logits.to(output.logits.device), scales, floor=self._floor)
        return output

    def fill(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The base's backbone has run by itself, to fill a cache with a prefix: fill the other's too."""
        cache = kwargs.get("past_key_values")
        if self._inside or self._given is not None or cache is None:
            return
        past = _length(cache) - output.last_hidden_state.shape[1]
        self._run(self._module.base_model, kwargs, past, cache)

    def _run(self, module: Any, given: dict[str, Any], past: int, cache: Any) -> Any:
        """The other module's pass with what the base was given but for the cache, which is its own."""
        twin = self._twin(given["past_key_values"], past, len(given["input_ids"])) if past else None
        if twin is None and cache is not None:
            twin = _new_cache(self._module)
        self._inside = True
        try:
            with self._swap():
                output = module(**_moved({**given, "past_key_values": twin}, next(module.parameters()).device))
        finally:
            self._inside = False
        if cache is not None:
            setattr(cache, _TWIN, twin)
        return output

    def _twin(self, cache: Any, past: int, batch: int) -> Any:
        """The other's cache that goes with one of the base's, its rows repeated and its end cut as the base's were."""
        twin = getattr(cache, _TWIN, None)
        held = _length(twin)
        if twin is None or held < past:
            raise ValueError(f"The {past} tokens in the cache were not read by both models: fill it inside the block.")
        if held > past:
            twin.crop(past - held)
        rows = len(twin.layers[0].keys)
        if rows != batch:
            if batch % rows:
                raise ValueError(f"The cache has {batch} rows, and the other model's {rows}: fill it inside the block.")
            twin.batch_repeat_interleave(batch // rows)
        return twin


def _of_rows(values: Tensor, batch: int) -> Float[Tensor, "rows 1 1"]:
    """Each row's value; a single one stands for all."""
    if len(values) == 1:
        return values[:, None, None]
    said = rows_now()
    items = torch.tensor(said.items if said and said.items else range(batch))
    if batch % len(items) or int(items.max()) >= len(values):
        raise ValueError(f"{len(values)} scales are given for {batch} rows: give one scale, or one for each question.")
    return values[items.repeat_interleave(batch // len(items))][:, None, None]


def _require_same_tokens(base: Model, tuned: Model) -> None:
    sizes = base.anatomy.vocab, tuned.anatomy.vocab
    if sizes[0] != sizes[1] or base.tokenizer.get_vocab() != tuned.tokenizer.get_vocab():
        raise ValueError(
            f"The two models do not have the same tokens (vocabularies of {sizes[0]} and {sizes[1]}), so their logits cannot be mixed."
        )


def _new_cache(module: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=module.config)


def _plain_cache(module: Any) -> bool:
    """Whether a module's cache keeps every token, so that a prefix may be shared."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in _new_cache(module).layers)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
