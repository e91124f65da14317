"""Sweeps: the same call for a steering, an edit and a delta; what is measured is what other measures say; resuming; the knee; random stand-ins."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from analyses import dose as module
from analyses import figures
from analyses.changes import Change, Editing, acting, confined, digest, stand_in
from analyses.dose import MEASURES, Cell, Line, Sweep, lengths, sweep
from analyses.general_text import GENERAL_TEXT
from analyses.representation import output_kl
from analyses.scoring import text_nll
from analyses.statistics import restricted_mean
from analyses.tasks import Question, accuracy
from analyses.watch import as_transcripts
from probes.directions import Direction
from probes.steering import Steering
from surgery.drawn import Noise
from surgery.edits import AddDirection, RemoveDirection, Scale, SwapLayers
from surgery.model import Model
from surgery.sites import Site
from surgery.transcript import Transcript
from surgery.weights import Delta, apply
from tests.families import FAMILIES, HIDDEN, tiny

QUESTIONS = [Question(f"{i} + {i}?", str(2 * i)) for i in range(6)]
TEXTS = [text[:40] for text in GENERAL_TEXT[:5]]
SHORT = {"questions": QUESTIONS, "texts": TEXTS, "length": "completion", "max_new_tokens": 12, "temperature": 1.0}


@pytest.fixture(scope="module")
def model() -> Model:
    return likely_to_end(Model(*tiny("llama", seed=1, tied=False)))


def likely_to_end(model: Model) -> Model:
    """A tiny model made to end its answers after some ten tokens: its head writes the end along the mean of the last stream."""
    module, end = model.module, int(model.tokenizer.eos_token_id)  # type: ignore[arg-type]
    with torch.no_grad():
        mean = module.base_model(input_ids=torch.arange(4, 100)[None]).last_hidden_state[0].mean(0)
        head = module.lm_head.weight  # type: ignore[union-attr]
        head.mul_(0.4)  # type: ignore[operator]
        head[end] = 3 * mean / mean.square().sum()  # type: ignore[index]
    return model


def vector(seed: int = 0, width: int = HIDDEN) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def changes(model: Model) -> dict[str, Change]:
    noise = Noise(apply(Scale(0.5), model.weights, "*.mlp.down") - model.weights, seed=1)
    return {
        "steering": Steering(vector(), at="1.resid"),
        "edit": Editing(RemoveDirection(vector()), "*.attn.o"),
        "task vector": noise,
    }


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.module(input_ids=torch.arange(4, 24)[None]).logits


# --- one call for all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["steering", "edit", "task vector"])
def test_one_call_sweeps_every_kind_of_change(model: Model, kind: str) -> None:
    before = logits(model)
    change = changes(model)[kind]
    strengths = (-0.5, 0.5, 1.0)
    found = sweep(model, change, strengths, **SHORT, controls=2, target=lambda _, ts: [len(t.ids) for t in ts])
    assert torch.equal(logits(model), before)
    table = found.frame()
    assert set(table["measure"]) == set(MEASURES)
    own = table[table["draw"].isna()]
    assert set(own["strength"]) == {0.0, *strengths}
    assert set(own["arm"]) == {kind}
    assert table["draw"].nunique() == 2
    assert len(table) == len(MEASURES) * 4 * 3
    judged = table[table["value"].notna() & table["low"].notna()]
    assert (judged["low"] <= judged["value"] + 1e-12).all()
    assert (judged["value"] <= judged["high"] + 1e-12).all()
    assert (judged["n"] > 0).all()
    kl = own[own["measure"] == "kl"].set_index("strength")["value"]
    assert kl[0.0] == 0
    assert (kl[[-0.5, 0.5, 1.0]] > 1e-5).all()
    assert kl.nunique() == 4
    drawn = table.query("measure == 'kl' and strength == 1").dropna(subset="draw")["value"]
    assert drawn.nunique() == 2  # one stand-in is not another
    zero = table[(table["strength"] == 0) & (table["measure"] == "text_nll")]
    assert zero["value"].nunique() == 1  # the untouched model, in every arm and stand-in


def test_what_is_measured_is_what_the_single_measures_say(model: Model) -> None:
    change = changes(model)["steering"]
    options = {**SHORT, "samples": 3}
    found = sweep(model, change, [0.4], **options, controls=0)
    cell = found.cells[1]
    table = found.frame().query("strength == 0.4").set_index("measure")
    with acting(change, model, 0.4):
        given = model.generate([q.question for q in QUESTIONS], samples=3, temperature=1.0, max_new_tokens=12)
    asked = [q for q in QUESTIONS for _ in range(3)]
    assert table.loc["accuracy", "value"] == accuracy(asked, given).overall.value
    assert table.loc["cut", "value"] == np.mean([not t.finished for t in given])
    counts, ended = lengths(given, "completion")
    assert cell.answers["length"] == tuple(counts)
    question = [i for i in range(6) for _ in range(3)]
    both = [found.cells[0].present("length")[1].max(), max(counts)]
    assert both == [12, 12]  # the cap
    mean = restricted_mean(counts, ended, until=12, clusters=question)
    for end in ("value", "low", "high", "n"):
        assert table.loc["length", end] == getattr(mean, end)
    everywhere = replace(change, over="all", strength=0.4)
    with acting(everywhere, model, 0.4):
        assert table.loc["text_nll", "value"] == pytest.approx(text_nll(model, TEXTS).mean.value, rel=1e-6)


def test_kl_is_that_of_the_changed_model_from_the_untouched(model: Model) -> None:
    change = changes(model)["edit"]
    assert isinstance(change, Editing)
    found = sweep(model, change, [1.0], **SHORT, controls=0, measures=["kl"]).frame()
    base, tuned = (likely_to_end(Model(*tiny("llama", seed=1, tied=False))) for _ in range(2))
    with tuned.installed(change.of(tuned.weights, 1.0)):
        texts = as_transcripts(base, TEXTS)
        expected = output_kl(base, tuned, texts, "all")["all"]
    value = found.query("strength == 1")["value"].item()
    assert value == pytest.approx(expected.value, rel=1e-4)
    assert value > 1e-3


def test_a_steering_over_a_span_still_shows_its_cost_on_text_without_spans(model: Model) -> None:
    steering = Steering(vector(), at="1.resid", over="thinking")
    table = sweep(model, steering, [0.5], **SHORT, controls=0, measures=["accuracy", "kl"]).frame()
    assert table.query("measure == 'kl' and strength == 0.5")["value"].item() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_back_bit_for_bit(family: str) -> None:
    model = Model(*tiny(family))
    before = logits(model)
    width = model.anatomy.d_model
    for change in (
        Steering(vector(width=width), at="2.resid"),
        Editing(RemoveDirection(vector(width=width)), "*.mlp.down"),
    ):
        found = sweep(
            model,
            change,
            [1.0],
            questions=["hello"],
            texts=TEXTS[:2],
            measures=["cut", "kl"],
            max_new_tokens=3,
            controls=1,
        )
        assert len(found.cells) == 3
        assert found.frame().query("measure == 'kl' and strength == 1")["value"].min() > 0
    assert torch.equal(logits(model), before)


def test_an_exception_inside_a_measure_gives_the_model_back(model: Model) -> None:
    before = logits(model)

    def broken(model: Model, transcripts: Sequence[Transcript]) -> list[float]:
        if not torch.equal(logits(model), before):
            raise RuntimeError("while the change acts")
        return [0.0] * len(transcripts)

    for change in changes(model).values():
        if isinstance(change, Steering):
            change = replace(change, over="all")
        with pytest.raises(RuntimeError, match="while the change acts"):
            sweep(model, change, [1.0], **SHORT, controls=0, target=broken)
        assert torch.equal(logits(model), before)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


# --- arms -------------------------------------------------------------------------------------------------------------


def test_layers_and_spans_are_arms_and_confine_the_change(model: Model) -> None:
    steering = Steering(vector(), at="*.resid")
    found = sweep(
        model,
        steering,
        [0.5],
        **SHORT,
        layers=[0, (1, 2)],
        span=["prompt", "completion"],
        controls=1,
        measures=["cut", "kl"],
    )
    own = [cell.line for cell in found.cells[1:] if cell.line.draw is None]
    assert own == [Line("steering", layers, span) for layers in ((0,), (1, 2)) for span in ("prompt", "completion")]
    assert len(found.cells) == 1 + 4 * 2
    assert "steering, layers 1 2, prompt" in set(found.frame()["arm"])
    with pytest.raises(ValueError, match="Say which arm"):
        found.trend("kl")
    assert found.trend("kl", "steering, layer 0, prompt").n == len(TEXTS)
    for kind, change in {
        "*.attn.o": Editing(RemoveDirection(vector()), "*.attn.o"),
        "**": changes(model)["task vector"],
    }.items():
        part = confined(change, model, layers=[1])
        with acting(part, model, 1.0):
            changed = {s for s in model.weights if not torch.equal(model.weights[s], untouched(model)[s])}
        assert {s.layer for s in changed} == {1}, kind


def untouched(model: Model) -> dict[Site, torch.Tensor]:
    if not hasattr(untouched, "kept"):
        untouched.kept = {s: model.weights[s].clone() for s in model.weights}  # type: ignore[attr-defined]
    return untouched.kept  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _remember(model: Model) -> None:
    untouched(model)


def test_several_changes_by_name(model: Model) -> None:
    found = sweep(model, changes(model), [1.0], **SHORT, controls=0, measures=["text_nll"])
    assert [cell.line.arm for cell in found.cells] == ["untouched", "steering", "edit", "task vector"]


def test_a_direction_is_swept_as_its_raw_vectors_are(model: Model) -> None:
    raw = {Site(1, "mid"): 3 * vector(1), Site(2, "mid"): 0.5 * vector(2)}
    options = {**SHORT, "controls": 1, "measures": ["cut", "kl"], "layers": [1, 2]}
    found = [sweep(model, Steering(d, units="raw"), [1.0], **options) for d in (Direction.of(raw), raw)]
    assert [cell.line.layers for cell in found[0].cells] == [None, (1,), (2,), (1,), (2,)]
    for one, other in zip(found[0].cells, found[1].cells, strict=True):
        assert one.key == other.key
        assert one.passages["kl"] == pytest.approx(other.passages["kl"], rel=1e-3, abs=1e-6)
    assert found[0].cells[1].passages["kl"] != found[0].cells[2].passages["kl"]


# --- random stand-ins -------------------------------------------------------------------------------------------------


def test_stand_ins_have_the_norm_of_what_they_stand_for(model: Model) -> None:
    first, again, other = (stand_in(changes(model)["steering"], model, seed=0, draw=d) for d in (0, 0, 1))
    assert isinstance(first, Steering)
    assert float(first.direction.norm()) == pytest.approx(float(vector().norm()), rel=1e-5)
    assert torch.equal(first.direction, again.direction)  # type: ignore[union-attr]
    assert not torch.equal(first.direction, other.direction)  # type: ignore[union-attr]
    assert abs(float(torch.cosine_similarity(first.direction, vector(), dim=0))) < 0.6
    by_site = {Site(0, "resid"): vector(1), Site(2, "resid"): 3 * vector(2)}
    drawn = stand_in(Steering(by_site), model, seed=0, draw=0)
    assert isinstance(drawn, Steering)
    for site, own in by_site.items():
        assert float(drawn.direction[site].norm()) == pytest.approx(float(own.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(*drawn.direction.values(), dim=0))) < 0.6
    measured = stand_in(Steering(Direction.of(by_site)), model, seed=0, draw=0)
    assert isinstance(measured, Steering)
    for site, own in by_site.items():  # a direction's own length, not 1
        assert float(measured.direction[site].norm()) == pytest.approx(float(own.norm()), rel=1e-5)
    edit = stand_in(Editing(AddDirection(5 * vector()), "*.mlp.down"), model, seed=0, draw=0)
    assert isinstance(edit, Editing)
    assert float(edit.edit.direction.norm()) == pytest.approx(5 * float(vector().norm()), rel=1e-5)
    assert edit.at == "*.mlp.down"


def test_an_edit_without_a_direction_is_stood_in_for_by_noise_of_its_norm(model: Model) -> None:
    for edit, at in ((Scale(0.5), ("1.mlp.*",)), (SwapLayers(0, 1), None)):
        whole = Editing(edit, at).of(model.weights, 1.0) - model.weights
        drawn = stand_in(Editing(edit, at), model, seed=3, draw=0)
        assert isinstance(drawn, Delta)
        norms = {site: norm for site, norm in whole.norms().items() if norm}
        assert drawn.norms() == pytest.approx(norms, rel=1e-4)
        assert set(drawn) == set(norms)
        site = next(iter(norms))
        assert torch.equal(drawn[site], drawn[site])
        assert not torch.equal(drawn[site], stand_in(Editing(edit, at), model, seed=3, draw=1)[site])  # type: ignore[index]
        assert torch.equal(torch.cat(list(drawn.strips(site, [slice(0, 3), slice(3, None)]))), drawn[site])


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_sweep_goes_on_and_gives_the_same_table(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = changes(model)["steering"]
    strengths = (-0.3, 0.3, 0.6)
    whole = sweep(model, change, strengths, **SHORT, controls=1, to=tmp_path / "whole")
    done: list[float] = []
    measure = module._Bench.measure

    def counted(self, change, strength):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(strength)
        return measure(self, change, strength)

    monkeypatch.setattr(module._Bench, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, change, strengths, **SHORT, controls=1, to=tmp_path / "broken")
    assert len(list((tmp_path / "broken" / "cells").iterdir())) == 4
    done[:] = [math.nan]
    again = sweep(model, change, strengths, **SHORT, controls=1, to=tmp_path / "broken")
    assert len(done) == 1 + 3  # only what was missing
    assert again == whole
    pd.testing.assert_frame_equal(again.frame(), whole.frame())
    done[:] = []
    assert sweep(model, change, strengths, **SHORT, controls=1, to=tmp_path / "broken") == whole
    assert not done
    more = sweep(model, change, (*strengths, 0.9), **SHORT, controls=0, to=tmp_path / "broken")
    assert done == [0.9]
    assert [cell.strength for cell in more.cells] == [0, -0.3, 0.3, 0.6, 0.9]
    for name in (p.name for p in (tmp_path / "whole" / "cells").iterdir()):
        assert (tmp_path / "whole" / "cells" / name).read_bytes() == (tmp_path / "broken" / "cells" / name).read_bytes()
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]


def test_a_direction_of_another_model_is_not_swept_unless_carried(model: Model) -> None:
    strange = Direction.of({Site(1, "mid"): vector()}, model="0" * 64)
    options = {**SHORT, "controls": 0, "measures": ["kl"]}
    with pytest.raises(ValueError, match=r"measured in another model.*carried_to"):
        sweep(model, Editing(RemoveDirection(strange), "1.attn.o"), [1.0], **options)
    sweep(model, Editing(RemoveDirection(strange.carried_to(model)), "1.attn.o"), [1.0], **options)


def test_a_folder_of_other_settings_is_refused_and_named(model: Model, tmp_path: Path) -> None:
    change = changes(model)["edit"]
    options = {**SHORT, "controls": 0, "measures": ["kl"], "to": tmp_path / "a"}
    sweep(model, change, [1.0], **options)
    other = Editing(RemoveDirection(vector(1)), "*.attn.o")
    for what, call in {
        "changes": lambda: sweep(model, other, [1.0], **options),
        "max_new_tokens": lambda: sweep(model, change, [1.0], **{**options, "max_new_tokens": 13}),
        "questions": lambda: sweep(model, change, [1.0], **{**options, "questions": QUESTIONS[:5]}),
        "texts": lambda: sweep(model, change, [1.0], **{**options, "texts": TEXTS[::-1]}),
        "seed": lambda: sweep(model, change, [1.0], **{**options, "seed": 1}),
        "model": lambda: sweep(Model(*tiny("llama", seed=2, tied=False)), change, [1.0], **options),
    }.items():
        with pytest.raises(FileExistsError, match=f"other .*{what}"):
            call()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="not a sweep"):
        sweep(model, change, [1.0], **{**options, "to": tmp_path / "mine"})


def test_saved_and_loaded_it_is_the_same(model: Model, tmp_path: Path) -> None:
    found = sweep(model, changes(model), [0.5], **SHORT, controls=1, layers=[1])
    found.save(tmp_path / "sweep.json")
    again = Sweep.load(tmp_path / "sweep.json")
    assert again.cells == found.cells
    pd.testing.assert_frame_equal(again.frame(), found.frame())
    assert json.loads((tmp_path / "sweep.json").read_text())["settings"]["controls"] == 1


def test_a_digest_tells_changes_apart(model: Model) -> None:
    things = [
        *changes(model).values(),
        Editing(RemoveDirection(vector()), "*.mlp.down"),
        Editing(RemoveDirection(vector(1)), "*.attn.o"),
        Steering(vector(), at="2.resid"),
        Steering(2 * vector(), at="1.resid"),
        QUESTIONS, QUESTIONS[:3], TEXTS, ["ab"], ["a", "b"], len, None, 0.5,
    ]  # fmt: skip
    assert len({digest(thing) for thing in things}) == len(things)
    made = [lambda x: x + 1, lambda x: x + 2, lambda x: x - 1, partial(max, 1), partial(max, 2)]

    def times(n: int) -> Callable[[int], int]:
        return lambda x: x * n

    made += [times(3), times(4), partial(int, base=8), partial(int, base=10), lambda x: x.real, lambda x: x.imag]
    made += [lambda x, *, n=1: x, lambda x, *, n=2: x, lambda x: (lambda: x + 1)(), lambda x: (lambda: x + 2)()]
    made += [type("Own", (), {"__call__": called})() for called in (lambda _, x: x, lambda _, x: -x)]
    assert len({digest(thing) for thing in made}) == len(made)
    told = "from analyses.changes import digest; print(digest([lambda x: x in {'yes', 'no', 'perhaps'}, {'yes', 'no', 'perhaps'}]))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", told],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1  # a folder is gone on with by another process
    assert [digest(c) for c in changes(model).values()] == [digest(c) for c in changes(model).values()]


class Words:
    """Counts words of its own."""

    def __init__(self, *words: str):
        self.words = words

    def __call__(self, model: Model, transcripts: Sequence[Transcript]) -> list[float]:
        return [float(sum(t.text.count(word) for word in self.words)) for t in transcripts]

    def count(self, model: Model, transcripts: Sequence[Transcript]) -> list[float]:
        return self(model, transcripts)


def using(held: object) -> Callable[[Model, Sequence[Transcript]], list[float]]:
    return lambda _, transcripts: [float(hash(str(held))) for _ in transcripts]


def test_a_digest_tells_targets_apart_by_what_they_hold(model: Model) -> None:
    """Whatever a target closes over, is bound to or keeps as its own."""
    held = [
        QUESTIONS[0], QUESTIONS[1], Site(1, "mid"), Site(2, "mid"), {"a": 1}, {"a": 2}, {"a": {"b": 2}}, [], {},
        {"a": {"b": 2}, "c": 1}, {"a": {"b": 2, "c": 1}}, [[1], 2], [1, [], 2], frozenset("ab"), frozenset("ac"),
        np.arange(3), np.arange(3.0), np.arange(4), np.float32(0.5), len, math.sqrt, using(1), using(2), Words("a"), Words("b"), Question, Words,
        re.compile("a" * 300), re.compile("a" * 301), re.compile("a", re.IGNORECASE), Path("a"), None, math, torch.float32, torch.nn.Linear(2, 2),
        re.compile("a"), [1, 2], [12], {"1": 2, "3": 4}, {"1:2,3": 4}, {1: 2, 3: 4}, torch.zeros(4), torch.zeros(2, 2), torch.zeros(2).double(),
        (model.weights - model.weights).keep(layers=[0]), (model.weights - model.weights).keep(layers=[1]),
        torch.nn.Linear(2, 2), Words("a").count, Words("b").count, "abc".count, "abd".count, vector(), vector(1), model, Model(*tiny("llama")),
    ]  # fmt: skip
    targets = [using(thing) for thing in held] + [Words("a"), Words("b"), Words("a").count, Words("b").count]
    assert len({digest(target) for target in targets}) == len(targets)
    for again in (using(QUESTIONS[0]), using(frozenset("ab")), using(Words("a")), Words("a").count):
        assert digest(again) in {digest(target) for target in targets}

    def itself(_: Model, transcripts: Sequence[Transcript]) -> list[float]:
        return itself(_, transcripts[1:])

    assert digest(itself) == digest(itself)


def test_what_has_no_stable_bytes_is_not_resumed(model: Model, tmp_path: Path) -> None:
    for held in (object(), torch.Generator(), iter([1])):
        with pytest.raises(ValueError, match=r"cannot be told from another.*Leave out `to`"):
            sweep(model, changes(model)["edit"], (1.0,), **SHORT, controls=0, target=using(held), to=tmp_path / "kept")
        assert not (tmp_path / "kept").exists()


def test_a_folder_is_not_resumed_with_another_target(model: Model, tmp_path: Path) -> None:
    given = {**SHORT, "controls": 0, "measures": ("target",), "to": tmp_path / "kept"}
    change = changes(model)["edit"]
    first = sweep(model, change, (1.0,), **given, target=using(QUESTIONS[0]))
    with pytest.raises(FileExistsError, match="holds a sweep with other target"):
        sweep(model, change, (1.0,), **given, target=using(QUESTIONS[1]))
    assert sweep(model, change, (1.0,), **given, target=using(QUESTIONS[0])) == first


# --- the table, without a model ---------------------------------------------------------------------------------------


def made(
    kl: dict[float, float], long: dict[float, list[tuple[int, bool]]] | None = None, draw: int | None = None
) -> Sweep:
    """A sweep with a KL and lengths at each strength."""
    cells = []
    for strength in sorted(kl, key=abs):
        line = Line("untouched") if strength == 0 else Line("steering", draw=draw)
        rows = (long or {}).get(strength, [])
        answers = {
            "question": tuple(range(len(rows))),
            "length": tuple(n for n, _ in rows),
            "ended": tuple(e for _, e in rows),
        }
        cells.append(
            Cell(line, strength, answers if long else {}, {"tokens": (10, 10), "kl": (10 * kl[strength],) * 2})
        )
    return Sweep(tuple(cells), budget=0.05, seed=0)


def test_the_knee_is_the_last_strength_before_the_budget_is_spent() -> None:
    kl = {-2: 0.01, -1: 0.2, -0.5: 0.04, 0: 0.0, 0.5: 0.01, 1: 0.05, 2: 0.051, 3: 0.02}
    knees = made(kl).knees().set_index("side")
    assert knees.loc["below", "strength"] == -0.5  # though further out it is cheap again
    assert knees.loc["above", "strength"] == 1  # at the budget is not above it
    assert knees["reached"].all()
    table = made(kl).frame()
    assert sorted(table.loc[table["knee"], "strength"]) == [-0.5, 1]
    assert made({0: 0.0, 1: 0.9}).knees()[["strength", "reached"]].to_numpy().tolist() == [[0.0, True]]
    assert made({0: 0.0, 1: 0.01, 2: 0.02}).knees()[["strength", "reached"]].to_numpy().tolist() == [[2.0, False]]
    assert not made({0: 0.0, 1: 0.01}).frame()["knee"].any()
    broken = made({0: 0.0, 1: 0.01, 2: math.nan}).knees()  # a model that says NaN is not cheap
    assert broken[["strength", "reached"]].to_numpy().tolist() == [[1.0, True]]


def test_lengths_are_compared_as_far_as_all_strengths_were_followed() -> None:
    long = {
        0.0: [(5, True), (9, True), (20, False)],
        1.0: [(12, True), (18, False), (18, False)],
        2.0: [(2, False), (1, True), (2, False)],
    }
    table = made({0: 0.0, 1: 0.0, 2: 0.0}, long).frame().query("measure == 'length'").set_index("strength")
    assert table.loc[0.0, "value"] == pytest.approx((5 + 9 + 18) / 3)
    assert table.loc[1.0, "value"] == pytest.approx((12 + 18 + 18) / 3)
    assert math.isnan(table.loc[2.0, "value"])
    assert table.loc[2.0, "method"] == "followed to 2 only"


def test_the_trend_ranks_strengths_within_questions() -> None:
    ease = np.random.default_rng(0).integers(5, 40, size=15)
    long = {s: [(int(e + 3 * s), True) for e in ease] for s in (-1.0, 0.0, 1.0, 2.0)}
    found = made(dict.fromkeys(long, 0.0), long).trend()
    assert found.z > 5
    assert found.n == 15
    falling = {-s: rows for s, rows in long.items()}
    assert made(dict.fromkeys(falling, 0.0), falling).trend("length").z == pytest.approx(-found.z)
    capped = {
        0.0: [(20, True), (25, True), (30, True)],
        1.0: [(18, False)] * 3,
    }  # all are known to be at least 18, and no more
    assert made(dict.fromkeys(capped, 0.0), capped).trend().z == 0


def test_missing_answers_are_missing_and_not_zero() -> None:
    answers = {
        "question": (0, 1, 2, 3),
        "right": (True, None, False, True),
        "length": (4, None, 6, 8),
        "ended": (True, None, True, True),
    }
    answers["target"] = (1.0, None, 3.0, None)
    table = Sweep((Cell(Line("untouched"), 0.0, answers, {}),), 0.05, 0).frame().set_index("measure")
    assert table["value"].to_dict() == {"target": 2.0, "accuracy": 0.5, "length": 6.0}
    assert table["missing"].to_dict() == {"target": 2, "accuracy": 1, "length": 1}
    assert table["n"].to_dict() == {"target": 2, "accuracy": 4, "length": 3}
    answers["question"] = (0, 1, 0, 2)  # what one question is asked again
    table = Sweep((Cell(Line("untouched"), 0.0, answers, {}),), 0.05, 0).frame().set_index("measure")
    assert table["n"].to_dict() == {"target": 1, "accuracy": 3, "length": 2}


def test_lengths_say_what_was_cut_off() -> None:
    def transcript(spans: dict[str, tuple[int, int]], count: int, finished: bool) -> Transcript:
        return Transcript("q", tuple(range(count)), "", ((0, 0),) * count, spans, finished)

    runs = [
        transcript({"thinking": (3, 7), "answer": (8, 9)}, 10, True),  # closed and ended
        transcript({"thinking": (3, 7), "answer": (8, 10)}, 10, False),  # closed, the answer cut off
        transcript({"thinking": (3, 10)}, 10, False),  # never closed
        transcript({"thinking": (3, 9)}, 10, True),  # never closed, but ended
        transcript({"answer": (3, 9)}, 10, True),
    ]
    assert lengths(runs) == ([4, 4, 7, 6, None], [True, True, False, True, None])
    assert lengths(runs, "answer") == ([1, 2, None, None, 6], [True, False, None, None, True])


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_figure_has_a_line_a_band_and_the_knee() -> None:
    own, drawn = made({0: 0.0, 1: 0.04, 2: 0.5}), [made({0: 0.0, 1: 0.01 * d, 2: 0.1 * d}, draw=d) for d in (1, 2, 3)]
    both = Sweep((*own.cells, *(c for d in drawn for c in d.cells[1:])), 0.05, 0)
    ax = both.plot(Figure().subplots())
    assert ax.lines[0].get_xydata().tolist() == [[0, 0], [1, pytest.approx(0.04)], [2, pytest.approx(0.5)]]
    band = ax.collections[1].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.3)
    at_two = band[band[:, 0] == 2][:, 1]
    assert (at_two.min(), at_two.max()) == pytest.approx((0.1, 0.3))
    dashed = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed == [1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["steering", "steering, random"]
    plain = own.plot(Figure().subplots(), measure="kl")
    assert len(plain.collections) == 1
    with pytest.raises(ValueError, match=r"'beauty'.*kl"):
        own.plot(Figure().subplots(), measure="beauty")


def test_all_measures_in_one_figure(model: Model) -> None:
    found = sweep(model, changes(model)["edit"], [0.5, 1.0], **SHORT, controls=1)
    drawn = figures.panels(figures.sweep, found.frame())
    assert len(drawn.axes) == len(MEASURES) - 1  # no target was given
    assert len(figures.png(drawn)) > 10000


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named_before_anything_is_measured(
    model: Model, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    monkeypatch.setattr(module._Bench, "measure", lambda *_: pytest.fail("measured"))
    steering = changes(model)["steering"]
    edit = changes(model)["edit"]
    other = Model(*tiny("gemma2"))
    for says, call in {
        "finite": lambda: sweep(model, steering, [0.1, math.nan], **SHORT),
        "one finite number": lambda: sweep(model, steering, [], **SHORT),
        "choose of target": lambda: sweep(model, steering, [1], **SHORT, measures=["beauty"]),
        "needs a target": lambda: sweep(model, steering, [1], **SHORT, measures=["target"]),
        "questions with answers": lambda: sweep(model, steering, [1], **{**SHORT, "questions": ["a"]}, measures=["accuracy"]),
        "no question": lambda: sweep(model, steering, [1], **{**SHORT, "questions": []}),
        "0 or more": lambda: sweep(model, steering, [1], **SHORT, controls=-1),
        "Only a steering": lambda: sweep(model, edit, [1], **SHORT, span="thinking"),
        "layer 7; it acts in 0, 1, 2": lambda: sweep(model, edit, [1], **SHORT, layers=[7]),
        "layer 2; it acts in 1": lambda: sweep(model, steering, [1], **SHORT, layers=[2]),
        "There is no layer 7": lambda: sweep(model, changes(model)["task vector"], [1], **SHORT, layers=[7]),
        "names itself": lambda: sweep(model, Editing(SwapLayers(0, 1)), [1], **SHORT, layers=[1]),
        "A point is not a change": lambda: sweep(model, model.weights, [1], **SHORT),
        "cannot be swept": lambda: sweep(model, vector(), [1], **SHORT),
        "no strength": lambda: Editing(vector(), "*.attn.o"),
        "width|wide": lambda: sweep(model, Steering(vector(width=9), at="1.resid"), [1], **SHORT),
        "needs the direction of its layer": lambda: sweep(model, Editing(RemoveDirection({"1.mid": vector()}), "*.attn.o"), [1], **SHORT),
        "0.attn.nothing": lambda: sweep(model, Editing(Scale(0.0), "0.attn.nothing"), [1], **SHORT),
        "of length 9": lambda: sweep(model, Editing(RemoveDirection(vector(width=9)), "*.attn.o"), [1], **SHORT),
        "same anatomy": lambda: sweep(model, other.weights - other.weights, [1], **SHORT),
        "controls=0": lambda: sweep(model, Steering(how=lambda rows: rows, at="1.resid"), [1], **SHORT),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=says):
            call()


def test_lengths_that_cannot_be_known_are_an_error(model: Model) -> None:
    options = {**SHORT, "measures": ["length"], "controls": 0}
    with pytest.raises(ValueError, match=r"None of the untouched model's 6 answers has a span 'thinking'"):
        sweep(model, changes(model)["edit"], [1], **{**options, "length": "thinking"})
    never = likely_to_end(Model(*tiny("llama", seed=1, tied=False)))
    with torch.no_grad():
        never.module.lm_head.weight[int(never.tokenizer.eos_token_id)].zero_()  # type: ignore[union-attr, index, arg-type]
    with pytest.raises(ValueError, match=r"cap of 12 tokens cut off all 6 spans 'completion'"):
        sweep(
            never, changes(never)["edit"], [1], **{**options, "temperature": 0.0}
        )  # some other token is always likelier


def test_a_target_that_is_infinite_is_an_error_and_nothing_is_kept(model: Model, tmp_path: Path) -> None:
    given = {**SHORT, "controls": 0, "to": tmp_path / "sweep"}
    with pytest.raises(ValueError, match=r"The target gave -inf .* 6 transcripts: .* finite .* None"):
        sweep(model, changes(model)["edit"], [1], **given, target=lambda *_: [1.0, None, -math.inf, 2.0, 3.0, math.nan])
    assert not list((tmp_path / "sweep").rglob("cells/*"))


def test_targets_that_are_all_equal_have_no_interval(model: Model) -> None:
    found = sweep(
        model,
        changes(model)["edit"],
        [1],
        **SHORT,
        controls=0,
        measures=["target"],
        target=lambda *_: [2.5] * 5 + [None],
    )
    for row in found.frame().to_dict("records"):
        assert (row["value"], row["n"], row["missing"], row["method"]) == (2.5, 5, 1, "no interval: all draws agree")
        assert math.isnan(row["low"])


def test_a_removal_of_a_random_direction_need_not_be_as_large(model: Model) -> None:
    """How much goes is what the weights write along the direction: the legend says no more than that it is random."""
    site = Site.parse("1.attn.o")
    along = torch.linalg.svd(model.weights[site].float())[0][:, 0]
    change = Editing(RemoveDirection(along), str(site))
    removed = (change.of(model.weights, 1.0)[site] - model.weights[site]).norm()
    drawn = stand_in(change, model, seed=0, draw=0)
    assert drawn.edit.direction.norm() == pytest.approx(1)  # type: ignore[union-attr]
    assert (drawn.of(model.weights, 1.0)[site] - model.weights[site]).norm() < 0.8 * removed  # type: ignore[union-attr]


def test_a_target_of_another_length_is_an_error(model: Model) -> None:
    with pytest.raises(ValueError, match="1 numbers for 6 transcripts"):
        sweep(model, changes(model)["edit"], [1], **SHORT, controls=0, target=lambda *_: [1.0])
