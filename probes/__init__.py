"""What the activations say.

capture      live tensors at sites, by hooks
activations  collect(): rows at sites over spans, without padding, each knowing whose it is; stream(), moments(), gradients()
engines      the same through nnsight, also on a server, and through TransformerLens
shards       rows on disk: written whole or not at all, gone on with after an interruption
estimates    Estimate: a number with its interval, by drawing whole questions
results      what results share: intervals of many numbers at once, files
accumulators Moments and CrossMoments: mean, covariance and extremes of rows seen once; mergeable
following    which tokens of a running pass are thinking, answer, padding: ``from probes.following import following``
recorder     recording(): activations while generating
showing      show_spans() colours the tokens that are meant
held_out     folds that keep a question whole, the AUC, and its interval over questions
directions   Direction: mean difference, pairs, PCA, logistic, mass-mean; arithmetic; length_direction()
fitting      the fits inside: penalty, and site, chosen on folds inside the training rows
linear       probe(): linear probes over layers and spans, beside their controls
calibration  calibration(): are a probe's probabilities what they say, before and after scaling: ``from probes.calibration import calibration``
transfer     transfer(): trained in one set, judged in another; along(): before, during, after the thinking: ``from probes.transfer import transfer``
erasure      LEACE: leace(), leace_streamed(), and check() of what is left
passes       a forward pass of a batch, read at some places while it runs
lens         what each stream says of the next token: ``from probes.lens import lens``
attribution  contributions(), writers_of(): which heads and layers write a direction, or a logit; ablations(): what silencing them does
attention    attention on marked tokens: ``from probes.attention import attention``
steering     steered(): add, ablate or clamp a direction on the tokens of a span, while generating and while reading
baking       bake(): a steering as weights, proved to agree, or refused with the reason
mixing       mixed(): the logits of two models as one, from the one to the other and beyond
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.accumulators import CrossMoments as CrossMoments
    from probes.accumulators import Moments as Moments
    from probes.activations import Activations as Activations
    from probes.activations import collect as collect
    from probes.activations import gradients as gradients
    from probes.activations import moments as moments
    from probes.activations import stream as stream
    from probes.attention import AttentionMass as AttentionMass
    from probes.attribution import Ablations as Ablations
    from probes.attribution import Contributions as Contributions
    from probes.attribution import ablated as ablated
    from probes.attribution import ablations as ablations
    from probes.attribution import contributions as contributions
    from probes.attribution import logit_contributions as logit_contributions
    from probes.attribution import writers_of as writers_of
    from probes.baking import agreement as agreement
    from probes.baking import bake as bake
    from probes.calibration import Calibration as Calibration
    from probes.directions import Direction as Direction
    from probes.directions import contrast_pairs as contrast_pairs
    from probes.directions import length_direction as length_direction
    from probes.directions import logistic as logistic
    from probes.directions import mass_mean as mass_mean
    from probes.directions import mean_difference as mean_difference
    from probes.directions import pca_of_differences as pca_of_differences
    from probes.erasure import Eraser as Eraser
    from probes.erasure import Erasers as Erasers
    from probes.erasure import leace as leace
    from probes.erasure import leace_streamed as leace_streamed
    from probes.estimates import Estimate as Estimate
    from probes.following import Follower as Follower
    from probes.lens import Lens as Lens
    from probes.linear import ProbeTable as ProbeTable
    from probes.linear import probe as probe
    from probes.mixing import mix_logits as mix_logits
    from probes.mixing import mixed as mixed
    from probes.recorder import Recording as Recording
    from probes.recorder import recording as recording
    from probes.showing import show_spans as show_spans
    from probes.steering import Steering as Steering
    from probes.steering import steered as steered
    from probes.steering import stream_norms as stream_norms
    from probes.transfer import TransferTable as TransferTable
    from probes.transfer import along as along

_HOMES = {
    "Direction": "directions",
    "Eraser": "erasure",
    "Erasers": "erasure",
    "ProbeTable": "linear",
    "Calibration": "calibration",
    "TransferTable": "transfer",
    "along": "transfer",
    "contrast_pairs": "directions",
    "leace": "erasure",
    "leace_streamed": "erasure",
    "length_direction": "directions",
    "logistic": "directions",
    "mass_mean": "directions",
    "mean_difference": "directions",
    "pca_of_differences": "directions",
    "probe": "linear",
    "Ablations": "attribution",
    "AttentionMass": "attention",
    "Contributions": "attribution",
    "Lens": "lens",
    "ablated": "attribution",
    "ablations": "attribution",
    "contributions": "attribution",
    "logit_contributions": "attribution",
    "writers_of": "attribution",
    "Activations": "activations",
    "collect": "activations",
    "gradients": "activations",
    "moments": "activations",
    "stream": "activations",
    "Recording": "recorder",
    "recording": "recorder",
    "show_spans": "showing",
    "CrossMoments": "accumulators",
    "Moments": "accumulators",
    "Estimate": "estimates",
    "Follower": "following",
    "Steering": "steering",
    "steered": "steering",
    "stream_norms": "steering",
    "agreement": "baking",
    "bake": "baking",
    "mix_logits": "mixing",
    "mixed": "mixing",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:  # names are loaded when first used, so that importing the package is free
    if name in _HOMES:
        return getattr(import_module(f"probes.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")
