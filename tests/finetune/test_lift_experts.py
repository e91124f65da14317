"""LIFT on matrices that lie in one parameter, as a mixture's experts do: each is chosen and trained as if it were apart."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from finetune.learner import learner
from finetune.lift import LIFT, budget, matrices_of, principal_indices
from surgery.delta import StoredDelta, save_delta
from surgery.model import Model
from surgery.sites import Site
from surgery.weights import linear_sites
from tests.families import SPARSE_FAMILIES, characters, tiny
from tests.finetune.test_lift_choices import VARIANTS

EXPERTS = 3
GATES = tuple(f"0.mlp.e{e}.{part}" for e in range(EXPERTS) for part in ("gate", "up"))
DOWNS = tuple(f"0.mlp.e{e}.down" for e in range(EXPERTS))
SHAPES = {
    "0.attn.q": (16, 16),
    **dict.fromkeys(GATES, (16, 40)),
    **dict.fromkeys(DOWNS, (40, 16)),
    "1.attn.q": (12, 16),
}


def draw(seed: int) -> dict[str, Tensor]:
    """A tensor for each matrix, some of them larger than others."""
    return {
        name: (1 + i % 3) * torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + i))
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def packed(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The same as a mixture stores them: gate over up, expert after expert."""
    gates = torch.stack([torch.cat([tensors[g], tensors[u]]) for g, u in zip(GATES[::2], GATES[1::2], strict=True)])
    return [tensors["0.attn.q"], gates, torch.stack([tensors[name] for name in DOWNS]), tensors["1.attn.q"]]


def apart(stored: Sequence[Tensor]) -> dict[str, Tensor]:
    """`packed` undone."""
    q, gates, downs, last = (tensor.detach() for tensor in stored)
    halves = [half for expert in gates for half in expert.chunk(2)]
    return {
        "0.attn.q": q,
        **dict(zip(GATES, halves, strict=True)),
        **dict(zip(DOWNS, downs, strict=True)),
        "1.attn.q": last,
    }


def together(params: list[nn.Parameter]) -> list[tuple[Any, nn.Parameter]]:
    return list(zip(("0.attn.q", GATES, DOWNS, "1.attn.q"), params, strict=True))


def backward(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    torch.stack([(p * g.to(p.dtype)).sum().float() for p, g in zip(params, grads, strict=True)]).sum().backward()


def train(lift: LIFT, params: list[nn.Parameter], steps: range, deal: Any) -> None:
    for step in steps:
        backward(params, deal(draw(step + 1)))
        lift.step()
        lift.zero_grad()


def separate(tensors: dict[str, Tensor]) -> list[Tensor]:
    return list(tensors.values())


@pytest.mark.parametrize(
    "variant",
    [*VARIANTS[:-1], {"overrides": {"0.**": 0.3, "1.*.*": None}}, {"density": None, "lora_rank": 1}, {"overrides": {"*.mlp.e1.*": {"lora_rank": 2}, "0.mlp.e0.up": 0.5}},
     {"overrides": {"*.mlp.e1.*": None, "0.mlp.e0.up": None}, "select": "random"}, {"scope": "global", "overrides": {"0.mlp.e2.*": 0.2}}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_matrices_train_as_they_would_apart(variant, dtype):
    options = {"lr": 0.05, "density": 0.1, "filter_rank": 3, "weight_decay": 0.1, "refresh": 2} | variant
    single = {name: nn.Parameter(W.to(dtype)) for name, W in draw(0).items()}
    stored = [nn.Parameter(W.to(dtype)) for W in packed(draw(0))]
    one, all_ = LIFT(list(single.items()), **options), LIFT(together(stored), **options)
    train(one, list(single.values()), range(5), separate)
    train(all_, stored, range(5), packed)
    for name, found in apart(stored).items():
        assert torch.equal(found, single[name]), name
    assert all_.refreshes == one.refreshes
    assert one.refreshes
    assert any(done.warm for done in one.refreshes) == ("agreement" in variant)
    assert any("basis" in own for own in all_.state.values()) == ("agreement" in variant)
    for key in set().union(*(own.keys() for own in one.state.values())) - {"indices"}:
        mine, theirs = (torch.cat([own[key].flatten() for own in lift.state.values()]) for lift in (all_, one))
        assert torch.equal(mine, theirs), key


@pytest.mark.parametrize(
    "variant", [{}, {"agreement": 0.9}, {"grow_to": 0.3}, {"select": "movement"}, {"select": "random"}], ids=str
)
def test_packed_matrices_resume_bit_for_bit(variant):
    options = {
        "lr": 0.05,
        "density": 0.1,
        "filter_rank": 3,
        "weight_decay": 0.1,
        "refresh": 2,
        "overrides": {"0.mlp.e1.gate": None},
    }
    options |= variant
    straight = [nn.Parameter(W.bfloat16()) for W in packed(draw(0))]
    train(lift := LIFT(together(straight), **options), straight, range(6), packed)
    assert any(done.warm for done in lift.refreshes) == ("agreement" in variant)
    for cut in (1, 2, 3):
        first = [nn.Parameter(W.bfloat16()) for W in packed(draw(0))]
        train(stopped := LIFT(together(first), **options), first, range(cut), packed)
        file = io.BytesIO()
        torch.save({"weights": [p.detach() for p in first], "optimizer": stopped.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file)
        second = [nn.Parameter(W) for W in loaded["weights"]]
        resumed = LIFT(together(second), **options)
        resumed.load_state_dict(loaded["optimizer"])
        train(resumed, second, range(cut, 6), packed)
        assert resumed.refreshes == lift.refreshes
        for p, q in zip(straight, second, strict=True):
            assert torch.equal(p, q)
            assert lift.state[p].keys() == resumed.state[q].keys()
            for key, value in lift.state[p].items():
                assert torch.equal(value, resumed.state[q][key]), key


def test_gathered_gradients_are_a_parameters():
    params = [nn.Parameter(W) for W in packed(draw(0))]
    lift = LIFT(together(params), density=0.1, filter_rank=2)
    grads = packed(draw(1))
    backward(params, grads)
    assert all(p.grad is None for p in params)
    names = ["0.attn.q", "0.mlp.e0.gate to 0.mlp.e2.up", "0.mlp.e0.down to 0.mlp.e2.down", "1.attn.q"]
    for found, name, p, g in zip(lift.gathered(), names, params, grads, strict=True):
        assert (found.name, found.parameter is p) == (name, True)
        assert torch.equal(found.grad, g.flatten()[found.indices.long()])
    norm = torch.cat([found.grad for found in lift.gathered()]).norm()
    torch.testing.assert_close(lift.clip_grad_norm_(1.0), norm)
    torch.testing.assert_close(torch.cat([found.grad for found in lift.gathered()]).norm(), torch.tensor(1.0))


def test_what_cannot_be_stacked_is_refused():
    fine = nn.Parameter(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"m has shape \(2, 3, 4\).*name each of the matrices"):
        LIFT([("m", fine)], density=0.5)
    with pytest.raises(ValueError, match=r"a to d has shape \(2, 3, 4\), which is not 4 matrices of one shape"):
        LIFT([(("a", "b", "c", "d"), fine)], density=0.5)
    with pytest.raises(ValueError, match=r"blocks of side 4 do not tile a 3x4 matrix, which is a to b"):
        LIFT([(("a", "b"), fine)], density=0.5, block=4)
    with torch.no_grad():
        fine[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"entries of b after 0 steps"):
        LIFT([(("a", "b"), fine)], density=0.5, filter_rank=1)


# In a mixture


def mixture(family: str, dtype: torch.dtype = torch.float32) -> Model:
    return Model(*tiny(family, dtype=dtype))


@contextmanager
def lifted(model: Model, lr: float = 0.02, **options: Any) -> Iterator[LIFT]:
    """LIFT as `tune` makes it."""
    density, decay = options.pop("density"), options.pop("weight_decay", 0.0)
    with learner(model, "lift", lr=lr, seed=0, density=density, weight_decay=decay, options=options) as student:
        assert student.lift is not None
        yield student.lift


def loss(model: Model, step: int = 0, tokens: int = 20) -> Tensor:
    ids = torch.randint(4, 90, (1, tokens), generator=torch.Generator().manual_seed(step))
    return model.module(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_every_matrix_of_a_mixture_is_named_where_it_lies(family):
    config = tiny(family)[0].config
    config.num_experts = config.num_local_experts = 12  # e10 is not between e1 and e2
    model = Model(AutoModelForCausalLM.from_config(config), characters())
    found = {}
    for names, p in matrices_of(model.weights):
        names = (names,) if isinstance(names, str) else names
        found |= dict(zip(names, p.detach().view(len(names), -1, p.shape[-1]), strict=True))
    assert set(map(Site.parse, found)) == set(linear_sites(model.weights))
    assert all(torch.equal(W, model.weights[name]) for name, W in found.items())


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_density_one_is_adamw_bit_for_bit_in_a_mixture(family):
    """Also for an expert that no token has come to: its gradient is zero, and moments carry it on."""
    ours, theirs = mixture(family), mixture(family)
    idle = 0
    with lifted(ours, lr=3e-3, density=1.0, weight_decay=0.1, refresh=2) as lift:
        params = {id(p): p for s in linear_sites(theirs.weights) for p in [theirs.weights.parameter(s)]}
        adamw = torch.optim.AdamW(params.values(), lr=3e-3, weight_decay=0.1, foreach=False)
        assert set(map(len, [s["indices"] for s in lift.state.values()])) == {p.numel() for p in params.values()}
        for step in range(5):
            loss(ours, step, tokens=3).backward()
            loss(theirs, step, tokens=3).backward()
            experts = theirs.module.model.layers[0].mlp.experts.gate_up_proj.grad
            idle += sum(not expert.any() for expert in experts)
            lift.step()
            adamw.step()
            theirs.module.zero_grad()
    assert idle
    for (name, p), q in zip(ours.module.named_parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_each_expert_is_chosen_by_its_own_slice_and_the_rest_keeps_its_bytes(family, dtype, tmp_path):
    base, model = mixture(family, dtype), mixture(family, dtype)
    with lifted(model, density=0.1, filter_rank=4, refresh=3) as lift:
        ever: dict[Site, set[int]] = {site: set() for site in linear_sites(model.weights)}

        def compare() -> None:
            """Each site's chosen entries, as they lie in its stored parameter, are those of its own matrix."""
            for site, seen in ever.items():
                W, p, place = model.weights[site], model.weights.parameter(site), model.anatomy.places[site]
                own = principal_indices(W.contiguous(), 4, budget(W.shape, density=0.1)).long()
                where = place.take(torch.arange(p.numel()).view(p.shape)).reshape(-1)
                chosen = lift.state[p]["indices"].long()
                assert torch.equal(where[own].sort().values, chosen[torch.isin(chosen, where)]), site
                seen.update(own.tolist())

        compare()
        for step in range(6):
            loss(model, step).backward()
            lift.step()
            if step % 3 == 2:
                compare()
        assert any(done.overlap < 1 for done in lift.refreshes)
        assert set(map(Site.parse, lift.refreshes[0].by_parameter)) == set(ever)
        delta = lift.delta(model.weights, base.weights)
    for site, seen in ever.items():
        changed = (model.weights[site] != base.weights[site]).flatten().nonzero().squeeze(1).tolist()
        assert set(changed) <= seen
        assert changed, site
    rest = set(model.weights) - set(ever)
    assert all(torch.equal(model.weights[s], base.weights[s]) for s in rest)
    stored = StoredDelta(save_delta(delta, tmp_path / "delta", base_hash="0"))
    assert {stored.form(site) for site in stored} == {"sparse"}
    forth = base.weights + stored
    for site in ever:
        rounding = 0 if dtype == torch.bfloat16 else 2**-22
        torch.testing.assert_close(forth[site].to(dtype), model.weights[site], rtol=rounding, atol=rounding / 64)


def test_an_expert_left_out_keeps_its_bytes():
    start, model = mixture("mixtral"), mixture("mixtral")
    with lifted(model, density=0.5, overrides={"*.mlp.e1.*": None, "*.attn.*": None}) as lift:
        for step in range(3):
            loss(model, step, tokens=60).backward()
            lift.step()
    still = {s for s in linear_sites(model.weights) if torch.equal(model.weights[s], start.weights[s])}
    assert still == {s for s in linear_sites(model.weights) if ".e1." in str(s) or s.part.startswith("attn.")}
