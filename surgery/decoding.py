"""Decoding: what a live model writes after each row of a batch, with what the rows share computed once.

`decode` is transformers' own generation, made faster where nothing can be seen of it: the cache has room for the tokens to come, rather
than being copied at each of them, and rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.borrowing import no_generation_settings, text_positions, without_adapter
from surgery.numbers import require_whole
from surgery.rows import all_stay, are_apart, rows_are, rows_now, select_rows
from surgery.seeds import seed_from_numbers
from surgery.transcript import end_tokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from surgery.model import Model

_STRETCH = 8  # tokens after which rows that have ended leave the batch


def decode(
    model: Model, ids: Tensor, mask: Tensor, length: int, past: Any = None, noise: GumbelNoise | None = None
) -> list[list[int]]:
    """What a model writes after each row of a batch, at most `length` tokens: the likeliest token each time.

    What the checkpoint says of generation (a repetition penalty, suppressed tokens, a temperature) has no say here.

    ids, mask: ``[batch, token]``; padding anywhere, as long as every row ends in the last column. past: a cache of all columns but the
    last ones, at least one of which it leaves; it is used up. noise: added to the logits, which makes them samples. A row ends with its
    end token, or is `length` long. Where hooks follow the passes that do not ask who their rows are (`surgery.rows.may_leave`), all rows stay
    in the batch to the end.
    Raises ValueError for a length below 1.
    """
    from transformers import DynamicCache, GenerationConfig

    from surgery.room import with_room

    require_whole("max_new_tokens", length, 1)
    module: Any = model.module
    ends, width = torch.tensor(sorted(end_tokens(model.tokenizer)), dtype=torch.long), ids.shape[1]
    said, named = rows_now(), None
    if said is not None and said.prompts is not None and said.items is not None and len(said.items) == len(ids):
        named = said.prompts, said.items
    stays = all_stay(module) or (followed(module) and named is None)
    stretch = length if stays or not len(ends) else _STRETCH
    cache = with_room(DynamicCache(config=module.config) if past is None else past)
    ids, mask, ends = ids.to(model.device), mask.to(model.device), ends.to(model.device)
    going, written = list(range(len(ids))), [[] for _ in ids]
    while going and (left := length - (ids.shape[1] - width)) > 0:
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(left, stretch),
            eos_token_id=ends.tolist() or None,
            pad_token_id=model.pad_id,
            use_cache=True,
        )
        left_over = rows_are(*([of[i] for i in going] for of in named)) if named else nullcontext()
        with no_generation_settings(module), text_positions(module), left_over:
            told: Tensor = module.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=[noise] if noise else [],
                past_key_values=cache,
            )
        new = told[:, ids.shape[1] :]
        ended = torch.isin(new, ends)
        kept = (ended.cumsum(1) - ended.long() == 0).sum(1).tolist()
        for row, tokens, count in zip(going, new.tolist(), kept, strict=True):
            written[row] += tokens[:count]
        ids, mask = told, torch.cat([mask, mask.new_ones(new.shape)], dim=1)
        stay = (~ended.any(1)).nonzero()[:, 0]
        if stretch < length and len(stay) < len(going):
            ids, mask, going = ids[stay], mask[stay], [going[i] for i in stay.tolist()]
            select_rows(cache, stay)
            if noise:
                noise.keep(stay.tolist())
        elif not len(stay):
            break
    return written


def followed(module: nn.Module) -> bool:
    """Whether hooks look at the passes."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def prefix_cache(module: PreTrainedModel, prefix: Sequence[int], rows: int) -> Any:
    """The KV cache of a prefix with which every row of a batch begins: computed once, repeated for `rows` rows.

    Differentiable where gradients are on. None for models some of whose layers do not keep a plain cache (sliding windows), and
    where rows are to be treated unlike (`surgery.rows.rows_apart`).
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=module.config)
    if are_apart() or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    ids = torch.tensor([list(prefix)], device=next(module.parameters()).device)
    with text_positions(module):
        without_adapter(module).base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(rows)
    return cache


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with in common, leaving each at least one token of its own."""
    shortest = min(map(len, rows))
    return next((i for i in range(shortest - 1) if len({row[i] for row in rows}) > 1), shortest - 1)


def pad_after_prefix(
    rows: Sequence[Sequence[int]], pad: int, share: bool = True, most: int | None = None
) -> tuple[Tensor, Tensor, int]:
    """Ids and attention mask ``[batch, longest]``, the padding between the rows' common prefix and the rest, and the prefix's length.

    At least one token of each row lies after the prefix, which has `most` tokens at most. Without `share` it is empty: plain left padding.
    """
    width = max(map(len, rows))
    start = common_prefix(rows) if share else 0
    start = start if most is None else min(start, most)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :start], mask[i, :start] = torch.tensor(row[:start]), 1
        tail = len(row) - start
        ids[i, width - tail :], mask[i, width - tail :] = torch.tensor(row[start:]), 1
    return ids, mask, start


class GumbelNoise:
    """Gumbel-max sampling: the arg max of ``logits / T + g`` with Gumbel noise g is a sample of ``softmax(logits / T)``.

    Each row draws from its own generator, so a sample does not depend on what else is in the batch.
    """

    def __init__(self, seeds: Sequence[tuple[int, int, int]], heat: float):
        self._heat = heat
        self._rows = [torch.Generator().manual_seed(seed_from_numbers(*seed)) for seed in seeds]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self._rows])
        gumbel = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
        if scores.device.type == "mps":  # which has no float64
            return (scores.cpu().double() / self._heat + gumbel).to(scores)
        return scores.double() / self._heat + gumbel.to(scores.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._rows = [self._rows[i] for i in rows]
