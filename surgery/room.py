"""A cache with room ahead: a token more is written into it, rather than copied together with all before it."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_ROOM = 64  # tokens that a layer is given room for at once


def with_room(cache: Any) -> Any:
    """The cache with room ahead in its plain layers; the others as they are."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            roomy = Roomy()
            vars(roomy).update(vars(layer))
            cache.layers[i] = roomy
    return cache


class Roomy(DynamicLayer):
    """A plain layer of a cache, and the room it lies in."""

    _rooms: tuple[Tensor | None, Tensor | None] = None, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        (self.keys, keys), (self.values, values) = (
            _appended(held, new, room)
            for held, new, room in zip((self.keys, self.values), (key_states, value_states), self._rooms, strict=True)
        )
        self._rooms = keys, values
        return self.keys, self.values


def _appended(held: Any, new: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """``cat([held, new], dim=-2)`` as a part of a room: the one where `held` lies already, if there is space in it, or a new one."""
    past = held.shape[-2] if held.numel() else 0
    whole = past + new.shape[-2]
    lies = room is not None and held.data_ptr() == room.data_ptr() and len(held) == len(room)
    if room is None or not lies or whole > room.shape[-2]:
        dtype = torch.promote_types(held.dtype, new.dtype) if past else new.dtype
        room = new.new_empty(*new.shape[:-2], whole + _ROOM, new.shape[-1], dtype=dtype)
        if past:
            room[..., :past, :] = held
    room[..., past:whole, :] = new
    return room[..., :whole, :], room
