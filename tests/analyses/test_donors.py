"""A donor pair remembers what it was made of; a vector that is known to carry a skill is told from its controls, and one that is not is not."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from analyses.controls import Planted, planted
from analyses.donors import Pair, Transfer, train_pair, transfer
from analyses.statistics import mcnemar, page
from analyses.tasks import grade
from finetune.rewards import Answer
from surgery.delta import StoredDelta
from surgery.drawn import Permuted
from surgery.model import Model
from surgery.runs import fingerprint

BEFORE: dict[str, str] = {}
SMALL: dict[str, Any] = {"texts": ["[Uabcd]ab\ncd", "[Uabcd]jj"], "max_new_tokens": 24, "seed": 1}


@pytest.fixture(scope="module")
def taught() -> Planted:
    return planted(0.0, seed=0)


@pytest.fixture(scope="module")
def sibling(taught: Planted) -> Model:
    """The taught model with what it knows taken half away: what is missing is known exactly."""
    half = Model(copy.deepcopy(taught.model.module), taught.model.tokenizer)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in half.module.parameters():
            p.add_(0.5 * p.std() * torch.randn(p.shape, generator=noise) if p.ndim > 1 else 0.0)
    return half


@pytest.fixture(scope="module")
def found(taught: Planted, sibling: Model) -> Transfer:
    missing = taught.model.weights - sibling.weights
    questions = taught.questions(24, seed=5)
    return transfer(
        sibling, missing, (-0.5, 0.5, 1.0), questions=questions, others={"half": 0.5 * missing}, draws=9, prompt="ab",
        start="independent", **SMALL,
    )  # fmt: skip


# --- the transfer -------------------------------------------------------------------------------------------------------


def test_a_vector_that_carries_the_skill_is_told_from_its_controls(found: Transfer) -> None:
    table = found.frame().set_index(["arm", "alpha"])
    best = table.loc[("vector", 1.0)]
    assert best["accuracy"] > 0.9
    assert best["difference_low"] > 0.3
    assert best["holm"] < 0.01
    assert found.rank == pytest.approx(0.1)
    assert found.trend().z > 2
    assert abs(found.trend("permuted").z) < found.trend().z
    with pytest.raises(ValueError, match="no arm 'third'"):
        found.trend("third")
    assert table.loc[("permuted", 1.0), "accuracy"] < 0.5
    assert table.loc["random"]["accuracy"].max() < 0.5


def test_the_table_is_what_the_cells_say(found: Transfer) -> None:
    table = found.frame()
    cells = {(c.line.arm, c.strength): c for c in found.arms.cells}
    before = [v is True for v in cells["untouched", 0.0].answers["right"]]
    for (arm, alpha), cell in cells.items():
        row = table[(table["arm"] == arm) & (table["alpha"] == alpha)].iloc[0]
        right = [v is True for v in cell.answers["right"]]
        assert row["accuracy"] == pytest.approx(sum(right) / 24)
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["difference"] == pytest.approx((sum(right) - sum(before)) / 24)
        assert row["p"] == mcnemar(before, right)
        assert row["n"] == 24
        assert row["missing"] == cell.answers["right"].count(None)
        assert row["kl"] == pytest.approx(sum(cell.passages["kl"]) / sum(cell.passages["tokens"]))
    assert set(table["arm"]) == {"untouched", "vector", "permuted", "half", "random", "prompt", "vector + prompt"}
    assert sorted(table[table["arm"] == "random"]["draw"]) == list(range(9))
    assert table[table["arm"] == "random"]["kl"].nunique() == 9
    tested = table[table["holm"].notna()]
    assert [(r.arm, r.alpha) for r in tested.itertuples()] == [
        ("vector", 1.0), ("permuted", 1.0), ("half", 1.0), ("prompt", 0.0), ("vector + prompt", 1.0),
    ]  # fmt: skip
    assert (tested["holm"] >= tested["p"]).all()
    along = [cells["vector", -0.5], cells["untouched", 0.0], cells["vector", 0.5], cells["vector", 1.0]]
    assert found.trend() == page(
        [[v is True for v in row] for row in zip(*(c.answers["right"] for c in along), strict=True)]
    )


def test_half_the_vector_at_one_is_the_vector_at_half(found: Transfer) -> None:
    cells = {(c.line.arm, c.strength): c for c in found.arms.cells}
    assert cells["half", 1.0].answers == cells["vector", 0.5].answers
    assert cells["half", 1.0].passages["kl"] == pytest.approx(cells["vector", 0.5].passages["kl"], rel=1e-3, abs=1e-6)


def test_a_vector_of_nothing_changes_nothing_and_ranks_last(taught: Planted) -> None:
    m = taught.model
    before = fingerprint(m)
    noise = Permuted(m.weights - _shifted(m).weights, seed=4)
    got = transfer(m, 1e-9 * noise, (1.0,), questions=taught.questions(6, seed=2), draws=3, prompt=None, **SMALL)
    assert got.rank == 1.0
    table = got.frame()
    assert (table["difference"] == 0).all()
    assert (table["difference_high"][1:] > 0.3).all()  # six questions answered alike make nothing certain
    assert table["difference_high"][0] == 0  # of the untouched sibling from itself
    assert table["kl"].max() < 1e-5
    assert got.prompted is None
    assert fingerprint(m) == before


def _shifted(m: Model) -> Model:
    other = Model(copy.deepcopy(m.module), m.tokenizer)
    with torch.no_grad():
        for i, p in enumerate(other.module.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return other


def test_a_permuted_vector_has_the_same_entries_elsewhere(taught: Planted) -> None:
    delta = taught.model.weights - _shifted(taught.model).weights
    other = Permuted(delta, seed=2)
    for site in delta:
        value, moved = delta[site], other[site]
        assert torch.equal(value.flatten().sort().values, moved.flatten().sort().values)
        assert torch.equal(moved, other[site])
        assert torch.equal(moved[1:3], other.rows(site, slice(1, 3)))
        if value.ndim > 1:
            assert not torch.equal(value, moved)
            assert not torch.equal(moved, Permuted(delta, seed=3)[site])
    assert Permuted(delta).norms() == pytest.approx(delta.norms())


def test_it_reloads_without_the_model(found: Transfer, tmp_path: Path) -> None:
    again = Transfer.load(found.save(tmp_path / "kept"))
    assert again.frame().equals(found.frame())
    assert (again.start, again.rank, again.prompt, again.seed) == ("independent", found.rank, "ab", 1)
    with pytest.raises(FileExistsError):
        found.save(tmp_path / "kept")


def test_it_is_drawn(found: Transfer) -> None:
    ax = found.plot()
    told = {line.get_label() for line in ax.get_lines()}
    assert {"vector", "permuted", "half", "9 random vectors", "prompt", "vector + prompt", "untouched"} <= told
    line = next(x for x in ax.get_lines() if x.get_label() == "vector")
    table = found.frame()
    own = table[(table["arm"] == "vector") | (table["arm"] == "untouched")].sort_values("alpha")
    assert line.get_xdata().tolist() == own["alpha"].tolist() == [-0.5, 0.0, 0.5, 1.0]
    assert line.get_ydata().tolist() == own["accuracy"].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"others": {"vector": None}}, "'vector' is taken"),
        ({"draws": 0}, "draws=0"),
        ({"alphas": (math.nan,)}, "finite"),
    ],
)
def test_bad_settings_are_one_clear_error(
    options: dict[str, Any], message: str, taught: Planted, unchecked: None
) -> None:
    m = taught.model
    delta = m.weights - _shifted(m).weights
    options = {"questions": taught.questions(2, seed=0), **SMALL} | options
    with pytest.raises(ValueError, match=message):
        transfer(m, delta, **options)


# --- the pair -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sequential", "independent"])
def pair(request: pytest.FixtureRequest) -> Pair:
    early = planted(0.0, seed=1, steps=40)
    BEFORE[request.param] = fingerprint(early.model)
    questions = early.questions(16, seed=7)
    return train_pair(
        early.model, early.transcripts(questions), questions, Answer(grade), start=request.param,
        supervise={"method": "full", "steps": 4, "batch_size": 8, "lr": 1e-3, "autocast": False},
        reinforce={"trains": "full", "steps": 3, "groups": 4, "samples": 8, "lr": 1e-3, "max_new_tokens": 24, "autocast": False},
    )  # fmt: skip


def test_a_pair_says_what_it_began_from(pair: Pair) -> None:
    began = {"sequential": pair.supervised, "independent": pair.base}[pair.start]
    assert pair.rounds.settings["start"] == fingerprint(began)
    assert fingerprint(pair.base) == BEFORE[pair.start]
    assert len({fingerprint(m) for m in (pair.base, pair.supervised, pair.reinforced)}) == 3


def test_the_vectors_add_up(pair: Pair) -> None:
    landed = pair.supervised.weights + pair.vector
    for site in landed:
        assert torch.equal(landed[site], pair.reinforced.weights[site])
    plain, both = pair.others["supervised - base"], pair.others["reinforced - base"]
    for site in plain:
        torch.testing.assert_close(plain[site] + pair.vector[site], both[site], rtol=1e-4, atol=1e-6)


def test_geometry_is_measured_site_by_site(pair: Pair) -> None:
    table = pair.geometry().set_index("site")
    site = next(s for s in pair.vector if str(s) == "1.mlp.down")
    v, plain = pair.vector[site], pair.others["supervised - base"][site]
    row = table.loc["1.mlp.down"]
    assert row["norm"] == pytest.approx(float(v.norm()), rel=1e-5)
    assert row["relative"] == pytest.approx(float(v.norm() / pair.base.weights[site].norm()), rel=1e-5)
    assert row["cosine"] == pytest.approx(float((v * plain).sum() / v.norm() / plain.norm()), rel=1e-4)
    other = _shifted(pair.base)
    with torch.no_grad():
        other.weights.parameter("0.attn.o").zero_()  # as biases often are
    other.module.bfloat16()
    shifted = pair.geometry(other).set_index("site")["relative"]
    assert shifted["1.mlp.down"] == pytest.approx(float(v.norm() / other.weights[site].float().norm()), rel=1e-5)
    assert math.isnan(shifted["0.attn.o"])


def test_a_pair_is_kept_as_vectors(pair: Pair, tmp_path: Path) -> None:
    folder = pair.save(tmp_path / "pair")
    stored = StoredDelta(folder / "vector")
    assert stored.base_hash == fingerprint(pair.supervised)
    for site in stored:
        assert torch.equal(stored[site], pair.vector[site])
    assert StoredDelta(folder / "supervised").base_hash == fingerprint(pair.base)
    said = json.loads((folder / "pair.json").read_text())
    assert said["start"] == pair.start
    assert said["rounds"]["rounds"][0]["reward"] == pair.rounds.rounds[0].reward
    assert said["hashes"]["reinforced"] == fingerprint(pair.reinforced)


def test_another_start_is_refused(taught: Planted, unchecked: None) -> None:
    with pytest.raises(ValueError, match="no start 'together'"):
        train_pair(taught.model, [], [], Answer(grade), start="together")  # type: ignore[arg-type]
