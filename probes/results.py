"""What results here share: an interval over independent questions, and a file that appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.held_out import resampled_means
from surgery.tensorfile import save_whole


def interval(
    values: Float[Tensor, "transcript part"],
    question: Sequence[str],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " part"], Float[np.ndarray, " part"], int]:
    """(low, high, questions): a percentile bootstrap interval of each column's mean over transcripts.

    Whole questions are drawn, all their transcripts with them. One question leaves nothing to judge the spread by: NaN; so does a
    column with a NaN. level: nominal coverage, in (0, 1).
    Source: Efron and Tibshirani 1993, section 13.3; clusters: Davison and Hinkley 1997, section 3.8.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a coverage in (0, 1), 0.95 for example.")
    _, unit = np.unique(np.asarray(question), return_inverse=True)
    n = int(unit.max()) + 1
    if n < 2:
        nothing = np.full(values.shape[1], np.nan)
        return nothing, nothing, n
    sums = torch.zeros(n, values.shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(unit), values.double())
    drawn = resampled_means(sums.numpy(), np.bincount(unit), draws, seed)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high, n


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """Tensors and what is said of them (anything JSON holds) as one safetensors file, whole or not at all."""
    save_whole(path, tensors, {"said": json.dumps(dict(said))})


def load_tensors(path: str | Path, *expected: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `save_tensors`. Raises ValueError where the file holds other tensors than expected."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            said = json.loads((file.metadata() or {}).get("said", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from error
    if set(tensors) != set(expected):
        raise ValueError(
            f"{path} holds {', '.join(sorted(tensors))}, not {', '.join(expected)}: it was saved by another kind of result."
        )
    return tensors, said
