"""SafeLoRA on every linear module beside its literal form, which makes each module's C and keeps them all.

The adapter and the alignment are random: what is measured does not depend on their values. The literal side streams both models'
matrices and keeps nothing but what the released code keeps besides the models themselves, so that C alone is compared.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks import measure
from tests.benchmarks.bench_write import perturbed

RANK, TAU, LIMIT = 8, 0.5, 1 / 20


def _adapter(base: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A random LoRA of every linear matrix: site -> (B, A)."""
    from surgery import Checkpoint
    from surgery.weights import linear_sites

    weights, generator = Checkpoint(base), torch.Generator().manual_seed(0)
    return {
        str(site): (
            torch.randn(weights.shape(site)[0], RANK, generator=generator),
            torch.randn(RANK, weights.shape(site)[1], generator=generator),
        )
        for site in linear_sites(weights)
    }


def ours(base: str, aligned: str) -> Callable[[], object]:
    """Ours; the realigned factors of all modules are made and kept."""
    from surgery import Checkpoint
    from surgery.lowrank import Factored
    from surgery.realign import safelora
    from surgery.sites import Site

    change = Factored({Site.parse(site): pair for site, pair in _adapter(base).items()})

    def call() -> object:
        found = safelora(change, Checkpoint(aligned) - Checkpoint(base), tau=TAU)
        return {site: found.delta.factors(site) for site in found.delta.factored()}

    return call


def literal(base: str, aligned: str) -> Callable[[], object]:
    """First C of every module, then rho and the new B of each."""
    from surgery import Checkpoint

    pairs = _adapter(base)

    def call() -> object:
        before, after = Checkpoint(base), Checkpoint(aligned)
        projections = []
        for site in pairs:
            V = after[site].float() - before[site].float()
            projections.append(V @ V.T / V.norm())
        made = {}
        for C, (site, (B, A)) in zip(projections, pairs.items(), strict=True):
            moved = C @ B
            rho = torch.nn.functional.cosine_similarity((moved @ A).reshape(1, -1), (B @ A).reshape(1, -1))
            made[site] = (moved if float(rho) <= TAU else B, A)
        return made

    return call


def run(folder: Path | str, base: Path | str, repeats: int = 3) -> list[measure.Row]:
    """Rows for memory, above the level just before the call, and for time.

    folder: where everything is written and then removed. base: a single-file checkpoint.
    """
    with tempfile.TemporaryDirectory(dir=folder) as here:
        aligned = perturbed(Path(base), Path(here) / "aligned")
        arguments = {"base": str(base), "aligned": str(aligned)}
        sides = measure.beside(f"{__name__}:ours", f"{__name__}:literal", arguments, repeats)
    name, note = "SafeLoRA, all linear modules", f"rank {RANK}; every C formed and kept, the models streamed"
    rises = [statistics.median(run.rise for run in side) / 2**20 for side in sides]
    memory = measure.Row(
        name=f"{name}: private memory above what was there before",
        ours=f"{rises[0]:.1f} MiB",
        peer=f"{rises[1]:.1f} MiB",
        ratio=rises[0] / rises[1],
        limit=LIMIT,
        note=note,
    )
    seconds = [statistics.median(run.seconds for run in side) for side in sides]
    time = measure.Row(
        name=f"{name}: time",
        ours=f"{seconds[0]:.2f} s",
        peer=f"{seconds[1]:.2f} s",
        ratio=seconds[0] / seconds[1],
        limit=None,
        note=note,
    )
    return [memory, time]
