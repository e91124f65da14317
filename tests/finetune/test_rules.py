"""Laws of DRIFT: the gradient is its formula, whole batches and split ones give the same, alpha 0 is plain tuning, and a prior that fits
nothing is an error."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from analyses.tasks import chained_sums
from finetune.lift import LIFT, budget, matrices_of
from finetune.movement import GradientCourse
from finetune.rules import (
    DRIFT,
    Control,
    Merged,
    Readings,
    Rule,
    controlled,
    matched_merge,
    merge_coefficients,
    pull,
)
from finetune.tune import tune
from surgery.checkpoint import Checkpoint
from surgery.delta import StoredDelta, save_delta
from surgery.lowrank import Factored, truncated
from surgery.model import Model
from surgery.sites import Site
from surgery.weights import Delta
from tests.families import SPARSE_FAMILIES, VLM_FAMILIES, save_tiny, tiny, tiny_language, tiny_vlm
from tests.oracles import rules as oracle
from tests.processes import together

RULES = get_args(Rule)
QUESTIONS = chained_sums(16, seed=3, terms=(2, 3))
SMALL: dict[str, Any] = {"steps": 3, "batch_size": 4, "autocast": False}


def model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    module, tokenizer = tiny(family, seed=seed, dtype=dtype)
    return Model(module, tokenizer)


def taught(m: Model, count: int = 16) -> list[Any]:
    return [m.transcript(q.question, q.completion(m.markers)) for q in QUESTIONS[:count]]


def sibling(m: Model, seed: int = 7, share: float = 0.1) -> Model:
    """A model some way off, as an expert would be."""
    module = copy.deepcopy(m.module)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(share * p.float().std() * torch.randn(p.shape, generator=noise).to(p.dtype))
    return Model(module, m.tokenizer)


class Held(Delta):
    """A vector held in memory."""

    def __init__(self, values: dict[Site, Tensor]):
        self.values_, self._shapes = values, {site: value.shape for site, value in values.items()}

    def shapes(self) -> Mapping[Site, torch.Size]:
        return self._shapes

    def _read(self, site: Site, rows: slice) -> Tensor:
        return self.values_[site][rows].clone()


def expert(m: Model, seed: int = 7) -> Delta:
    """What would lead from the model as it is to an expert: noise at every site, a tenth of its spread."""
    noise, weights = torch.Generator().manual_seed(seed), m.weights
    return Held(
        {s: 0.1 * w.float().std() * torch.randn(w.shape, generator=noise) for s in weights for w in [weights[s]]}
    )


def tensors(m: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in m.module.named_parameters()}


def same(a: Model, b: Model) -> bool:
    mine, other = tensors(a), tensors(b)
    return all(torch.equal(x, other[name]) for name, x in mine.items())


def random_pair(seed: int, shape: tuple[int, ...] = (5, 7)) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)


class Host:
    """What a Trainer does around a step, by hand: gradients go in, the callback acts, the optimizer steps."""

    def __init__(self, m: Model, drift: DRIFT, optimizer: Any):
        from transformers import TrainerState

        self.m, self.drift, self.optimizer, self.state = m, drift, optimizer, TrainerState()
        drift.on_train_begin(None, self.state, None)

    def step(self, losses: list[Any]) -> None:
        for loss in losses:
            loss().backward()
        self.drift.on_pre_optimizer_step(None, self.state, None, optimizer=self.optimizer)

    def finish(self) -> None:
        self.optimizer.step()
        self.drift.on_optimizer_step(None, self.state, None, optimizer=self.optimizer)
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self.drift.on_step_end(None, self.state, None)


def losses(m: Model, pieces: int, through: torch.nn.Module | None = None) -> list[Any]:
    """The loss of 8 sequences of random tokens as the sum of so many micro-batches' losses."""
    ids = torch.randint(0, 90, (8, 12), generator=torch.Generator().manual_seed(5))
    forward = through or m.module

    def one(rows: Tensor) -> Any:
        return lambda: forward(input_ids=rows, labels=rows).loss * len(rows) / len(ids)

    return [one(rows) for rows in ids.chunk(pieces)]


def walk(m: Model, drift: DRIFT, steps: int = 3) -> None:
    """Some steps of AdamW on the same batch."""
    host = Host(m, drift, torch.optim.AdamW(m.module.parameters(), lr=1e-3))
    for _ in range(steps):
        host.step(losses(m, 1))
        host.finish()
    drift.on_train_end(None, host.state, None)


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_gradient_is_the_formula(rule: Any, alpha: float, sign: int) -> None:
    for seed in range(4):
        g, d = random_pair(seed)
        g = sign * (g + 0.5 * d)  # along it or against it
        torch.testing.assert_close(
            pull(g, d, alpha, rule).double(), oracle.bent(g, d, alpha, rule), rtol=2e-5, atol=1e-5
        )


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_what_a_rule_does_not_depend_on(seed: int, grown: float, alpha: float) -> None:
    g, d = random_pair(seed)
    for rule in RULES:
        bent = pull(g, d, alpha, rule)
        if rule != "absolute":  # scale-free in the prior, of degree one in the gradient
            scale = float(bent.abs().max())
            torch.testing.assert_close(pull(g, grown * d, alpha, rule), bent, rtol=1e-4, atol=1e-4 * scale)
            torch.testing.assert_close(
                pull(grown * g, d, alpha, rule), grown * bent, rtol=1e-4, atol=1e-4 * grown * scale
            )
        torch.testing.assert_close(pull(g.T, d.T, alpha, rule).T, bent, rtol=1e-4, atol=1e-4 * float(bent.abs().max()))


def test_extremes_of_the_rules() -> None:
    g, d = random_pair(1)
    zero = torch.zeros_like(g)
    for rule in RULES:
        assert torch.equal(pull(g, zero, 1.0, rule), g)
        assert torch.equal(pull(g, d, 0.0, rule), g)
        assert not torch.isnan(pull(zero, d, 1.0, rule)).any()
    torch.testing.assert_close(
        pull(d, d, 1.0, "adaptive"), zero, atol=1e-5, rtol=0
    )  # cancels where the loss pushes away
    torch.testing.assert_close(pull(-d, d, 1.0, "adaptive"), -d)  # off where it goes there already
    bent = pull(d + 0.1 * g, d, 1.0, "project")
    assert abs(float((bent * d).sum())) < 1e-4  # the conflict is gone
    assert torch.equal(pull(-d, d, 1.0, "project"), -d)
    assert torch.equal(pull(d, d, 1.0, "aligned"), d)
    torch.testing.assert_close(pull(-d, d, 1.0, "aligned"), -2 * d)


def test_a_gradient_of_bfloat16_is_bent_in_float32() -> None:
    g, d = random_pair(2)
    bent = pull(g.bfloat16(), d.bfloat16(), 1.0, "norm")
    assert bent.dtype == torch.bfloat16
    assert torch.equal(bent, pull(g.bfloat16().float(), d.bfloat16().float(), 1.0, "norm").bfloat16())


def test_pull_leaves_its_arguments_alone() -> None:
    g, d = random_pair(3)
    before = g.clone(), d.clone()
    pull(g, d)
    assert torch.equal(g, before[0])
    assert torch.equal(d, before[1])


def test_pull_refuses(unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        pull(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"no rule 'strong'.*adaptive"):
        pull(torch.ones(2), torch.ones(2), 1.0, "strong")  # type: ignore[arg-type]


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt-neox", *SPARSE_FAMILIES])
def test_every_site_gets_its_own_formula(rule: Any, family: str) -> None:
    """Also where q, k and v are rows of one matrix, matrices are stored the other way round, or all experts are one tensor."""
    if rule not in ("adaptive", "absolute") and family != "llama":
        return
    m = model(family)
    prior = expert(m)
    drift = DRIFT(prior, m, 0.7, rule, normalise=False)
    plain = copy.deepcopy(m)
    for loss in losses(plain, 1):
        loss().backward()
    Host(m, drift, torch.optim.SGD(m.module.parameters())).step(losses(m, 1))
    places, linear = m.anatomy.places, m.anatomy.linear_sites()
    for site in linear:
        raw = places[site].take(plain.weights.parameter(site).grad)
        found = places[site].take(m.weights.parameter(site).grad)
        expected = oracle.bent(raw, prior[site], 0.7, rule)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))
        assert not torch.equal(found, raw) or rule in ("project", "aligned")
    untouched = {places[s].name for s in m.weights} - {places[s].name for s in linear}
    for name, p in m.module.named_parameters():
        if name in untouched and p.grad is not None:
            assert torch.equal(p.grad, dict(plain.module.named_parameters())[name].grad), name


@pytest.mark.parametrize("rule", RULES)
def test_splitting_the_batch_changes_nothing(rule: Any) -> None:
    found = {}
    for pieces in (1, 2, 8):
        m = model()
        Host(m, DRIFT(expert(m), m, 1.0, rule), torch.optim.SGD(m.module.parameters())).step(losses(m, pieces))
        found[pieces] = {n: p.grad for n, p in m.module.named_parameters()}
    for name, whole in found[1].items():
        for pieces in (2, 8):
            torch.testing.assert_close(found[pieces][name], whole, rtol=1e-3, atol=2e-5 * float(whole.abs().max()))


def test_the_released_form_depends_on_the_split() -> None:
    """Each micro-batch's gradient is bent by itself, so that norms add up: the formula, and not the law above."""
    site, found = Site.parse("1.mlp.up"), {}
    for pieces in (1, 4):
        m = model()
        drift = DRIFT(expert(m), m, 1.0, "norm", legacy=True)
        singles = []
        for loss in losses(plain := copy.deepcopy(m), pieces):
            plain.module.zero_grad()
            loss().backward()
            singles.append(oracle.bent(plain.weights.parameter(site).grad, expert(m)[site], 1.0, "norm"))
        Host(m, drift, torch.optim.SGD(m.module.parameters())).step(losses(m, pieces))
        found[pieces] = m.weights.parameter(site).grad.double()
        torch.testing.assert_close(found[pieces], sum(singles), rtol=1e-3, atol=1e-4)
        drift.close()
        assert not m.weights.parameter(site)._backward_hooks
    apart = (found[4] - found[1]).norm() / found[1].norm()
    assert apart > 0.2
    once = DRIFT(expert(model()), m := model(), 1.0, "norm")
    Host(m, once, torch.optim.SGD(m.module.parameters())).step(losses(m, 4))
    torch.testing.assert_close(m.weights.parameter(site).grad.double(), found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_descent_goes_along_the_prior(rule: Any) -> None:
    """A step of plain descent moves the weights further along the prior than without, for a positive alpha."""
    along = {}
    for alpha in (0.0, 1.0):
        m = model()
        host = Host(m, drift := DRIFT(expert(m), m, alpha, rule), torch.optim.SGD(m.module.parameters(), lr=1e-4))
        host.step(losses(m, 1))
        host.finish()
        along[alpha] = drift.merged().overall
    assert along[1.0] > along[0.0]


def test_strengths_of_their_own() -> None:
    m = model()
    drift = DRIFT(expert(m), m, {"default": 0.5, "attn": 0.0, "1.mlp.*": 2.0, "*.mlp.down": -1.0})
    alphas = {str(part.site): part.alpha for part in drift._parts}
    assert alphas["0.attn.q"] == 0.0
    assert alphas["0.mlp.up"] == 0.5
    assert alphas["1.mlp.up"] == 2.0
    assert alphas["1.mlp.down"] == -1.0  # the last that names it
    assert alphas["1.mlp.norm"] == 2.0
    assert "0.mlp.norm" not in alphas


@pytest.mark.parametrize(
    ("at", "layers", "expected"),
    [
        ("default", None, 21),
        ("attn", None, 12),
        ("mlp", None, 9),
        ("norm", None, 6),
        (["attn", "norm"], None, 18),
        ("full", None, 29),
        ("embed", None, 1),
        (["*.attn.q", "0-1.mlp.up"], None, 5),
        ("default", 1, 7),
        ("default", slice(1, None), 14),
        ("default", [0, 2], 14),
    ],
)
def test_where_it_acts(at: Any, layers: Any, expected: int) -> None:
    m = model()
    assert len(DRIFT(expert(m), m, at=at, layers=layers)._parts) == expected


def test_biases_are_a_preset() -> None:
    m = model("qwen2")
    assert {p.site.part for p in DRIFT(expert(m), m, at="bias")._parts} == {"attn.q.bias", "attn.k.bias", "attn.v.bias"}


def test_normalise_scales_the_prior_to_the_weights() -> None:
    m = model()
    site = Site.parse("0.mlp.up")
    for scale in (1.0, 30.0):
        twin = copy.deepcopy(m)
        drift = DRIFT(scale * expert(twin), twin, 0.01, "absolute")
        host = Host(twin, drift, torch.optim.SGD(twin.module.parameters()))
        host.step(losses(twin, 1))
        found = twin.weights.parameter(site).grad.clone()
        host.finish()
        along, moved = (scale * expert(m)[site]).double(), twin.weights[site].double() - m.weights[site].double()
        far = float((moved * along).sum() / along.square().sum())  # of the prior as it was given
        assert drift.merged().sites[site] == pytest.approx(far, rel=1e-3)
        plain = copy.deepcopy(m)
        losses(plain, 1)[0]().backward()
        d, w, raw = expert(m)[site], m.weights[site], plain.weights.parameter(site).grad
        torch.testing.assert_close(found, raw - 0.01 * d * w.norm() / d.norm(), rtol=1e-3, atol=1e-5)


# --- LIFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("rule", ["adaptive", "absolute"])
def test_lifts_chosen_entries_are_bent_as_a_vector(family: str, rule: Any) -> None:
    m = model(family)
    prior = expert(m)
    drift = DRIFT(prior, m, 0.7, rule, normalise=False)
    chosen = {id(p): (str(s), p) for s in m.anatomy.linear_sites() for p in [m.weights.parameter(s)]}
    plain = copy.deepcopy(m)
    for loss in losses(plain, 1):
        loss().backward()
    with LIFT(list(chosen.values()), density=0.3, filter_rank=4) as lift:
        Host(m, drift, lift).step(losses(m, 2))
        held = {g.parameter: g for g in lift.gathered()}
        for site in m.anatomy.linear_sites():
            place, found = m.anatomy.places[site], held[m.weights.parameter(site)]
            chosen = torch.zeros(found.parameter.numel(), dtype=torch.bool)
            chosen[found.indices.long()] = True
            dense = torch.zeros(found.parameter.numel())
            dense[found.indices.long()] = found.grad
            mine = place.take(chosen.view(found.parameter.shape))
            raw = place.take(plain.weights.parameter(site).grad)[mine]
            bent = place.take(dense.view(found.parameter.shape))[mine]
            expected = oracle.bent(raw, prior[site][mine], 0.7, rule)
            torch.testing.assert_close(bent.double(), expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("family", "rule"), [("llama", "norm"), ("mixtral", "adaptive"), ("qwen2-moe", "absolute")])
def test_a_refresh_of_lift_takes_the_prior_along(family: str, rule: Any) -> None:
    m = model(family)
    prior, places = expert(m), m.anatomy.places
    drift = DRIFT(prior, m, 0.7, rule, normalise=False)
    with LIFT(matrices_of(m.weights), lr=0.3, density=0.1, filter_rank=4, refresh=1) as lift:
        host = Host(m, drift, lift)
        before = {p: state["indices"].clone() for p, state in lift.state.items()}
        for _ in range(3):
            host.step(losses(m, 1))
            host.finish()
        plain = copy.deepcopy(m)
        losses(plain, 1)[0]().backward()
        host.step(losses(m, 1))
        gathered = {g.parameter: g for g in lift.gathered()}
        for site in m.anatomy.linear_sites():
            p, raw = m.weights.parameter(site), plain.weights.parameter(site).grad
            bent, there = torch.zeros(p.numel()), torch.zeros(p.numel(), dtype=torch.bool)
            bent[gathered[p].indices.long()], there[gathered[p].indices.long()] = gathered[p].grad, True
            bent, there, raw = (places[site].take(whole.view(p.shape)) for whole in (bent, there, raw))
            expected = oracle.bent(raw[there], prior[site][there], 0.7, rule)
            atol = 1e-3 * float(expected.abs().max())
            torch.testing.assert_close(bent[there].double(), expected, rtol=1e-3, atol=atol)
            assert len(expected) == budget(prior[site].shape, density=0.1)
        assert any(not torch.equal(g.indices, before[p]) for p, g in gathered.items())


class Largest(TorchDispatchMode):
    """The most entries that a tensor made within has, views of what there is aside."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not made._is_view() and func is not torch.ops.aten.detach.default:
            self.entries = max(self.entries, made.numel())
        return made


def test_one_of_many_packed_experts_costs_its_own_entries() -> None:
    m = model("mixtral")
    site = next(s for s in m.anatomy.linear_sites() if m.anatomy.places[s].expert is not None)
    whole, own = m.weights.parameter(site).numel(), m.weights[site].numel()
    assert whole >= 4 * own
    prior, watch = expert(m), GradientCourse(m)
    with LIFT(matrices_of(m.weights), density=0.1, filter_rank=4) as lift:
        losses(m, 1)[0]().backward()
        gathered = {g.parameter: (g.indices, g.grad) for g in lift.gathered()}
        drift = DRIFT(prior, m, 0.7, "adaptive", normalise=False)
        (part,) = (part for part in drift._parts if part.site == site)
        for look in (lambda: part.bend("adaptive", lift, gathered), lambda: watch._gradient(m, site, gathered)):
            with Largest() as largest:
                look()
            assert 0 < largest.entries <= own


# --- several processes ------------------------------------------------------------------------------------------------


def replicated(rank: int, world: int) -> dict[str, Tensor]:
    """Bent gradients of a model in DDP, of this process's rows; the processes' gradients are averaged."""
    m = model()
    through = torch.nn.parallel.DistributedDataParallel(m.module) if world > 1 else m.module
    host = Host(m, DRIFT(expert(m), m, 1.0, "norm"), torch.optim.SGD(m.module.parameters()))
    host.step([lambda: world * losses(m, world, through)[rank]()])
    return {name: p.grad for name, p in m.module.named_parameters() if p.grad is not None}


def chosen_entries(rank: int, world: int) -> dict[str, Tensor]:
    """The same of LIFT, which averages what it has gathered."""
    m = model()
    with LIFT([(str(s), m.weights.parameter(s)) for s in m.anatomy.linear_sites()], density=0.2, filter_rank=4) as lift:
        host = Host(m, DRIFT(expert(m), m, 1.0, "norm"), lift)
        host.step([lambda: world * losses(m, world)[rank]()])
        return {g.name: g.grad.clone() for g in lift.gathered()}


def test_two_processes_are_one(tmp_path: Path) -> None:
    jobs: dict[str, Any] = {"replicated": replicated, "chosen_entries": chosen_entries}
    found = together(2, jobs, tmp_path)
    for name, job in jobs.items():
        assert not any(isinstance(result, str) for result in found[name]), found[name]
        for site, whole in job(0, 1).items():
            assert torch.equal(found[name][0][site], found[name][1][site])
            torch.testing.assert_close(found[name][0][site], whole, rtol=1e-3, atol=2e-5 * float(whole.abs().max()))


# --- the decoupled form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2-moe"])
def test_the_update_form_bends_the_optimizers_step(rule: Any, family: str) -> None:
    m = model(family)
    prior, plain = expert(m), copy.deepcopy(m)
    start = copy.deepcopy(m)
    drift = DRIFT(prior, m, 0.7, rule, form="update", normalise=False)
    host = Host(m, drift, torch.optim.AdamW(m.module.parameters(), lr=1e-2))
    host.step(losses(m, 2))
    host.finish()
    optimizer = torch.optim.AdamW(plain.module.parameters(), lr=1e-2)
    for loss in losses(plain, 2):
        loss().backward()
    optimizer.step()
    for site in m.anatomy.linear_sites():
        step = plain.weights[site] - start.weights[site]
        expected = -oracle.bent(-step, prior[site], 0.7, rule)
        found = (m.weights[site] - start.weights[site]).double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 + 1e-4 * float(expected.abs().max()))


def test_the_update_form_with_lift_moves_only_chosen_entries() -> None:
    found = {}
    for alpha in (0.0, 0.7):
        m = model()
        start, prior = copy.deepcopy(m), expert(m)
        chosen = [(str(s), m.weights.parameter(s)) for s in m.anatomy.linear_sites()]
        with LIFT(chosen, lr=0.1, density=0.2, filter_rank=4, refresh=1) as lift:
            host = Host(m, DRIFT(prior, m, alpha, "adaptive", form="update"), lift)
            host.step(losses(m, 1))
            indices = {g.name: g.indices.long() for g in lift.gathered()}
            host.finish()
            assert lift.refreshes[0].overlap < 1  # the step's entries are bent, also those that leave at its end
        found[alpha] = {n: (m.weights[n] - start.weights[n]).reshape(-1) for n in indices}
    for name, at in indices.items():
        step, moved = found[0.0][name], found[0.7][name]
        outside = torch.ones(len(moved), dtype=torch.bool)
        outside[at] = False
        assert not moved[outside].any()
        expected = -oracle.bent(-step[at], prior[name].reshape(-1)[at], 0.7, "adaptive")
        torch.testing.assert_close(moved[at].double(), expected, rtol=1e-3, atol=1e-5)


def test_the_update_form_goes_on_over_a_refresh() -> None:
    m = model()
    chosen = [(str(s), m.weights.parameter(s)) for s in m.anatomy.linear_sites()]
    with LIFT(chosen, lr=0.1, density=0.1, filter_rank=4, refresh=1) as lift:
        host = Host(m, drift := DRIFT(expert(m), m, 1.0, "norm", form="update"), lift)
        reached = []
        for _ in range(4):
            host.step(losses(m, 1))
            host.finish()
            reached.append(drift.merged().overall)
        assert len(lift.refreshes) == 4
    assert reached == sorted(reached)
    assert reached[-1] > 3 * reached[0] > 0


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_the_effective_merge_coefficient() -> None:
    m = model()
    start, prior = copy.deepcopy(m), expert(m)
    drift = DRIFT(prior, m, 1.0, "norm", log_every=2)
    assert drift.merged().overall == 0
    host = Host(m, drift, torch.optim.AdamW(m.module.parameters(), lr=1e-3))
    for _ in range(4):
        plain = copy.deepcopy(m)
        host.step(losses(m, 1))
        host.finish()
    losses(plain, 1)[0]().backward()  # of the last step
    linear = m.anatomy.linear_sites()
    before, after, along = ([w[s] for s in linear] for w in (start.weights, m.weights, prior))
    expected = oracle.merge_coefficient(before, after, along)
    assert drift.merged().overall == pytest.approx(expected, rel=1e-6)
    assert expected > 1e-3
    measured = merge_coefficients(start.weights, m.weights, prior.keep(at=linear))
    assert measured.overall == pytest.approx(expected, rel=1e-5)
    for i, site in enumerate(linear):
        each = oracle.merge_coefficient(before[i : i + 1], after[i : i + 1], along[i : i + 1])
        assert drift.merged().sites[site] == pytest.approx(each, rel=1e-5)
        assert measured.sites[site] == pytest.approx(each, rel=1e-4)
    drift.on_train_end(None, host.state, None)  # which reads no step twice
    frame = drift.readings.frame()
    assert sorted(set(frame.step)) == [2, 4]
    assert len(frame) == 2 * (1 + len(linear))
    last = frame[frame.step == 4].set_index("site")
    assert last.merged["all"] == pytest.approx(expected, rel=1e-6)
    assert ((last.cosine.abs() <= 1) & (last.injected > 0)).all()
    for site in ("0.mlp.up", "all"):  # the rule "norm" puts in as much as there is
        assert last.injected[site] == pytest.approx(1.0, rel=1e-4)
    g, d = (torch.cat([of(s).double().flatten() for s in linear]) for of in (lambda s: plain.weights.parameter(s).grad, prior.__getitem__))  # fmt: skip
    assert last.cosine["all"] == pytest.approx(float(g @ d / (g.norm() * d.norm())), rel=1e-3)


def test_a_merge_has_the_coefficient_it_was_made_with() -> None:
    m = model()
    prior = expert(m)
    assert merge_coefficients(m.weights, m.weights + 0.3 * prior, prior).overall == pytest.approx(0.3, rel=1e-4)
    every = {site: 0.1 * (i + 1) for i, site in enumerate(m.anatomy.linear_sites())}
    merged = matched_merge(m.weights, prior, every)
    found = merge_coefficients(m.weights, merged, prior.keep(at=list(every)))
    assert {s: round(c, 4) for s, c in found.sites.items()} == {s: round(c, 4) for s, c in every.items()}
    assert torch.equal(merged["embed"], m.weights["embed"])  # what has no coefficient stays
    assert set(merge_coefficients(m.weights, matched_merge(m.weights, prior, found), prior).sites) == set(prior)
    assert merge_coefficients(m.weights, matched_merge(m.weights, prior, 0.5), prior).overall == pytest.approx(
        0.5, rel=1e-4
    )
    assert len(Merged(0.5, every).frame()) == len(every) + 1
    with pytest.raises(ValueError, match=r"coefficient for 9\.mlp\.up, which the vector does not move"):
        matched_merge(m.weights, prior, {Site.parse("9.mlp.up"): 1.0})
    with pytest.raises(ValueError, match="zero everywhere"):
        merge_coefficients(m.weights, m.weights, m.weights - m.weights)


def test_readings_are_saved_and_reloaded(tmp_path: Path) -> None:
    m = model()
    drift = DRIFT(expert(m), m)
    walk(m, drift)
    drift.readings.save(tmp_path / "deep" / "readings.json")
    again = Readings.load(tmp_path / "deep" / "readings.json")
    assert again == drift.readings
    assert again.settings["rule"] == "adaptive"
    state = Host(m := model(), drift := DRIFT(expert(m), m), None).state
    state.global_step = 3
    drift._read(3)
    resumed = DRIFT(expert(m := model()), m)
    for _ in range(2):  # a run that is resumed twice has told all of it
        resumed.on_train_begin(None, state, None)
        assert len(resumed.readings.lines) == len(drift.readings.lines) == 22


# --- controls ---------------------------------------------------------------------------------------------------------


def test_controls() -> None:
    m = model()
    prior = expert(m)
    norms = prior.norms()
    made = {control: controlled(prior, control, seed=1) for control in get_args(Control)}
    for control, delta in made.items():
        assert delta.shapes() == prior.shapes()
        for site, norm in delta.norms().items():
            assert norm == pytest.approx(norms[site], rel=1e-5), (control, site)
    site = Site.parse("0.mlp.up")
    assert torch.equal(made["flipped"][site], -prior[site])
    assert torch.equal(made["permuted"][site].flatten().sort().values, prior[site].flatten().sort().values)
    for control in ("random", "permuted"):
        assert abs(made[control].cosines(prior)[site]) < 0.15
        assert torch.equal(controlled(prior, control, seed=1)[site], made[control][site])
        assert torch.equal(made[control].keep(at="0.mlp.*")[site], made[control][site])  # of (seed, site) alone
        assert not torch.equal(controlled(prior, control, seed=2)[site], made[control][site])
        alike = controlled(Held({Site.parse(f"{n}.mlp.up"): torch.arange(12.0).view(3, 4) for n in (0, 1)}), control)
        assert not torch.equal(alike["0.mlp.up"], alike["1.mlp.up"])
        assert torch.equal(made[control].rows(site, slice(3, 9)), made[control][site][3:9])
    assert abs(made["random"].cosines(controlled(prior, "random", seed=2))[site]) < 0.15


def test_a_control_is_one_word_away() -> None:
    ends = {}
    for control in (None, *get_args(Control)):
        m, by_hand = model(), model()
        walk(m, DRIFT(expert(m), m, control=control, seed=1))
        prior = controlled(expert(by_hand), control, seed=1) if control else expert(by_hand)
        walk(by_hand, DRIFT(prior, by_hand))
        assert same(m, by_hand)
        ends[control] = m
    assert not any(same(a, b) for a, b in itertools.combinations(ends.values(), 2))


# --- where the prior lies ---------------------------------------------------------------------------------------------


def test_every_store_gives_the_same(tmp_path: Path) -> None:
    save_delta(expert(model()), tmp_path / "prior", base_hash="none")
    ends = []
    for store in ("memory", "pinned", "lazy"):
        m = model()
        drift = DRIFT(StoredDelta(tmp_path / "prior"), m, store=store)
        walk(m, drift)
        ends.append((m, drift.readings.lines))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][0], ends[2][0])
    assert ends[0][1] == ends[1][1] == ends[2][1]


def test_lazy_holds_nothing() -> None:
    m = model()
    frozen = Factored(truncated(expert(m), 2)[0]._pairs)
    assert not any(p.prior.parts for p in DRIFT(frozen, m, store="lazy")._parts)
    assert all(p.prior.parts for p in DRIFT(frozen, m)._parts)


def test_low_rank_is_the_truncated_prior() -> None:
    ends = []
    for rank, whole in ((4, True), (None, False)):
        m = model()
        prior = expert(m)
        drift = DRIFT(prior if whole else truncated(prior, 4)[0], m, rank=rank)
        if whole:
            assert drift.errors == pytest.approx({s: e for s, e in truncated(prior, 4)[1].items() if s in drift.errors})
            assert len(drift.errors) == 21
        walk(m, drift)
        ends.append(tensors(m))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-6)


def test_a_live_prior_read_lazily_is_refused() -> None:
    m = model()
    live = sibling(m).weights - m.weights
    for prior in (live, 0.5 * live, live.keep(at=["*.attn.*", "*.mlp.*"]), controlled(live, "random")):
        with pytest.raises(ValueError, match=r"read lazily it would move.*memory"):
            DRIFT(prior, m, store="lazy")
    DRIFT(expert(model()), m, store="lazy")


def test_the_prior_does_not_move_with_the_model() -> None:
    """It is measured from the live model when DRIFT is made; what the model does later is no part of it."""
    m = model()
    prior = sibling(m).weights - m.weights
    drift, before = DRIFT(prior, m), prior["0.mlp.up"].clone()
    with torch.no_grad():
        m.weights.parameter("0.mlp.up").add_(1.0)
    assert torch.equal(next(p for p in drift._parts if str(p.site) == "0.mlp.up").delta(), before)


# --- in trainers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["full", "lift"])
def plain(request: pytest.FixtureRequest) -> tuple[Any, Model, Any]:
    m = model()
    return request.param, m, tune(m, taught(m), method=request.param, accumulate=2, **SMALL)


@pytest.mark.parametrize("options", [{}, {"legacy": True}, {"form": "update"}], ids=str)
def test_alpha_zero_is_plain_tuning_bit_for_bit(plain: tuple[Any, Model, Any], options: dict[str, Any]) -> None:
    method, expected, done = plain
    for alpha in (0.0, 1.0):
        m = model()
        again = tune(
            m, taught(m), method=method, accumulate=2, callbacks=[DRIFT(expert(m), m, alpha, **options)], **SMALL
        )
        assert same(m, expected) == (alpha == 0)
        assert (again.losses == done.losses) == (alpha == 0)


@pytest.mark.parametrize("method", ["full", "lift"])
def test_a_trainers_accumulation_is_one_large_batch(method: Any) -> None:
    ends = {}
    for accumulate in (1, 4):
        m = model()
        drift = DRIFT(expert(m), m, 1.0, "norm")
        tune(
            m,
            taught(m),
            method=method,
            steps=3,
            batch_size=16,
            accumulate=accumulate,
            autocast=False,
            callbacks=[drift],
        )
        ends[accumulate] = tensors(m), drift.merged().overall
    assert ends[1][1] == pytest.approx(ends[4][1], rel=1e-3)
    for name, tensor in ends[1][0].items():
        torch.testing.assert_close(ends[4][0][name], tensor, rtol=1e-3, atol=1e-4)


FORMS: list[dict[str, Any]] = [{}, {"form": "update"}, {"legacy": True}]


@pytest.mark.parametrize("form", FORMS, ids=["gradient", "update", "legacy"])
def test_a_schedule_multiplies_the_strength(form: dict[str, Any], tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def half(step: int, steps: int) -> float:
        asked.append((step, steps))
        return 0.5

    found = {}
    for name, alpha, schedule in (
        ("half", 0.8, half),
        ("constant", 0.4, None),
        ("off", 0.8, lambda *_: 0.0),
        ("none", None, None),
    ):
        m = model()
        pulls = [] if alpha is None else [DRIFT(expert(m), m, alpha, schedule=schedule, **form)]
        trainer_of(m, str(tmp_path), pulls, "plain").train()
        found[name] = m
    assert asked == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert same(found["half"], found["constant"])
    assert same(found["off"], found["none"])
    assert not same(found["constant"], found["none"])


def test_a_schedule_is_asked_at_every_step_and_its_answer_is_a_number() -> None:
    ours, theirs = model(), model()
    prior = expert(ours)
    fading = DRIFT(prior, ours, 0.9, schedule=lambda step, steps: 1 - step / 3, log_every=1)
    walk(ours, fading)
    optimizer = torch.optim.AdamW(theirs.module.parameters(), lr=1e-3)
    for step in range(3):
        host = Host(theirs, DRIFT(prior, theirs, 0.9 * (1 - step / 3)), optimizer)
        host.step(losses(theirs, 1))
        host.finish()
    assert same(ours, theirs)
    injected = [reading.injected for reading in fading.readings.lines if reading.site == "all"]
    assert injected == sorted(injected, reverse=True)
    assert injected[0] > 2 * injected[2]
    with pytest.raises(ValueError, match=r"schedule gave nan at step 1: .* a finite number"):
        walk(ours, DRIFT(prior, ours, schedule=lambda step, steps: math.nan))


def trainer_of(m: Model, folder: str, callbacks: list[Any], kind: str, **options: Any) -> Any:
    from datasets import Dataset

    rows = []
    for t in taught(m, 8):
        begin, _ = t.spans["completion"]
        ids = (list(t.ids) + [0] * 200)[:120]
        labels = ([-100] * begin + list(t.ids[begin:]) + [-100] * 200)[:120]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [int(i < len(t.ids)) for i in range(120)]})
    settings = {
        "output_dir": folder, "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True,
        "learning_rate": 1e-3, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "seed": 0,
        "remove_unused_columns": False, "dataloader_pin_memory": False, "bf16": False,
    }  # fmt: skip
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        args: Any = SFTConfig(
            **settings | options,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            gradient_checkpointing=False,
        )
        return SFTTrainer(
            m.module,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=m.tokenizer,
            callbacks=callbacks,
        )
    from transformers import Trainer, TrainingArguments, default_data_collator

    return Trainer(
        m.module,
        args=TrainingArguments(**settings | options),
        train_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_other_trainers(kind: str, tmp_path: Path) -> None:
    m = model()
    drift = DRIFT(expert(m), m, 1.0, "norm", log_every=2)
    trainer = trainer_of(m, str(tmp_path / "a"), [drift], kind)
    trainer.train()
    said = [e for e in trainer.state.log_history if "pull_merged" in e]
    assert [e["step"] for e in said] == [2, 4]
    assert said[-1]["pull_merged"] == drift.merged().overall > 1e-4
    assert {"pull_cosine", "pull_injected"} <= said[-1].keys()
    plain = model()
    trainer_of(plain, str(tmp_path / "b"), [], kind).train()
    without = merge_coefficients(model().weights, plain.weights, expert(model()).keep(at=m.anatomy.linear_sites()))
    assert said[-1]["pull_merged"] > without.overall + 1e-4


def test_the_coefficient_reaches_later_callbacks(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    heard = []

    class Listener(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            heard.append(logs.get("pull_merged"))

    m = model()
    drift = DRIFT(expert(m), m, log_every=3)
    trainer = trainer_of(m, str(tmp_path), [drift, Listener()], "plain")
    for _ in range(2):  # what the end of a run was found to be is not told of the next one's beginning
        trainer.train()
        assert [x is None for x in heard[:4]] == [True, True, False, True]
        heard.clear()
        assert [line.step for line in drift.readings.lines if line.site == "all"] == [3, 4]


@pytest.mark.parametrize(
    ("method", "options"),
    [("full", {"control": "random", "seed": 2}), ("lift", {}), ("lift", {"form": "update"})],
    ids=str,
)
def test_a_resumed_run_is_the_same(method: Any, options: dict[str, Any], tmp_path: Path) -> None:
    whole = model()
    first = DRIFT(expert(whole), whole, log_every=1, **options)
    long = SMALL | {"steps": 4}
    tune(whole, taught(whole), method=method, callbacks=[first], **long)
    broken = model()
    with pytest.raises(KeyboardInterrupt):
        tune(
            broken, taught(broken), method=method, checkpoints=tmp_path, save_every=2,
            callbacks=[DRIFT(expert(broken), broken, log_every=1, **options), stop_at(3)], **long,
        )  # fmt: skip
    m = model()
    drift = DRIFT(expert(m), m, log_every=1, **options)
    tune(m, taught(m), method=method, checkpoints=tmp_path, save_every=2, callbacks=[drift, stop_at(None)], **long)
    assert same(m, whole)
    assert drift.readings == first.readings
    assert drift.merged() == first.merged()
    with pytest.raises(ValueError, match="DRIFT was True, now False"):
        tune(m, taught(m), method=method, checkpoints=tmp_path, save_every=2, **long)


def stop_at(step: int | None) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    return Stop()


def test_a_checkpoint_of_another_prior_is_refused(tmp_path: Path) -> None:
    m = model()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(
            m, str(tmp_path), [DRIFT(expert(m), m), stop_at(3)], "plain", save_strategy="steps", save_steps=2
        ).train()
    half = str(tmp_path / "checkpoint-2")
    for what, message in (
        (lambda m: DRIFT(expert(m, seed=8), m), "prior differs"),
        (lambda m: DRIFT(expert(m), m, 0.5), r"alpha was 1\.0, now 0\.5"),
        (lambda m: DRIFT(expert(m), m, at="mlp"), r"acted on 21 tensors \(0\.attn\.k.*now on 9 \(0\.mlp\.down"),
        (lambda m: DRIFT(expert(m), m, schedule=math.hypot), r"schedule was none, now hypot"),
        (lambda m: DRIFT(expert(m), m, rule="norm"), "rule was adaptive, now norm"),
    ):
        again = model()
        before = tensors(again)
        with pytest.raises(ValueError, match=message):
            trainer_of(again, str(tmp_path), [what(again)], "plain").train(resume_from_checkpoint=half)
        assert before.keys() == tensors(again).keys()
    # a model already at the checkpoint: expert - model would be another prior
    moved = Model(type(m.module).from_pretrained(half), m.tokenizer)
    fixed = Model(tiny("llama", seed=3)[0], m.tokenizer).weights
    with pytest.raises(ValueError, match=r"prior differs.*weights before training"):
        trainer_of(moved, str(tmp_path), [DRIFT(fixed - moved.weights, moved)], "plain").train(
            resume_from_checkpoint=half
        )
    bare = model()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(bare, str(tmp_path / "bare"), [stop_at(3)], "plain", save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="a run without DRIFT"):
        trainer_of(bare, str(tmp_path / "bare"), [DRIFT(expert(bare), bare)], "plain").train(
            resume_from_checkpoint=str(tmp_path / "bare" / "checkpoint-2")
        )


@pytest.mark.parametrize("failing", [False, True])
def test_hooks_and_random_state_are_given_back(failing: bool) -> None:
    m = model()
    drift = DRIFT(expert(m), m, legacy=True, control="random")
    state = torch.get_rng_state()
    with drift:
        if failing:
            with pytest.raises(KeyboardInterrupt):
                tune(m, taught(m), method="full", callbacks=[drift, stop_at(1)], **SMALL)
            assert any(p._backward_hooks for p in m.module.parameters())
        else:
            tune(m, taught(m), method="full", callbacks=[drift], **SMALL)
    assert not any(p._backward_hooks for p in m.module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_go_with_the_callback() -> None:
    m = model()
    drift = DRIFT(expert(m), m, legacy=True)
    with pytest.raises(KeyboardInterrupt):
        tune(m, taught(m), method="full", callbacks=[drift, stop_at(1)], **SMALL)
    del drift
    import gc

    gc.collect()
    assert not any(p._backward_hooks for p in m.module.parameters())


# --- vision-language models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_a_language_models_prior_bends_the_tower(family: str) -> None:
    module, tokenizer = tiny_language(family)
    text = Model(module, tokenizer)
    host = Model(tiny_vlm(family, language=module), tokenizer)
    prior, plain = expert(text), copy.deepcopy(host)
    drift = DRIFT(prior, host, 0.7, "norm")
    assert [p.site for p in drift._parts] == text.anatomy.linear_sites()

    def loss(m: Model) -> Any:
        ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(5))
        types = {"token_type_ids": torch.zeros_like(ids)} if family == "gemma3" else {}
        return lambda: m.module(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), **types).loss

    loss(plain)().backward()
    Host(host, drift, torch.optim.SGD(host.module.parameters())).step([loss(host)])
    tower = {host.anatomy.places[p.site].name for p in drift._parts}
    for name, p in host.module.named_parameters():
        raw = dict(plain.module.named_parameters())[name].grad
        if p.grad is None or name in tower:
            continue
        assert torch.equal(p.grad, raw), name
    for site in text.anatomy.linear_sites():
        expected = oracle.bent(plain.weights.parameter(site).grad, prior[site], 0.7, "norm")
        torch.testing.assert_close(
            host.weights.parameter(site).grad.double(), expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max())
        )


def test_a_merge_lands_on_the_tower() -> None:
    module, tokenizer = tiny_language("llava")
    text, host = Model(module, tokenizer), Model(tiny_vlm("llava", language=module), tokenizer)
    merged = matched_merge(host.weights, expert(text), 0.5)
    found = merge_coefficients(host.weights, merged, expert(text))
    assert found.overall == pytest.approx(0.5, rel=1e-4)


# --- bad input --------------------------------------------------------------------------------------------------------


def elsewhere(delta: Delta, name: str) -> Delta:
    """A vector with sites that no model here has, as from a family under another name."""
    return Factored({Site.unnamed(name): (torch.ones(3, 1), torch.ones(1, 3))})


def test_a_prior_that_fits_nothing() -> None:
    m = model()
    with pytest.raises(
        ValueError, match=r"moves none of the 21 tensors asked for, first .*0\.attn.* it moves file:visual"
    ):
        DRIFT(elsewhere(expert(m), "visual"), m)
    with pytest.raises(ValueError, match=r"moves none of the 9 tensors asked for"):
        DRIFT(expert(m).keep(at="*.attn.q"), m, at="mlp")


def test_a_prior_that_fits_too_little() -> None:
    m = model()
    little = expert(m).keep(at=["*.attn.q", "*.attn.v"])
    with pytest.raises(
        ValueError, match=r"moves 6 of the 21 tensors asked for \(29%, at least 90% wanted\).*leaves out .*least"
    ):
        DRIFT(little, m)
    assert len(DRIFT(little, m, least=0.2)._parts) == 6
    assert len(DRIFT(little, m, at=["*.attn.q", "*.attn.v"])._parts) == 6


def test_a_prior_that_is_zero_or_sick() -> None:
    m = model()
    with pytest.raises(ValueError, match="zero at all of the 21"):
        DRIFT(m.weights - m.weights, m)
    sick = copy.deepcopy(m)
    with torch.no_grad():
        sick.weights.parameter("1.mlp.up")[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite at 1\.mlp\.up"):
        DRIFT(sick.weights - m.weights, m)


def test_an_expert_of_another_width_or_depth() -> None:
    import transformers

    m = model()
    for changed in ({"intermediate_size": 48}, {"num_hidden_layers": 4}):
        config = copy.deepcopy(m.module.config)
        config.update(changed)
        if "num_hidden_layers" in changed:
            config.layer_types = None
        other = Model(transformers.AutoModelForCausalLM.from_config(config), m.tokenizer)
        with pytest.raises(ValueError, match=r"does not fit|layers do not correspond"):
            DRIFT(expert(other), m)
        with pytest.raises(ValueError, match=r"does not fit|layers do not correspond"):
            DRIFT(sibling(other).weights - other.weights, m)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "strong"}, "no rule 'strong'"),
        ({"form": "both"}, "no form 'both'"),
        ({"store": "disk"}, "no store 'disk'"),
        ({"control": "shuffled"}, "no control 'shuffled'"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2, "store": "lazy"}, "rank=2"),
        ({"legacy": True, "form": "update"}, "legacy"),
        ({"least": 0.0}, "least=0"),
        ({"log_every": 0}, "log_every=0"),
        ({"alpha": math.nan}, "finite"),
        ({"alpha": {}}, "mapping"),
        ({"alpha": {"attn": 1.0}, "at": "mlp"}, "mapping"),
        ({"at": "*.attention.*"}, "matches no site"),
        ({"at": "0.attn.o.h1"}, "one head"),
        ({"at": "bias"}, "names nothing"),
        ({"layers": 9}, r"layers \[9\]"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str, unchecked: None) -> None:
    m = model()
    with pytest.raises(ValueError, match=message):
        DRIFT(expert(m), m, **options)


def test_an_adapter_has_no_gradient_to_bend() -> None:
    m = model()
    before = tensors(m)
    with pytest.raises(ValueError, match=r"Only 0 of the 21 tensors asked for are trained.*LoRA"):
        tune(m, taught(m), method="lora", callbacks=[DRIFT(expert(m), m)], **SMALL)
    assert all(torch.equal(p, before[n]) for n, p in m.module.named_parameters())


def test_lift_that_trains_less_than_was_asked_for() -> None:
    m = model()
    with pytest.raises(ValueError, match=r"Only 21 of the 29"):
        tune(m, taught(m), callbacks=[DRIFT(expert(m), m, at="full")], **SMALL)


def test_a_step_without_gradients() -> None:
    m, other = model(), model()
    host = Host(m, DRIFT(expert(m), m), torch.optim.SGD(m.module.parameters()))
    with pytest.raises(RuntimeError, match=r"Step 1 brought no gradient to any of the 21 tensors"):
        host.step(losses(other, 1))


def test_deepspeed_and_fsdp1_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a launcher asks for it, and the arguments of the trainer do not name it."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from transformers import TrainerState

    m = model()
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"DeepSpeed .* cannot reach the gradient\. Put .*Surgical .* DDP"):
        DRIFT(expert(m), m).on_train_begin(None, TrainerState(), None)
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.FSDP)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", SimpleNamespace(fsdp_version=1))
    with pytest.raises(ValueError, match=r"FSDP1 .* FSDP2"):
        DRIFT(expert(m), m).on_train_begin(None, TrainerState(), None)


def test_an_expert_on_disk(tmp_path: Path) -> None:
    """Read from two checkpoints as it is needed: nothing of either is held."""
    save_tiny("llama", tmp_path / "start")
    save_tiny("llama", tmp_path / "expert", seed=4)
    m = Model.load(tmp_path / "start", device="cpu")
    prior = Checkpoint(tmp_path / "expert") - Checkpoint(tmp_path / "start")
    drift = DRIFT(prior, m, store="lazy")
    live = model()
    other = DRIFT(Model.load(tmp_path / "expert", device="cpu").weights - live.weights, live)
    for each, callback in ((m, drift), (live, other)):
        walk(each, callback)
    assert drift.settings == other.settings
    assert same(m, live)
