"""Monitors of the weights and of gradients: their numbers are those of the definitions, computed the long way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.lift import budget, principal_indices
from finetune.monitors import every, read_log
from finetune.movement import ChangeNorm, GradientCourse, Start, UpdateShape, as_trained, shape_of, spread_layers
from finetune.tune import tune
from surgery.model import Model
from surgery.weights import linear_sites
from tests.families import tiny
from tests.finetune.test_monitors import SMALL, model, taught


def moved(W: Tensor, size: float, seed: int = 0) -> Tensor:
    return W + size * torch.randn(W.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-3, 1.0])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (12, 3)])
def test_the_shape_of_a_change_is_that_of_its_definitions(shape: tuple[int, int], size: float) -> None:
    before = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    after = moved(before, size)
    after[0] = before[0]  # some entries do not move
    principal = principal_indices(before, 2, 10).long()
    found = shape_of(before, after, principal)
    change = (after - before).double()
    spectrum = torch.linalg.svdvals(change)
    assert found.relative == pytest.approx(float(change.norm() / before.double().norm()), rel=1e-5)
    assert found.stable_rank == pytest.approx(float((spectrum**2).sum() / spectrum[0] ** 2), rel=0.02)
    energy = [float(change.flatten()[int(i)]) ** 2 for i in principal]
    assert found.principal == pytest.approx(sum(energy) / float(change.square().sum()), rel=1e-5)
    stuck = count = 0
    for a, b in zip(before.flatten().tolist(), after.flatten().tolist(), strict=True):
        count += a != b
        stuck += a != b and bool(torch.tensor(a).bfloat16() == torch.tensor(b).bfloat16())
    assert found.absorbed == stuck / count
    assert (found.absorbed > 0.3) == (size < 0.01)
    stored = after.bfloat16().double() - before.bfloat16().double()
    assert found.lost == pytest.approx(float((stored - change).norm() / change.norm()), rel=1e-4)


def test_a_change_that_bf16_holds_is_kept_whole() -> None:
    before = torch.randn(8, 8).bfloat16().float()
    found = shape_of(before, 2 * before, torch.arange(3))
    assert (found.absorbed, found.lost, found.relative) == (0, 0, 1)


def test_a_rank_one_change_has_stable_rank_one() -> None:
    before, u, v = torch.randn(30, 20), torch.randn(30, 1), torch.randn(1, 20)
    assert shape_of(before, before + u @ v, torch.arange(3)).stable_rank == pytest.approx(1, rel=1e-4)


def test_change_norm_is_the_relative_frobenius_norm() -> None:
    m = model()
    watch = ChangeNorm(m)
    assert set(watch(m, 0).values()) == {0.0}
    start = {s: m.weights[s].clone() for s in linear_sites(m.weights)}
    with torch.no_grad():
        m.weights.parameter("1.mlp.up").mul_(1.25)
        m.weights.parameter("2.attn.k").add_(0.5)
    found = watch(m, 1)
    assert found["1.mlp.up"] == pytest.approx(0.25)
    key = next(s for s in start if str(s) == "2.attn.k")
    assert found["2.attn.k"] == pytest.approx(0.5 * start[key].numel() ** 0.5 / float(start[key].norm()))
    moved = sum(float((m.weights[s] - w).norm()) ** 2 for s, w in start.items())
    assert found["all"] == pytest.approx((moved / sum(float(w.norm()) ** 2 for w in start.values())) ** 0.5)
    assert found["0.attn.q"] == 0
    assert list(ChangeNorm(m, [key])(m, 1)) == ["all", "2.attn.k"]


def test_the_monitor_gives_means_and_each_matrix() -> None:
    m = model()
    start = Start(m)
    watch = UpdateShape(m, [0, 2], density=0.1, filter_rank=4, start=start)
    still = watch(m, 0)
    assert still["relative"] == 0
    assert "stable_rank" not in still  # nothing moved: there is no shape, and no number that is not one
    with torch.no_grad():
        for name in ("0.mlp.up", "2.attn.q"):
            p = m.weights.parameter(name)
            p.copy_(moved(p, 0.01))
    found = watch(m, 1)
    for name in ("0.mlp.up", "2.attn.q"):
        site = next(s for s in start.sites if str(s) == name)
        W = start[site]
        expected = shape_of(W, m.weights[site], principal_indices(W, 4, budget(W.shape, 0.1)).long())
        assert found[f"{name}.stable_rank"] == expected.stable_rank
        assert found[f"{name}.principal"] == expected.principal
    assert found["stable_rank"] == pytest.approx((found["0.mlp.up.stable_rank"] + found["2.attn.q.stable_rank"]) / 2)
    sizes = [W.numel() for s, W in ((s, start[s]) for s in start.sites) if s.layer in (0, 2)]
    assert found["chance"] == sum(int(0.1 * size) for size in sizes) / sum(sizes) < 0.1
    sparser = UpdateShape(m, [0, 2], density=0.05, filter_rank=2, start=start)(m, 1)  # of the same start
    assert sparser["0.mlp.up.principal"] < found["0.mlp.up.principal"]
    assert not [key for key in found if key.startswith("1.")]
    assert {k for k in found if k.endswith(".relative")} == {f"{s}.relative" for s in start.sites if s.layer in (0, 2)}


@pytest.mark.parametrize(("stored", "size"), [("bfloat16", 2), ("float16", 2), ("float32", 4), ("float64", 8)])
def test_the_start_is_held_in_as_many_bits_as_say_all(stored: str, size: int) -> None:
    m = model()
    held = getattr(torch, stored)
    for p in m.module.parameters():
        p.data = (p.data.double() / 3).to(held).to(torch.promote_types(held, torch.float32))
    before = {site: m.weights[site].clone() for site in linear_sites(m.weights)}
    start = Start(m)
    assert start.nbytes == size * sum(W.numel() for W in before.values())
    with torch.no_grad():
        for p in m.module.parameters():
            p.zero_()  # a copy it is
    assert all(torch.equal(start[site], W.float()) for site, W in before.items())


def test_default_layers_are_spread_over_the_depth() -> None:
    assert spread_layers(30, 4) == [0, 10, 19, 29]
    assert spread_layers(3, 4) == [0, 1, 2]
    assert spread_layers(5, 1) == [0]
    with pytest.raises(ValueError, match=r"no matrix in layers \[9\]: the model has 3"):
        UpdateShape(model(), [9])


@pytest.mark.parametrize(  # gpt2 stores [in, out] and q, k, v in one
    ("family", "kind"), [("llama", "lora"), ("gpt2", "lora"), ("phi3", "lora"), ("gpt2", "dora"), ("phi3", "ia3")]
)
def test_what_is_trained_by_an_adapter_is_seen(family: str, kind: str) -> None:
    """While an adapter trains the module's own weights stand still; the monitors see what the forward pass uses."""
    from peft import IA3Config, LoraConfig, get_peft_model

    m = Model(*tiny(family))
    start = Start(m)
    names = sorted({m.anatomy.places[s].name.removesuffix(".weight") for s in start.sites})
    shared: Any = {"target_modules": names, "task_type": "CAUSAL_LM", "fan_in_fan_out": family == "gpt2"}
    config = (
        IA3Config(feedforward_modules=[n for n in names if "down" in n], **shared)
        if kind == "ia3"
        else LoraConfig(r=2, use_dora=kind == "dora", **shared)
    )
    learner: Any = get_peft_model(m.module, config)  # type: ignore[arg-type]
    assert ChangeNorm(m, start=start)(m, 0)["all"] == (0 if kind == "lora" else pytest.approx(0, abs=1e-6))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in learner.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    seen = {s: as_trained(m, s) for s in start.sites}
    change = ChangeNorm(m, start=start)(m, 1)
    with learner.disable_adapter():
        assert all(torch.equal(as_trained(m, s), start[s]) for s in start.sites)
    if kind != "ia3":  # an adapter that is not in every layer another one is in
        learner.add_adapter("narrow", LoraConfig(r=2, layers_to_transform=[0], use_dora=kind == "dora", **shared))
        learner.set_adapter("narrow")
        assert all(torch.allclose(as_trained(m, s), start[s], atol=1e-5) for s in start.sites)
        learner.set_adapter("default")
        learner.delete_adapter("narrow")
    learner.merge_and_unload()
    for site, W in seen.items():
        assert torch.allclose(W, m.weights[site].float(), atol=1e-5), site
        assert not torch.equal(W, start[site])
    assert change["all"] == pytest.approx(ChangeNorm(m, start=start)(m, 1)["all"], rel=1e-4)


class Seen:
    """The gradients and weights before each step, dense, by site."""

    before_step = True

    def __init__(self) -> None:
        self.gradients: dict[int, dict[str, Tensor]] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}

    def __call__(self, m: Model, step: int, optimizer: Any) -> dict[str, float]:
        lift = getattr(optimizer, "optimizer", optimizer)
        held = {one.parameter: one for one in lift.gathered()} if hasattr(lift, "gathered") else {}
        self.gradients[step], self.weights[step] = {}, {}
        for site in linear_sites(m.weights):
            p = m.weights.parameter(site)
            self.weights[step][str(site)] = p.detach().clone()
            if p in held:
                dense = torch.zeros(p.numel())
                for index, value in zip(held[p].indices.tolist(), held[p].grad.tolist(), strict=True):
                    dense[index] = value
                self.gradients[step][str(site)] = dense.view(p.shape)
            else:
                self.gradients[step][str(site)] = p.grad.clone()
        return {}


@pytest.mark.parametrize("method", ["lift", "full"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_course_of_the_gradient(method: Any, accumulate: int, tmp_path: Path) -> None:
    m, seen = model(), Seen()
    start = {str(s): m.weights[s].clone() for s in linear_sites(m.weights)}
    watch = [every(1, seen), every(1, GradientCourse(m))]
    options: dict[str, Any] = SMALL | {"accumulate": accumulate, "lr": 1e-2}
    tune(m, taught(m), method=method, steps=3, watch=watch, log=tmp_path / "log", **options)
    lines = {line["step"]: line for line in read_log(tmp_path / "log") if line["monitor"] == "gradient"}
    assert list(lines) == [1, 2, 3]
    for step, line in lines.items():
        g, w = seen.gradients[step], seen.weights[step]
        every_g = torch.cat([g[s].flatten().double() for s in start])
        every_d = torch.cat([(w[s] - start[s]).flatten().double() for s in start])
        assert line["norm"] == pytest.approx(float(every_g.norm()), rel=1e-5)
        in_one = torch.cat([g[s].flatten().double() for s in start if s.startswith("1.")])
        assert line["L1.norm"] == pytest.approx(float(in_one.norm()), rel=1e-5)
        if step == 1:  # nothing has moved yet
            assert line["onward"] is None
            continue
        cosine = float(-(every_g @ every_d) / (every_g.norm() * every_d.norm()))
        assert line["onward"] == pytest.approx(cosine, abs=1e-5)
    assert lines[2]["onward"] > 0


def test_frozen_weights_have_no_gradient_and_the_line_says_so(tmp_path: Path) -> None:
    m = model()
    with pytest.warns(RuntimeWarning, match="frozen, as under a LoRA adapter"):
        tune(m, taught(m), method="lora", steps=1, watch=[every(1, GradientCourse(m))], log=tmp_path / "log", **SMALL)
    assert next(line for line in read_log(tmp_path / "log") if line["monitor"] == "gradient")["failed"]


def test_what_lift_moves_in_packed_experts_is_seen_expert_by_expert(tmp_path: Path) -> None:
    m = Model(*tiny("mixtral"))
    watch = [every(1, GradientCourse(m)), every(3, UpdateShape(m, density=0.1, filter_rank=4))]
    tune(m, taught(m), steps=3, density=0.1, filter_rank=4, watch=watch, log=tmp_path / "log", **SMALL)
    lines = read_log(tmp_path / "log")
    (shape,) = (line for line in lines if line["monitor"] == "geometry" and line["step"] == 3)
    for site in linear_sites(m.weights):
        assert shape[f"{site}.principal"] == pytest.approx(1, abs=1e-6), site
    gradients = {line["step"]: line["norm"] for line in lines if line["monitor"] == "gradient"}
    logged = {
        line["step"]: line["grad_norm"] for line in lines if line["monitor"] == "training" and "grad_norm" in line
    }
    assert set(gradients) == {1, 2, 3}
    for step in set(gradients) & set(logged):  # the trainer's is before clipping
        assert gradients[step] == pytest.approx(min(logged[step], 1.0), rel=1e-3)
