import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from surgery.linalg import (
    each_matrix,
    low_rank,
    principal_angles,
    principal_subspace,
    project_out,
    side_by_side,
    singular_system,
    singular_values,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def matrix(out: int, into: int, seed: int = 0, decay: float = 0.0) -> torch.Tensor:
    """A random matrix; decay > 0 gives it a spectrum that falls by that exponent, 0 leaves it flat."""
    W = torch.randn(out, into, generator=torch.Generator().manual_seed(seed))
    if decay:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        W = (U * S * torch.arange(1, len(S) + 1) ** -decay) @ Vh
    return W


SHAPES = [(40, 24), (24, 40), (32, 32), (1, 7), (7, 1), (64, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_low_rank_is_the_truncated_svd(shape, decay):
    W = matrix(*shape, decay=decay)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    for rank in range(1, min(shape) + 1):
        expected = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(low_rank(W, rank), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_subspace_of_every_side(shape):
    W = matrix(*shape)
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    rank = min(3, *shape)
    short = Vh.T if shape[1] <= shape[0] else U
    for side, expected in (("out", U), ("in", Vh.T), ("short", short)):
        basis = principal_subspace(W, rank, side=side)
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
        for k in range(rank):  # column by column: ordered, up to sign
            assert abs(float(basis[:, k] @ expected[:, k])) == pytest.approx(1, abs=1e-10)
        assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_subspaces_from_one_decomposition(shape):
    W = matrix(*shape)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    for rank in {1, min(3, *shape), min(shape)}:
        values, left, right = singular_system(W, rank)
        torch.testing.assert_close(values, singular_values(W))
        torch.testing.assert_close(values, S, atol=1e-7, rtol=1e-9)
        for basis, expected in ((left, U), (right, Vh.T)):
            assert basis.shape == expected[:, :rank].shape
            torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
            for k in range(rank):
                assert abs(float(basis[:, k] @ expected[:, k])) == pytest.approx(1, abs=1e-9)
    with pytest.raises(ValueError, match="has ranks 1 to"):
        singular_system(W, min(shape) + 1)


def test_the_matrix_given_is_not_written_to():
    W = matrix(6, 6).double()
    before = W.clone()
    singular_system(W, 2)
    low_rank(W, 6).zero_()
    low_rank(W, 2).zero_()
    assert torch.equal(W, before)


def test_singular_values_accuracy():
    S = torch.logspace(0, -6, 24, dtype=torch.float64)
    Q = torch.linalg.qr(matrix(40, 24).double()).Q
    R = torch.linalg.qr(matrix(24, 24, seed=1).double()).Q
    for W in ((Q * S) @ R.T, ((Q * S) @ R.T).T):
        error = (singular_values(W) - S).abs()
        assert (error <= 30e-16 / S).all()
    assert (singular_values(torch.zeros(3, 4)) == 0).all()


def test_wide_matrices_beyond_float64_stay_close():
    W = matrix(1100, 1030, decay=0.5)
    basis = principal_subspace(W, 4)
    assert basis.dtype == torch.float32
    assert principal_subspace(W[:, :1024], 4).dtype == torch.float64
    exact = torch.linalg.svd(W, full_matrices=False).Vh[:4].T
    assert principal_angles(basis, exact).max() < 1e-4


def test_project_out():
    W, u, v = matrix(9, 5), matrix(1, 9, seed=1)[0], matrix(1, 5, seed=2)[0]
    gone = project_out(W, 3 * u)
    assert (u @ gone).abs().max() < 1e-5
    torch.testing.assert_close(project_out(gone, u), gone)  # twice is once
    torch.testing.assert_close(project_out(project_out(W, u, 2.0), u, 2.0), W)  # a reflection undoes itself
    torch.testing.assert_close(project_out(W, u, 0.3), W + 0.3 * (gone - W))
    assert (project_out(W, v, side="in") @ v).abs().max() < 1e-5
    torch.testing.assert_close(project_out(W, v, side="in"), project_out(W.T, v).T)
    assert torch.equal(project_out(W, u, 0.0), W)
    for bad in (torch.zeros(9), v, u * math.nan):
        with pytest.raises(ValueError, match="direction"):
            project_out(W, bad)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-5, 0.1, 0.7, 0.9, 1.5, math.pi / 2])
def test_principal_angles_are_accurate_at_every_size(angle):
    frame = torch.linalg.qr(matrix(12, 4).double()).Q
    a, b, c, d = frame.T
    U, V = torch.stack([a, b], 1), torch.stack([a, math.cos(angle) * b + math.sin(angle) * c], 1)
    mix = torch.tensor([[2.0, 1.0], [0.5, -3.0]], dtype=torch.float64)
    found = principal_angles(U @ mix, V)
    assert found[1] == pytest.approx(angle, rel=1e-3, abs=1e-15)
    assert found[0] == pytest.approx(0, abs=1e-14)
    wider = principal_angles(U, torch.stack([math.cos(angle) * b + math.sin(angle) * d], 1))
    assert wider.shape == (1,)
    assert wider[0] == pytest.approx(angle, rel=1e-3, abs=1e-15)


def test_principal_angles_refuse_what_spans_nothing(unchecked):
    U = matrix(6, 2)
    with pytest.raises(ValueError, match="dependent"):
        principal_angles(U, U[:, [0, 0]])
    with pytest.raises(ValueError, match="one space"):
        principal_angles(U, matrix(5, 2))


def test_each_matrix_changes_nothing_and_gives_threads_back():
    items = [matrix(60, 40, seed=i) for i in range(6)]
    before = torch.get_num_threads()
    alone = [low_rank(W, 4) for W in items]
    try:
        torch.set_num_threads(3)
        together = each_matrix(lambda W: low_rank(W, 4), items)
        inside = each_matrix(lambda _: torch.get_num_threads(), items)
        assert each_matrix(lambda _: torch.get_num_threads(), items[:1]) == [3]  # one alone may use all
        meeting = threading.Barrier(3, timeout=60)  # which those that are not at work at once never reach together
        each_matrix(lambda _: meeting.wait(), items)
        side_by_side(lambda _: meeting.wait(), items)
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                assert side_by_side(lambda _: torch.is_grad_enabled(), items) == [recorded] * 6
        with ThreadPoolExecutor(1) as later:
            assert torch.get_num_threads() == later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
    assert inside == [1] * 6
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("W", "rank", "message"),
    [
        (torch.ones(3), 1, "matrix"),
        (torch.ones(0, 3), 1, "matrix"),
        (torch.ones(3, 4), 0, "rank"),
        (torch.ones(3, 4), 4, "ranks 1 to 3"),
        (torch.full((3, 4), math.nan), 1, "NaN"),
        (torch.full((3, 4), math.inf), 2, "infinite"),
    ],
)
def test_bad_input(W, rank, message, unchecked):
    with pytest.raises(ValueError, match=message):
        principal_subspace(W, rank)
