"""Merges of one model, of nothing, and by methods that throw dice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.checkpoint import Checkpoint
from surgery.merging import merge
from surgery.reverse import undo
from tests.families import FAMILIES, SPARSE_FAMILIES, VLM_FAMILIES, save_tiny
from tests.siblings import (
    NAMES,
    RANDOM,
    by_mergekit,
    of,
    point_of,
    sibling,
    tensors_of,
)

# --- identities ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_added_is_the_base(dtype, homes, tmp_path):
    home = homes("llama", dtype)
    recipe = of(home, "task_arithmetic", parameters={"weight": 0})
    done = merge(recipe, tmp_path / "out")
    assert done.hash == done.base_hash == Checkpoint(home / "base").hash()
    assert not done.kept


VISION = [f"{family} (vision){layout}" for family in VLM_FAMILIES for layout in ("", ", old", ", module")]
UNTIED = [f"{family}, untied" for family in ("phi3", "gpt-neox", *SPARSE_FAMILIES)]
KINDS = (*FAMILIES, *SPARSE_FAMILIES, *UNTIED, "gpt-neox with buffers", *VISION)


@pytest.fixture
def pair(homes, tmp_path):
    """kind -> a folder with base and a. The buffers are those that old files of GPT-NeoX have, which no sum may touch."""

    def of_kind(kind):
        family, _, word = kind.partition(", ")
        if family != "gpt-neox with buffers":
            options = {"untied": {"tied": False}, "": {}}.get(word, {"layout": word})
            return homes(family, torch.bfloat16, **options)
        save_tiny("gpt-neox", tmp_path / "home/base", dtype=torch.float16, tied=False)
        sibling(tmp_path / "home/base", tmp_path / "home/a", seed=1)
        for name in ("base", "a"):
            file = tmp_path / "home" / name / "model.safetensors"
            tensors = load_file(file)
            for layer in range(3):
                at = f"gpt_neox.layers.{layer}.attention"
                tensors[f"{at}.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
                tensors[f"{at}.rotary_emb.inv_freq"] = torch.ones(2).half()
                tensors[f"{at}.masked_bias"] = torch.tensor(float("-inf")).half()
            save_file(tensors, file, metadata={"format": "pt"})
        return tmp_path / "home"

    return of_kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_laws_of_merging_hold_for_every_family(kind, pair, tmp_path):
    """Weight 0 is the base and weight 1 the other, to the last expert and the last tensor of a vision tower."""
    home = pair(kind)
    base, other = Checkpoint(home / "base"), Checkpoint(home / "a")
    nothing = merge(of(home, "task_arithmetic", ("a",), parameters={"weight": 0}), tmp_path / "nothing")
    assert nothing.hash == nothing.base_hash == base.hash()
    assert not nothing.kept
    whole = merge(of(home, "task_arithmetic", ("a",), parameters={"weight": 1}), tmp_path / "whole")
    assert whole.hash == other.hash()
    half = merge(of(home, "task_arithmetic", ("a",), parameters={"weight": 0.5}), tmp_path / "half")
    assert half.hash not in (base.hash(), other.hash())
    between, sum_ = Checkpoint(tmp_path / "half"), base + 0.5 * (other - base)
    assert all(torch.equal(between[site], sum_[site].to(base.dtype(site))) for site in base)
    assert undo(tmp_path / "half", tmp_path / "back") == base.hash()


@pytest.mark.parametrize("method", ["linear", "passthrough", "karcher"])
def test_one_model_is_itself(method, homes, tmp_path):
    home = homes("qwen2", torch.bfloat16)
    done = merge(of(home, method, ("b",), base=False, each={"b": {"weight": 1}}), tmp_path / "out")
    assert done.hash == Checkpoint(home / "b").hash()


def test_an_addition_taken_away_again(homes, tmp_path):
    home = homes("llama")
    up = merge(of(home, "task_arithmetic", ("a", "b"), each={"a": {"weight": 1}, "b": {"weight": 0}}), tmp_path / "up")
    assert up.hash == Checkpoint(home / "a").hash()


# --- random methods -----------------------------------------------------------------------------------------------------------


def chance(home: Path, method: str, names=NAMES, **extra) -> dict:
    each = {n: {"weight": w, "density": d} for n, w, d in zip(NAMES, (0.5, 0.3, 0.4), (0.5, 0.7, 0.4), strict=True)}
    return of(home, method, names, each=each, **extra)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Siblings with matrices large enough for torch to share a sum among threads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    home = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, vocab_size=100, num_hidden_layers=1, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(home / "base")
    for seed, name in enumerate(NAMES, 1):
        sibling(home / "base", home / name, seed)
    return home


@pytest.mark.parametrize("method", sorted(RANDOM))
def test_chance_depends_on_seed_tensor_and_model_alone(method, large):
    recipe = chance(large, method)
    first = point_of(recipe)
    seen = {site: first[site] for site in first}
    again = point_of(recipe)
    torch.manual_seed(1234)  # what the caller's own generator holds does not matter, and is not touched
    before = torch.get_rng_state()
    try:
        torch.set_num_threads(2)
        for site in reversed(list(again)):  # in another order, with more threads
            assert torch.equal(again[site], seen[site]), site
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), before)
    other = point_of(recipe, seed=1)
    assert all(not torch.equal(other[site], seen[site]) for site in seen if first.shape(site).numel() > 50)


def test_a_models_share_of_chance_is_its_own(homes):
    """Who else is merged, and in what order, does not move a model's mask."""
    home = homes("llama")
    alone = point_of(of(home, "dare_linear", ("b",), parameters={"weight": 1, "density": 0.5}))
    each = {n: {"weight": float(n == "b"), "density": 0.5} for n in NAMES}
    for names in (("a", "b", "c"), ("c", "b"), ("b", "a")):
        among = point_of(of(home, "dare_linear", names, each=each))
        assert all(torch.equal(among[site], alone[site]) for site in alone)
    twin = point_of(of(home, "dare_linear", ("a",), parameters={"weight": 1, "density": 0.5}))
    base, site = Checkpoint(home / "base"), "1.mlp.up"
    assert not torch.equal(twin[site] != base[site], alone[site] != base[site])  # two models, two masks


@pytest.mark.parametrize("method", sorted(RANDOM))
def test_chance_is_distributed_as_mergekits(method, large, tmp_path):
    """The share of entries kept, by size of the change, and the rescaled sum of magnitudes, beside mergekit's own draws."""
    density, base, tuned = 0.6, tensors_of(large / "base"), tensors_of(large / "a")
    recipe = of(large, method, ("a",), parameters={"weight": 1, "density": density, "normalize": False})
    sides = []
    for draw in range(2):
        ours = tensors_of(merge(recipe, tmp_path / f"ours{draw}", seed=draw).folder)
        sides.append((ours, by_mergekit(recipe, tmp_path / f"theirs{draw}", seed=100 + draw)))  # not a sibling's seed
    name = "model.layers.0.mlp.down_proj.weight"
    delta = tuned[name] - base[name]
    ranks = delta.abs().argsort(dim=1).argsort(dim=1).float() / (delta.shape[1] - 1)
    for third in ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.001)):
        chosen = (ranks >= third[0]) & (ranks < third[1])
        rates = [[float((side[name] != base[name])[chosen].float().mean()) for side in pair] for pair in sides]
        sigma = (density * (1 - density) / (2 * int(chosen.sum()))) ** 0.5
        ours, theirs = (sum(column) / 2 for column in zip(*rates, strict=True))
        assert abs(ours - theirs) < 5 * 2**0.5 * sigma
        if method.startswith("dare"):
            assert abs(ours - density) < 5 * sigma
    for pair in sides:
        for side in pair:
            ratio = float((side[name] - base[name]).abs().sum() / delta.abs().sum())
            assert ratio == pytest.approx(1, abs=1e-4)


def test_the_recipes_own_seed(homes, tmp_path):
    home = homes("llama")
    recipe = chance(home, "dare_ties")
    a = merge({**recipe, "surgery": {"seed": 5}}, tmp_path / "a")
    b = merge(recipe, tmp_path / "b", seed=5)
    c = merge({**recipe, "surgery": {"seed": 5}}, tmp_path / "c", seed=0)
    d = merge(recipe, tmp_path / "d")
    assert a.hash == b.hash != c.hash == d.hash
