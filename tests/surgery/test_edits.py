"""What an edit does to a matrix, a bias, a head or a whole layer, on every family."""

import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from surgery import writing
from surgery.checkpoint import Checkpoint
from surgery.edits import AddDirection, RemoveDirection, ReplaceLayers, Scale, SwapLayers, TruncateRank, gain_after
from surgery.model import Model
from surgery.sites import Site, match
from surgery.weights import apply
from surgery.writing import write
from tests.families import (
    FAMILIES,
    HIDDEN,
    SPARSE_FAMILIES,
    VLM_FAMILIES,
    characters,
    save_tiny,
    save_tiny_vlm,
    tiny,
    tiny_vlm,
)

EVERY = [*FAMILIES, *SPARSE_FAMILIES, *(f"{family} (vision)" for family in VLM_FAMILIES)]
U = torch.randn(32, generator=torch.Generator().manual_seed(5))
V = torch.randn(12, generator=torch.Generator().manual_seed(6))


def save(family, folder, **options):
    name, vision, _ = family.partition(" (vision)")
    return (save_tiny_vlm if vision else save_tiny)(name, folder, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> its tiny model as a checkpoint's folder."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = save(family, tmp_path_factory.mktemp("models") / "base")
        return made[family]

    return of


@pytest.fixture(scope="module")
def weights(folders):
    """family -> the weights of its tiny live model; of a vision-language model those of its files."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = Checkpoint(folders(family)) if "vision" in family else Model(*tiny(family)).weights
        return made[family]

    return of


def mlp(point, layer, part):
    """A matrix of a layer's MLP; of an expert where it has experts."""
    return next(s for s in point if s.layer == layer and s.part.startswith("mlp.") and s.part.endswith(part))


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def same_bits(a, b):
    return list(a) == list(b) and all(torch.equal(bits(a[s].float()), bits(b[s].float())) for s in a)


def edits_of(weights, strength):
    """One of every kind, with where it goes."""
    heads = weights.anatomy.head_dim
    return [
        (Scale(0.5, strength), "*.attn.v"),
        (Scale(0.0, strength), "1.attn.k.h1"),
        (RemoveDirection(U, strength), mlp(weights, 1, "down")),
        (RemoveDirection(U, strength), "1.attn.o.h2"),
        (AddDirection(U, strength), "0.attn.o"),
        (AddDirection(U, strength, reads=torch.ones(heads)), "*.attn.o.h3"),
        (AddDirection(torch.ones(heads), strength, reads=U), "2.attn.k.h1"),
        (TruncateRank(2, strength), "*.attn.q"),
        (TruncateRank(1, strength), "2.attn.v.h0"),
        (SwapLayers(0, 2, strength), None),
        (ReplaceLayers(apply(Scale(2.0), weights, "**"), {0: 2}, strength), None),
    ]


@pytest.mark.parametrize("family", EVERY)
def test_at_strength_0_no_bit_changes_and_at_1_some_do(weights, family):
    point = weights(family)
    for edit, at in edits_of(point, 0.0):
        assert same_bits(apply(edit, point, at), point), edit
    for edit, at in edits_of(point, 1.0):
        after = apply(edit, point, at)
        assert not same_bits(after, point), edit
        assert after.changed_from(after) == set()
        assert apply(Scale(2.0), after, "norm").changed_from(after) == {Site(None, "norm")}


def test_strength_0_keeps_negative_zeros(weights):
    W = torch.tensor([[0.0, -0.0], [-0.0, -1.0]])
    for edit in (
        Scale(-3.0, 0.0),
        Scale(1e308, 0.0),
        RemoveDirection(torch.ones(2), 0.0),
        AddDirection(torch.ones(2), 0.0),
        TruncateRank(1, 0.0),
    ):
        assert torch.equal(bits(edit(Site(0, "attn.o"), W)), bits(W))


@pytest.mark.parametrize("family", EVERY)
def test_strength_is_the_share_of_the_way(weights, family):
    point = weights(family)
    for (some_of_it, at), (whole, _) in zip(edits_of(point, 0.25), edits_of(point, 1.0), strict=True):
        some, all_of_it = apply(some_of_it, point, at), apply(whole, point, at)
        for site in all_of_it.changed_from(point):
            quarter = point[site] + (all_of_it[site] - point[site]) / 4
            torch.testing.assert_close(some[site], quarter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at", ["*.attn.o", "mlp", "1.attn.o.h2"])
@pytest.mark.parametrize("family", EVERY)
def test_removing_twice_is_removing_once(weights, family, at):
    point = weights(family)
    at = str(mlp(point, 2, "down")) if at == "mlp" else at
    once = apply(RemoveDirection(U), point, at)
    twice = apply(RemoveDirection(U), once, at)
    u = U / U.norm()
    for site in once.changed_from(point):
        torch.testing.assert_close(twice[site], once[site], rtol=0, atol=1e-6)
        columns = point.anatomy.head_slice(Site.parse(at))[1] if ".h" in at else slice(None)
        assert (u @ once[site])[columns].abs().max() < 1e-5 < (u @ point[site])[columns].abs().max()
        if ".h" in at:
            rest = torch.ones(point.shape(site)[1], dtype=torch.bool)
            rest[columns] = False
            assert torch.equal(once[site][:, rest], point[site][:, rest])


@pytest.mark.parametrize("family", EVERY)
def test_edits_of_disjoint_sites_commute(weights, family):
    point = weights(family)
    parts = [
        (RemoveDirection(U), "1.attn.o.h0"),
        (TruncateRank(3), "1.attn.o.h2"),
        (Scale(0.5), mlp(point, 1, "up")),
        (AddDirection(U), mlp(point, 1, "down")),
        (SwapLayers(0, 2), None),
    ]
    forth = back = point
    for edit, at in parts:
        forth = apply(edit, forth, at)
    for edit, at in reversed(parts):
        back = apply(edit, back, at)
    assert same_bits(forth, back)
    assert not same_bits(forth, point)


@pytest.mark.parametrize("family", EVERY)
def test_heads_are_edited_alone(weights, family):
    """A query head of o is columns, a key head of k is rows, and under GQA there are fewer of those."""
    point = weights(family)
    width = point.anatomy.head_dim
    for edit, at, span in (
        (AddDirection(U, reads=torch.ones(width)), "1.attn.o.h3", (slice(None), slice(3 * width, 4 * width))),
        (AddDirection(torch.ones(width), reads=U), "1.attn.k.h1", (slice(width, 2 * width),)),
        (Scale(0.0), "1.attn.v.h1", (slice(width, 2 * width),)),
    ):
        after = apply(edit, point, at)
        site = Site.parse(at).whole
        expected = point[site].clone()
        expected[span] = edit(Site.parse(at), expected[span])
        assert torch.equal(after[site], expected)
        assert not torch.equal(after[site], point[site])
    with pytest.raises(
        ValueError, match=rf"does not exist: 1\.attn\.k has heads h0 to h{point.anatomy.n_kv_heads - 1}"
    ):
        apply(Scale(0.0), point, f"1.attn.k.h{point.anatomy.n_kv_heads}")


@pytest.mark.parametrize("family", EVERY)
def test_a_head_named_with_its_whole_is_edited_once(weights, family):
    point = weights(family)
    whole = apply(Scale(0.5), point, "1.attn.o")
    for at in (["1.attn.o", "1.attn.o.h2"], ["*.attn.o.h2", "1.attn.o", "1.attn.o.h0"]):
        assert torch.equal(apply(Scale(0.5), point, at)["1.attn.o"], whole["1.attn.o"])
    with pytest.raises(ValueError, match=r"1\.attn\.o\.h99 does not exist"):
        apply(Scale(0.5), point, ["1.attn.o", "1.attn.o.h99"])
    twice = apply(Scale(0.5), apply(Scale(0.5), point, "1.attn.o.h2"), "1.attn.o")["1.attn.o"]
    head = point.anatomy.head_slice(Site(1, "attn.o", 2))
    assert torch.equal(twice[head], 0.25 * point["1.attn.o.h2"].float())  # two edits, one after the other, are two


@pytest.mark.parametrize("family", EVERY)
def test_truncated_ranks(weights, family):
    point = weights(family)
    for site in match(["0.attn.*", "1.mlp.**"], point):
        W = point[site]
        if W.ndim != 2:
            continue
        torch.testing.assert_close(apply(TruncateRank(min(W.shape)), point, site)[site], W, rtol=0, atol=1e-6)
        cut = apply(TruncateRank(3), point, site)[site]
        singular = torch.linalg.svdvals(cut.double())
        assert singular[2] > 1e-3 > 1e-5 > singular[3]
        best = torch.linalg.svdvals(W.double())[3:].norm()
        assert float((W.double() - cut).norm()) == pytest.approx(float(best), rel=1e-4)
    head = apply(TruncateRank(2), point, "1.attn.o.h1")["1.attn.o.h1"]
    assert int((torch.linalg.svdvals(head) > 1e-5).sum()) == 2


@pytest.mark.parametrize("family", EVERY)
def test_directions_are_written(weights, family):
    """Rank one: W x gains u (v · x); by default what W writes along u doubles. A bias gains u."""
    point = weights(family)
    at = mlp(point, 1, "down")
    W = point[at]
    v = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(1))
    x = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(2))
    read = apply(AddDirection(U, 0.3, reads=v), point, at)[at]
    torch.testing.assert_close(read @ x, W @ x + 0.3 * U * (v @ x), rtol=1e-4, atol=1e-4)
    assert torch.linalg.matrix_rank(read - W, rtol=1e-4) == 1
    doubled = apply(AddDirection(7 * U), point, at)[at]
    torch.testing.assert_close(U @ doubled, 2 * (U @ W), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(RemoveDirection(U, 0.5)(at, doubled), W, rtol=1e-4, atol=1e-4)
    for site in (s for s in point if s.part == "attn.o.bias" or s.part == "mlp.down.bias"):
        assert torch.equal(apply(AddDirection(U, 2.0), point, site)[site], point[site] + 2 * U)
        once = apply(RemoveDirection(U), point, site)[site]
        assert abs(float(once @ U)) < 1e-4 < abs(float(point[site] @ U))


@pytest.mark.parametrize("family", EVERY)
def test_a_bias_that_is_not_there_is_refused_with_the_alternative(weights, family):
    point = weights(family)
    lacking = [s.part for s in (Site(0, "attn.o"), mlp(point, 0, "down")) if Site(0, f"{s.part}.bias") not in point]
    for part in lacking:
        said = rf"'\*\.{re.escape(part)}\.bias' matches no site\. This model has no bias at \*\.{re.escape(part)}.*AddDirection at \*\.{re.escape(part)}"
        with pytest.raises(ValueError, match=said):
            apply(AddDirection(U), point, f"*.{part}.bias")
    assert lacking or family in ("gpt2", "gpt-neox")


# --- whole layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_swapping_twice_is_not_swapping(folders, family):
    point = Checkpoint(folders(family))
    once = apply(SwapLayers(0, 2), point)
    assert same_bits(apply(SwapLayers(2, 0), once), point)
    assert once.changed_from(point) == {s for s in point if s.layer in (0, 2)}
    for site in point:
        there = {0: 2, 2: 0}.get(site.layer, site.layer) if site.layer is not None else None
        assert torch.equal(once[site], point[Site(there, site.part)])
        assert once[site].dtype == point[site].dtype
        assert torch.equal(once.rows(site, slice(1, 3)), once[site][1:3])


@pytest.mark.parametrize("family", EVERY)
def test_replacing_layers(folders, family, tmp_path):
    point = Checkpoint(folders(family))
    donor = Checkpoint(save(family, tmp_path / "donor", seed=1))
    assert apply(ReplaceLayers(point, [0, 1, 2]), point) is point
    assert same_bits(apply(ReplaceLayers(Checkpoint(point.folder), range(3)), point), point)
    taken = apply(ReplaceLayers(donor, {0: 2}), point)
    for site in point:
        expected = donor[Site(2, site.part)] if site.layer == 0 else point[site]
        assert torch.equal(bits(taken[site]), bits(expected))
    assert same_bits(apply(ReplaceLayers(point, [0]), taken), point)


def test_tensors_without_a_name_move_with_their_block(tmp_path):
    """A file may hold a tensor that the family's table does not know; it belongs to its layer all the same."""
    from safetensors.torch import load_file

    folder = save_tiny("gpt2", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    extra = {f"transformer.h.{i}.attn.bias": torch.full((1, 1, 4, 4), float(i)) for i in range(3)}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    point = Checkpoint(folder)
    swapped = apply(SwapLayers(0, 2), point)
    for i, j in ((0, 2), (1, 1), (2, 0)):
        assert bool((swapped[f"file:transformer.h.{i}.attn.bias"] == j).all())


def test_layers_that_do_not_fit(weights, folders):
    llama = weights("llama")
    for edit in (SwapLayers(0, 3), SwapLayers(-1, 1), ReplaceLayers(llama, [7]), ReplaceLayers(llama, {0: 3})):
        with pytest.raises(ValueError, match=r"There is no layer -?\d: this model has layers 0 to 2"):
            apply(edit, llama)
    with pytest.raises(ValueError, match="Layer 1 swapped with itself changes nothing"):
        SwapLayers(1, 1)
    with pytest.raises(ValueError, match="No layer is named"):
        apply(ReplaceLayers(llama, []), llama)
    with pytest.raises(
        ValueError,
        match=r"Layer 1 does not fit in the place of layer 0: 3 tensors differ, first attn\.k\.bias: absent here, \(24,\) there",
    ):
        apply(ReplaceLayers(weights("qwen2"), {0: 1}), llama)
    with pytest.raises(ValueError, match=r"it has 4 heads \(4 kv\) of 8, here are 4 \(2 kv\) of 12"):
        apply(ReplaceLayers(weights("gpt2"), [0]), llama)


def test_an_edit_needs_its_sites_and_a_swap_none(weights):
    point = weights("llama")
    with pytest.raises(TypeError, match=r"Scale\(.*\) edits one tensor at a time: say at which sites"):
        apply(Scale(0.5), point)
    with pytest.raises(TypeError, match=r"SwapLayers\(.*\) edits the whole model: leave out the sites"):
        apply(SwapLayers(0, 1), point, "0.attn.o")
    assert apply(lambda whole: whole, point) is point


# --- on disk and in a live model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_what_is_written_is_what_is_installed(folders, family, tmp_path):
    """fp32: file and live model give the same logits, and tensors that no edit touches keep their bytes."""
    base = Checkpoint(folders(family))

    def edited(point):
        down = mlp(point, 0, "down")
        point = apply(RemoveDirection(U), point, ["0.attn.o.h1", mlp(point, 2, "down")])
        point = apply(AddDirection(U, 0.1, reads=torch.ones(point.shape(down)[1])), point, down)
        point = apply(TruncateRank(4), apply(Scale(0.5), point, "0.attn.k.h1"), mlp(point, 2, "up"))
        return apply(SwapLayers(0, 2), point)

    written = write(edited(base), tmp_path / "out")
    touched = {base.anatomy.places[s].name for s in edited(base).changed_from(base)}
    assert len(touched) < len(base.tensors)
    for name, digest in base.hashes().items():
        assert (written.hashes[name] == digest) == (name not in touched), name
    if "vision" in family:
        return  # its files are proved by `write` itself
    model = Model.load(folders(family), device="cpu")
    ids = torch.randint(4, base.anatomy.vocab, (2, 9), generator=torch.Generator().manual_seed(3))

    def logits(module):
        with torch.no_grad():
            return module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    before = logits(model.module)
    expected = logits(Model.load(tmp_path / "out", device="cpu").module)
    for point in (edited(model.weights), edited(base)):
        with model.installed(point):
            assert torch.equal(logits(model.module), expected)
    assert not torch.equal(before, expected)
    assert torch.equal(logits(model.module), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_strength_0_and_a_double_swap_keep_every_byte_on_disk(tmp_path, dtype):
    base = Checkpoint(save_tiny("llama", tmp_path / "base", dtype=dtype))
    point = apply(RemoveDirection(U, 0.0), base, "*.attn.o")
    point = apply(SwapLayers(0, 1), apply(SwapLayers(0, 1), point))
    assert write(point, tmp_path / "out").hash == base.hash()


def test_a_whole_matrix_edit_is_computed_once(tmp_path, monkeypatch):
    """The writer walks a tensor in pieces; an edit that needs all of it must not run again for each."""
    monkeypatch.setattr(writing, "_CHUNK", 64)
    base = Checkpoint(save_tiny("llama", tmp_path / "base"))
    calls = []
    edited = apply(lambda site, W: calls.append(site) or W * 2, base, "*.mlp.down")
    write(apply(SwapLayers(0, 1), edited), tmp_path / "out")
    assert len(calls) == 3


# --- what they are given ----------------------------------------------------------------------------------------------


def test_strength():
    W, site = torch.randn(32, 7), Site(0, "attn.o")
    u = U / U.norm()
    assert torch.equal(RemoveDirection(U, 0.0)(site, W), W)
    reflected = RemoveDirection(U, 2.0)
    torch.testing.assert_close(reflected(site, reflected(site, W)), W)
    torch.testing.assert_close(u @ RemoveDirection(100 * U, 0.25)(site, W), 0.75 * (u @ W))
    torch.testing.assert_close(RemoveDirection(U)(site, W), (torch.eye(32) - torch.outer(u, u)) @ W)
    torch.testing.assert_close(Scale(3.0, 0.5)(site, W), 2 * W)
    assert torch.equal(Scale(0.1)(site, W), W * 0.1)


def test_edits_leave_what_they_are_given():
    W, u, v, site = torch.randn(32, 12), U.clone(), V.clone(), Site(0, "attn.o")
    before = W.clone()
    for edit in (
        Scale(2.0),
        RemoveDirection(u),
        AddDirection(u),
        AddDirection(u, reads=v),
        TruncateRank(2),
        TruncateRank(2, 0.5),
    ):
        edit(site, W)
    assert torch.equal(W, before)
    assert torch.equal(u, U)
    assert torch.equal(v, V)


def test_what_is_no_direction():
    for bad in (torch.zeros(3), torch.tensor([float("nan")]), torch.tensor([float("inf")])):
        for made in (RemoveDirection, AddDirection, lambda bad: AddDirection(U, reads=bad)):
            with pytest.raises(
                ValueError, match=r"A direction is one finite, non-zero vector; this has shape \(\d,\) and norm"
            ):
                made(bad)
    weights = Model(*tiny("llama")).weights
    for at, shape in (("0.mlp.up", r"\(40, 32\)"), ("norm", r"\(32,\)")):
        for edit in (RemoveDirection(U), AddDirection(U)):
            with pytest.raises(ValueError, match=rf"{at} is {shape} and cannot write a direction of length 32"):
                apply(edit, weights, at)  # at once: a mistake in the last of many sites must not wait for the others
    with pytest.raises(ValueError, match=r"0\.mlp\.down is \(32, 40\) and cannot read a direction of length 12"):
        apply(AddDirection(U, reads=V), weights, "0.mlp.down")
    with pytest.raises(ValueError, match=r"0\.mlp\.down\.bias is a bias and reads nothing"):
        apply(AddDirection(U, reads=V), Model(*tiny("gpt2")).weights, "0.mlp.down.bias")


def test_what_is_no_rank():
    for rank in (0, -3):
        with pytest.raises(ValueError, match="A rank is 1 or more"):
            TruncateRank(rank)
    llama = Model(*tiny("llama")).weights
    assert torch.equal(apply(TruncateRank(2), llama, "*.mlp.*")["0.mlp.norm"], llama["0.mlp.norm"])  # of rank one
    assert math.isfinite(float(TruncateRank(10**9)(Site(0, "attn.o"), torch.ones(3, 2)).sum()))


# --- directions of the stream -----------------------------------------------------------------------------------------


def by_layer(point, seed=7):
    g = torch.Generator().manual_seed(seed)
    return {
        Site(layer, "mid"): torch.randn(point.anatomy.d_model, generator=g) for layer in range(point.anatomy.n_layers)
    }


@pytest.mark.parametrize("part", ["attn.out", "mlp.out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_receives_no_more_of_its_layers_direction(family, part):
    """Whatever norm stands between matrix and stream, and with strength w the matrix's share along it is 1 - w of what it was."""
    model = Model(*tiny(family))
    point, directions = model.weights, by_layer(model.weights)
    matrix = {"attn.out": "*.attn.o", "mlp.out": "*.mlp.down"}[part]
    at = [str(s) for s in point if s.whole.part in (matrix[2:], f"{matrix[2:]}.bias")]
    weight, bias = (
        Site(0, matrix[2:]),
        Site(0, f"{matrix[2:]}.bias"),
    )  # a bias too passes the norm, where a config asks for one
    assert point.anatomy.norm_after(weight) == point.anatomy.norm_after(bias)
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    seen = {}

    def written(weights):
        taps = [(s, model.anatomy.tap(s)) for s in model.anatomy.activation_sites() if s.part == part]
        hooks = [tap.attach(model.module, lambda x, s=s: seen.update({s: x.detach().clone()})) for s, tap in taps]
        try:
            with torch.no_grad(), model.installed(weights):
                model.module(input_ids=ids)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            s.layer: seen[s] @ (directions[Site(s.layer, "mid")] / directions[Site(s.layer, "mid")].norm())
            for s, _ in taps
        }

    before, after = written(point), written(apply(RemoveDirection(directions), point, at))
    for layer in before:
        assert after[layer].abs().max() < 2e-5 * max(1.0, float(before[layer].abs().max()))
        assert before[layer].abs().max() > 1e-2
    for strength in (0.25, 2.0):
        edited = apply(RemoveDirection(directions, strength), point, at)
        for site in edited.changed_from(point):
            gain = 1.0 if (g := gain_after(point, site)) is None else g
            u = gain * directions[Site(site.layer, "mid")]
            torch.testing.assert_close(u @ edited[site], (1 - strength) * (u @ point[site]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_gains_are_those_of_the_norms(family):
    module, tokenizer = tiny(family)
    point = Model(module, tokenizer).weights
    x = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2))
    for site, norm in (
        (Site(1, "attn.o"), "post_attention_layernorm"),
        (Site(1, "mlp.down"), "post_feedforward_layernorm"),
    ):
        gain = gain_after(point, site)
        with torch.no_grad():
            said = getattr(module.model.layers[1], norm)(x)
        torch.testing.assert_close(said, gain * x / x.square().mean().sqrt(), rtol=1e-4, atol=1e-4)
    assert gain_after(point, Site(1, "attn.q")) is None
    assert gain_after(Model(*tiny("llama")).weights, Site(1, "attn.o")) is None


NORMS = ["norm", "1.attn.norm", "1.attn.q_norm", "1.attn.k_norm", "1.attn.out_norm", "1.mlp.norm", "1.mlp.out_norm"]


@pytest.mark.parametrize("factor", [0.0, 0.25, 3.0])
@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "gemma3", "gemma3 (vision)"])
def test_a_scaled_norm_gives_so_much_less(family, factor):
    """Also where files hold a gain less one: the stored number is not what the norm multiplies by."""
    name, vision, _ = family.partition(" (vision)")
    model = Model(tiny_vlm(name) if vision else tiny(name)[0], characters())
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(1))

    def logits():
        with torch.no_grad():
            return model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    before = logits()
    for norm in (norm for norm in NORMS if norm in model.weights):
        inner = model.module.get_submodule(model.anatomy.places[Site.parse(norm)].name.removesuffix(".weight"))
        hook = inner.register_forward_hook(lambda _, args, out: factor * out)
        try:
            expected = logits()
        finally:
            hook.remove()
        assert not torch.equal(expected, before)
        for edit in (Scale(factor), Scale(2 * factor - 1, strength=0.5)):
            with model.installed(apply(edit, model.weights, norm)):
                torch.testing.assert_close(logits(), expected, rtol=2e-4, atol=2e-4)


def test_each_layer_takes_its_own_direction_and_heads_share_it(weights):
    point, directions = weights("llama"), by_layer(weights("llama"))
    at = ["0.attn.o.h1", "2.attn.o.h0", "2.attn.o.h3"]
    whole = apply(RemoveDirection(directions), point, at)
    for site in at:
        alone = apply(RemoveDirection(directions[Site(Site.parse(site).layer, "mid")]), point, site)
        assert torch.equal(whole[site], alone[site])
    assert torch.equal(whole["1.attn.o"], point["1.attn.o"])
    numbered = {site.layer: vector for site, vector in directions.items()}
    assert same_bits(apply(RemoveDirection(numbered), point, at), whole)
    exact = {Site(0, "resid"): U, Site(0, "attn.o"): directions[Site(0, "mid")], 2: directions[Site(2, "mid")]}
    assert same_bits(apply(RemoveDirection(exact), point, at), whole)


def test_a_direction_that_a_layer_lacks_or_has_twice_is_an_error(weights):
    point, directions = weights("llama"), by_layer(weights("llama"))
    del directions[Site(1, "mid")]
    with pytest.raises(
        ValueError, match=r"1.attn.o needs the direction of its layer, and there is none: these are at 0.mid, 2.mid"
    ):
        apply(RemoveDirection(directions), point, "*.attn.o")
    directions[Site(2, "resid")] = U
    with pytest.raises(ValueError, match=r"2.attn.o.h1 needs the direction of its layer, and there are 2"):
        apply(RemoveDirection(directions), point, "2.attn.o.h1")
    with pytest.raises(ValueError, match="the mapping is empty"):
        RemoveDirection({})
    with pytest.raises(ValueError, match="non-zero"):
        RemoveDirection({0: torch.zeros(32)})
    with pytest.raises(ValueError, match=r"0.attn.o is \(32, 48\) and cannot write a direction of length 12"):
        apply(RemoveDirection({0: V}), point, "0.attn.o")


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1", None, [1.0]])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: Scale(x),
        lambda x: Scale(0.5, x),
        lambda x: RemoveDirection(U, x),
        lambda x: AddDirection(U, x),
        lambda x: TruncateRank(2, x),
        lambda x: SwapLayers(0, 1, x),
        lambda x: ReplaceLayers(None, [0], x),
    ],
)
def test_what_is_no_finite_number_is_no_strength(make, bad, unchecked):
    """They went on to weights of NaN, which `installed` computed with, or to torch's words for another type."""
    with pytest.raises(ValueError, match=r"(strength|factor)=.*a finite number"):
        make(bad)


@pytest.mark.parametrize("bad", [2.5, math.nan, math.inf, True, "2"])
def test_what_is_no_whole_number_is_no_rank(bad, unchecked):
    with pytest.raises(ValueError, match=r"rank=.*: give a whole number"):
        TruncateRank(bad)


@pytest.mark.parametrize("bad", [[1.0, 2.0], np.ones(32), None, "brief"])
def test_what_is_no_tensor_is_no_direction(bad, unchecked):
    for make in (RemoveDirection, AddDirection, lambda x: RemoveDirection({0: x}), lambda x: AddDirection(U, reads=x)):
        if bad is not None or make in (RemoveDirection, AddDirection):
            with pytest.raises(ValueError, match=r"A direction is one tensor, not a (list|ndarray|NoneType|str)"):
                make(bad)


@pytest.mark.parametrize("layers", [3, "34", [1.5], {0: "1"}, [True]])
def test_layers_are_whole_numbers(layers, unchecked):
    with pytest.raises(ValueError, match=r"layers=3: name them in a list|layer=.*: give a whole number"):
        ReplaceLayers(None, layers)
    if layers != 3:
        with pytest.raises(ValueError, match=r"layer=.*: give a whole number"):
            SwapLayers(0, next(iter(layers.values() if isinstance(layers, dict) else layers)))
