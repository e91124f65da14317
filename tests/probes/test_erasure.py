"""Erasing is LEACE's theorem: what is left cannot be told, what is changed is as little as can be."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.accumulators import CrossMoments, Moments
from probes.activations import Activations, collect
from probes.erasure import Erased, Eraser, Erasers, check, eraser, leace, leace_streamed, told
from probes.held_out import auc, auc_score, deal
from probes.steering import steered
from surgery.model import Model
from surgery.sites import Site
from tests.families import FAMILIES, tiny
from tests.oracles import erasure as oracle

MID, RESID = Site(1, "mid"), Site(2, "resid")


def activations(values):
    n = len(next(iter(values.values())))
    index = torch.arange(n)
    return Activations(values, index, torch.full((n,), -1), torch.zeros(n, dtype=torch.long), ("thinking",))


def rows(n=200, d=12, classes=2, seed=0, effect=1.5):
    """Correlated rows whose mean goes with the class."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randint(0, classes, (n,), generator=draw)
    mix = torch.randn(d, d, generator=draw)
    X = torch.randn(n, d, generator=draw) @ mix + effect * torch.randn(classes, d, generator=draw)[z] + 3
    return X, z


def one_hot(z):
    return torch.nn.functional.one_hot(z).float()


def fitted(X, z):
    return eraser(Moments.of(X), CrossMoments.of(X, one_hot(z)))


@pytest.mark.parametrize("classes", [2, 4])
def test_the_theorem(classes):
    X, z = rows(classes=classes)
    found = fitted(X, z)
    assert found.rank == classes - 1
    expected = oracle.leace(X.numpy(), one_hot(z).numpy(), X[:20].numpy())
    torch.testing.assert_close(found(X[:20]).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 4])
def test_no_class_is_left_in_the_means(classes):
    X, z = rows(classes=classes)
    gone = fitted(X, z)(X)
    means = torch.stack([gone[z == k].double().mean(dim=0) for k in range(classes)])
    torch.testing.assert_close(means, X.double().mean(dim=0).expand(classes, -1), rtol=0, atol=1e-5)
    assert float((X.double().mean(dim=0) - X[z == 0].double().mean(dim=0)).norm()) > 0.3


def test_erasing_twice_is_erasing_once():
    X, z = rows()
    erase = fitted(X, z)
    torch.testing.assert_close(erase(erase(X)), erase(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(erase.right @ erase.left, torch.eye(erase.rank), rtol=0, atol=1e-5)


def test_as_little_changes_as_can():
    """Taking out the difference of the means, or any other direction's worth that leaves the means equal, moves the rows further."""
    X, z = rows()
    X64, erase = X.double(), fitted(X, z)
    gap = X64[z == 1].mean(dim=0) - X64[z == 0].mean(dim=0)
    least = (erase(X) - X).double().square().sum(dim=1).mean()
    draw = torch.Generator().manual_seed(1)
    for reads in (gap, *torch.randn(20, len(gap), generator=draw, dtype=torch.float64)):
        other = (
            (X64 - X64.mean(dim=0)) @ reads / (gap @ reads)
        )  # x - gap (reads·(x - mean)) / (reads·gap) equals the means too
        assert (other.square().mean() * gap.square().sum()) >= least * (1 - 1e-6)


def test_nothing_can_be_told_on_the_same_rows():
    X, z = rows(effect=0.7)
    y = z.numpy().astype(bool)
    assert told(X, y) > 0.05
    assert told(fitted(X, z)(X), y) < 1e-9


def test_nothing_can_be_told_with_more_dimensions_than_rows():
    """Where a hyperplane separates any two classes, until they are erased."""
    X, z = rows(n=40, d=60, effect=0)
    y = z.numpy().astype(bool)
    share = y.mean()
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert told(X, y) == pytest.approx(entropy, abs=1e-3)
    assert told(fitted(X, z)(X), y) < 1e-6


def test_what_is_told_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    X, z = rows(effect=0.5)
    y = z.numpy().astype(bool)
    plain = LogisticRegression(C=1e8, max_iter=10000, tol=1e-8).fit(X.double().numpy(), y)
    share = y.mean()
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert told(X, y) == pytest.approx(entropy - log_loss(y, plain.predict_proba(X.double().numpy())), abs=1e-5)


def test_any_shape_and_dtype():
    X, z = rows()
    erase = fitted(X, z)
    assert torch.equal(erase(X.view(10, 20, -1)).view_as(X), erase(X))
    half = X.bfloat16()
    assert torch.equal(erase(half), erase(half.float()).bfloat16())  # computed wide
    with pytest.raises(ValueError, match="width 12; these have 5"):
        erase(torch.ones(2, 5))


def test_a_check_on_the_same_and_on_other_rows():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    X, z = rows(n=400, effect=2.0)
    found = check(activations({MID: X, RESID: X * 2 + 7 * torch.arange(12)}), z, torch.arange(400) // 2)
    first = found.rows[0]
    assert (first.site, found.rows[1].site) == ("1.mid", "2.resid")
    assert first.told_before > 0.1
    assert first.told_after < 1e-9
    assert first.before.low > 0.6
    assert first.after.value < 0.55
    assert first.after.n == 200
    y, scores = z.numpy().astype(bool), np.empty(400)
    fold = deal(np.arange(400) // 2, y)
    for k in range(5):  # by hand: eraser and probe of the other folds
        train, erase = fold != k, fitted(X[fold != k], z[fold != k])
        pipe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000)).fit(
            erase(X[train]).numpy(), y[train]
        )
        scores[~train] = pipe.decision_function(erase(X[~train]).numpy())
    assert first.after.value == pytest.approx(auc(scores, y, fold))
    assert first.after == auc_score(scores, y, np.arange(400) // 2, fold, folds=5, what="held-out AUC inside folds")
    assert 0 < first.moved < 1
    assert found.rows[1].moved == pytest.approx(first.moved, rel=1e-4)
    assert list(found.frame()["site"]) == ["1.mid", "2.resid"]
    assert "told_after" in found._repr_html_()
    other = check(activations({MID: X}), z, torch.arange(400) // 2, C=10.0, folds=3, seed=1).rows[0]
    assert other.before != first.before


def test_a_class_that_one_group_alone_has_is_judged_on_its_own_rows_only():
    X, z = rows(n=60)
    (found,) = check(activations({MID: X}), z, torch.where(z == 1, 0, torch.arange(60))).rows
    assert found.told_before > 0.1 > 1e-9 > found.told_after
    assert np.isnan([found.before.value, found.after.value]).all()


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_row_without_a_label_is_left_out(missing):
    X, z = rows(n=60)
    labels, acts = [*z.tolist()[:-2], missing, missing], activations({MID: X})
    some = activations({MID: X[:-2]})
    assert torch.equal(leace(acts, labels)[MID].left, leace(some, z[:-2])[MID].left)
    assert leace(acts, labels).about == leace(some, z[:-2]).about
    assert check(acts, labels, torch.arange(60)) == check(some, z[:-2], torch.arange(58))
    model = Model(*tiny("llama"))
    runs, known = answers(model)
    streamed = leace_streamed(model, runs, [*known[:-1], missing], at="1.resid", over="thinking")
    assert streamed.about == leace_streamed(model, runs[:-1], known[:-1], at="1.resid", over="thinking").about


def test_what_varies_too_little_is_left_as_it_is():
    X, z = rows(d=3)
    X = torch.linalg.qr(X - X.mean(dim=0))[0] * torch.tensor([1.0, 1e-1, 1e-3])  # variances 1, 1e-2 and 1e-6, apart
    X = X.roll(1, dims=1)
    moments, cross = Moments.of(X), CrossMoments.of(X, one_hot(z))
    for tolerance, least in ((0.0, 0), (1e-9, 0), (1e-4, 1), (1e-1, 2)):
        moved = (eraser(moments, cross, tolerance=tolerance)(X) - X).norm(dim=0) > 1e-6 * X.norm(dim=0)
        assert moved.tolist() == [least < 1, True, least < 2]


def test_a_check_is_kept(tmp_path):
    X, z = rows(n=60)
    found = check(activations({MID: X}), z, torch.arange(60))
    found.save(tmp_path / "c.json")
    assert Erased.load(tmp_path / "c.json") == found
    said = json.loads((tmp_path / "c.json").read_text())
    for row in said["rows"]:
        for score in (row["before"], row["after"]):
            del score["seed"], score["level"]  # as files of before have it
    (tmp_path / "old.json").write_text(json.dumps(said))
    assert Erased.load(tmp_path / "old.json").rows[0].after == replace(found.rows[0].after, seed=None)


def test_erasers_at_sites(tmp_path):
    X, z = rows()
    acts = activations({MID: X, RESID: X.flip(1) * 2})
    found = leace(acts, z)
    assert list(found) == [MID, RESID]
    erased = found(acts)
    assert torch.equal(erased[MID], fitted(X, z)(X))
    assert torch.equal(found["2.resid"](acts[RESID]), erased[RESID])
    only = Erasers({MID: found[MID]})(acts)
    assert torch.equal(only[RESID], acts[RESID])
    assert torch.equal(only.transcript, acts.transcript)
    found.save(tmp_path / "e.safetensors")
    again = Erasers.load(tmp_path / "e.safetensors")
    assert again.about == found.about == {"over": ["thinking"], "classes": ["0", "1"], "rows": 200}
    assert torch.equal(again(acts)[MID], erased[MID])
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]
    assert "2 sites" in repr(found)
    Erasers({RESID: found[RESID], Site(10, "mid"): found[MID]}, {}).save(tmp_path / "e.safetensors")
    assert list(Erasers.load(tmp_path / "e.safetensors")) == [RESID, Site(10, "mid")]  # in the order of layers
    some = [None if i % 4 == 0 else int(k) for i, k in enumerate(z)]
    kept = [i for i in range(200) if i % 4]
    assert torch.equal(leace(acts, some)[MID].left, fitted(X[kept], z[kept]).left)


def answers(model):
    labels = [0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0]
    texts = [f"<think>{'ab'[label] * (3 + i % 4)}cd</think>{i}" for i, label in enumerate(labels)]
    return [model.transcript(f"q{i // 2}", text) for i, text in enumerate(texts)], labels


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_collected(family):
    model = Model(*tiny(family))
    runs, labels = answers(model)
    at = ["1.resid", "2.resid"]
    some = [None, *labels[1:]]
    streamed = leace_streamed(model, runs, some, at=at, over="thinking", batch_size=5)
    acts = collect(model, runs, at=at, over="thinking")
    whole = leace(acts, some)
    acts = acts.where(acts.transcript > 0)
    for site in whole:
        torch.testing.assert_close(streamed[site](acts[site]), whole[site](acts[site]), rtol=1e-3, atol=1e-3)
        y = np.array([labels[i] for i in acts.transcript]) == 1
        assert told(acts[site], y) > 0.1
        assert told(streamed[site](acts[site]), y) < 1e-5
    assert streamed.about["rows"] == len(acts)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_erasing_while_the_model_runs(family):
    """Erasers are functions of rows at their sites, as steering takes them: what is collected is what they would have given."""
    model = Model(*tiny(family))
    runs, labels = answers(model)
    plain = collect(model, runs, at="2.resid", over="thinking")
    erasers = leace(plain, labels)
    with steered(model, None, how=erasers, over="thinking"):
        found = collect(model, runs, at=["2.resid", "2.mlp.out"], over="thinking")
    torch.testing.assert_close(found["2.resid"], erasers(plain)["2.resid"], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_erased(tmp_path):
    X, z = rows()
    with pytest.raises(ValueError, match="All 200 labelled rows are of one class"):
        leace(activations({MID: X}), torch.zeros(200))
    with pytest.raises(ValueError, match="must come from the same rows"):
        eraser(Moments.of(X), CrossMoments.of(X[:5], one_hot(z)[:5]))
    with pytest.raises(ValueError, match="do not vary: there is nothing"):
        leace(activations({MID: torch.ones(200, 3)}), z)
    alike = torch.cat([X, X])
    with pytest.raises(ValueError, match="do not vary together"):
        leace(activations({MID: alike}), [0] * 200 + [1] * 200)
    with pytest.raises(ValueError, match=r"The erasers are for 1\.mid; the activations are at 2\.resid"):
        leace(activations({MID: X}), z)(activations({RESID: X}))
    with pytest.raises(ValueError, match="two classes, labelled 1 and 0"):
        check(activations({MID: X}), z + 1, torch.arange(200))
    model = Model(*tiny("llama"))
    runs, _ = answers(model)
    with pytest.raises(ValueError, match="12 transcripts, 2 labels"):
        leace_streamed(model, runs, [0, 1])
    with pytest.raises(FileNotFoundError, match="no erasers at"):
        Erasers.load(tmp_path / "none")
    activations({MID: X}).save(tmp_path / "acts.safetensors")
    with pytest.raises(ValueError, match="holds no erasers: it does not say"):
        Erasers.load(tmp_path / "acts.safetensors")


@pytest.mark.parametrize("unit", [2.0**-60, 2.0**60])
def test_the_units_of_activations_matter_to_nothing(unit):
    """What is too little to be erased is judged after whitening."""
    X, z = rows()
    erase, other = fitted(X, z), fitted(unit * X, z)
    assert other.rank == erase.rank
    torch.testing.assert_close(other(unit * X) / unit, erase(X))
    alike = torch.cat([X, X])
    with pytest.raises(ValueError, match="do not vary together"):
        fitted(unit * alike, torch.tensor([0, 1]).repeat_interleave(200))


def test_an_eraser_by_hand():
    erase = Eraser(torch.tensor([1.0, 0.0]), torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    assert erase(torch.tensor([[5.0, 2.0]])).tolist() == [[1.0, 2.0]]


def test_settings_that_erase_nothing_or_anything():
    X, z = rows()
    for tolerance in (-1.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"tolerance={tolerance}: a share of the largest variance, in \[0, 1\)"):
            leace(activations({MID: X}), z, tolerance=tolerance)
    for C in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"C={C}: the inverse strength of the penalty is above 0"):
            check(activations({MID: X}), z, torch.arange(200), C=C)
