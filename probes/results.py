"""What results here share: intervals of many numbers at once, and a file that appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.estimates import ends, numbered, resampled_means
from surgery.tensorfile import save_whole


def interval(
    values: Float[Tensor, "transcript part"],
    question: Sequence[str],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " part"], Float[np.ndarray, " part"], int]:
    """(low, high, questions): the percentile interval of each column's mean over transcripts, whole questions being drawn.

    One question leaves nothing to judge the spread by: NaN; so does a column with a NaN. level: nominal coverage, in (0, 1).
    Source: as `probes.estimates.percentile`; clusters: Davison and Hinkley (1997), section 3.8.
    """
    unit, n = numbered(question, len(values))
    sums = torch.zeros(n, values.shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(unit), values.double())
    low, high = ends(resampled_means(sums.numpy(), np.bincount(unit), draws, seed), n, level)
    return low, high, n


@contextmanager
def reading(path: str | Path, kind: type) -> Iterator[dict[str, Any]]:
    """What a JSON file of results says; what is missing in it, or else than it should be, is a ValueError that names the file and what it should hold."""
    try:
        yield json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no {kind.__name__}: give what {kind.__name__}.save wrote ({error}).") from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """Tensors and what is said of them (anything JSON holds) as one safetensors file, whole or not at all."""
    save_whole(path, tensors, {"said": json.dumps(dict(said))})


def load_tensors(path: str | Path, *expected: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `save_tensors`. Raises ValueError as `read_tensors`."""
    tensors, metadata = read_tensors(path, *expected)
    return tensors, json.loads(metadata.get("said", "{}"))


def read_tensors(path: str | Path, *expected: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. Raises ValueError where it is damaged, or holds other tensors than expected."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from error
    if set(tensors) != set(expected):
        raise ValueError(
            f"{path} holds {', '.join(sorted(tensors))}, not {', '.join(expected)}: it was saved by another kind of result."
        )
    return tensors, metadata
