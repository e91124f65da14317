"""What an edit does to a matrix, on every family."""

import pytest
import torch

from surgery.edits import RemoveDirection, Scale
from surgery.model import Model
from surgery.sites import Site
from surgery.weights import apply
from tests.families import FAMILIES, tiny

U = torch.randn(32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("at", ["*.attn.o", "*.mlp.down", "1.attn.o.h2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_removing_twice_is_removing_once(family, at):
    weights = Model(*tiny(family)).weights
    once = apply(RemoveDirection(U), weights, at)
    twice = apply(RemoveDirection(U), once, at)
    u = U / U.norm()
    for site in once.changed_from(weights):
        torch.testing.assert_close(twice[site], once[site], rtol=0, atol=1e-6)
        columns = weights.anatomy.head_slice(Site.parse(at))[1] if ".h" in at else slice(None)
        assert (u @ once[site])[columns].abs().max() < 1e-5 < (u @ weights[site])[columns].abs().max()
        if ".h" in at:
            rest = torch.ones(weights.shape(site)[1], dtype=torch.bool)
            rest[columns] = False
            assert torch.equal(once[site][:, rest], weights[site][:, rest])


def test_strength():
    W, site = torch.randn(32, 7), Site(0, "attn.o")
    u = U / U.norm()
    assert torch.equal(RemoveDirection(U, 0.0)(site, W), W)
    reflected = RemoveDirection(U, 2.0)
    torch.testing.assert_close(reflected(site, reflected(site, W)), W)
    torch.testing.assert_close(u @ RemoveDirection(100 * U, 0.25)(site, W), 0.75 * (u @ W))
    torch.testing.assert_close(RemoveDirection(U)(site, W), (torch.eye(32) - torch.outer(u, u)) @ W)


def test_edits_leave_what_they_are_given():
    W, u, site = torch.randn(32, 7), U.clone(), Site(0, "attn.o")
    before = W.clone()
    for edit in (Scale(2.0), RemoveDirection(u)):
        edit(site, W)
    assert torch.equal(W, before)
    assert torch.equal(u, U)


def test_what_is_no_direction():
    for bad in (torch.zeros(3), torch.tensor([float("nan")]), torch.tensor([float("inf")])):
        with pytest.raises(
            ValueError, match=r"A direction is one finite, non-zero vector; this has shape \(\d,\) and norm"
        ):
            RemoveDirection(bad)
    weights = Model(*tiny("llama")).weights
    for at, shape in (("0.mlp.up", r"\(40, 32\)"), ("norm", r"\(32,\)")):
        with pytest.raises(ValueError, match=rf"{at} is {shape} and cannot write a direction of length 32"):
            apply(RemoveDirection(U), weights, at)[at]
