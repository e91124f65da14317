"""Fixtures of several files."""

import pytest
import torch

from tests.siblings import siblings


@pytest.fixture(scope="session")
def homes(tmp_path_factory):
    made = {}

    def home(family, dtype=torch.float32, **options):
        key = (family, dtype, *options.items())
        if key not in made:
            made[key] = siblings(family, tmp_path_factory.mktemp(family) / "home", dtype, **options)
        return made[key]

    return home
