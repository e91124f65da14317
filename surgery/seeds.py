"""Seeds of draws that have a name: they depend on the name alone, not on the order of draws, on threads or on what else is drawn."""

from __future__ import annotations

import hashlib
import json


def seed_from_numbers(*parts: int) -> int:
    """32 bits, from whole numbers of 0 or more: a run's seed, a step, a sample."""
    from numpy.random import SeedSequence

    return int(SeedSequence(parts).generate_state(1)[0])


def seed_from_words(*parts: object) -> int:
    """63 bits, from words and numbers: a seed, a tensor, a model."""
    said = json.dumps(parts, default=lambda part: part.item() if hasattr(part, "item") else str(part)).encode()
    return int.from_bytes(hashlib.sha256(said).digest()[:8], "little") >> 1
