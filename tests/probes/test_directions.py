"""Methods are their papers' equations, arithmetic is that of vectors, and an AUC is of questions the direction has not seen."""

import dataclasses
import json
import re
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from analyses.controls import planted_length
from probes.activations import Activations, collect
from probes.directions import (
    Direction,
    Length,
    by_thresholds,
    contrast_pairs,
    length_direction,
    logistic,
    longest_and_shortest,
    mass_mean,
    mean_difference,
    pca_of_differences,
    span_lengths,
)
from probes.held_out import deal
from surgery.model import Model
from surgery.sites import Site
from surgery.transcript import read_transcript
from tests.families import FAMILIES, tiny
from tests.oracles import directions as oracle

MID, RESID = Site(1, "mid"), Site(2, "resid")


def activations(values: dict[Site, torch.Tensor]) -> Activations:
    n = len(next(iter(values.values())))
    index = torch.arange(n)
    return Activations(values, index, torch.full((n,), -1), torch.zeros(n, dtype=torch.long), ("thinking",))


def planted(n: int = 60, d: int = 24, seed: int = 0, effect: float = 2.0, confound: float = 0.0):
    """Two rows a question, one of each label, apart by `effect` along u; and singles whose question offset goes with the label."""
    draw = torch.Generator().manual_seed(seed)
    u, w = torch.linalg.qr(torch.randn(d, 2, generator=draw)).Q.T
    y = torch.arange(2 * n) % 2
    g = torch.arange(2 * n) // 2
    offsets = torch.randn(n, d, generator=draw) * 2
    X = offsets[g] + effect * y[:, None] * u + 0.5 * torch.randn(2 * n, d, generator=draw)
    # questions that only ever get one label, told apart by w
    alone = torch.arange(n) % 2
    Y = torch.randn(n, d, generator=draw) + confound * (2 * alone[:, None] - 1) * w + effect * alone[:, None] * u
    X, y = torch.cat([X, Y]), torch.cat([y, alone])
    g = torch.cat([g, n + torch.arange(n)])
    return X, y, g, u


def cosine(a, b):
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    return float(a @ b / a.norm() / b.norm())


# --- methods ----------------------------------------------------------------------------------------------------------------


def paired_rows():
    X, y, g, u = planted()
    two = g < 60
    return X[two], y[two], g[two], u


def test_the_mean_difference_and_its_length():
    X, y, g, _ = planted()
    found = mean_difference(activations({MID: X}), y, g)
    gap = oracle.class_means(X.numpy(), y)
    torch.testing.assert_close(found.raw(MID).double(), torch.from_numpy(gap), rtol=1e-5, atol=1e-6)
    assert found.norms[MID] == pytest.approx(np.linalg.norm(gap))
    assert float(found[MID].norm()) == pytest.approx(1, abs=1e-6)
    assert found[MID].dtype == torch.float32


def test_pairs_by_hand():
    X, y, g, _ = paired_rows()
    found = contrast_pairs(activations({MID: X}), y, g)
    expected = oracle.pairs(X.numpy(), y.tolist(), g.tolist()).mean(axis=0)
    torch.testing.assert_close(found.raw(MID).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_the_first_component_of_the_differences():
    X, y, g, u = paired_rows()
    found = pca_of_differences(activations({MID: X}), y, g, seed=4)
    differences = oracle.pairs(X.numpy(), y.tolist(), g.tolist())
    turned = np.random.default_rng(4).permutation(len(differences)) % 2 * 2 - 1
    assert cosine(found[MID], oracle.first_component(differences, turned)) == pytest.approx(1, abs=1e-6)
    assert found.norms[MID] == pytest.approx(float(differences.mean(axis=0) @ found[MID].double().numpy()))
    assert cosine(found[MID], u) > 0.95
    other = pca_of_differences(activations({MID: X}), y, g, seed=5)
    assert not torch.equal(found[MID], other[MID])
    # labels the other way round: the direction turns round
    assert cosine(pca_of_differences(activations({MID: X}), 1 - y, g, seed=4)[MID], -found[MID]) == pytest.approx(
        1, abs=1e-6
    )


def test_logistic_is_scikit_learns_in_the_activations_own_coordinates():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    X, y, g, _ = planted()
    X = X * torch.logspace(-1, 1, X.shape[1])
    X[:, 3] = 0.3  # a coordinate that never moves tells nothing
    found = logistic(activations({MID: X}), y, g, C=0.1)
    pipe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(X.double().numpy(), y.numpy())
    scores = torch.from_numpy(pipe.decision_function(X.double().numpy()))
    projected = X.double() @ found[MID].double()
    assert np.corrcoef(scores, projected)[0, 1] == pytest.approx(1, abs=1e-6)
    assert found[MID][3] == 0
    assert found.norms[MID] > 0
    stronger = logistic(activations({MID: X}), y, g, C=10.0)
    assert cosine(found[MID], stronger[MID]) < 0.9999


def test_mass_mean_plain_and_whitened():
    X, y, g, _ = planted()
    X = X * torch.logspace(-1.5, 1, X.shape[1])  # variances below 1e-3 of the largest are not divided by
    acts = activations({MID: X})
    assert torch.equal(mass_mean(acts, y, g)[MID], mean_difference(acts, y, g)[MID])
    found = mass_mean(acts, y, g, whitened=True)
    assert cosine(found[MID], oracle.mass_mean(X.numpy(), y.tolist())) == pytest.approx(1, abs=1e-6)


METHODS = {
    "mean": mean_difference,
    "pairs": contrast_pairs,
    "pca": pca_of_differences,
    "logistic": logistic,
    "mass": lambda *a, **k: mass_mean(*a, whitened=True, **k),
}


@pytest.mark.parametrize("name", METHODS)
def test_adding_the_vector_carries_one_mean_to_the_other_along_it(name):
    X, y, g, _ = paired_rows()
    found = METHODS[name](activations({MID: X}), y, g)
    u = found[MID].double()
    means = [X[y == side].double().mean(dim=0) @ u for side in (0, 1)]
    assert float(means[1] - means[0]) == pytest.approx(found.norms[MID], rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_planted_direction_is_found_and_held_out(name):
    X, y, g, u = paired_rows()
    found = METHODS[name](activations({MID: X}), y, g)
    if name != "mass":  # which tells classes apart rather than writes them
        assert cosine(found[MID], u) > 0.8
    assert found.auc[MID].low > 0.55
    assert found.auc[MID].n == 60
    # literally: each question's rows on what the other folds' questions give
    fold, scores = torch.from_numpy(deal(g.numpy(), y.numpy(), seed=0)), torch.zeros(len(y), dtype=torch.float64)
    for k in range(5):
        seen = fold != k
        scores[~seen] = X[~seen].double() @ METHODS[name](activations({MID: X[seen]}), y[seen], g[seen])[MID].double()
    strata = (g if name in ("pairs", "pca") else fold).tolist()
    assert found.auc[MID].value == pytest.approx(oracle.auc(scores.tolist(), y.tolist(), strata))


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_found_where_nothing_is(name):
    """Twice as many dimensions as rows: on its own rows any method tells the classes apart, on others none does."""
    draw = torch.Generator().manual_seed(0)
    X, y, g = torch.randn(40, 80, generator=draw), torch.arange(40) % 2, torch.arange(40) // 2
    found = METHODS[name](activations({MID: X}), y, g)
    if name != "pca":  # the largest of the differences' variances is no one's label
        strata = g.tolist() if name == "pairs" else [0] * 40
        assert oracle.auc(X @ found[MID], y.tolist(), strata) > 0.8
    assert found.auc[MID].low < 0.5 < found.auc[MID].high
    assert abs(found.halves[MID]) < 0.5


def test_pairs_do_not_mistake_the_question_for_the_label():
    X, y, g, u = planted(n=200, effect=1.0, confound=3.0)
    acts, two = activations({MID: X}), g < 200
    pooled = mean_difference(acts, y, g)
    paired = contrast_pairs(acts, [int(label) if pair else None for label, pair in zip(y, two, strict=True)], g)
    assert cosine(paired[MID], u) > 0.9
    assert cosine(pooled[MID], u) < 0.75


def test_labels_of_transcripts_and_rows_that_are_left_out():
    X, y, g, _ = planted()
    n = len(X)
    double = Activations(
        {MID: X.repeat_interleave(2, dim=0)},
        torch.arange(n).repeat_interleave(2),
        torch.zeros(2 * n, dtype=torch.long),
        torch.zeros(2 * n, dtype=torch.long),
        ("thinking",),
    )
    a = mean_difference(double, y, g)
    b = mean_difference(double, y.repeat_interleave(2), g.repeat_interleave(2))
    assert torch.equal(a[MID], b[MID])
    torch.testing.assert_close(a.raw(MID), mean_difference(activations({MID: X}), y, g).raw(MID))
    some = [None if i % 3 == 0 else int(label) for i, label in enumerate(y)]
    kept = [i for i in range(n) if i % 3]
    c = mean_difference(activations({MID: X}), some, g)
    torch.testing.assert_close(c.raw(MID), mean_difference(activations({MID: X[kept]}), y[kept], g[kept]).raw(MID))


def test_a_site_without_difference_is_left_out_and_named():
    X, y, g, _ = planted()
    same = X[:1] * (1 + 1e-7 * torch.randn(X.shape, generator=torch.Generator().manual_seed(0)))  # but for rounding
    found = mean_difference(activations({MID: X, RESID: same}), y, g)
    assert found.sites == [MID]
    assert found.about["without_difference"] == ["2.resid"]
    with pytest.raises(ValueError, match="same mean at every site"):
        mean_difference(activations({RESID: same}), y, g)


def test_what_gives_no_direction():
    X, y, g, _ = planted()
    acts = activations({MID: X})
    with pytest.raises(ValueError, match=r"All 180 labelled rows have label 1: .* rows of both are needed"):
        mean_difference(acts, torch.ones(180, dtype=torch.long), g)
    with pytest.raises(ValueError, match="No row has a label"):
        mean_difference(acts, [None] * 180, g)
    with pytest.raises(ValueError, match=r"Labels are 1 or 0 .* hold 2"):
        mean_difference(acts, y + 1, g)
    with pytest.raises(ValueError, match="7 labels for 180 rows of 180 transcripts"):
        mean_difference(acts, y[:7], g)
    with pytest.raises(ValueError, match="60 of 120 groups have rows of one label only"):
        contrast_pairs(acts, y, g)
    with pytest.raises(ValueError, match="needs at least 3 groups with rows of both labels; 2 have"):
        pca_of_differences(activations({MID: X[:4]}), y[:4], g[:4])
    with pytest.raises(ValueError, match=r"1\.mid hold NaN"):
        mean_difference(activations({MID: X * float("nan")}), y, g)
    with pytest.raises(ValueError, match="C=0"):
        logistic(acts, y, g, C=0)


# --- arithmetic -------------------------------------------------------------------------------------------------------------


def two():
    draw = torch.Generator().manual_seed(1)
    return (Direction.of({site: torch.randn(8, generator=draw) * 3 for site in (MID, RESID)}) for _ in range(2))


def test_arithmetic_is_that_of_raw_vectors():
    d, e = two()
    for site in (MID, RESID):
        mixed = (d + 0.5 * e).raw(site)
        torch.testing.assert_close(mixed, d.raw(site) + 0.5 * e.raw(site))
        torch.testing.assert_close((d - e).raw(site), d.raw(site) - e.raw(site))
        torch.testing.assert_close((d / 2).raw(site), d.raw(site) / 2)
        torch.testing.assert_close(((d - e) + e).raw(site), d.raw(site), rtol=1e-5, atol=1e-5)
        assert torch.equal((-1 * -d)[site], d[site])
        assert torch.equal((-d)[site], -d[site])
        assert float((d + e)[site].norm()) == pytest.approx(1, abs=1e-6)
    assert ((d + e).about["method"], (d - e).about["method"]) == ("sum", "difference")
    assert (2 * d).norms[MID] == 2 * d.norms[MID]
    assert (-2 * d).norms[MID] == 2 * d.norms[MID]
    with pytest.raises(ValueError, match=r"cancel at 1\.mid"):
        d - d
    with pytest.raises(ValueError, match=r"times 0\.0"):
        d * 0.0
    with pytest.raises(ValueError, match=r"1 sites are in one only, first 2\.resid"):
        d + e.keep(MID)


def test_the_opposite_direction_has_the_opposite_auc():
    X, y, g, _ = paired_rows()
    d = mean_difference(activations({MID: X}), y, g)
    turned = mean_difference(activations({MID: X}), 1 - y, g)
    assert (-d).auc[MID].value == pytest.approx(1 - turned.auc[MID].value)
    assert (-d).auc[MID].low == 1 - d.auc[MID].high
    assert (2 * d).auc == d.auc
    assert (d + d).auc == {}


def test_by_site_and_by_layer():
    d, _ = two()
    assert torch.equal(d[1], d["1.mid"])
    assert torch.equal(d[2], d[RESID])
    assert MID in d
    assert 1 in d
    assert "5.mid" not in d
    assert list(d) == [MID, RESID]
    assert d.keep("*.mid").sites == [MID]
    with pytest.raises(KeyError, match=r"Layer 7 was asked of a direction that has 2 sites, 1\.mid to 2\.resid"):
        d[7]
    with pytest.raises(KeyError, match=r"5\.mid was asked"):
        d["5.mid"]
    both = Direction.of({Site(1, "mid"): torch.ones(3), Site(1, "resid"): torch.ones(3)})
    with pytest.raises(KeyError, match=r"Layer 1 .* has 1\.mid, 1\.resid: name one"):
        both[1]
    for wrong in (torch.zeros(3), torch.tensor([float("nan"), 1.0]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"direction at 1\.mid must be one finite, non-zero vector"):
            Direction.of({MID: wrong})
    with pytest.raises(ValueError, match="at least one site"):
        Direction.of({})
    half = torch.linspace(-1, 2, 7).bfloat16()
    assert Direction.of({MID: half}).norms[MID] == pytest.approx(float(half.double().norm()))


def test_cosines():
    d, e = two()
    own = d.cosines()
    assert list(own.index) == ["1.mid", "2.resid"] == list(own.columns)
    assert own.loc["1.mid", "1.mid"] == pytest.approx(1)
    assert own.loc["1.mid", "2.resid"] == pytest.approx(cosine(d[1], d[2]))
    assert d.cosines(e).loc["1.mid", "2.resid"] == pytest.approx(cosine(d[1], e[2]))
    assert np.isnan(d.cosines(Direction.of({MID: torch.ones(5)})).iloc[0, 0])


def test_random_directions_have_the_same_lengths():
    d, e = two()
    a = d.random(0)
    assert a.norms == pytest.approx(d.norms)
    assert torch.equal(a[MID], d.keep(MID).random(0)[MID])
    assert torch.equal(a[MID], e.random(0)[MID])
    assert not torch.equal(a[MID], d.random(1)[MID])
    assert abs(cosine(a[MID], a[RESID])) < 0.999


def test_judged_on_rows_it_has_not_seen():
    X, y, g, _ = paired_rows()
    seen, held = g < 30, g >= 30
    d = mean_difference(activations({MID: X[seen], RESID: X[seen]}), y[seen], g[seen])
    other = activations({MID: X[held]})
    found = d.auc_on(other, y[held], g[held])
    assert list(found) == [MID]
    scores = (X[held] @ d[MID]).tolist()
    assert found[MID].value == pytest.approx(oracle.auc(scores, y[held].tolist(), [0] * 60))
    assert found[MID].n == 30
    inside = d.auc_on(other, y[held], g[held], inside=True)[MID]
    assert inside.value == pytest.approx(oracle.auc(scores, y[held].tolist(), g[held].tolist()))
    assert inside.value > found[MID].value
    chance = d.random(0).auc_on(other, y[held], g[held])[MID]
    assert chance.low < 0.5 < chance.high
    with pytest.raises(ValueError, match=r"The direction has 1\.mid; the activations are at 2\.resid"):
        d.keep(MID).auc_on(activations({RESID: X}), y, g)
    with pytest.raises(ValueError, match="width 24, and the activations there 5"):
        d.auc_on(activations({MID: X[:, :5]}), y, g)


def test_save_and_load(tmp_path):
    X, y, g, _ = paired_rows()
    d = mean_difference(activations({MID: X, RESID: X * 2 + 1, Site(10, "mid"): X}), y, g)
    path = tmp_path / "deep" / "d.safetensors"
    d.save(path)
    again = Direction.load(path)
    assert again.sites == d.sites
    assert all(torch.equal(again[s], d[s]) for s in d)
    assert (again.norms, again.auc, again.halves, again.about) == (d.norms, d.auc, d.halves, d.about)
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    old = {
        site: {k: v for k, v in auc.items() if k not in ("seed", "level")}
        for site, auc in json.loads(said["auc"]).items()
    }
    save_file(dict(load_file(path)), tmp_path / "old", {**said, "auc": json.dumps(old)})  # as files of before have it
    assert Direction.load(tmp_path / "old").auc == {
        site: dataclasses.replace(auc, seed=None) for site, auc in d.auc.items()
    }
    assert [p.name for p in path.parent.iterdir()] == ["d.safetensors"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(
        plain.stat().st_mode
    )  # readable by those who read other files here
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is no direction"):
        Direction.load(path)
    activations({MID: X}).save(tmp_path / "acts.safetensors")
    with pytest.raises(ValueError, match="does not say that it is one"):
        Direction.load(tmp_path / "acts.safetensors")
    with pytest.raises(FileNotFoundError, match="no direction at"):
        Direction.load(tmp_path / "none")


def test_a_table_and_a_line():
    X, y, g, _ = paired_rows()
    d = mean_difference(activations({MID: X}), y, g)
    frame = d.frame()
    assert frame.loc[0, "site"] == "1.mid"
    assert frame.loc[0, "auc"] == d.auc[MID].value
    assert frame.loc[0, "halves"] == d.halves[MID] > 0.5
    assert "mean difference" in repr(d)
    assert "1.mid" in d._repr_html_()


# --- models -----------------------------------------------------------------------------------------------------------------


def test_a_direction_belongs_to_its_model():
    model, other = Model(*tiny("llama")), Model(*tiny("llama", seed=1))
    runs = answers(model)
    d = length_direction(model, runs)
    d.require(model)
    d.require(Model(model.module, model.tokenizer))
    with pytest.raises(ValueError, match=r"measured in another model: its fingerprint is \w{16}, the one here"):
        d.require(other)
    moved = d.carried_to(other)
    moved.require(other)
    assert moved.about["measured_in"] == d.about["model"]
    assert d.auc
    assert (moved.auc, moved.halves) == ({}, {})  # they were measured in the first
    assert torch.equal(moved[1], d[1])
    with pytest.raises(ValueError, match="measured in different models"):
        d + moved
    with pytest.raises(ValueError, match=r"1\.mid has width 8, .* 32"):
        Direction.of({MID: torch.ones(8)}).require(model)
    with pytest.raises(ValueError, match=r"'9\.mid' matches no site"):
        Direction.of({Site(9, "mid"): torch.ones(32)}).require(model)
    Direction.of({Site(1, "attn.z", 2): torch.ones(12)}).require(model)


# --- length -----------------------------------------------------------------------------------------------------------------


def answers(model, questions=6, samples=4):
    """Long answers think in b's, short ones in a's."""
    runs = []
    for q in range(questions):
        for s in range(samples):
            n = 3 + q + (10 + s if s % 2 else s)
            runs.append(model.transcript(f"q{'x' * q}", f"<think>{('b' if s % 2 else 'a') * n}</think>{s}"))
    return runs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_length_direction_is_the_mean_over_questions(family):
    model = Model(*tiny(family))
    runs = answers(model)
    at = ["*.resid"] if family == "gpt-neox" else ["*.mid", "*.resid"]
    found = length_direction(model, runs, at=at)
    # at the embedding it is known: b's less a's
    embed = model.module.get_input_embeddings().weight
    b, a = (embed[model.tokenizer(c, add_special_tokens=False)["input_ids"][0]].detach() for c in "ba")
    if family != "gpt2":  # whose stream has positions in it
        scale = 32**0.5 if family.startswith("gemma") else 1
        torch.testing.assert_close(found.raw("0.resid"), (b - a) * scale, rtol=1e-4, atol=1e-4)
    acts = collect(model, runs, at=found.sites, over="thinking")
    for site in found.sites:
        gaps = []
        for q in range(6):
            means = [acts[site][acts.transcript == 4 * q + s].double().mean(dim=0) for s in range(4)]
            gaps.append(means[3] - means[0])
        torch.testing.assert_close(found.raw(site).double(), torch.stack(gaps).mean(dim=0), rtol=1e-3, atol=1e-4)
        assert found.auc[site].n == 6
    assert found.auc[found.sites[0]].value == 1
    assert found.about["counts"] | {"mean_tokens_long": 0, "mean_tokens_short": 0} == {
        "rows": 12, "groups": 6, "positive": 6, "runs": 24, "missing": 0, "censored": 0, "questions": 6, "long": 6, "short": 6,
        "mean_tokens_long": 0, "mean_tokens_short": 0,
    }  # fmt: skip


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt-neox"])
def test_the_published_recipe(family):
    model = Model(*tiny(family))
    runs = answers(model)
    found = length_direction(model, runs, how="thresholds", short=9, long=16)
    rows = [(list(t.ids), *t.spans["thinking"]) for t in runs]
    for layer in range(3):
        path = model.anatomy.tap(Site(layer, "mid")).path
        expected = oracle.published_length_direction(model.module, path, rows, short=9, long=16)
        torch.testing.assert_close(found.raw(layer).double(), expected, rtol=1e-3, atol=1e-4)
    assert found.about["over"] == ["thinking"]
    assert (found.about["short"], found.about["long"]) == (9, 16)


def cut(model, question, text):
    """A run that the cap ended."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return read_transcript(model.tokenizer, question, model.prompt_ids(question), ids)


def test_a_cut_answer_is_at_least_as_long_as_what_was_seen_of_it():
    model = Model(*tiny("llama"))
    whole = model.transcript("q", "<think>aaaa</think>1")
    runs = [whole, cut(model, "q", "<think>bb"), cut(model, "q", "<think>cc</think>1"), cut(model, "q", "none")]
    found = span_lengths(runs)
    assert found == [Length(4, False), Length(2, True), Length(2, False), None]
    assert span_lengths(runs, "completion")[3] == Length(4, True)


def test_longest_and_shortest():
    def pick(*lengths, share=0.25):
        known = [None if n is None else Length(abs(n), n < 0) for n in lengths]
        return longest_and_shortest(known, ["q"] * len(known), share)

    assert pick(5, 9, 7, 2) == [None, 1, None, 0]
    assert pick(5, None, 7) == [0, None, 1]
    assert pick(5, -9) == [0, 1]
    assert pick(-5, 9) == [None, None]  # the first may be the longer of the two
    assert pick(-2, 5, 9) == [None, 0, 1]
    assert pick(5, 5) == [None, None]
    assert pick(5) == [None]
    assert pick(*range(8)) == [0, 0, None, None, None, None, 1, 1]
    assert pick(*range(7)) == [0, None, None, None, None, None, 1]  # a whole number of at most the share
    assert pick(0, 1, 2, 3, -10, -11, -12, -13) == [0, 0, None, None, None, None, 1, 1]  # a share of all, cut or not
    assert pick(*range(8), share=0.5) == [0] * 4 + [1] * 4
    assert pick(1, 2, 2, 2, 2, 2, 2, 2, share=0.5).count(None) == 6  # ties are on neither side
    assert pick(1, 5, 5, 9, share=0.5) == [0, None, None, 1]  # nor is one of two that tie, though others are longer
    two = longest_and_shortest([Length(n, False) for n in (1, 9, 20, 30)], ["a", "a", "b", "b"])
    assert two == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="share=0"):
        pick(1, 2, share=0.0)


def test_thresholds():
    lengths = [Length(99, False), Length(99, True), Length(100, False), Length(1000, False), Length(1001, True), None]
    assert by_thresholds(lengths) == [0, None, None, None, 1, None]
    with pytest.raises(ValueError, match="short=9, long=3"):
        by_thresholds(lengths, 9, 3)


def test_a_longest_answer_that_was_cut_counts_as_long():
    model = Model(*tiny("llama"))
    runs = [
        run
        for q in "xyz"
        for run in (
            model.transcript(q, "<think>aa</think>1"),
            cut(model, q, "<think>bbbbbb"),
            model.transcript(q, "no"),
        )
    ]
    counts = length_direction(model, runs, at="1.mid").about["counts"]
    assert (counts["censored"], counts["missing"], counts["long"], counts["short"]) == (3, 3, 3, 3)
    assert counts["mean_tokens_long"] == 6


def test_a_planted_length_direction():
    """The model's own is known, and so is the topic that goes with length and does not cause it."""
    planted = planted_length(seed=0)
    questions = [q.question for q in planted.questions(24, seed=1)]
    runs = planted.model.generate(questions, samples=5, seed=0, max_new_tokens=60)
    paired = length_direction(planted.model, runs)
    published = length_direction(planted.model, runs, how="thresholds", short=4, long=15)
    for layer in (1, 2, 3):
        assert cosine(-paired[layer], planted.direction) > 0.95
        assert abs(cosine(paired[layer], planted.topic)) < 0.05
        assert paired.auc[Site(layer, "mid")].low > 0.7
        assert paired.halves[Site(layer, "mid")] > 0.9
        assert abs(cosine(published[layer], planted.topic)) > 0.3


def test_what_has_no_length_direction():
    model = Model(*tiny("llama"))
    plain = [model.transcript(q, "a" * n) for q in "xy" for n in (2, 5)]
    with pytest.raises(ValueError, match=r"None of the 4 runs has a span thinking; they have .*answer.*'answer'"):
        length_direction(model, plain)
    length_direction(model, plain, over="completion")
    with pytest.raises(ValueError, match="All 2 answers were cut off before their thinking ended"):
        length_direction(model, [cut(model, "x", "<think>aa"), cut(model, "x", "<think>aaa")])
    single = [model.transcript(q, f"<think>{q * 3}</think>") for q in "xyz"]
    with pytest.raises(
        ValueError, match=r"No question has two answers of which one is known to be longer .* 3 to 3 tokens"
    ):
        length_direction(model, single)
    with pytest.raises(ValueError, match=r"No answer is short \(under 3 tokens.*lengths run from 3 to 21"):
        length_direction(model, answers(model), how="thresholds", short=3, long=10)
    with pytest.raises(ValueError, match=r"No answer is long \(over 1000 tokens\)"):
        length_direction(model, answers(model), how="thresholds")
    with pytest.raises(ValueError, match=r"'\*\.poem' matches no site"):
        length_direction(model, answers(model), at="*.poem")


def test_an_answer_that_lacks_the_part_that_is_read_is_missing():
    model = Model(*tiny("llama"))
    runs = answers(model)
    lengths = [n for n in span_lengths(runs) if n is not None]
    found = length_direction(model, runs, over="thinking[9:]", at="1.mid").about["counts"]
    assert found["missing"] == sum(n.tokens < 10 for n in lengths) > 0
    # of three or four answers with such a part the longest is compared with the shortest of these
    assert found["long"] == found["short"] == found["questions"] == 6
    assert found["mean_tokens_short"] >= 10
    sentences = length_direction(model, runs, over="sentence[0]", at="1.mid").about
    assert sentences["of"] == "thinking"
    assert sentences["counts"]["missing"] == 0
    for over in ("thinking[100:]", "/zzzz/"):
        with pytest.raises(
            ValueError, match=rf"None of the 24 runs has a span {re.escape(over)}; they have .*thinking"
        ):
            length_direction(model, runs, over=over)


def test_the_model_is_left_as_it_was():
    model = Model(*tiny("gemma2"))
    ids = torch.tensor([model.prompt_ids("q")])
    before = model.module(input_ids=ids).logits
    state = torch.get_rng_state()
    length_direction(model, answers(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.module(input_ids=ids).logits, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())


def test_options_change_something():
    model = Model(*tiny("llama"))
    runs = [*answers(model, samples=8), cut(model, "q", "<think>aa</think>c")]
    base = length_direction(model, runs)
    for options in (
        {"share": 0.5},
        {"over": "thinking[:2]"},
        {"over": "answer", "of": "thinking"},
        {"at": "*.resid"},
        {"how": "thresholds", "short": 9, "long": 16},
    ):
        other = length_direction(model, runs, **options)
        assert other.sites != base.sites or not torch.equal(other[base.sites[1]], base[base.sites[1]])
    assert dataclasses.replace(base).norms == base.norms


def test_what_has_no_direction(unchecked, tmp_path):
    found = Direction.of({MID: torch.ones(3)})
    with pytest.raises(ValueError, match="A direction divided by 0 has no direction"):
        found / 0
    assert torch.equal(Direction.of({MID: [3.0, 4.0]})[MID], torch.tensor([0.6, 0.8]))
    save_file({"a": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors holds no activations"):
        Activations.load(tmp_path / "other.safetensors")
