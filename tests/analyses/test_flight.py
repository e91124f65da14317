"""The flight recorder's page: it tells what the log holds, no more, and what it lacks."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analyses.flight import HEADLINES, Curve, Flight, _placed, course, course_map, flight_recorder, write_page
from analyses.general_text import GENERAL_TEXT
from analyses.tasks import Question, chained_sums
from analyses.watch import WATCHES
from finetune.monitors import read_log
from finetune.tune import tune
from surgery.model import Model
from tests.families import tiny

QUESTIONS = chained_sums(8, seed=5, terms=(2, 3))


def line(step: int, monitor: str, seconds: float = 0.0, **numbers: Any) -> dict[str, Any]:
    return {"step": step, "monitor": monitor, "seconds": seconds, **numbers}


LINES = (
    line(0, "recorder", event="begin", steps=10, accumulate=2, budget=0.03, every={"nll": None, "never": None, "mine": 5}, model="<Model x>"),
    line(0, "nll", 0.5, answer_nll=4.0, low=3.0, high=5.0),
    line(1, "recorder", event="plan", every={"nll": 5}),
    line(1, "training", loss=3.0, grad_norm=1.0),
    line(5, "nll", 0.5, answer_nll=5.0),
    line(5, "mine", 2.0, failed="RuntimeError: no room left"),
    line(5, "geometry", 0.1, stable_rank=None, undefined=["stable_rank"]),
    line(5, "change", 0.1, all=0.1, **{"0.mlp.up": 0.05, "11.attn.o": 0.2}),
    line(10, "nll", 0.5, answer_nll=2.0),
    line(10, "representation", 0.25, **{"thinking.cka": 0.9, "thinking.L3.cka": 0.95, "thinking.L7.cka": 0.85, "answer.L7.cka": 0.99}),
    line(10, "geometry", 0.1, stable_rank=3.0, **{"7.mlp.down.stable_rank": 3.0}),
    line(10, "training", loss=1.0, grad_norm=0.5),
    line(10, "mine", 2.0, x=1.0),
    line(10, "recorder", event="end", training_seconds=100.0, measuring_seconds=5.5, budgeted_seconds=1.5, measured={}),
)  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in LINES))
    return path


def test_the_frame_has_every_number_once_and_in_its_place(log: Path) -> None:
    table = Flight.load(log).frame()
    keys = ["step", "monitor", "measure", "span", "site"]
    rows = {
        (*(r[k] for k in keys), None if r["layer"] is pd.NA else r["layer"]): r["value"]
        for r in table.to_dict("records")
    }
    assert len(rows) == len(table)
    apart = ("step", "seconds", "low", "high")
    numbers = [v for one in LINES if one["monitor"] != "recorder" for k, v in one.items() if k not in apart]
    assert sorted(rows.values()) == sorted(v for v in numbers if isinstance(v, float))
    assert rows[5, "change", "all", "", "", None] == 0.1
    assert rows[5, "change", "", "", "11.attn.o", 11] == 0.2
    assert rows[10, "representation", "cka", "thinking", "", 3] == 0.95
    assert rows[10, "geometry", "stable_rank", "", "7.mlp.down", 7] == 3.0
    assert rows[10, "representation", "thinking.cka", "", "", None] == 0.9
    assert "recorder" not in set(table["monitor"])
    sure = table[table["low"].notna() | table["high"].notna()]
    assert sure[["step", "measure", "value", "low", "high"]].to_numpy().tolist() == [[0, "answer_nll", 4.0, 3.0, 5.0]]
    headlines = Flight.load(log).headlines()
    assert list(headlines.columns) == ["step", "measure", "value", "low", "high"]
    assert headlines.loc[headlines["low"].notna(), ["value", "low", "high"]].to_numpy().tolist() == [[4.0, 3.0, 5.0]]
    nll = headlines[headlines["measure"] == HEADLINES["nll", "answer_nll"]]
    assert list(zip(nll["step"], nll["value"], strict=True)) == [(0, 4.0), (5, 5.0), (10, 2.0)]
    assert {"loss", "norm of the gradient"} < set(headlines["measure"])


def test_the_story_tells_first_last_half_and_extremes() -> None:
    curve = Curve("nll", "answer_nll", "answer NLL", (0, 5, 10), (4.0, 5.0, 2.0), ((3.0, 5.0), None, (1.0, 2.5)))
    assert curve.half == pytest.approx(
        5 + 5 * 2 / 3
    )  # the way from 4 to 2 first goes up to 5, and crosses 3 after two thirds
    assert str(curve) == "answer NLL: 4 at step 0, 2 [1, 2.5] at step 10; half of that by step 8; highest 5 at step 5"
    assert str(Curve("a", "b", "it", (3,), (1.0,), (None,))) == "it: 1 at step 3"
    assert (
        str(Curve("a", "b", "it", (0, 3), (1.0, 1.0), (None, None))) == "it: 1 at the first measurement and at the last"
    )
    assert Curve("a", "b", "it", (0, 3), (1.0, 1.0), (None, None)).half is None
    assert Curve("a", "b", "it", (0, 4), (0.0, 1.0), (None, None)).half == 2
    assert (
        Curve("a", "b", "it", (0, 10, 20, 30), (0.0, 0.5, 0.5, 1.0), (None,) * 4).half == 10
    )  # where it came to the half first


def test_an_interval_is_of_the_number_that_its_line_begins_with(log: Path) -> None:
    begins = line(10, "accuracy", 1.0, accuracy=0.5, low=0.2, high=0.8, missing=1, n=16, thinking_tokens=30.0)
    own = line(10, "mine", 1.0, low=1.0, high=2.0)
    flight = Flight((*LINES, begins, own))
    table: Any = flight.frame()
    rows = table[table["step"] == 10].set_index(["monitor", "measure"])
    assert rows.loc[("accuracy", "accuracy"), ["low", "high"]].tolist() == [0.2, 0.8]
    assert rows.loc[("accuracy", "thinking_tokens"), ["low", "high"]].isna().all()
    assert ("accuracy", "low") not in rows.index
    assert rows.loc[("mine", "low"), "value"] == 1.0
    assert "held-out accuracy: 0.5 [0.2, 0.8] at step 10" in flight.story()
    assert "0.2 to 0.8; from 0.5 at step 10" in flight.page(log.with_name("page.html")).read_text()


def test_two_lines_of_one_step_each_say_their_own() -> None:
    flight = Flight((line(4, "training", loss=2.0), line(4, "training", reward=0.5)))
    assert [(c.called, c.values) for c in flight.curves] == [
        ("training loss (nats per token)", (2.0,)),
        ("reward", (0.5,)),
    ]


def test_the_story_tells_what_failed_what_was_lost_and_what_it_cost(log: Path) -> None:
    story = Flight.load(log).story()
    assert repr(Flight.load(log)).splitlines() == story
    assert story == [
        "10 of 10 optimizer steps of <Model x>, each of 2 micro-batches.",
        "training loss (nats per token): 3 at step 1, 1 at step 10; half of that by step 6",
        "norm of the gradient: 1 at step 1, 0.5 at step 10; half of that by step 6",
        "answer NLL (nats per token): 4 at step 0, 2 at step 10; half of that by step 8; highest 5 at step 5",
        "relative change of the weights: 0.1 at step 5",
        "CKA with the start, over the thinking: 0.9 at step 10",
        "stable rank of the change: 3 at step 10",
        "change at step 5: highest at 11.attn.o (0.2)",
        "representation cka at step 10: lowest at layer 7 over the thinking (0.85)",
        "geometry stable rank at step 10: highest at 7.mlp.down (3)",
        "The monitor mine failed 1 of 2 times, first at step 5: RuntimeError: no room left",
        "geometry stable_rank was not finite at step 5",
        "Training took 100.0 s and watching it 5.5 s more, 5.5% of that; the budget of 3.0% was kept (1.5%)",
        "There was no time to measure never",
    ]


def test_a_budget_that_was_overdrawn_is_called_so(log: Path) -> None:
    lines = [*LINES[:-1], {**LINES[-1], "budgeted_seconds": 4.0}]
    assert any("was overdrawn (4.0%)" in said for said in Flight(tuple(lines)).story())


def test_a_run_that_was_cut_short_says_so(log: Path) -> None:
    said = Flight(LINES[:6]).story()
    assert said[0].startswith("5 of 10 optimizer steps")
    assert said[0].endswith("the end was not recorded.")
    assert not any("watching" in s for s in said)
    resumed = Flight((*LINES[:6], line(5, "recorder", event="begin"), *LINES[8:]))
    assert "resumed at step 5" in resumed.story()[0]


def test_costs_are_the_seconds_of_the_lines(log: Path) -> None:
    table = Flight.load(log).costs().set_index("monitor")
    assert list(table.loc["nll", ["measured", "failed", "steps", "seconds", "each", "share"]]) == [
        3,
        0,
        5,
        1.5,
        0.5,
        0.015,
    ]
    assert list(table.loc["mine", ["measured", "failed", "seconds"]]) == [2, 1, 4.0]


def test_the_story_is_of_the_last_measurement_and_the_last_end() -> None:
    begun = line(0, "recorder", event="begin", steps=20, every={"gradient": None, "geometry": 7}, budget=0.03)
    ended = {"event": "end", "measuring_seconds": 1.0, "budgeted_seconds": 1.0}
    values = [(0, 0.9, 0.8), (1, 0.7, 0.6), (2, 0.5, 0.4), (10, 0.2, 0.3)]
    measured = [
        line(
            step,
            "representation",
            1.0,
            **{"cka": 0.0, "L0.cka": low, "L1.cka": high, "L0.shift": high, "L1.shift": low},
        )
        for step, low, high in values
    ]
    first, last = (line(step, "recorder", training_seconds=10.0 * step, **ended) for step in (10, 20))
    flight = Flight((begun, *measured, first, line(10, "recorder", event="begin"), last))
    story = flight.story()
    assert "representation cka at step 10: lowest at layer 0 (0.2)" in story
    assert "representation shift at step 10: highest at layer 0 (0.3)" in story
    assert flight.costs()["steps"].tolist() == [1]
    assert flight.training_seconds == 200
    assert story[-1] == "There was no time to measure gradient"  # of the other it was said when


def test_it_is_saved_and_read_again(log: Path, tmp_path: Path) -> None:
    found = Flight.load(log)
    assert Flight.load(found.save(tmp_path / "deep" / "copy.jsonl")) == found
    assert not list((tmp_path / "deep").glob(".*"))


@pytest.mark.parametrize("text", ["", '{"step": 0, "mon'])
def test_a_log_without_a_line_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(ValueError, match="has no line: training has not begun"):
        Flight.load(tmp_path / "log")
    with pytest.raises(FileNotFoundError, match="no log at"):
        Flight.load(tmp_path / "nowhere")


def test_figures_draw_what_was_measured_and_refuse_what_was_not(log: Path) -> None:
    import matplotlib.pyplot as plt

    found = Flight.load(log)
    _, ax = plt.subplots()
    found.plot(ax, monitor="nll", measure="answer_nll")
    drawn = ax.get_lines()[0]
    assert (list(drawn.get_xdata()), list(drawn.get_ydata())) == ([0, 5, 10], [4, 5, 2])
    assert ax.get_ylabel() == HEADLINES["nll", "answer_nll"]
    _, ax = plt.subplots()
    found.plot(ax, monitor="representation", measure="cka", places=True)
    cells = ax.images[0].get_array()
    assert cells is not None
    assert cells.tolist() == [[0.95], [0.85], [0.99]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["thinking 3", "thinking 7", "answer 7"]
    for draw, measure in ((course, "beauty"), (course_map, "answer_nll")):
        with pytest.raises(ValueError, match=r"was not measured there; there is .*nll answer_nll"):
            draw(found.frame(), monitor="nll", measure=measure)
    plt.close("all")


class Parsed(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures = 0
        self.words = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.pictures += tag == "img"
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_whole_and_escapes_what_it_is_told(log: Path, tmp_path: Path) -> None:
    to = write_page(log)
    assert to == tmp_path / "log.html"
    page = Parsed()
    page.feed(to.read_text())
    assert not page.open
    assert page.pictures == len(Flight.load(log).curves) + 3 == 9  # and maps of change, CKA and stable rank
    assert "What training did to <Model x>" in page.words
    assert "RuntimeError: no room left" in page.words
    assert "http:" not in to.read_text()  # self-contained
    assert "https:" not in to.read_text()
    assert not list(tmp_path.glob(".*"))


@pytest.fixture(scope="module")
def flown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run with everything watched, with time enough."""
    where = tmp_path_factory.mktemp("flight")
    m = Model(*tiny("llama"))
    recorder = flight_recorder(
        m, where / "log.jsonl", questions=QUESTIONS, texts=GENERAL_TEXT[:2], budget=100, max_new_tokens=4
    )
    told = [m.transcript(q.question, q.completion(m.markers)) for q in QUESTIONS]
    done = tune(m, told, steps=4, batch_size=4, autocast=False, lr=1e-2, callbacks=[recorder])
    return where, done


def test_a_recorded_run_has_everything_and_its_page(flown: tuple[Path, Any]) -> None:
    where, done = flown
    lines = read_log(where / "log.jsonl")
    assert {one["monitor"] for one in lines} == {*WATCHES, "recorder", "training"} - {"drift"}
    assert not [one for one in lines if "failed" in one]
    found = Flight.load(where / "log.jsonl")
    losses = next(c for c in found.curves if c.measure == "loss")
    assert list(losses.values) == pytest.approx(done.losses)
    told = {(c.monitor, c.measure) for c in found.curves}
    assert told >= {
        key for key in HEADLINES if key[0] not in ("training", "drift") and key != ("accuracy", "thinking_tokens")
    }
    page = Parsed()
    page.feed((where / "log.html").read_text())
    assert not page.open
    assert page.pictures >= len(told)


def test_what_there_is_nothing_for_is_left_out(tmp_path: Path) -> None:
    m = Model(*tiny("llama"))
    recorder = flight_recorder(m, tmp_path / "log", questions=QUESTIONS, page=False)
    assert [w.name for w in recorder._watches] == [n for n in WATCHES if not n.startswith("drift")]
    some = flight_recorder(m, tmp_path / "log", questions=QUESTIONS, names=["nll"], steps=3)
    assert [(w.name, w.steps) for w in some._watches] == [("nll", 3)]
    with pytest.raises(ValueError, match="no monitor 'beauty'"):
        flight_recorder(m, tmp_path / "log", questions=QUESTIONS, names=["beauty"])


def test_questions_without_solutions_are_recorded_by_default(tmp_path: Path) -> None:
    """As gym tasks and plain files have them: what is read over the thinking is left out, and what is short is compared in fewer directions."""
    m = Model(*tiny("llama"))
    bare = [Question(q.question, q.answer) for q in QUESTIONS[:6]]
    recorder = flight_recorder(m, tmp_path / "log", questions=bare, budget=100, max_new_tokens=4)
    told = [m.transcript(q.question, q.completion(m.markers)) for q in bare]
    tokens = sum(t.spans["answer"][1] - t.spans["answer"][0] for t in told)
    assert tokens > 4
    tune(m, told, steps=2, batch_size=2, autocast=False, callbacks=[recorder])
    lines = read_log(tmp_path / "log")
    assert not [line for line in lines if "failed" in line]
    found = [line for line in lines if line["monitor"] == "representation"]
    assert {key.split(".")[0] for line in found for key in line} == {"step", "monitor", "seconds", "answer"}
    few = flight_recorder(m, tmp_path / "log", questions=bare[:1])
    assert "representation" not in [w.name for w in few._watches]
    with pytest.raises(ValueError, match=r"has a span thinking.*questions with a worked solution"):
        flight_recorder(m, tmp_path / "log", questions=bare, names=["representation"])


def test_without_questions_what_is_of_weights_and_texts_is_recorded(tmp_path: Path) -> None:
    m = Model(*tiny("llama"))
    recorder = flight_recorder(m, tmp_path / "log", questions=[], texts=GENERAL_TEXT[:2])
    assert [w.name for w in recorder._watches] == ["gradient", "change", "drift-general", "geometry"]
    with pytest.raises(ValueError, match="'nll' is measured on questions, and there are none"):
        flight_recorder(m, tmp_path / "log", questions=[], names=["nll"])
    with pytest.raises(ValueError, match="'drift-general' is measured on texts, and there are none"):
        flight_recorder(m, tmp_path / "log", questions=QUESTIONS, names=["drift-general"])


@pytest.mark.parametrize("site", ["3.mlp.e0.up", "3.mlp.shared.down", "3.attn.q", "3.mlp.e11.gate"])
def test_every_site_of_a_layer_has_its_place(site: str) -> None:
    for measure in ("", ".relative", ".energy_principal"):
        assert _placed(site + measure) == {"measure": measure[1:], "span": "", "layer": 3, "site": site}
