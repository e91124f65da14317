"""The same activations through other libraries: nnsight (also on a server, for models beyond one machine) and TransformerLens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probes import capture
from surgery.model import Model
from surgery.rows import some_ask
from surgery.sites import Site

Engine = Literal["torch", "nnsight", "transformer-lens"]
Rows = Sequence[Sequence[int]]
Reader = Callable[[Rows, Sequence[Site]], dict[Site, Tensor]]


def forward(
    model: Model, rows: Rows, sites: Sequence[Site], engine: Engine = "torch", remote: bool | str = False
) -> dict[Site, Float[Tensor, "batch token d"]]:
    """One forward pass of token rows, as far as the last of the sites: site -> activations, padded on the right.

    See `reader`, which opens the engine once for many batches.
    """
    return reader(model, engine, remote)(rows, sites)


def reader(model: Model, engine: Engine = "torch", remote: bool | str = False) -> Reader:
    """A function (rows, sites) -> {site: ``[batch, token, d]``} that reads activations with an engine.

    engine: "torch" reads with hooks on the module. "nnsight" and "transformer-lens" read through their own window onto the
        same weights; hooks on the module do not act there, and inside `steered`, `ablated` or `recording` they are refused. TransformerLens
        computes attention eagerly: equal to rounding.
    remote: of nnsight. True runs on NDIF, a text on the server of that address: with the weights *they* have under the hub id that the
        model was loaded by, so not with edits made here. "local" serializes as for a server and runs here.
    Raises ValueError for an unknown engine, for `remote` with another engine than nnsight, and where hooks of ours would not act.
    """
    if engine in ("nnsight", "transformer-lens") and some_ask(model.module):
        raise ValueError(
            f"engine={engine!r} runs the weights alone: what this model is steered, silenced or recorded with now would not act there. "
            "Use engine='torch', or leave the block first."
        )
    if remote and engine != "nnsight":
        raise ValueError(f"remote={remote!r} is for engine='nnsight'; {engine!r} runs here.")
    match engine:
        case "torch":
            return partial(capture.forward, model)
        case "nnsight":
            return _with_nnsight(model, remote)
        case "transformer-lens":
            return _with_bridge(model)
    raise ValueError(f"There is no engine {engine!r}: choose torch, nnsight or transformer-lens.")


def _with_nnsight(model: Model, remote: bool | str) -> Reader:
    from surgery.windows import hub_id

    if remote and remote != "local" and hub_id(model) is None:
        raise ValueError(
            "A server knows models by hub id, and this one was not loaded by any. Load it as 'owner/name', or leave remote off."
        )
    window = model.nnsight()
    from nnsight import save

    @torch.no_grad()
    def read(rows: Rows, sites: Sequence[Site]) -> dict[Site, Tensor]:
        wholes = _wholes(model, sites)
        taps = [model.anatomy.tap(site) for site in wholes]
        points = [(tap.path, tap.side == "input") for tap in taps]  # plain words, for they may travel
        ids, mask = capture.pad_right(rows, model.pad_id)
        values: list[Tensor] = []
        with window.trace(input_ids=ids, attention_mask=mask, use_cache=False, remote=remote) as tracer:
            values = save([])
            for path, entering in points:
                value = window.get(path).input if entering else window.get(path).output
                values.append(value[0] if isinstance(value, tuple) else value)
            tracer.stop()
        return _parts(model, dict(zip(wholes, values, strict=True)), sites)

    return read


def _with_bridge(model: Model) -> Reader:
    from surgery.windows import hook_names

    bridge = model.bridge()

    @torch.no_grad()
    def read(rows: Rows, sites: Sequence[Site]) -> dict[Site, Tensor]:
        wholes = _wholes(model, sites)
        hooks = {site: hook_names(site, model.anatomy)[1] for site in wholes}
        ids, mask = capture.pad_right(rows, model.pad_id)
        last = (wholes[-1].layer or 0) + 1
        _, seen = bridge.run_with_cache(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            names_filter=list(hooks.values()),
            return_cache_object=False,
            return_type=None,
            stop_at_layer=last if last < model.anatomy.n_layers else None,
            use_cache=False,
        )
        # heads have a dimension of their own there
        whole = {site: seen[hook].flatten(2) for site, hook in hooks.items()}
        return _parts(model, whole, sites)

    return read


def _wholes(model: Model, sites: Sequence[Site]) -> list[Site]:
    """The sites without their heads, each once, in the order of a forward pass. Raises ValueError for one that does not exist."""
    for site in sites:
        model.anatomy.tap(site)
    return sorted({site.whole for site in sites}, key=model.anatomy.order)


def _parts(model: Model, whole: dict[Site, Tensor], sites: Sequence[Site]) -> dict[Site, Tensor]:
    heads = {site: model.anatomy.tap(site).head for site in sites}
    return {site: whole[site.whole] if head is None else whole[site.whole][..., head] for site, head in heads.items()}
