"""Points and vectors, on every family: what is equal is equal to the bit."""

import dataclasses
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from surgery.checkpoint import Checkpoint
from surgery.delta import StoredDelta, save_delta
from surgery.edits import ReplaceLayers, Scale, SwapLayers
from surgery.model import Model
from surgery.rounding import Kept
from surgery.sites import Site, match
from surgery.weights import apply, linear_sites, pieces
from surgery.writing import write
from tests.families import FAMILIES, save_tiny

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(family, tied) -> base and tuned, each a checkpoint; the tuned one has two shards, the base one file."""
    made = {}

    def pair(family, tied=True, dtype=torch.bfloat16):
        if (family, tied, dtype) not in made:
            folder = tmp_path_factory.mktemp(family)
            save_tiny(family, folder / "base", tied=tied, dtype=dtype)
            save_tiny(family, folder / "tuned", tied=tied, dtype=dtype, seed=1, shards=2)
            made[family, tied, dtype] = Checkpoint(folder / "base"), Checkpoint(folder / "tuned")
        return made[family, tied, dtype]

    return pair


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[s], b[s]) and a[s].dtype == b[s].dtype for s in a)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_algebra(pairs, family, tied, tmp_path):
    base, tuned = pairs(family, tied)
    delta = tuned - base
    assert same(base + delta, tuned)
    assert same(tuned - delta, base)
    assert same(base + (0.25 * delta + 0.75 * delta), tuned)
    assert same((base + 0.5 * delta) + 0.5 * delta, tuned)
    assert same(base - -delta, tuned)
    assert same(base + 2.0 * delta - delta, tuned)
    for site in base:
        direct = tuned[site].float() - base[site].float()
        assert delta[site].dtype == torch.float32
        assert torch.equal(delta[site], direct)
        assert torch.equal((-delta)[site], -direct)
        assert torch.equal((base + 0.0 * delta)[site], base[site].float())
        torch.testing.assert_close((base + 0.3 * delta)[site], base[site].float() + 0.3 * direct, rtol=0, atol=1e-6)
        torch.testing.assert_close((base - delta / 4.0)[site], base[site].float() - direct / 4, rtol=0, atol=1e-6)
        assert delta.shape(site) == delta[site].shape == base.shape(site) == base[site].shape
    # and on disk: the bytes of the tuned tensors
    written = write(base + delta, tmp_path / "again")
    assert written.hashes == tuned.hashes()
    assert written.hash == tuned.hash()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_algebra_of_live_models(pairs, family):
    base, tuned = (Model.load(c.folder) for c in pairs(family))
    a, b = base.weights, tuned.weights
    assert same(a + (b - a), b)
    assert same(base.weights, pairs(family)[0])  # by site, the file is the module
    assert same(base.weights + (b - base.weights), b)  # two looks at one module are one point
    file = pairs(family)[0]
    assert all(float(n) == 0 for n in (a - file).norms().values())


def test_a_sum_is_on_the_device_of_its_point(pairs, tmp_path):
    """Files are read on the CPU, and a live model may be anywhere: what is added goes to it. (Any device will do: this one needs no GPU.)"""
    base, tuned = pairs("llama")
    live = Model.load(base.folder)
    live.module.to("meta")
    vector = 0.25 * (tuned - base) + 0.5 * (tuned - base).keep("*.attn.*")
    moved = live.weights + vector
    for site in ("embed", "1.attn.q", "2.mlp.down"):
        assert moved[site].device.type == "meta"
        assert moved[site].shape == base.shape(site)
    save_delta(tuned - base, tmp_path / "delta", base_hash=base.hash())
    assert (live.weights + 0.5 * StoredDelta(tmp_path / "delta"))["1.attn.q"].device.type == "meta"


def test_a_point_plus_a_point(pairs):
    base, tuned = pairs("llama")
    with pytest.raises(TypeError, match=r"A model plus a model is not a model\. Add a difference"):
        base + tuned  # pyright: ignore[reportOperatorIssue]
    for wrong in (lambda: 2 * base, lambda: base + 1, lambda: base - 1, lambda: -base, lambda: (tuned - base) + base):
        with pytest.raises(TypeError):
            wrong()
    for wrong in (lambda: (tuned - base) * "2", lambda: (tuned - base) * (tuned - base), lambda: (tuned - base) + 1):
        with pytest.raises(TypeError):
            wrong()


def test_small_changes_are_not_lost_in_large_weights(pairs):
    base, tuned = pairs("llama")
    site = Site(1, "mlp.down")
    small = apply(lambda _, W: W + 2.0**-20, base, "1.mlp.down") - base
    moved = base + 1000.0 * (small + (tuned - base) - (tuned - base))
    exact = base[site].double() + 1000 * ((base[site].float() + 2.0**-20) - base[site].float()).double()
    torch.testing.assert_close(moved[site].double(), exact, rtol=0, atol=1e-6)


def test_sums_of_vectors(pairs):
    base, tuned = pairs("llama")
    delta = tuned - base
    assert same(sum([0.5 * delta, 0.5 * delta]), delta)
    for site in base:
        assert not (delta - delta)[site].any()
        assert len((delta - delta).rows(site, slice(1, 4))) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_keep(pairs, family):
    base, tuned = pairs(family)
    kept = (tuned - base).keep(at=["*.attn.o", "0.mlp.*"])
    chosen = set(match(["*.attn.o", "0.mlp.*"], base))
    assert set(kept) == chosen
    view = base + kept
    assert set(view) == set(base)
    for site in base:
        if site in chosen:
            torch.testing.assert_close(view[site], tuned[site].float(), rtol=0, atol=1e-6)
        else:
            assert torch.equal(view[site], base[site])
            assert site not in kept
    assert view.changed_from(base) == chosen
    with pytest.raises(ValueError, match=r"'\*\.attn\.oo' matches no site\. Did you mean \*\.attn\.o\?"):
        kept.keep("*.attn.oo")
    with pytest.raises(ValueError, match="matches no site"):
        kept["1.attn.q"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_keep_splits_a_vector(pairs, data):
    """What is kept and what is not add up to the whole; keeping twice is keeping once; each entry is the whole's or zero."""
    base, tuned = pairs(data.draw(st.sampled_from(["llama", "gpt2", "gpt-neox", "qwen2"])))
    anatomy, delta = base.anatomy, tuned - base
    at = data.draw(st.sampled_from(["**", "*.attn.*", "*.attn.[qo]", ["*.attn.[kv]", "*.mlp.up"], "0-1.**"]))
    layers = data.draw(st.sampled_from([None, 1, 0, [0, 2], range(1, 3), slice(1, None), slice(None, None, 2)]))
    heads = data.draw(st.sampled_from([None, 0, [0, 1], slice(1, None)]))
    wanted = {layers} if isinstance(layers, int) else range(3)[layers] if isinstance(layers, slice) else layers
    masks = {}
    for site in match(at, base):
        if wanted is not None and site.layer not in wanted:
            continue
        mask = torch.ones(base.shape(site), dtype=torch.bool)
        if heads is not None:
            part = site.part.removesuffix(".bias")
            if part not in ("attn.q", "attn.k", "attn.v", "attn.o") or site.part == "attn.o.bias":
                continue
            count = anatomy.n_heads if part[-1] in "qo" else anatomy.n_kv_heads
            which = [0] if heads == 0 else list(range(count)[heads] if isinstance(heads, slice) else heads)
            lengthwise = torch.tensor([h in which for h in range(count)]).repeat_interleave(anatomy.head_dim)
            mask &= lengthwise if part == "attn.o" else lengthwise.view(-1, *[1] * (mask.ndim - 1))
        masks[site] = mask
    if not masks:
        with pytest.raises(ValueError, match=r"nothing would be kept|None of the sites"):
            delta.keep(at, layers=layers, heads=heads)
        return
    kept = delta.keep(at, layers=layers, heads=heads)
    assert set(kept) == set(masks)
    twice = kept.keep(layers=layers, heads=heads)
    rest = delta - kept
    rows = slice(data.draw(st.integers(0, 5)), data.draw(st.integers(6, 30)))
    for site in data.draw(st.sets(st.sampled_from(list(delta)), min_size=4, max_size=8)):
        whole = delta[site]
        if site in masks:
            by_hand = torch.where(masks[site], whole, 0.0)
            assert torch.equal(kept[site], by_hand)
            assert torch.equal(twice[site], by_hand)
            assert torch.equal(kept.rows(site, rows), by_hand[rows])
            assert torch.equal(rest[site], whole - by_hand)
            assert torch.equal((kept + rest)[site], whole)
        else:
            assert torch.equal(rest[site], whole)


def test_layers_and_the_rest_are_the_whole(pairs):
    base, tuned = pairs("gpt2")
    delta = tuned - base
    outside = [s for s in delta if s.layer is None]
    parts = sum([delta.keep(layers=slice(None, 2)), delta.keep(layers=2), delta.keep(outside)])
    assert set(parts) == set(delta)
    assert all(torch.equal(parts[s], delta[s]) for s in delta)
    # a slice counts the model's layers, not those that the vector or the patterns happen to reach
    assert {s.layer for s in delta.keep(layers=slice(-2, None))} == {1, 2}
    with pytest.raises(ValueError, match=r"no layer 2 among 0, 1"):
        delta.keep("0-1.**").keep(layers=slice(-1, None))


def test_keep_by_head_site(pairs):
    """The sites of heads, as attribution lists them, are patterns like others."""
    base, tuned = pairs("llama")
    delta = tuned - base
    kept = delta.keep([Site(0, "attn.o", 1), Site(0, "attn.o", 3), Site(2, "mlp.up")])
    assert [str(s) for s in kept] == ["0.attn.o", "2.mlp.up"]
    w = base.anatomy.head_dim
    assert torch.equal(kept["0.attn.o"][:, w : 2 * w], delta["0.attn.o"][:, w : 2 * w])
    assert torch.equal(kept["0.attn.o"][:, 3 * w :], delta["0.attn.o"][:, 3 * w :])
    assert not kept["0.attn.o"][:, :w].any()
    assert not kept["0.attn.o"][:, 2 * w : 3 * w].any()
    assert torch.equal(kept["2.mlp.up"], delta["2.mlp.up"])
    assert torch.equal(delta.keep(["0.attn.o.h1", "0.attn.o"])["0.attn.o"], delta["0.attn.o"])
    assert [str(s) for s in delta.keep("*.attn.o.h1", heads=[1, 2])] == ["0.attn.o", "1.attn.o", "2.attn.o"]
    with pytest.raises(ValueError, match=r"None of the sites kept has the heads"):
        delta.keep("*.attn.o.h1", heads=2)
    with pytest.raises(ValueError, match=r"0\.attn\.k\.h2 does not exist: 0\.attn\.k has heads h0 to h1"):
        delta.keep("*.attn.k", heads=2)
    with pytest.raises(ValueError, match=r"0\.attn\.o\.h-1 does not exist"):
        delta.keep("*.attn.o", heads=-1)
    with pytest.raises(ValueError, match=r"There is no layer 7, 9 among 0, 1, 2: nothing would be kept"):
        delta.keep(layers=[9, 7])
    with pytest.raises(ValueError, match=r"There is no layer 1 among none"):
        delta.keep("embed", layers=1)


def test_heads_need_a_model(pairs, tmp_path):
    """Only a model knows where a head lies; a vector must not give the whole tensor for one."""
    base, tuned = pairs("llama")
    delta = tuned - base
    stored = StoredDelta(save_delta(delta, tmp_path / "delta", base_hash="x"))
    for wrong in (lambda: delta["0.attn.o.h1"], lambda: delta.shape("0.attn.o.h1")):
        with pytest.raises(ValueError, match=r"0\.attn\.o\.h1.*whole tensors"):
            wrong()
    assert "0.attn.o.h1" not in delta
    for wrong in (lambda: stored.keep("0.attn.o.h1"), lambda: (0.5 * stored).keep("0.attn.o", heads=1)):
        with pytest.raises(ValueError, match=r"0\.attn\.o.*whole tensors.*anatomy=model\.anatomy"):
            wrong()
    told = stored.keep("*.attn.o", heads=1, anatomy=base.anatomy)
    assert all(torch.equal(told[s], delta.keep("*.attn.o.h1")[s]) for s in told)
    assert (stored + delta).anatomy is tuned.anatomy or (stored + delta).anatomy is base.anatomy
    assert stored.anatomy is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_a_slice(pairs, family):
    base, _ = pairs(family)
    anatomy, width = base.anatomy, base.anatomy.head_dim
    for part, count in [("q", anatomy.n_heads), ("k", anatomy.n_kv_heads), ("v", anatomy.n_kv_heads)]:
        heads = [base[f"1.attn.{part}.h{h}"] for h in range(count)]
        assert all(base.shape(f"1.attn.{part}.h{h}") == heads[h].shape == (width, 32) for h in range(count))
        assert all(torch.equal(base.rows(f"1.attn.{part}.h{h}", slice(1, 4)), heads[h][1:4]) for h in range(count))
        assert torch.equal(torch.cat(heads), base[f"1.attn.{part}"])
    heads = [base[f"1.attn.o.h{h}"] for h in range(anatomy.n_heads)]
    assert torch.equal(torch.cat(heads, 1), base["1.attn.o"])
    with pytest.raises(ValueError, match=r"1\.attn\.o\.h4 does not exist: 1\.attn\.o has heads h0 to h3"):
        base["1.attn.o.h4"]
    with pytest.raises(ValueError, match=r"1\.mlp\.down has no heads"):
        base["1.mlp.down.h0"]
    assert "1.attn.o.h3" in base
    assert base.get("1.attn.o.h4") is base.get("1.mlp.down.h0") is None


def test_reading_what_is_not_there(pairs):
    base, tuned = pairs("llama")
    for points in (base, base + 0.5 * (tuned - base), tuned - base):
        for read in (points.__getitem__, points.shape, lambda site, points=points: points.rows(site, slice(2))):
            with pytest.raises(ValueError, match=r"'1\.attn\.qq' matches no site\. Did you mean 1\.attn\.q\?"):
                read("1.attn.qq")
        assert "1.attn.qq" not in points
        assert "1.attn.q" in points
        assert 7 not in points
    with pytest.raises(ValueError, match=r"'1\.attn\.qq' matches no site"):
        base.dtype("1.attn.qq")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_rows(pairs, family):
    base, tuned = pairs(family)
    half = apply(Scale(0.5), base + 0.5 * (tuned - base), "*.attn.o.h1")
    for points in (base, tuned - base, half):
        for site in points:
            assert torch.equal(points.rows(site, slice(1, 4)), points[site][1:4])


def test_norms_cosines_survival(pairs):
    base, tuned = pairs("llama")
    delta = 0.01 * (tuned - base)
    for site, norm in delta.norms().items():
        assert norm == pytest.approx(float(delta[site].double().norm()), rel=1e-5)
    assert all(c == pytest.approx(-1, abs=1e-5) for c in delta.cosines(-3.0 * delta).values())
    other = (tuned - base).keep("*.mlp.up")
    assert set(delta.cosines(other)) == set(other)
    assert all(math.isnan(c) for c in delta.cosines(0.0 * delta).values())
    with pytest.raises(ValueError, match="no site in common"):
        delta.keep("*.attn.o").cosines(other)
    for site, s in delta.survival(torch.bfloat16, base).items():
        was, wish = base[site].double(), (base[site].float() + delta[site]).double()
        got = wish.float().to(torch.bfloat16).double()
        asked, kept = wish - was, got - was
        assert s.asked == pytest.approx(float(asked.norm()), rel=1e-4)
        assert s.kept == pytest.approx(float(kept.norm()), rel=1e-4)
        assert s.cosine == pytest.approx(float((asked * kept).sum() / asked.norm() / kept.norm()), rel=1e-3)
        stuck = ((kept == 0) & (asked != 0)).sum() / (asked != 0).sum()
        assert s.unmoved == pytest.approx(float(stuck), abs=1e-6)
        assert 0 < s.unmoved < 1 or site.part == "norm" or "norm" in site.part


def _rounded(before, after):
    """Kept, by its definition: differences in fp32, sums of them in fp64."""
    asked, kept = (after - before.float()).double(), (after.bfloat16().float() - before.float()).double()
    stuck, moving = int(((kept == 0) & (asked != 0)).sum()), int((asked != 0).sum())
    norms = float(asked.norm()), float(kept.norm())
    cosine = float((asked * kept).sum()) / (norms[0] * norms[1]) if norms[0] * norms[1] else math.nan
    return *norms, cosine, stuck / moving if moving else 0.0, moving


def test_long_tensors_are_walked_in_pieces(pairs, monkeypatch):
    """Sums over pieces are sums over the whole, whatever the size of a piece."""
    base, tuned = pairs("qwen2")
    delta = 0.01 * (tuned - base).keep(["1.**", "norm"])
    other = (tuned - base) + 0.5 * (tuned - base).keep("*.mlp.*")
    seen = []
    for size in (50, 1 << 20):
        monkeypatch.setattr("surgery.weights._PIECE", size)
        seen.append((delta.norms(), delta.cosines(other), delta.survival("bfloat16", base)))
        assert all(len(list(pieces(delta.shape(s)))) == 1 for s in delta) == (size == 1 << 20)
        for shape in ((5, 3), (1, 40), (40,), (1,)):
            covered = torch.cat([torch.arange(shape[0])[strip] for strip in pieces(torch.Size(shape))])
            assert torch.equal(covered, torch.arange(shape[0]))
    assert list(pieces(torch.Size(()))) == [slice(None)]
    for site in delta:
        direct, against = delta[site].double(), other[site].double()
        whole = Kept(*_rounded(base[site], (base + delta)[site]))
        for norms, cosines, kept in seen:
            assert norms[site] == pytest.approx(float(direct.norm()), rel=1e-9)
            assert cosines[site] == pytest.approx(
                float((direct * against).sum() / direct.norm() / against.norm()), rel=1e-9
            )
            assert kept[site] == pytest.approx(whole) or dataclasses.astuple(kept[site]) == pytest.approx(
                dataclasses.astuple(whole), rel=1e-9, nan_ok=True
            )


def test_survival_takes_a_name(pairs):
    base, tuned = pairs("llama")
    delta = 0.01 * (tuned - base).keep("*.attn.o")
    for name, dtype in (("bfloat16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32)):
        assert delta.survival(name, base) == delta.survival(dtype, base)
    assert delta.survival("bf16", base) != delta.survival("fp16", base)
    with pytest.raises(ValueError, match=r"'int8' is not a dtype of weights"):
        delta.survival("int8", base)
    with pytest.raises(ValueError, match=r"'auto' is not one dtype"):
        delta.survival("auto", base)


def test_survival_knows_where_the_change_began(pairs, tmp_path):
    base, tuned = pairs("llama")
    delta = tuned - base
    asked = delta.survival("bfloat16", base)
    assert delta.survival("bfloat16") == asked
    half = 0.5 * delta
    for part in (half, half.keep("*.mlp.up"), 2 * half.keep("*.attn.o.h1"), half + 0.25 * (tuned - base)):
        assert part.survival("bfloat16") == part.survival("bfloat16", base)
    assert (-half).survival("bfloat16") == (-half).survival("bfloat16", tuned)
    moved = base + half
    assert (moved - base).survival("bfloat16") == (moved - base).survival("bfloat16", base)
    stored = StoredDelta(save_delta(delta, tmp_path / "delta", base_hash="x"))
    for unknown in (stored, 0.5 * stored, (tuned - base) + (tuned - moved), delta + stored):
        with pytest.raises(
            ValueError, match=r"does not know one point that it was taken from.*survival\(dtype, base\)"
        ):
            unknown.survival("bfloat16")


def test_cosines_need_equal_shapes(pairs):
    a, b = pairs("llama"), pairs("gpt2")
    with pytest.raises(ValueError, match=r"do not have the same anatomy.*0\.attn\.k: "):
        (a[1] - a[0]).cosines(b[1] - b[0])


def test_survival_by_hand(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    base = apply(lambda _, W: torch.ones_like(W), Checkpoint(folder), "norm")
    after = torch.ones(base.shape("norm"))
    after[1:4] = torch.tensor([1.0 + 2**-9, 1.0 + 2**-7, 2.0])  # bf16 keeps steps of 2**-7 above 1
    (s,) = (apply(lambda _, W: after, base, "norm") - base).keep("norm").survival("bfloat16", base).values()
    assert s.unmoved == pytest.approx(1 / 3)
    assert s.asked == pytest.approx(math.sqrt(2**-18 + 2**-14 + 1))
    assert s.kept == pytest.approx(math.sqrt(2**-14 + 1))
    assert s.entries == 3
    (nothing,) = (0.0 * (base - Checkpoint(folder))).keep("norm").survival("bfloat16", base).values()
    assert nothing.asked == nothing.kept == nothing.unmoved == 0
    assert math.isnan(nothing.cosine)


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_is_a_view(pairs, family):
    base, _ = pairs(family)
    edited = apply(Scale(0.0), base, ["*.attn.o.h1", "2.mlp.up"])
    touched = {s.whole for s in match(["*.attn.o.h1", "2.mlp.up"], base)}
    for site in base:
        if site not in touched:
            assert torch.equal(edited[site], base[site])
            assert edited[site].dtype == base[site].dtype
    for layer in range(3):
        expected = base[f"{layer}.attn.o"].float()
        w = base.anatomy.head_dim
        expected[:, w : 2 * w] = 0
        assert torch.equal(edited[f"{layer}.attn.o"], expected)
    assert not edited["2.mlp.up"].any()
    twice = apply(Scale(3.0), apply(Scale(2.0), base, "0.attn.v"), "0.attn.v")
    assert torch.equal(twice["0.attn.v"], 6 * base["0.attn.v"].float())
    assert (
        len(linear_sites(edited)) == len(match(["*.attn.[qkvo]", "*.mlp.gate", "*.mlp.up", "*.mlp.down"], base))
        if "2.mlp.gate" in base
        else True
    )


def test_apply_to_nothing(pairs):
    base, _ = pairs("llama")
    with pytest.raises(ValueError, match=r"'\*\.attn\.z' matches no site.*Layers 0 to 2 have"):
        apply(Scale(0.0), base, "*.attn.z")
    with pytest.raises(ValueError, match=r"0\.attn\.k\.h2 does not exist: 0\.attn\.k has heads h0 to h1"):
        apply(Scale(0.0), base, "*.attn.k.h2")
    with pytest.raises(ValueError, match=r"0\.mlp\.up has no heads"):
        apply(Scale(0.0), base, "*.mlp.up.h0")
    wrong = apply(lambda _, W: W[:1], base, "0.attn.o")
    with pytest.raises(ValueError, match=r"The edit turned 0\.attn\.o from \(32, 48\) into \(1, 48\)"):
        wrong["0.attn.o"]


def test_different_architectures_name_three_differences(pairs, tmp_path):
    base, _ = pairs("llama")
    other, _ = pairs("qwen2")
    untied, _ = pairs("llama", tied=False)
    with pytest.raises(
        ValueError,
        match=r"do not have the same anatomy: 9 sites differ, first 0\.attn\.k\.bias: \(24,\) against absent; 0\.attn\.q\.bias: \(48,\) against absent; "
        r"0\.attn\.v\.bias: \(24,\) against absent\. Differences need the same architecture and vocabulary",
    ):
        other - base
    with pytest.raises(ValueError, match=r"1 site differs, first head: absent against \(100, 32\)"):
        base - untied
    with pytest.raises(ValueError, match=r"1 site differs, first head: \(100, 32\) against absent"):
        untied - base
    with pytest.raises(ValueError, match=r"1 site differs, first head: absent against \(100, 32\)"):
        base + (untied - pairs("llama", tied=False)[1])
    gpt2, gpt2_tuned = pairs("gpt2")
    with pytest.raises(
        ValueError,
        match=r"first norm\.bias: absent against \(32,\); position: absent.*; 0\.attn\.k: \(24, 32\) against \(32, 32\)",
    ):
        base + (gpt2_tuned - gpt2)
    with pytest.raises(ValueError, match=r"do not have the same anatomy.*0\.attn\.k: "):
        (base - pairs("llama")[1]) + (gpt2_tuned - gpt2)
    saved = StoredDelta(save_delta(gpt2_tuned - gpt2, tmp_path / "delta", base_hash="x"))
    with pytest.raises(ValueError, match="do not have the same anatomy"):
        base + saved


def test_nothing_is_read_before_it_is_asked(pairs):
    code = """
import sys
from surgery.checkpoint import Checkpoint
from surgery.edits import ReplaceLayers, Scale, SwapLayers
from surgery.weights import apply
read = []
base, tuned = map(Checkpoint, sys.argv[1:])
for point in (base, tuned):
    point._read = lambda site, rows, real=point._read: read.append(str(site)) or real(site, rows)
view = apply(Scale(2.0), base + 0.5 * (tuned - base).keep("1.mlp.up"), "0.attn.o")
repr(view), len(view), view.shape("embed"), list(view), view.changed_from(base), "embed" in view
assert read == [], read
view["embed"]
assert read == ["embed"], read
"""
    folders = [str(c.folder) for c in pairs("llama")]  # apart: checking types at run time reads tensors
    subprocess.run([sys.executable, "-c", code, *folders], check=True)


def test_threads_read_their_own(pairs):
    base, _ = pairs("llama")
    expected = {s: base[s] for s in base}
    with ThreadPoolExecutor(4) as pool:
        for site, tensor in zip([*base] * 50, pool.map(base.__getitem__, [*base] * 50), strict=True):
            assert torch.equal(tensor, expected[site])


def test_writing_to_what_was_read_changes_nothing(pairs):
    base, tuned = pairs("llama", dtype=torch.float32)
    for points in (base, base + 0.5 * (tuned - base), tuned - base, apply(Scale(2.0), base, "embed")):
        before = points["embed"].clone()
        points["embed"].zero_()
        assert torch.equal(points["embed"], before)


def test_a_sum_leaves_what_it_is_of(tmp_path):
    """Of a module in fp32 what is read is the module's own."""
    base, tuned = (Model.load(save_tiny("llama", tmp_path / str(seed), seed=seed)).weights for seed in (0, 1))
    before = {site: (base[site].clone(), tuned[site].clone()) for site in base}
    for sums in (tuned - base, base + 0.5 * (tuned - base)):
        for site, (was, other) in before.items():
            sums[site]
            assert torch.equal(base[site], was)
            assert torch.equal(tuned[site], other)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_a_quantised_model_are_no_weights(pairs, codes, tmp_path):
    """Neither a difference of codes nor an edit of them is one of weights; what stays as it is stays."""
    base, _ = pairs("llama")
    folder = save_tiny("llama", tmp_path / "codes", dtype=torch.bfloat16, seed=1)
    tensors = load_file(folder / "model.safetensors")
    tensors[UP] = tensors[UP].to(codes)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantised, words = (
        Checkpoint(folder),
        rf"1\.mlp\.up is stored as {codes}: such numbers are codes of a quantised model",
    )
    change = quantised - base
    for sums in (change, base + 0.5 * change, quantised + 0.5 * -change):
        assert sums["0.mlp.up"].any()
        with pytest.raises(ValueError, match=words):
            sums["1.mlp.up"]
    for edit in (SwapLayers(1, 2), ReplaceLayers(base, [1]), ReplaceLayers(Checkpoint(folder), [1], 0.5)):
        with pytest.raises(ValueError, match=words):
            apply(edit, quantised)
    with pytest.raises(ValueError, match=words):
        apply(Scale(2.0), quantised, "*.mlp.up")
    with pytest.raises(ValueError, match=words):
        write(
            quantised, tmp_path / "out", dtype=torch.float32
        )  # without the scales, the codes would be taken for weights
    moved = quantised + change.keep("0.mlp.up")
    assert moved["1.mlp.up"].dtype == codes
    assert apply(ReplaceLayers(quantised, [1]), moved)["1.mlp.up"].dtype == codes
    assert not torch.equal(moved["0.mlp.up"], quantised["0.mlp.up"])


def test_sums_of_vectors_between_models_of_unlike_sites(tmp_path):
    """A point that lacks a site is no origin there."""
    small, large = (Checkpoint(save_tiny(family, tmp_path / family)) for family in ("llama", "qwen2"))
    of_small = apply(Scale(2.0), small, "*.mlp.up") - small
    of_large = apply(lambda _, W: W + 1, large, "*.attn.q.bias") - large
    both = of_small + of_large
    assert torch.allclose(both["0.attn.q.bias"], torch.ones(large.shape("0.attn.q.bias")))
    assert torch.allclose(both["0.mlp.up"], small["0.mlp.up"])
