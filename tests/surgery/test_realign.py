"""SafeLoRA and SafeMERGE against their literal, dense forms; planted modules whose fate is known; what cannot be judged."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.checkpoint import Checkpoint
from surgery.delta import StoredDelta, save_delta
from surgery.lowrank import Adapter, Factored, save_adapter
from surgery.model import Model
from surgery.realign import column_space, pair_norm, rescaled, safelora, safemerge, similarities, similarity
from surgery.sites import Site, match
from surgery.weights import Delta, apply, linear_sites
from surgery.writing import write
from tests.families import FAMILIES, save_tiny
from tests.oracles import realign as oracle


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank_alignment(base, rank=3, seed=7):
    """An aligned point: low rank was added to every matrix of the layers, full rank to some."""
    seeds = iter(range(seed, 10_000))

    def aligned(site, W):
        here = next(seeds) * 31 + (site.layer or 0)
        if site.part == "mlp.down":
            return W + 0.1 * noise(*W.shape, seed=here)
        return W + 0.1 * noise(W.shape[0], rank, seed=here) @ noise(rank, W.shape[1], seed=here + 1)

    made = {site: aligned(site, base[site].float()) for site in linear_sites(base)}
    return apply(lambda site, W: made[site], base, list(made))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """family -> base, aligned and tuned points, and an adapter of every linear module with rank 3."""
    made = {}

    def case(family):
        if family not in made:
            base = Checkpoint(save_tiny(family, tmp_path_factory.mktemp(family) / "base"))
            tuned = Checkpoint(save_tiny(family, tmp_path_factory.mktemp(family) / "tuned", seed=1))
            pairs = {
                site: (0.1 * noise(base.shape(site)[0], 3, seed=i), noise(3, base.shape(site)[1], seed=1000 + i))
                for i, site in enumerate(linear_sites(base))
            }
            made[family] = base, low_rank_alignment(base), tuned, Factored(pairs)
        return made[family]

    return case


def dense(delta, site):
    return delta[site].double()


# --- one module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (40, 32), (32, 40), (8, 100)])
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_rho_and_norms_are_the_dense_ones(shape, rank):
    V, left, right = noise(*shape), noise(shape[0], rank, seed=1), noise(rank, shape[1], seed=2)
    dW = left.double() @ right.double()
    moved = oracle.alignment_map(V) @ dW
    for found in (similarity(V, left, right), similarity(V, dW.float())):
        assert found.rho == pytest.approx(oracle.rho(V, dW), abs=1e-5)
        assert found.norm == pytest.approx(float(dW.norm()), rel=1e-5)
        assert found.rescaled == pytest.approx(float(moved.norm()), rel=1e-5)
    torch.testing.assert_close((rescaled(V, left) @ right).double(), moved, rtol=1e-3, atol=1e-3)
    assert pair_norm(left, right) == pytest.approx(float(dW.norm()), rel=1e-5)


def test_rho_is_a_cosine_of_a_positive_map():
    for seed in range(20):
        V, left, right = noise(12, 9, seed=seed), noise(12, 2, seed=seed + 100), noise(2, 9, seed=seed + 200)
        found = similarity(V, left, right)
        assert 0 <= found.rho <= 1
        for factor in (1e-4, 1e4):  # neither size matters
            assert similarity(factor * V, left, right).rho == pytest.approx(found.rho, abs=1e-6)
            assert similarity(V, factor * left, right).rho == pytest.approx(found.rho, abs=1e-6)
        assert similarity(V, -left, right).rho == pytest.approx(found.rho, abs=1e-6)
    Q = torch.linalg.qr(noise(12, 12)).Q
    assert similarity(Q, noise(12, 2), noise(2, 12)).rho == pytest.approx(1, abs=1e-6)


def test_factors_that_cancel_are_zero():
    """A sum of large factors whose product is small keeps its digits."""
    left, right, small = noise(20, 3), noise(3, 15, seed=1), noise(20, 15, seed=2) * 1e-3
    Q, R = torch.linalg.qr(small)
    lefts, rights = torch.cat([left, -left, Q], 1), torch.cat([right, right, R])
    assert similarity(noise(20, 15), lefts, rights).norm == pytest.approx(float(small.double().norm()), rel=1e-2)


def test_columns_in_groups_are_all_columns(monkeypatch):
    from surgery import realign

    V, dW = noise(30, 20), noise(30, 20, seed=1)
    whole, moved = similarity(V, dW), rescaled(V, dW)
    monkeypatch.setattr(realign, "_WIDE", 60)
    monkeypatch.setattr(realign, "_STRIP", 40)  # of a norm
    found = similarity(V, dW)
    assert (found.rho, found.norm, found.rescaled) == pytest.approx((whole.rho, whole.norm, whole.rescaled), rel=1e-6)
    torch.testing.assert_close(rescaled(V, dW), moved)


def test_strips_of_a_matrix_are_all_of_it(cases, monkeypatch):
    from surgery import realign

    base, aligned, tuned, adapter = cases("llama")
    for change in (adapter, tuned - base):
        whole = safelora(change, aligned - base, tau=0.6)
        with monkeypatch.context() as patched:
            patched.setattr(realign, "_STRIP", 100)
            strips = safelora(change, aligned - base, tau=0.6)
            assert [m.rho for m in strips.modules] == pytest.approx([m.rho for m in whole.modules], abs=1e-6)
            for site in change:
                torch.testing.assert_close(strips.delta[site], whole.delta[site])


def test_what_has_no_angle():
    V, zero = noise(6, 5), torch.zeros(6, 5)
    nothing = similarity(V, zero)
    assert math.isnan(nothing.rho)
    assert (nothing.norm, nothing.rescaled) == (0, 0)
    unaligned = similarity(zero, V)
    assert math.isnan(unaligned.rho)
    assert math.isnan(unaligned.rescaled)
    outside = torch.cat([torch.zeros(3, 5), V[:3]])
    assert similarity(torch.cat([V[:3], torch.zeros(3, 5)]), outside).rho == 0
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="The alignment holds values that are NaN or infinite"):
            similarity(torch.full((6, 5), bad), V)
        with pytest.raises(ValueError, match="The change holds values that are NaN or infinite"):
            similarity(V, torch.full((6, 5), bad))


def test_the_column_space_and_its_cut():
    V = noise(20, 4) @ noise(4, 9, seed=1)
    U = column_space(V)
    assert U.shape == (20, 4)
    torch.testing.assert_close(U.T @ U, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close((U @ U.T).double(), oracle.projector(V), rtol=0, atol=1e-4)
    graded = torch.linalg.qr(noise(20, 4)).Q * torch.tensor([1.0, 0.5, 0.1, 0.01])
    for cut, kept in ((0.0, 4), (0.009, 4), (0.05, 3), (0.2, 2), (0.9, 1)):
        assert column_space(graded, cut).shape[1] == kept
    assert [column_space(torch.tensor([1.0, 0.5, 0.0]).diag(), cut).shape[1] for cut in (0.0, 0.5)] == [2, 1]
    for cut in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"cut=.*a fraction of the largest singular value"):
            column_space(V, cut)


# --- SafeLoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_safelora_is_the_literal_one_for_adapters_and_for_full_tunes(cases, family):
    base, aligned, tuned, adapter = cases(family)
    for change in (adapter, tuned - base):
        alignment = aligned - base
        found = safelora(change, alignment, tau=0.6)
        modules = {m.site: m for m in found.modules}
        assert modules.keys() == {s for s in change if s.layer is not None and len(change.shape(s)) == 2}
        assert set(found.delta) == set(change)
        realigned = [m for m in found.modules if m.realigned]
        assert realigned
        for site in change:
            expected = dense(change, site)
            V, m = alignment[site], modules.get(site)
            if m is not None and V.any():
                rho = oracle.rho(V, expected)
                assert m.rho == pytest.approx(rho, abs=1e-5)
                assert m.before == pytest.approx(float(expected.norm()), rel=1e-5)
                assert m.realigned == (m.rho <= 0.6)
                expected = oracle.alignment_map(V) @ expected if m.realigned else expected
                assert m.after == pytest.approx(float(expected.norm()), rel=1e-4)
            torch.testing.assert_close(dense(found.delta, site), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.delta.rows(site, slice(2, 5)), found.delta[site][2:5])


def test_factors_stay_factors(cases, tmp_path):
    base, aligned, _, adapter = cases("llama")
    found = safelora(adapter, aligned - base, tau=0.6)
    assert found.delta.factored() == list(adapter)
    for site in adapter:
        left, right = found.delta.factors(site)
        assert left.shape[1] == adapter.rank(site) == 3
        assert torch.equal(right, adapter.factors(site)[1])
        torch.testing.assert_close(left @ right, found.delta[site])
    again = Adapter(save_adapter(found.delta, tmp_path / "adapter", base), base)
    for site in adapter:
        torch.testing.assert_close(again[site], found.delta[site])


def test_nothing_is_read_or_kept_before_it_is_asked(cases):
    base, aligned, _, adapter = cases("llama")
    found = safelora(adapter, aligned - base, tau=0.6)
    held = [value for value in vars(found.delta).values() if isinstance(value, torch.Tensor)]
    assert not held
    left = found.delta.factors("0.attn.q")[0].clone()
    found.delta.factors("0.attn.q")[0].zero_()
    assert torch.equal(found.delta.factors("0.attn.q")[0], left)


@pytest.mark.parametrize("count", [1, 10, 21])
def test_count_takes_the_least_alike(cases, count):
    base, aligned, _, adapter = cases("llama")
    found = safelora(adapter, aligned - base, count=count)
    by_rho = sorted(found.modules, key=lambda m: m.rho)
    assert [m.realigned for m in by_rho] == [True] * count + [False] * (21 - count)
    assert found.tau is None
    for wrong in (0, 22):
        with pytest.raises(ValueError, match=rf"count={wrong}: 21 modules can be judged, so ask for 1 to 21"):
            safelora(adapter, aligned - base, count=wrong)
    with pytest.raises(ValueError, match=r"tau=0\.5 and count=3: choose modules by a threshold or by number"):
        safelora(adapter, aligned - base, tau=0.5, count=3)


@pytest.mark.parametrize("choice", [{"tau": 0.6}, {"count": 10}], ids=str)
def test_on_llama_names_and_enumeration_agree(cases, choice, tmp_path):
    """PEFT's folder and the models' files, paired by order as the released code does, against ours, paired by name."""
    base, aligned, _, adapter = cases("llama")
    folder = save_adapter(adapter, tmp_path / "adapter", base)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": 12, "r": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    change = Adapter(folder, base)
    assert change.scaling("0.attn.q") == 4.0
    folders = base.folder, write(aligned, tmp_path / "aligned").folder
    before, after = (Model.load(f).module.requires_grad_(False).named_parameters() for f in folders)
    before, after = dict(before), dict(after)
    stored = load_file(folder / "adapter_model.safetensors")
    ordered = {}
    for name in before:  # as the modules of a model enumerate their adapters
        for kind in ("lora_A", "lora_B"):
            key = f"base_model.model.{name.removesuffix('.weight')}.{kind}.weight"
            if key in stored:
                ordered[key] = stored[key]
    assert ordered.keys() == stored.keys()
    expected = oracle.by_enumeration(before, after, ordered, ["_proj.weight"], **choice)
    found = safelora(change, aligned - base, **choice).delta
    moved = 0
    for site in found:
        name = f"base_model.model.{base.anatomy.places[site].name.removesuffix('.weight')}"
        product = 4 * expected[f"{name}.lora_B.weight"] @ expected[f"{name}.lora_A.weight"]
        torch.testing.assert_close(found[site], product, rtol=1e-3, atol=1e-4)
        moved += not torch.equal(expected[f"{name}.lora_B.weight"], ordered[f"{name}.lora_B.weight"])
    assert 0 < moved < 21


def test_exact_keeps_what_lies_inside_and_removes_what_lies_outside(cases):
    base, aligned, _, _ = cases("llama")
    site, V = Site(1, "attn.q"), (aligned - base)["1.attn.q"]
    U = column_space(V)
    assert U.shape == (48, 3)
    inside, right = U @ noise(3, 2), noise(2, 32, seed=1)
    outside = noise(48, 2, seed=2)
    outside = outside - U @ (U.T @ outside)
    for left, kept in ((inside, inside), (outside, torch.zeros(48, 2)), (inside + outside, inside)):
        for change in (Factored({site: (left, right)}), Planted({site: left @ right})):
            found = safelora(change, aligned - base, tau=1.0, projection="exact")
            torch.testing.assert_close(found.delta[site], kept @ right, rtol=1e-4, atol=1e-4)
            assert found.modules[0].after == pytest.approx(float((kept @ right).norm()), rel=1e-4, abs=1e-3)
            assert found.modules[0].kept == 3
    assert safelora(Factored({site: (outside, right)}), aligned - base, tau=0.01).modules[0].realigned
    down = Site(0, "mlp.down")  # V has full rank there: everything lies inside
    change = Factored({down: (noise(32, 2), noise(2, 40, seed=1))})
    whole = safelora(change, aligned - base, tau=1.0, projection="exact")
    assert torch.equal(whole.delta[down], change[down])
    cut = safelora(change, aligned - base, tau=1.0, projection="exact", cut=0.5)
    P = column_space((aligned - base)[down], 0.5)
    assert 0 < P.shape[1] == cut.modules[0].kept < 32
    torch.testing.assert_close(cut.delta[down], P @ (P.T @ change[down]), rtol=1e-4, atol=1e-5)


def test_shrink_has_the_papers_size_and_the_changes_direction(cases):
    base, aligned, tuned, adapter = cases("llama")
    for change in (adapter, tuned - base):
        paper = safelora(change, aligned - base, tau=0.6)
        shrunk = safelora(change, aligned - base, tau=0.6, projection="shrink")
        assert [m.realigned for m in paper.modules] == [m.realigned for m in shrunk.modules]
        for m in shrunk.modules:
            assert float(shrunk.delta[m.site].norm()) == pytest.approx(float(paper.delta[m.site].norm()), rel=1e-4)
            assert m.after == pytest.approx(float(shrunk.delta[m.site].norm()), rel=1e-4)
        assert all(c == pytest.approx(1, abs=1e-5) for c in shrunk.delta.cosines(change).values() if not math.isnan(c))
        assert any(c < 0.9 for c in paper.delta.cosines(change).values())


class Planted(Delta):
    """A dense change that is given."""

    def __init__(self, tensors):
        self._tensors = tensors

    def shapes(self):
        return {site: tensor.shape for site, tensor in self._tensors.items()}

    def _read(self, site, rows):
        return self._tensors[site][rows]


def test_where_alignment_or_the_change_is_zero_nothing_is_done(cases, tmp_path):
    base, aligned, _, adapter = cases("llama")
    some = (aligned - base).keep("0.*.*")  # alignment moved layer 0 alone, and says nothing of the others
    stored = StoredDelta(save_delta(some, tmp_path / "some", base_hash="x"))
    quiet = Factored(
        {
            s: ((0 * left if s.part == "attn.q" else left), right)
            for s in adapter
            for left, right in [adapter.factors(s)]
        }
    )
    for alignment in (some, stored, aligned - apply(lambda s, W: aligned[s].float(), base, ["1.**", "2.**"])):
        for found in (safelora(quiet, alignment, tau=1.0), safemerge(quiet, adapter, alignment, tau=1.1, weight=0.5)):
            for m in found.modules:
                blind = m.site.layer != 0 or m.site.part == "attn.q"
                assert math.isnan(m.rho) == blind
                assert m.realigned == (not blind)
                assert torch.equal(found.delta[m.site], quiet[m.site]) == blind
                assert m.before == pytest.approx(float(quiet[m.site].norm()), rel=1e-5)
            assert "15 without an angle" in str(found)
            assert found.summary()["blind"] == 15
        with pytest.raises(ValueError, match=r"count=7: 6 modules can be judged"):
            safelora(quiet, alignment, count=7)


def test_at_narrows_what_is_judged(cases):
    base, aligned, _, adapter = cases("llama")
    found = safelora(adapter, aligned - base, tau=1.0, at=["*.attn.q", "2.mlp.*"])
    assert {m.site for m in found.modules} == set(match(["*.attn.q", "2.mlp.*"], adapter))
    for site in adapter:
        assert torch.equal(found.delta[site], adapter[site]) == (site not in {m.site for m in found.modules})


# --- SafeMERGE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])
def test_the_exact_merge_is_the_dense_sum(cases, weight):
    base, aligned, tuned, adapter = cases("llama")
    other = Factored(
        {
            s: (noise(base.shape(s)[0], 2, seed=i), noise(2, base.shape(s)[1], seed=50 + i))
            for i, s in enumerate(adapter)
        }
    )
    for change, safe in ((adapter, other), (tuned - base, other), (adapter, tuned - base)):
        found = safemerge(change, safe, aligned - base, tau=0.6, weight=weight)
        assert {m.realigned for m in found.modules} == {True, False}
        for m in found.modules:
            assert m.realigned == (m.rho < 0.6)
            wanted = change[m.site]
            if m.realigned:
                wanted = weight * wanted + (1 - weight) * safe[m.site]
            torch.testing.assert_close(found.delta[m.site], wanted, rtol=1e-4, atol=1e-5)
            assert m.after == pytest.approx(float(wanted.norm()), rel=1e-4)
            factored = isinstance(change, Factored) and (isinstance(safe, Factored) or not m.realigned)
            assert (m.site in found.delta.factored()) == factored
            if factored and m.realigned:
                assert found.delta.rank(m.site) == 5
            if not factored:
                with pytest.raises(ValueError, match="not a product of factors"):
                    found.delta.factors(m.site)
        assert set(found.delta) == set(change)


def test_pefts_form_is_pefts(cases, tmp_path):
    """PEFT itself combines two adapters of different alphas, "linear"; ours has its cross terms, the exact form has not."""
    from peft import PeftModel

    base, aligned, _, adapter = cases("llama")
    other = Factored(
        {
            s: (noise(*left.shape, seed=i), right.flip(1))
            for i, s in enumerate(adapter)
            for left, right in [adapter.factors(s)]
        }
    )
    folders = [save_adapter(a, tmp_path / name, base) for name, a in (("tuned", adapter), ("safe", other))]
    for folder, alpha in zip(folders, (6, 1.5), strict=True):
        config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": alpha}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    change, safe = (Adapter(folder, base) for folder in folders)
    found = safemerge(change, safe, aligned - base, tau=1.1, weight=0.8, form="peft")

    peft = PeftModel.from_pretrained(Model.load(base.folder).module, str(folders[0]), adapter_name="tuned")
    peft.load_adapter(str(folders[1]), adapter_name="safe")
    peft.add_weighted_adapter(["tuned", "safe"], [0.8, 0.2], "both", combination_type="linear")
    modules = dict(peft.base_model.model.named_modules())
    for site in found.delta:
        module = modules[base.anatomy.places[site].name.removesuffix(".weight")]
        torch.testing.assert_close(found.delta[site], module.get_delta_weight("both").detach(), rtol=1e-4, atol=1e-4)
        pairs = [
            (w, a.scaling(site), left / a.scaling(site), right)
            for w, a in ((0.8, change), (0.2, safe))
            for left, right in [a.factors(site)]
        ]
        torch.testing.assert_close(found.delta[site], oracle.added_factors(pairs), rtol=1e-4, atol=1e-4)
        exact = 0.8 * change[site] + 0.2 * safe[site]
        assert float((found.delta[site] - exact).norm() / exact.norm()) > 0.1
        assert found.delta.rank(site) == 3


def test_merges_that_cannot_be(cases):
    base, aligned, tuned, adapter = cases("llama")
    alignment = aligned - base
    wide = Factored({s: (noise(base.shape(s)[0], 5), noise(5, base.shape(s)[1])) for s in adapter})
    for safe, form, said in (
        (tuned - base, "peft", r"at 0\.attn\.k the changes are not both factored: use the exact form"),
        (wide, "peft", r"at 0\.attn\.k there are 3 and 5: use the exact form"),
        (adapter.keep("0.*.*"), "exact", r"at 1\.attn\.k, 1\.attn\.o, 1\.attn\.q \(14 of 21 modules to be merged\)"),
    ):
        with pytest.raises(ValueError, match=said):
            safemerge(adapter, safe, alignment, tau=1.1, form=form)
    for weight in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"weight={re.escape(str(weight))}"):
            safemerge(adapter, adapter, alignment, weight=weight)


# --- what goes in, what comes out -------------------------------------------------------------------------------------


def test_vectors_that_do_not_belong_together(cases):
    base, aligned, _, adapter = cases("llama")
    gpt2, gpt2_aligned, gpt2_tuned, _ = cases("gpt2")
    with pytest.raises(ValueError, match=r"0\.attn\.k is \(24, 32\) in the change and \(32, 32\) in the alignment"):
        safelora(adapter, gpt2_aligned - gpt2)
    with pytest.raises(ValueError, match="moves none of the change's 7 modules"):
        safelora(adapter.keep("0.*.*"), (aligned - base).keep("1.*.*"))
    with pytest.raises(ValueError, match="The change moves no linear module"):
        safelora((gpt2_tuned - gpt2).keep("norm"), gpt2_aligned - gpt2)
    with pytest.raises(ValueError, match=r"'\*\.attn\.z' matches no site"):
        safelora(adapter, aligned - base, at="*.attn.z")
    with pytest.raises(ValueError, match="cut belongs to the exact projection"):
        safelora(adapter, aligned - base, cut=0.1)
    with pytest.raises(ValueError, match=r"cut=2\.0: a fraction"):
        safelora(adapter, aligned - base, projection="exact", cut=2.0)
    bad = Planted({Site(0, "attn.q"): torch.full((48, 32), float("nan"))})
    with pytest.raises(ValueError, match=r"0\.attn\.q: The change holds values that are NaN"):
        similarities(bad, aligned - base)


def test_defaults_are_the_papers(cases):
    base, aligned, _, adapter = cases("llama")
    one = safelora(adapter, aligned - base)
    assert one.tau == 0.5
    assert [m.realigned for m in one.modules] == [m.rho <= 0.5 for m in one.modules]
    other = safemerge(adapter, adapter, aligned - base)
    assert other.tau == 0.35
    assert [m.realigned for m in other.modules] == [m.rho < 0.35 for m in other.modules]
    middle = sorted(m.rho for m in one.modules)[10]  # a threshold that a module is at: realigned, but not merged
    assert sum(m.realigned for m in safelora(adapter, aligned - base, tau=middle).modules) == 11
    assert sum(m.realigned for m in safemerge(adapter, adapter, aligned - base, tau=middle).modules) == 10


def test_the_table(cases):
    base, aligned, _, adapter = cases("llama")
    found = safelora(adapter, aligned - base, tau=0.6)
    table = found.frame()
    assert list(table.columns) == [
        "index",
        "site",
        "layer",
        "part",
        "rho",
        "norm_before",
        "norm_after",
        "realigned",
        "kept",
        "tau",
    ]
    assert list(table["site"]) == [str(m.site) for m in found.modules] == [str(s) for s in adapter]
    assert (table["tau"] == 0.6).all()
    assert list(table["index"]) == list(range(21))
    count = int(table["realigned"].sum())
    assert str(found).startswith(f"{count} of 21 modules realigned, norm of the change in all 21 ")
    assert safelora(adapter, aligned - base, count=2).frame()["tau"].isna().all()


def test_a_realigned_model_is_base_plus_the_vector(cases, tmp_path):
    base, aligned, tuned, adapter = cases("qwen2")
    for i, change in enumerate((adapter, tuned - base)):
        found = safelora(change, aligned - base, tau=0.6)
        written = Checkpoint(write(base + found.delta, tmp_path / f"out{i}").folder)
        for site in change:
            torch.testing.assert_close(written[site], base[site] + found.delta[site], rtol=1e-5, atol=1e-5)
        saved = StoredDelta(save_delta(found.delta, tmp_path / f"delta{i}", base_hash=base.hash()))
        for site in saved:
            torch.testing.assert_close(saved[site], found.delta[site])


def test_unaligned_files_are_read_by_name(cases, tmp_path):
    """The aligned model's tensors in another order and in two files: nothing changes."""
    base, aligned, _, adapter = cases("llama")
    folder = write(aligned, tmp_path / "aligned").folder
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    halves = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, share in halves.items():
        save_file({n: tensors[n] for n in share}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, share in halves.items() for n in share}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    one, other = safelora(adapter, aligned - base), safelora(adapter, Checkpoint(folder) - base)
    for site in adapter:
        torch.testing.assert_close(one.delta[site], other.delta[site], rtol=1e-4, atol=1e-6)


def test_words_and_numbers_that_say_nothing(cases, unchecked):
    """A threshold of NaN realigned nothing, and a word that is no projection or form was taken for another."""
    base, aligned, tuned, _ = cases("llama")
    change, alignment = tuned - base, aligned - base
    for realign in (
        lambda **how: safelora(change, alignment, **how),
        lambda **how: safemerge(change, change, alignment, **how),
    ):
        with pytest.raises(ValueError, match="tau=nan: give a finite number"):
            realign(tau=math.nan)
        with pytest.raises(ValueError, match=r"count=2\.5: give a whole number"):
            realign(count=2.5)
    with pytest.raises(ValueError, match="projection='papr': choose paper, exact or shrink"):
        safelora(change, alignment, projection="papr")
    with pytest.raises(ValueError, match="form='exat': choose exact or peft"):
        safemerge(change, change, alignment, form="exat")
    with pytest.raises(ValueError, match=r"V is \(3, 4\) and the change \(4, 2\)"):
        similarity(torch.ones(3, 4), torch.ones(4, 2))


def test_models_are_no_changes(cases, unchecked):
    """Whole models were compared as if they were changes."""
    base, aligned, tuned, _ = cases("llama")
    for given in ((tuned, aligned - base), (tuned - base, aligned)):
        with pytest.raises(TypeError, match=r"a change is wanted, and this is a model: take the difference"):
            safelora(*given)
    with pytest.raises(TypeError, match="a change is wanted, and this is a model"):
        safemerge(tuned - base, tuned, aligned - base)
