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


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as a plan can see, so that ``multi_gpu`` may be asked for; mergekit's executor itself computes on the processor."""
    from mergekit import merge

    from surgery.merging import plan

    real = merge.run_merge

    def planned(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            return plan(*args, **options)

    def run(config, out, options, **rest):
        real(config, out, options.model_copy(update={"multi_gpu": False, "cuda": False, "device": "cpu"}), **rest)

    monkeypatch.setattr("surgery.merging.running.plan", planned)
    monkeypatch.setattr(merge, "run_merge", run)
