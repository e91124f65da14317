"""In pieces, merged in any order, or all at once: the same statistics."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.accumulators import CrossMoments, Moments


def draw(rows, d, seed=0, offset=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, d, generator=generator, dtype=torch.float64) @ torch.randn(
        d, d, generator=generator, dtype=torch.float64
    )
    return (mixed + offset).to(dtype)


def close(a, b, tolerance=1e-9):
    fields = [name for name in vars(a) if name != "count"]
    assert a.count == b.count
    for name in fields:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)


def test_against_numpy():
    x, y = draw(300, 7), draw(300, 4, seed=1)
    m, c = Moments.of(x), CrossMoments.of(x, y)
    wide = x.double().numpy()
    np.testing.assert_allclose(m.mean, wide.mean(0))
    for ddof in (0, 1):
        np.testing.assert_allclose(m.covariance(ddof), np.cov(wide.T, ddof=ddof), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(m.variance(ddof), wide.var(0, ddof=ddof), rtol=1e-9)
    both = np.cov(wide.T, y.double().numpy().T)
    np.testing.assert_allclose(c.covariance(), both[:7, 7:], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(c.mean_y, y.double().mean(0))
    assert torch.equal(m.low, x.double().amin(0))
    assert torch.equal(m.high, x.double().amax(0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 5), st.randoms(use_true_random=False))
def test_any_pieces_in_any_order(sizes, seed, random):
    x, y = draw(sum(sizes), 5, seed, offset=3), draw(sum(sizes), 3, seed + 99)
    whole, cross = Moments.of(x), CrossMoments.of(x, y)
    pieces = list(zip(x.split(sizes), y.split(sizes), strict=True))
    one_by_one, other = Moments.empty(5), CrossMoments.empty(5, 3)
    for a, b in pieces:
        one_by_one.add_(a)
        other.add_(a, b)
    close(one_by_one, whole)
    close(other, cross)
    random.shuffle(pieces)
    cut = random.randint(0, len(pieces))
    merged, merged_cross = [Moments.empty(5)] * 2, [CrossMoments.empty(5, 3)] * 2
    for i, (a, b) in enumerate(pieces):
        merged[i < cut] = merged[i < cut] + Moments.of(a)
        merged_cross[i < cut] = merged_cross[i < cut] + CrossMoments.of(a, b)
    close(merged[0] + merged[1], whole)
    close(merged_cross[0] + merged_cross[1], cross)


def test_far_from_zero_nothing_is_lost():
    """Where sums of squares would cancel: spread 1 about 1e6, in batches."""
    x = draw(4000, 6, dtype=torch.float64)
    far = Moments.empty(6)
    for part in (x + 1e6).split(100):
        far.add_(part)
    torch.testing.assert_close(far.covariance(), x.T.cov(), rtol=1e-6, atol=1e-6)
    naive = (
        (x + 1e6).float().T @ (x + 1e6).float() / 4000 - torch.outer((x + 1e6).mean(0), (x + 1e6).mean(0))
    ).double()
    assert not torch.allclose(naive, x.T.cov(), rtol=0.5)


def test_merging_leaves_both_as_they_were():
    a, b = Moments.of(draw(20, 4)), Moments.of(draw(30, 4, seed=1))
    kept = [Moments(m.count, m.mean.clone(), m.scatter.clone(), m.low.clone(), m.high.clone()) for m in (a, b)]
    _ = a + b
    close(a, kept[0], 0)
    close(b, kept[1], 0)


def test_the_rows_are_not_changed():
    x = draw(50, 4, dtype=torch.float64)
    before = x.clone()
    Moments.of(x)
    CrossMoments.of(x, x)
    assert torch.equal(x, before)


def test_half_precision_is_added_wide():
    x = draw(500, 4, offset=50, dtype=torch.bfloat16)
    torch.testing.assert_close(Moments.of(x).covariance(), x.double().T.cov(), rtol=1e-9, atol=1e-9)


def test_processes_each_keep_their_own(tmp_path):
    code = """
import sys, torch
from probes.accumulators import CrossMoments, Moments
from tests.probes.test_moments import draw
begin, end, to = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
x, y = draw(90, 4)[begin:end], draw(90, 3, seed=1)[begin:end]
Moments.of(x).save(to + ".x")
CrossMoments.of(x, y).save(to + ".xy")
"""
    for begin, end in ((0, 40), (40, 90)):
        words = [sys.executable, "-c", code, str(begin), str(end), str(tmp_path / f"m{begin}")]
        subprocess.run(words, check=True, timeout=60)
    close(Moments.load(tmp_path / "m0.x") + Moments.load(tmp_path / "m40.x"), Moments.of(draw(90, 4)))
    cross = CrossMoments.load(tmp_path / "m0.xy") + CrossMoments.load(tmp_path / "m40.xy")
    close(cross, CrossMoments.of(draw(90, 4), draw(90, 3, seed=1)))
    with pytest.raises(ValueError, match="holds mean_x, mean_y, scatter, not mean, scatter, low, high"):
        Moments.load(tmp_path / "m0.xy")
    (tmp_path / "half").write_bytes((tmp_path / "m0.x").read_bytes()[:99])
    with pytest.raises(ValueError, match="half is damaged"):
        Moments.load(tmp_path / "half")


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    """Counted in entries that are made wide at a time: never more than a block, whatever the batch."""
    monkeypatch.setattr("probes.accumulators._BLOCK", 64)
    widened = []
    plain = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: (widened.append(t.numel()), plain(t, *a, **k))[1])
    x = draw(1000, 4)
    widened.clear()
    m = Moments.of(x)
    assert max(widened) <= 64
    assert sum(widened) == x.numel()
    torch.testing.assert_close(m.covariance(), x.double().T.cov(), rtol=1e-9, atol=1e-9)
    y = draw(1000, 9, seed=1)
    widened.clear()
    cross, turned = CrossMoments.of(x, y), CrossMoments.of(y, x)
    assert max(widened) <= 64
    both = torch.cat([x, y], dim=1).double().T.cov()
    torch.testing.assert_close(cross.covariance(), both[:4, 4:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(turned.covariance(), both[4:, :4], rtol=1e-9, atol=1e-9)
    assert sum(getattr(m, name).numel() for name in ("mean", "scatter", "low", "high")) == 4 * 4 + 3 * 4


def test_what_does_not_add(unchecked):
    m = Moments.of(draw(10, 4))
    before = m.scatter.clone()
    with pytest.raises(ValueError, match=r"\(5, 3\); the statistics so far are of rows of width 4"):
        m.add_(draw(5, 3))
    for bad in (torch.nan, torch.inf):
        rows = draw(5, 4)
        rows[[1, 3], 2] = bad
        with pytest.raises(ValueError, match="2 of 5 rows hold NaN or infinity"):
            m.add_(rows)
        with pytest.raises(ValueError, match="2 of 5 rows hold NaN or infinity"):
            CrossMoments.of(draw(5, 4), rows)
    assert m.count == 10
    assert torch.equal(m.scatter, before)
    with pytest.raises(ValueError, match="width 4 and of width 3 do not add"):
        _ = m + Moments.empty(3)
    with pytest.raises(ValueError, match="x has 5 rows and y 4"):
        CrossMoments.of(draw(5, 2), draw(4, 2))
    with pytest.raises(ValueError, match="ddof=1 needs more than 1 rows; there are 1"):
        Moments.of(draw(1, 4)).covariance()
    assert not Moments.of(draw(1, 4)).covariance(ddof=0).any()


def test_no_rows_change_nothing():
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    for found, more in ((CrossMoments.of(x, y), (x[:0], y[:0])), (Moments.of(x), (x[:0],))):
        before = found.scatter.clone()
        assert torch.equal(found.add_(*more).scatter, before)
        assert found.count == 5
    assert CrossMoments.empty(3, 2).add_(x[:0], y[:0]).count == 0


def test_what_is_no_table_of_rows(unchecked):
    with pytest.raises(ValueError, match=r"These rows are \(3,\)"):
        Moments.of(torch.ones(3))
    for ddof in (-1, 10):
        with pytest.raises(ValueError, match=f"ddof={ddof}"):
            Moments.of(draw(10, 3)).covariance(ddof)
    with pytest.raises(TypeError, match="unsupported operand"):
        Moments.of(draw(10, 3)) + 1
