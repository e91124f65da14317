"""What LIFT keeps of each entry, how it is reached from outside, and the change it leaves behind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finetune.lift import LIFT
from finetune.lift.halves import LOW, joined, split
from surgery.delta import StoredDelta, save_delta
from surgery.model import LiveWeights, Model
from surgery.weights import linear_sites
from tests.families import tiny
from tests.oracles.lift import nearest

BITS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50)


def from_bits(bits: list[int]) -> Tensor:
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return values[torch.isfinite(values.bfloat16())]


# Halves


@settings(max_examples=300, deadline=None)
@given(BITS)
def test_two_halves_are_the_whole(bits):
    values = from_bits(bits)
    stored, low = split(values, torch.bfloat16)
    assert (stored.dtype, low.dtype) == (torch.bfloat16, LOW[torch.bfloat16])
    assert torch.equal(joined(stored, low).view(torch.int32), values.view(torch.int32))
    assert torch.equal(stored, nearest(values, torch.bfloat16))
    kept = values[values.abs() < 65504]
    stored, low = split(kept, torch.float16)
    assert torch.equal(stored, kept.half())
    assert torch.equal(joined(stored, low), kept)


def test_a_weight_with_nothing_beside_it_is_itself():
    values = torch.randn(1000).bfloat16()
    assert torch.equal(joined(values, torch.zeros(1000, dtype=torch.int16)), values.float())
    stored, low = split(values.float(), torch.bfloat16)
    assert torch.equal(stored, values)
    assert not low.any()


@pytest.mark.parametrize(
    ("dtype", "each", "of_adamw"),
    [(torch.float32, 14, 0.0875), (torch.bfloat16, 16, 0.10), (torch.float16, 18, 0.1125)],
)
def test_state_in_bytes(dtype, each, of_adamw):
    p = nn.Parameter(torch.randn(200, 300).to(dtype))
    lift = LIFT([p], density=0.05, refresh=2)
    for _ in range(5):
        (p.float() * torch.randn(200, 300)).sum().backward()
        lift.step()
    size = sum(v.numel() * v.element_size() for v in lift.state[p].values())
    assert size == each * 3000
    assert size / (8 * p.numel()) == pytest.approx(of_adamw)  # AdamW in float32 keeps 8 bytes for each weight


# From outside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_changed_between_steps_stays_changed(dtype):
    p = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype))
    lift = LIFT([p], lr=1e-3, density=0.1, filter_rank=2)
    p.float().sum().backward()
    lift.step()
    with torch.no_grad():
        p += 1
    before = lift.values(p)
    assert torch.equal(p.detach().flatten()[lift.state[p]["indices"]], nearest(before, dtype))
    p.float().sum().backward()
    lift.step()
    torch.testing.assert_close(lift.values(p), before - 1e-3, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_read_and_written_in_full(dtype):
    p = nn.Parameter(torch.randn(16, 16).to(dtype))
    lift = LIFT([p], density=0.1, filter_rank=2)
    others = torch.ones(256, dtype=torch.bool).index_fill(0, lift.state[p]["indices"].long(), False)
    unchosen = p.detach().flatten()[others].clone()
    values = torch.randn(25)
    lift.set_values_(p, values)
    assert torch.equal(lift.values(p), values)
    assert torch.equal(p.detach().flatten()[lift.state[p]["indices"]], nearest(values, dtype))
    assert torch.equal(p.detach().flatten()[others], unchosen)
    with pytest.raises(KeyError, match="does not train"):
        lift.values(nn.Parameter(torch.ones(2, 2)))


def test_gathered_gradients_can_be_bent():
    params = [nn.Parameter(torch.randn(16, 16)) for _ in range(3)]
    lift = LIFT([(f"{i}.mlp.up", p) for i, p in enumerate(params)], lr=0.1, density=0.1, filter_rank=2)
    before = [p.detach().clone() for p in params]
    (params[0].sum() + (2 * params[2]).sum()).backward()
    found = lift.gathered()
    assert [(g.name, g.parameter is params[i]) for g, i in zip(found, (0, 2), strict=True)] == [
        ("0.mlp.up", True),
        ("2.mlp.up", True),
    ]
    assert torch.equal(found[1].indices, lift.state[params[2]]["indices"])
    assert torch.equal(found[1].grad, torch.full((25,), 2.0))
    assert [name for name, _ in lift.gradients()] == ["0.mlp.up", "2.mlp.up"]
    found[0].grad.zero_()
    found[1].grad.neg_()
    lift.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, True, False]
    torch.testing.assert_close(lift.values(params[2]), before[2].flatten()[found[1].indices] + 0.1)


# The change


def tuned(family: str, dtype: torch.dtype = torch.float32, **options: object) -> tuple[Model, Model, LIFT]:
    """A tiny model and the same one trained for some steps on its every matrix."""
    base, model = (Model(*tiny(family, dtype=dtype)) for _ in range(2))
    weights = model.weights
    assert isinstance(weights, LiveWeights)
    chosen = {id(p): (str(s), p) for s in linear_sites(weights) for p in [weights.parameter(s)]}
    model.module.requires_grad_(False)
    for _, p in chosen.values():
        p.requires_grad_(True)
    lift = LIFT(list(chosen.values()), lr=0.02, density=0.05, filter_rank=4, **options)
    ids = torch.randint(4, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    for _ in range(6):
        model.module(input_ids=ids, labels=ids).loss.backward()
        lift.step()
    return base, model, lift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "phi3"]
)  # the last two hold [in, out] matrices, and q, k and v in one
def test_the_change_is_sparse_whole_and_takes_itself_back(family, dtype, tmp_path):
    base, model, lift = tuned(family, dtype, refresh=4)  # of six steps: two choices
    assert any(done.overlap < 1 for done in lift.refreshes)
    delta = lift.delta(model.weights, base.weights)
    now = {site: model.weights[site].clone() for site in model.weights}
    assert set(delta) <= set(linear_sites(model.weights))
    trained = sum(len(state["indices"]) for state in lift.state.values())
    moved = sum(int((delta[site] != 0).sum()) for site in delta)
    assert trained < moved  # what left the mask is in it too
    forth, back = base.weights + delta, model.weights - delta
    for site in now:
        ulp = 0 if dtype == torch.bfloat16 else 2**-22  # float32: the difference, and adding it again, are rounded
        for found, wanted in ((forth[site], now[site]), (back[site], base.weights[site])):
            torch.testing.assert_close(found.to(dtype), wanted, rtol=ulp, atol=ulp / 64)
            assert torch.equal(
                found.to(dtype)[now[site] == base.weights[site]], wanted[now[site] == base.weights[site]]
            )
    stored = StoredDelta(save_delta(delta, tmp_path / "delta", base_hash="0"))
    assert {stored.form(site) for site in stored} == {"sparse"}
    assert all(torch.equal(stored[site], delta[site]) for site in stored)
    model.module.zero_grad()
    with torch.no_grad():
        next(iter(lift.state)).add_(1)
    assert all(torch.equal(stored[site], delta[site]) for site in stored)  # a copy


def test_the_change_needs_its_own_base():
    _, model, lift = tuned("llama")
    other = Model(*tiny("llama", seed=1))
    with pytest.raises(ValueError, match=r"0\.attn\.k differs from the base in .* at most 38 were ever trained"):
        lift.delta(model.weights, other.weights)
    with pytest.raises(ValueError, match="nothing has changed"):
        lift.delta(model.weights, model.weights)
    base, spread, elsewhere = tuned("llama", scope="global", select="random", refresh=4)
    assert elsewhere.delta(spread.weights, base.weights)  # a matrix may have had more entries than it has now
    with pytest.raises(ValueError, match="trains none of these weights"):
        lift.delta(other.weights, other.weights)
