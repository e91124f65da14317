"""Live tensors at sites: hooks on the model's own forward pass, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from surgery.anatomy import Tap
from surgery.model import Model
from surgery.sites import Site

Keep = Callable[[Float[Tensor, "batch token width"]], Tensor]

# hooks of all blocks open now that come after those attached later, the outermost first: what changes the stream between attention and MLP,
# where attention adds to it, after all that changes what attention adds; and what only looks after all that changes
_later: dict[Literal["mid", "looks"], list[RemovableHandle]] = {"mid": [], "looks": []}


class _EnoughError(Exception):
    """Raised inside a forward pass once everything asked for was seen."""


@torch.no_grad()
def read(
    model: Model,
    ids: Int[Tensor, "batch token"],
    mask: Int[Tensor, "batch token"],
    watched: Sequence[tuple[Tap, Callable[[Tensor], None]]],
) -> None:
    """One forward pass that calls each function with its tap's live tensor, and ends when all have been called.

    Raises ValueError when a tap's module does not run, as in a compiled model, and for a text longer than the model's positions.
    """
    model.require_room(ids.shape[1])
    missing = dict(enumerate(tap for tap, _ in watched))

    def counted(number: int, see: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def then(value: Tensor) -> None:
            see(value)
            missing.pop(number, None)
            if not missing:
                raise _EnoughError

        return then

    backbone = model.module.base_model  # no need of the vocabulary
    with ExitStack() as hooks, suppress(_EnoughError):
        for number, (tap, see) in enumerate(watched):
            hooks.callback(tap.attach(model.module, counted(number, see)).remove)
        backbone(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    if missing:
        raise ValueError(_never_ran(next(iter(missing.values())).path))


@contextmanager
def tapped(model: Model, sites: Sequence[Site], see: Callable[[Site, Tensor], None]) -> Iterator[list[RemovableHandle]]:
    """Call ``see(site, value)`` with the live tensor whenever a forward pass inside the block comes by a site.

    A head's value is its slice of the whole, and what is steered or silenced in blocks around this one or inside it has been. Gives the
    hooks' handles; they are gone on leaving, also after an exception. Raises ValueError for a site that does not exist.
    """
    handles: list[RemovableHandle] = []

    def looking(site: Site) -> Callable[[Tensor], None]:
        return lambda value: see(site, value)

    try:
        for site in sites:
            handles.append(model.anatomy.tap(site).attach(model.module, looking(site)))
        with coming_later("looks", handles):
            yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def coming_later(kind: Literal["mid", "looks"], handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside the block, hooks that `in_order` takes behind those that blocks inside it attach."""
    mine = list(handles)
    _later[kind].extend(mine)
    try:
        in_order()
        yield
    finally:
        for handle in mine:
            _later[kind].remove(handle)


def in_order() -> None:
    """Bring the hooks of all open blocks in order: to be called by who has just attached one that changes activations."""
    for handle in (*_later["mid"], *_later["looks"]):
        hooks: Any = handle.hooks_dict_ref()
        hooks.move_to_end(handle.id)


def forward(
    model: Model, rows: Sequence[Sequence[int]], sites: Sequence[Site], keep: Keep | None = None
) -> dict[Site, Tensor]:
    """One forward pass of token rows, padded on the right, as far as the last of `sites`: site -> ``[batch, token, width]``.

    keep: what to keep of each value as it comes by, for the rest to be freed at once; all of it by default.
    Padding is on the right, where causal attention keeps it out of every real token; what is at padding means nothing. Raises
    ValueError as `read`.
    """
    seen: dict[Site, Tensor] = {}

    def keeper(site: Site) -> Callable[[Tensor], None]:
        return lambda value: seen.update({site: value if keep is None else keep(value)})

    read(model, *pad_right(rows, model.pad_id), [(model.anatomy.tap(site), keeper(site)) for site in sites])
    return {site: seen[site] for site in sites}


def require_seen(model: Model, sites: Sequence[Site], seen: Container[Site]) -> None:
    """Raise ValueError for a site that a forward pass did not come by."""
    missing = [site for site in sites if site not in seen]
    if missing:
        raise ValueError(_never_ran(model.anatomy.tap(missing[0]).path))


def _never_ran(path: str) -> str:
    return f"The hook on {path} never ran in the forward pass. Compiled modules run without hooks: take the model as it was before torch.compile."


def pad_right(
    rows: Sequence[Sequence[int]], pad: int
) -> tuple[Int[Tensor, "batch longest"], Int[Tensor, "batch longest"]]:
    """Token ids and attention mask of rows, padded on the right."""
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return ids, mask


@contextmanager
def only_activations(module: nn.Module) -> Iterator[None]:
    """Inside the block gradients flow through activations alone: parameters ask for none, the embedding's output does."""
    asking = [p for p in module.parameters() if p.requires_grad]
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda _, args, output: output.requires_grad_())
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in asking:
            parameter.requires_grad_(True)
