"""Other libraries' views of a live model, over the very same tensors, and the names of its places in their dialects.

nnsight and TransformerLens build themselves into the modules they are given, for good: one replaces every module's ``forward``, the
other the modules themselves, and asks for eager attention. So a window is given a `twin`: modules of its own over the
model's own parameters. An edit on either side is seen on the other, and the model itself is as it was.
"""

from __future__ import annotations

import copy
import difflib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.sites import Patterns, Site, match

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from pandas import DataFrame
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

    from surgery.anatomy import Anatomy, Place
    from surgery.model import Model

# what the bridge calls the matrices it cuts out of a fused one
_PIECES = {
    "attn.q": ("attn", "q"),
    "attn.k": ("attn", "k"),
    "attn.v": ("attn", "v"),
    "mlp.gate": ("mlp", "gate"),
    "mlp.up": ("mlp", "in"),
}


def twin(module: nn.Module) -> nn.Module:
    """A module with the structure of another and its very parameters and buffers: the same objects, so they are never out of step.

    Modules, config and train/eval are the twin's own; forward and backward hooks do not come along. A parameter or buffer that is
    *replaced* later, as buffers are on a move to another device, is not followed. Raises ValueError for compiled modules.
    """
    modules = list(module.modules())
    compiled = [m for m in modules if type(m).__name__ == "OptimizedModule"]
    if compiled:
        raise ValueError(
            f"{len(compiled)} module(s) of this model are compiled, which fixes what they call. Open the window first, or on the model before torch.compile."
        )
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for m in modules:
        for name, value in vars(m).items():
            if name.startswith(("_forward", "_backward")) and "hooks" in name and isinstance(value, dict):
                kept[id(value)] = type(value)()
    double = copy.deepcopy(module, kept)
    for m in double.modules():
        # transformers notes that its recording hooks are there, and they have stayed behind
        vars(m).pop("_output_capturing_hooks_installed", None)
    return double


def open_nnsight(model: Model) -> TransformersModel:
    """The model in nnsight: ``with window.trace("text"): x = window.model.layers[3].output.save()``. Weights are the live ones.

    With ``trace(..., remote=True)`` a server computes, with the weights *it* has under the model's hub id (see `hub_id`), so without edits made
    here. The tokenizer is a copy, padding on the left as nnsight wants it. Importing nnsight gives every object of the process a ``save`` and wraps
    ``Tensor.backward``, for good. Raises ImportError where nnsight is not installed, ValueError for compiled modules.
    """
    module: Any = twin(model.module)
    with _opening():
        if "nnsight" not in sys.modules:
            # They define classes that refuse attributes they do not know, and nnsight gives every object one.
            for early in ("anyio.abc._sockets", "anyio.streams.file", "anyio.streams.tls"):
                with suppress(ImportError):
                    import_module(early)
        try:
            from nnsight import TransformersModel
        except ImportError as error:
            raise _missing("nnsight", error) from error
        # without a device it would move the model, parameters and all, to a GPU that is there
        where = {} if getattr(module, "hf_device_map", None) else {"device": model.device}
        tokenizer = copy.deepcopy(model.tokenizer)
        window = TransformersModel(module, task="text-generation", tokenizer=tokenizer, **where)
    window.repo_id = hub_id(model)
    return window


def hub_id(model: Model) -> str | None:
    """The hub id a model was loaded by (``owner/name``), or None where it came from a folder of the user's own."""
    ref = str(getattr(model.module.config, "_name_or_path", "") or "")
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", ref + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return ref if re.fullmatch(r"[\w.-]+/[\w.-]+", ref) and not Path(ref).exists() else None


def open_bridge(model: Model) -> TransformerBridge:
    """The model in TransformerLens: ``logits, cache = bridge.run_with_cache(ids)``. Weights are the live ones, unprocessed.

    Logits and activations are those of the module with eager attention, to rounding. Where q, k, v (or gate, up) are one
    matrix, the bridge computes with pieces of its own: they are renewed from the live matrix whenever their attention (MLP)
    is called, so write into the matrix, not into the pieces. ``enable_compatibility_mode()`` gives the bridge processed copies
    of all weights; from then on it has parted from the model. On a model with experts it would write into the live ones, and
    is refused. Of a vision-language model the language tower is at the hooks' names; its image processor is not loaded.

    Raises ImportError where transformer-lens is not installed, ValueError for an architecture without an adapter there and for compiled modules.
    """
    module: Any = twin(model.module)
    architecture = type(module).__name__
    with _opening():
        try:
            from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
            from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
        except ImportError as error:
            raise _missing("transformer-lens", error) from error
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise ValueError(
                f"TransformerLens has no adapter for {architecture}. model.nnsight() opens any model of these families."
            )
        module.set_attn_implementation("eager")  # the attention it computes itself is eager: the masks must be, too
        # Not boot_transformers, which is for loading: given a module it still asks the hub for processors, and installs packages for them.
        bridge = build_bridge_from_module(
            module,
            architecture,
            hf_config=module.config,
            tokenizer=_as_it_is(model.tokenizer),
            model_name=hub_id(model) or architecture,
        )
    _renew_pieces(bridge, model)
    if model.anatomy.n_experts:
        bridge.adapter.supports_compatibility_mode = False
    return bridge


def _as_it_is(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that the bridge does not load again from the hub to have it begin with a BOS: it measures what the tokenizer does, and adds one
    itself."""
    own = copy.deepcopy(tokenizer)
    own.init_kwargs = {"name_or_path": own.name_or_path, **own.init_kwargs, "add_bos_token": True}
    return own


def _renew_pieces(bridge: TransformerBridge, model: Model) -> None:
    """Hang onto each module with pieces of a fused matrix a hook that reads them anew from the live one."""
    parameters = dict(model.module.named_parameters())
    pieces: dict[nn.Module, list[tuple[nn.Parameter, nn.Parameter, Place]]] = {}
    for site, place in model.anatomy.places.items():
        part = site.part.removesuffix(".bias")
        if place.rows is None or place.expert is not None or part not in _PIECES:
            continue
        owner, name = _PIECES[part]
        module = bridge.blocks[site.layer]._modules[owner]
        linear = module._modules[name].original_component
        own = linear.weight if part == site.part else linear.bias
        pieces.setdefault(module, []).append((own, parameters[place.name], place))

    def hook(held: list[tuple[nn.Parameter, nn.Parameter, Place]]) -> Callable[..., None]:
        def renew(*_: Any) -> None:
            for own, live, place in held:
                own.data = place.take(live.data)

        return renew

    for module, held in pieces.items():
        module.register_forward_pre_hook(hook(held))


@contextmanager
def _opening() -> Iterator[None]:
    """No words from libraries that are being opened; what they change of warnings, logging and random numbers is given back."""
    logger = logging.getLogger("transformers")
    level, disabled = logger.level, logging.root.manager.disable
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)  # what is really wrong is raised
            yield
    finally:
        logging.disable(disabled)
        logger.setLevel(level)


def _missing(package: str, why: ImportError) -> ImportError:
    """One error for a library that is not installed and for one that is too old: what Python says tells which."""
    return ImportError(f"{package} cannot be imported ({why}). It comes with: pip install 'model-surgery[interp]'")


# --- names --------------------------------------------------------------------------------------------------------------------


def names(anatomy: Anatomy, at: Patterns = "**") -> DataFrame:
    """What activation sites, those that the patterns name, are called elsewhere: in forward order, with the site as index.

    transformer_lens: the classic hook name. bridge: the hook it stands for in a `TransformerBridge`. module: path of the Hugging Face
    module (nnsight's, too). side: whether its ``input`` or its ``output`` is the activation. width: of the last dimension; TransformerLens splits
    that of ``attn.z`` into heads.
    """
    import pandas as pd

    rows = []
    for site in match(at, anatomy.activation_sites()):
        tap = anatomy.tap(site)
        rows.append((str(site), *hook_names(site, anatomy), tap.path, tap.side, anatomy.width(site)))
    columns = ["site", "transformer_lens", "bridge", "module", "side", "width"]
    return pd.DataFrame(rows, columns=columns).set_index("site")


def hook_names(site: Site, anatomy: Anatomy) -> tuple[str, str]:
    """TransformerLens's classic name of an activation site's hook, and the bridge's own."""
    if site.part == "resid" and site.layer == anatomy.n_layers:
        block = f"blocks.{anatomy.n_layers - 1}"
        return f"{block}.hook_resid_post", f"{block}.hook_out"
    block, inner = f"blocks.{site.layer}", {part: path for part, (path, _) in anatomy.streams.items()}
    match site.part:
        case "resid":
            return f"{block}.hook_resid_pre", f"{block}.hook_in"
        case "attn.z":
            return f"{block}.attn.hook_z", f"{block}.attn.o.hook_in"
        case "attn.out":
            return (
                f"{block}.hook_attn_out",
                f"{block}.{'attn' if inner['attn.out'] == inner['attn.z'] else 'ln1_post'}.hook_out",
            )
        case "mid":
            return f"{block}.hook_resid_mid", f"{block}.{'mlp' if inner['mid'] == 'mlp' else 'ln2'}.hook_in"
        case "mlp.out":
            return f"{block}.hook_mlp_out", f"{block}.{'mlp' if inner['mlp.out'] == 'mlp' else 'ln2_post'}.hook_out"
    raise ValueError(
        f"{site} is no activation site; they are {', '.join(map(str, anatomy.activation_sites()[:6]))}, ..."
    )


def site_of(name: str, anatomy: Anatomy) -> Site:
    """The activation site that another dialect's name means, the whole of it where the name is of all heads.

    Known are TransformerLens's names (``blocks.3.hook_resid_post``, ``blocks.3.attn.hook_z``), the bridge's (``blocks.3.attn.o.hook_in``), short
    ones (``resid_post.3``), a Hugging Face module's path with a side (``model.layers.3.input``), and the site's own. Raises ValueError
    for others, with the nearest.
    """
    known = _known(anatomy)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise ValueError(
            f"{name!r} names no activation site of this {anatomy.family} of {anatomy.n_layers} layers."
            + (f" Near it are {', '.join(near)}." if near else "")
            + " names(anatomy) is the table of all."
        )
    return known[name]


def _known(anatomy: Anatomy) -> dict[str, Site]:
    known: dict[str, Site] = {}
    for site in anatomy.activation_sites():
        classic, own = hook_names(site, anatomy)
        tap = anatomy.tap(site)
        short = f"{classic.rpartition('hook_')[2]}.{classic.split('.')[1]}"
        known |= dict.fromkeys((str(site), classic, own, short, f"{tap.path}.{tap.side}"), site)
    for layer in range(anatomy.n_layers):  # what leaves a block enters the next
        block, after = f"blocks.{layer}", Site(layer + 1, "resid")
        known |= dict.fromkeys(
            (
                f"{block}.hook_resid_post",
                f"{block}.hook_out",
                f"resid_post.{layer}",
                f"{anatomy.blocks}.{layer}.output",
            ),
            after,
        )
    return known
