"""Stochastic rounding: neighbours only, no bias, and the same draws for pieces as for the whole."""

import numpy as np
import pytest
import torch

from surgery import Checkpoint, Scale, apply, write
from surgery.rounding import generator, stochastic
from surgery.sites import Site
from surgery.weights import linear_sites
from tests.families import save_tiny

DTYPES = [torch.bfloat16, torch.float16]


def neighbours(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest value of `dtype` not above x and the smallest not below it, found by search over all of them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[torch.isfinite(every)].sort().values
    at = torch.searchsorted(every, x)
    return every[torch.searchsorted(every, x, right=True) - 1], every[at]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_goes_to_one_of_its_two_neighbours(dtype):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 3, 4000)
    below, above = neighbours(x, dtype)
    got = stochastic(x, dtype, generator(0, "w")).float()
    assert bool(((got == below) | (got == above)).all())
    assert 0.2 < float((got == below).float().mean()) < 0.8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.1, -0.1, 1.0003, 3e-8, -3e-8, 1e-9])
def test_the_mean_is_the_number(dtype, value):
    draws = 40_000
    x = torch.full((draws,), value)
    got = stochastic(x, dtype, generator(0, "w")).double()
    low, high = (float(n[0]) for n in neighbours(x[:1], dtype))
    share = (float(x[0]) - low) / (high - low)
    spread = (high - low) * (share * (1 - share) / draws) ** 0.5
    assert abs(float(got.mean()) - float(x[0])) <= 5 * spread


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_dtype_holds_stays_and_the_largest_value_is_not_left(dtype):
    x = torch.randn(1000).to(dtype).float()
    x[:3] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max])
    got = stochastic(x, dtype, generator(1, "w"))
    assert torch.equal(got, x.to(dtype))
    assert torch.signbit(got[:2]).tolist() == [False, True]


def test_pieces_one_after_another_are_the_whole():
    x = torch.randn(37, 5)
    draws = generator(3, "w")
    pieces = torch.cat([stochastic(x[i : i + 4], torch.bfloat16, draws) for i in range(0, 37, 4)])
    assert torch.equal(pieces, stochastic(x, torch.bfloat16, generator(3, "w")))
    assert not np.array_equal(generator(3, "w").random(8), generator(3, "v").random(8))


def test_a_change_too_small_for_bf16_survives_on_average(tmp_path):
    base = Checkpoint(save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16))
    small = apply(Scale(1 + 2**-12), base, "*.mlp.up")
    nearest = write(small, tmp_path / "nearest").total()
    first, again, other = (
        write(small, tmp_path / f"s{i}", rounding="stochastic", seed=seed) for i, seed in enumerate([0, 0, 1])
    )
    assert nearest.kept == 0
    # the component along what was asked is kept; what is added is noise across it
    along = [w.total().cosine * w.total().kept / w.total().asked for w in (first, other)]
    assert along == pytest.approx([1, 1], abs=0.35)
    assert first.hash == again.hash != other.hash
    for site in linear_sites(base):  # each tensor has draws of its own
        literal = stochastic(small[site], torch.bfloat16, generator(0, base.anatomy.places[site].name))
        assert torch.equal(Checkpoint(first.folder)[site], literal)


def test_what_shares_a_tensor_with_a_change_is_rounded_by_chance_too(tmp_path):
    base = Checkpoint(save_tiny("phi3", tmp_path / "model"))
    written = write(
        apply(Scale(2.0), base, "0.attn.q"), tmp_path / "out", dtype=torch.bfloat16, rounding="stochastic", seed=3
    )
    place = base.anatomy.places[Site.parse("0.attn.k")]
    literal = place.take(stochastic(base.stored(place.name), torch.bfloat16, generator(3, place.name)))
    assert torch.equal(Checkpoint(written.folder)["0.attn.k"], literal)
    assert not torch.equal(base["0.attn.k"].bfloat16(), literal)


def test_a_word_that_is_no_rounding_is_refused(tmp_path, unchecked):
    base = Checkpoint(save_tiny("llama", tmp_path / "model"))
    with pytest.raises(ValueError, match="choose nearest or stochastic"):
        write(base, tmp_path / "out", rounding="up")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
