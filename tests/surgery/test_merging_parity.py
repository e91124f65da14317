"""Merging beside mergekit itself: the same recipes, the same tiny siblings, run by its `run_merge` and by ours."""

from __future__ import annotations

import pytest
import torch
from mergekit.merge_methods import registered_methods
from mergekit.sparsify import SparsificationMethod, sparsify

from surgery.checkpoint import Checkpoint
from surgery.merging import Merged, merge, plan, read_recipe, rules
from surgery.merging.rules import Cut
from tests.siblings import (
    DETERMINISTIC,
    FAMILIES,
    RANDOM,
    by_mergekit,
    furthest,
    of,
    point_of,
    tensors_of,
)

# --- golden parity ------------------------------------------------------------------------------------------------------------


def test_every_method_of_the_installed_mergekit_has_its_parity() -> None:
    covered = {name.split("-")[0] for name in DETERMINISTIC} | RANDOM
    assert covered == {method.spec.name for method in registered_methods()}


@pytest.mark.parametrize(
    ("case", "family"), [(c, f) for c in DETERMINISTIC for f in FAMILIES if "-" not in c or f == "qwen2"]
)
def test_parity(case, family, homes, tmp_path, record_property):
    recipe = DETERMINISTIC[case](homes(family))
    theirs = by_mergekit(recipe, tmp_path / "theirs")
    done = merge(recipe, tmp_path / "ours")
    assert done.road == "stream"
    apart = furthest(theirs, tensors_of(tmp_path / "ours"))
    record_property("max difference", apart)
    assert apart < 1e-6
    if "linear" not in case and "task_arithmetic" not in case:  # mergekit's own rule, on the same numbers
        assert apart == 0


@pytest.mark.parametrize("found", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", ["linear", "linear-gradient", "task_arithmetic", "ties", "slerp-gradient", "model_stock"]
)
def test_parity_of_what_is_stored(case, found, homes, tmp_path):
    """Arithmetic in float32, stored as bf16, on both sides: the same bits, or next to them where a sum is rounded another way.

    A mean of bf16 numbers often lies half-way between two of them, so that its last digit decides.
    """
    recipe = DETERMINISTIC[case](homes("llama", found)) | {"dtype": "float32", "out_dtype": "bfloat16"}
    theirs = by_mergekit(recipe, tmp_path / "theirs")
    merge(recipe, tmp_path / "ours")
    ours = tensors_of(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    assert all(w.dtype == torch.bfloat16 for w in [*theirs.values(), *ours.values()])
    steps = [(ours[n].view(torch.int16).int() - w.view(torch.int16).int()).abs().reshape(-1) for n, w in theirs.items()]
    apart = torch.cat(steps)
    if case == "ties" and found == torch.bfloat16:  # mergekit's sort chooses among equals by chance
        assert (apart > 0).float().mean() < 0.1
    elif "linear" in case or "task_arithmetic" in case:
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < (0.03 if found == torch.bfloat16 else 1e-4)
    else:
        assert apart.max() == 0


@pytest.mark.parametrize(
    "case",
    [
        "linear",
        "task_arithmetic-gradient",
        "ties",
        "breadcrumbs",
        "multislerp",
        "karcher",
        "model_stock",
        "ramplus_tl",
        "arcee_fusion",
    ],
)
def test_as_mergekit_computes(case, homes, tmp_path):
    """`compute: mergekit` does what mergekit does with bf16 models: to the bit, also where it rounds on the way."""
    recipe = DETERMINISTIC[case](homes("qwen2", torch.bfloat16))
    theirs = by_mergekit(recipe, tmp_path / "theirs")
    if case in ("ramplus_tl", "arcee_fusion"):  # their rules come out in float32, and mergekit stores that
        assert torch.float32 in {w.dtype for w in theirs.values()}
        theirs = {name: w.bfloat16() for name, w in theirs.items()}
    merge({**recipe, "surgery": {"compute": "mergekit"}}, tmp_path / "ours")
    assert furthest(theirs, tensors_of(tmp_path / "ours")) == 0


@pytest.mark.parametrize("shape", [(7,), (40, 30), (3, 5, 4), (70_000, 8), ()], ids=str)
@pytest.mark.parametrize("kind", ["real", "ties", "zeros"])
def test_the_cut_is_mergekits(shape, kind):
    """What TIES keeps is what mergekit's sort over the whole tensor keeps; among entries of one magnitude evenly."""
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(shape, generator=generator)
    if kind == "ties":  # few magnitudes, as between bf16 models
        delta = (delta * 3).round() / 8
    if kind == "zeros":
        delta = delta * (torch.rand(shape, generator=generator) < 0.3)
    rows = max(1, shape[0] // 3) if shape else 1
    strips = [delta[i : i + rows] for i in range(0, shape[0], rows)] if shape else [delta]
    for density in (0.01, 0.3, 0.5, 0.9):
        theirs = sparsify(delta, density=density, method=SparsificationMethod.magnitude)
        keep = max(1, int(density * delta.numel()))
        cut = Cut.of(lambda: strips, keep)
        mask = torch.cat([cut.mask(strip, i).reshape(-1) for i, strip in enumerate(strips)])
        assert torch.equal(mask, cut.mask(delta, 0).reshape(-1))
        assert mask.sum() == keep
        ours = delta.reshape(-1) * mask
        assert torch.equal(ours.abs().sort().values, theirs.abs().reshape(-1).sort().values)
        if kind == "real":
            assert torch.equal(ours.view(shape), theirs)
        equal = delta.abs().reshape(-1) == delta.abs().reshape(-1).sort(descending=True).values[keep - 1]
        taken = mask[equal]  # evenly: no stretch of the equals has more than its share
        share = taken.cumsum(0) - torch.arange(1, len(taken) + 1) * float(taken.mean())
        assert share.abs().max() <= 1


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_rows_are_the_rows(case, homes, monkeypatch):
    """Also where a tensor is looked at in many strips, and rows begin in the middle of one."""
    recipe = DETERMINISTIC[case](homes("qwen2", torch.bfloat16))
    in_one = point_of(recipe)
    monkeypatch.setattr(rules, "_ROWS", 5 * 32)
    point = point_of(recipe)
    assert torch.equal(point["1.mlp.down"], in_one["1.mlp.down"])
    for site in ("embed", "1.mlp.down", "0.attn.q.bias", "norm"):
        whole = point[site]
        for first, last in ((3, 11), (13, 24)):
            assert torch.equal(point.rows(site, slice(first, last)), whole[first:last])
        whole.fill_(9)  # the caller's own
        assert not (point[site] == 9).any()


def test_a_whole_tensor_is_the_callers_own(homes):
    point = point_of(of(homes("llama"), "passthrough", ("a",), base=False))
    point["1.mlp.down"].fill_(9)
    assert not (point["1.mlp.down"] == 9).any()


def test_a_recipe_in_float64_is_computed_in_float64(homes):
    home = homes("llama")
    models = [{"model": str(home / name), "parameters": {"weight": weight}} for name, weight in (("base", 1), ("a", 2))]
    made = plan(read_recipe({"merge_method": "linear", "dtype": "float64", "models": models}))
    base, other = Checkpoint(home / "base"), Checkpoint(home / "a")
    point = Merged(made, base)
    for site in base:
        mean = (base[site].double() + 2 * other[site].double()) / 3
        torch.testing.assert_close(point[site], mean, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("case", ["slerp", "model_stock", "breadcrumbs"])
def test_arithmetic_is_float32_unless_asked_otherwise(case, homes, tmp_path):
    recipe = DETERMINISTIC[case](homes("llama", torch.bfloat16))
    wide = by_mergekit(recipe | {"dtype": "float32", "out_dtype": "bfloat16"}, tmp_path / "wide")
    merge(recipe, tmp_path / "ours")
    assert furthest(wide, tensors_of(tmp_path / "ours")) == 0
