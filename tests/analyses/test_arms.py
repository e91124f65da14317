"""Tuning arms: what a run measures, that pairs are pairs, that a comparison resumes, and what a choice among options is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyses.arms import UNTUNED, Arms, Run, arms, option_nll, options
from analyses.statistics import crossed_bootstrap, tango, wilson
from analyses.tasks import Question, chained_sums, side_of
from surgery.model import Model
from tests.families import save_tiny, tiny

TRAIN = chained_sums(24, seed=1, terms=(2, 2))
HELD = chained_sums(6, seed=2, terms=(2, 2), side="test")
CHOICE = [Question(f"Is {n} even? Answer format: yes/no", "yes" if n % 2 == 0 else "no") for n in range(5)]
WAYS: dict[str, dict[str, Any]] = {
    "lift": {"lr": 1e-2},
    "still": {"lr": 0.0, "steps": 1},
    "full": {"method": "full", "lr": 1e-2},
}
SMALL: dict[str, Any] = {"steps": 3, "batch_size": 4, "autocast": False, "seeds": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("model") / "base"))


def compared(folder: str, to: Path, ways: Any = WAYS, **options: Any) -> Arms:
    known: dict[str, Any] = {
        "choices": {"even": CHOICE},
        "texts": ["A text.", "Another text."],
        "generate": 2,
        "max_new_tokens": 4,
    }
    return arms(folder, ways, TRAIN, target=HELD, to=to, **(SMALL | known | options))


@pytest.fixture(scope="module")
def found(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Arms:
    return compared(folder, tmp_path_factory.mktemp("arms") / "of")


def test_every_arm_and_seed_is_measured_on_everything(found: Arms) -> None:
    assert found.arms == list(WAYS)
    assert [(r.arm, r.seed) for r in found.runs] == [("untuned", 0), *((w, s) for s in (0, 1) for w in WAYS)]
    assert set(found.measures) == {"answer_nll", "completion_nll", "accuracy", "even_nll", "even_accuracy", "text_nll"}
    sizes = {"answer_nll": 6, "completion_nll": 6, "accuracy": 2, "even_nll": 5, "even_accuracy": 5, "text_nll": 2}
    for run in found.runs:
        assert len(run.losses) == {"untuned": 0, "still": 1}.get(run.arm, 3)  # a way's own options before those of all
        assert {name: len(values) for name, values in run.values.items()} == sizes


def test_an_arm_that_does_not_move_is_the_untuned_model_and_others_learn(found: Arms) -> None:
    for measure in found.measures:
        for row in found.table("still", measure):
            assert row.tolist() == found.table("untuned", measure)[0].tolist()
    assert found.table("full", "completion_nll").mean() < found.table("untuned", "completion_nll").mean()
    assert found.table("lift", "answer_nll").std(0).max() > 0  # the seeds differ


def test_differences_are_paired(found: Arms) -> None:
    frame = found.differences()
    assert set(frame["arm"]) == {"still", "full"}
    assert set(frame["base"]) == {"lift"}
    row = frame[(frame.arm == "full") & (frame.measure == "completion_nll")].iloc[0]
    table = found.table("full", "completion_nll") - found.table("lift", "completion_nll")
    assert row["value"] == pytest.approx(table.mean())
    assert row["by_seed"] == pytest.approx(table.mean(1), abs=1e-6)
    assert (row["low"], row["high"], row["n"], row["seeds"]) == (*_ends(table), 6, 2)
    against = found.differences("untuned")
    still = against[against.arm == "still"].set_index("measure")
    assert (still["value"] == 0).all()
    assert (still["low"] < still["high"]).tolist() == [
        name.endswith("accuracy") for name in still.index
    ]  # of six questions


def _ends(table: np.ndarray) -> tuple[float, float]:
    e = crossed_bootstrap(table)
    return e.low, e.high


def test_no_accuracy_is_certain() -> None:
    even = {"nll": (0.5,) * 9}  # is no share
    runs = [Run("untuned", 0, {"accuracy": (0.0,) * 9} | even)]
    runs += [Run("lift", s, {"accuracy": (1.0,) * 9} | even) for s in (0, 1)]
    found = Arms(tuple(runs))
    apart = found.differences(UNTUNED).set_index("measure")
    assert (apart.loc["accuracy", "low"], apart.loc["accuracy", "high"]) == (tango(9, 0, 9).low, 1)
    assert (apart.loc["nll", "low"], apart.loc["nll", "high"]) == (0, 0)
    frame = found.frame().set_index("measure")
    assert frame.loc["nll", "value"].tolist() == [0.5, 0.5]
    frame = frame.loc["accuracy"].set_index("arm")
    assert frame.loc["untuned", "high"] == wilson(0, 9).high
    assert frame.loc["lift", "low"] == wilson(9, 9).low


def test_a_share_of_one_seed_has_the_closed_interval() -> None:
    """Draws of eight questions are few and short of what eight can say; with more seeds these are drawn too."""
    untuned, lift = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    runs = [
        Run("untuned", 0, {"accuracy": untuned, "nll": (*untuned[:-1], 0.3)}),
        Run("lift", 0, {"accuracy": lift, "nll": (*lift[:-1], 0.2)}),
    ]
    frame = Arms(tuple(runs)).frame().set_index(["arm", "measure"])
    for arm, right in (("untuned", 1), ("lift", 3)):
        row, expected = frame.loc[(arm, "accuracy")], wilson(right, 8)
        assert (row["low"], row["high"], row["n"]) == (expected.low, expected.high, 8)
    apart = Arms(tuple(runs)).differences(UNTUNED).set_index("measure")
    assert (apart.loc["accuracy", "low"], apart.loc["accuracy", "high"]) == (tango(2, 0, 8).low, tango(2, 0, 8).high)
    table = np.array([(*lift[:-1], 0.2)])
    assert (frame.loc[("lift", "nll"), "low"], frame.loc[("lift", "nll"), "high"]) == _ends(table)  # no share
    more = Arms((*runs, Run("lift", 1, {"accuracy": untuned, "nll": untuned}))).frame().set_index(["arm", "measure"])
    assert tuple(more.loc[("lift", "accuracy"), ["low", "high"]]) == _ends(np.array([lift, untuned]))


def test_it_saves_loads_and_draws(found: Arms, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    found.save(tmp_path / "arms.json")
    again = Arms.load(tmp_path / "arms.json")
    assert again.runs == found.runs
    ax = again.plot("completion_nll", "text_nll", Figure().subplots())
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {*WAYS, "untuned"}


def test_an_interrupted_comparison_goes_on(
    folder: str, found: Arms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.tune

    whole, calls = finetune.tune.tune, []

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(finetune.tune, "tune", stop)
    with pytest.raises(KeyboardInterrupt):
        compared(folder, tmp_path / "of")
    again = compared(folder, tmp_path / "of")
    assert len(calls) == 3 + 4  # two runs were there already
    assert [r.values for r in again.runs] == [r.values for r in found.runs]
    for other in ({"steps": 2}, {"ways": {"lift": {}}}):
        with pytest.raises(FileExistsError, match=f"other {'shared' if 'steps' in other else 'ways'}"):
            compared(folder, tmp_path / "of", **other)
    with pytest.raises(FileExistsError, match="is not a comparison"):
        compared(folder, Path(folder))


def test_runs_of_a_model_that_was_rebuilt_are_not_mixed_with_the_old(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    few = {"ways": {"full": WAYS["full"]}, "seeds": 1, "steps": 1}
    compared(str(model), tmp_path / "of", **few)
    shutil.rmtree(model)
    save_tiny("llama", model, seed=1)
    with pytest.raises(FileExistsError, match="other weights"):
        compared(str(model), tmp_path / "of", **few)


def test_a_choice_is_normalised_over_the_options() -> None:
    model = Model(*tiny("llama"))
    nats, right = option_nll(model, CHOICE)
    for question, found, chosen in zip(CHOICE, nats, right, strict=True):
        scores = {}
        for option in ("yes", "no"):
            t = model.transcript(question.question, option)
            begin, end = t.spans["answer"]
            with torch.no_grad():
                p = model.module(input_ids=torch.tensor([t.ids])).logits[0].log_softmax(-1)
            scores[option] = math.exp(sum(float(p[i - 1, t.ids[i]]) for i in range(begin, end)))
        assert found == pytest.approx(-math.log(scores[question.answer] / sum(scores.values())), rel=1e-4)
        assert chosen == (max(scores, key=lambda option: scores[option]) == question.answer)
    assert options(Question("Which?", "b", meta={"options": ["a", "b"]})) == ["a", "b"]
    with pytest.raises(ValueError, match="an option without a word has no likelihood"):
        options(Question("Which?\nAnswer format: a/b/", "b"))


@pytest.mark.parametrize("question", [Question("Which?", "b"), Question("Which? Answer format: a/c", "b")])
def test_a_question_without_its_options(question: Question) -> None:
    with pytest.raises(ValueError, match="needs options among which the answer 'b' is"):
        options(question)


def test_bad_input(folder: str, found: Arms, tmp_path: Path) -> None:
    for bad in ({"ways": {}}, {"seeds": 0}, {"ways": {"untuned": {}}}):
        with pytest.raises(ValueError, match="at least 1 of each"):
            compared(folder, tmp_path / "of", **bad)
    with pytest.raises(ValueError, match="6 target questions, 7 to be answered"):
        compared(folder, tmp_path / "of", generate=7)
    assert not (tmp_path / "of").exists()
    with pytest.raises(ValueError, match="There is no 'speed' of 'lift'"):
        found.table("lift", "speed")
    with pytest.raises(ValueError, match="no pairs"):
        Arms((*found.runs, Run("lift", 2, found.runs[1].values))).differences()


def test_the_command(surgery, folder: str, tmp_path: Path) -> None:
    keep = tmp_path / "even.jsonl"
    keep.write_text("".join(json.dumps({"question": q.question, "answer": q.answer}) + "\n" for q in CHOICE))
    short = ["--steps", "2", "--batch-size", "2", "--seeds", "2", "--items", "4", "--answered", "2", "--passages", "2"]
    words = ["arms", folder, "--arms", "lift,full", *short, "--keep", keep, "--to", tmp_path / "out", "--quiet"]
    done = surgery(*words)
    assert done.code == 0, done.err
    assert "even_nll" in done.out
    made = {"arms.json", "arms.csv", "differences.csv", "differences.png", "trade_off.png", "record.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} >= made
    again = surgery(*words)
    assert again.code == 2
    assert "finished comparison" in again.err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert set(record["inputs"]) == {"model", "keep even"}
    replayed = surgery("replay", tmp_path / "out", "--to", tmp_path / "replayed")
    assert replayed.code == 0, replayed.err
    assert "2 outputs equal, 0 differ" in replayed.out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / keep.name).write_text(keep.read_text())
    twice = surgery(*words[:-2], tmp_path / "again", "--keep", tmp_path / "other" / keep.name, "--quiet")
    assert twice.code == 2
    assert "Two files of --keep are called 'even'" in twice.err


def test_the_command_where_only_answers_are_known(surgery, folder: str, tmp_path: Path) -> None:
    data = tmp_path / "asked.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(40)))
    short = ["--steps", "1", "--batch-size", "2", "--seeds", "1", "--items", "4", "--answered", "0", "--passages", "2"]
    words = ["arms", folder, "--arms", "lift, full", "--data", data, *short]
    done = surgery(*words, "--to", tmp_path / "out", "--quiet")
    assert done.code == 0, done.err
    assert set(json.loads((tmp_path / "out" / "record.json").read_text())["inputs"]) == {"model", "data"}
    held = sum(side_of(f"{i} + 1?") == "test" for i in range(40))
    all_of_it = surgery(*words[:-8], "--to", tmp_path / "all", "--dry-run")
    assert f"{40 - held} questions to learn, {held} held out" in all_of_it.out
    assert "--items 41" in surgery(*words, "--items", 41, "--to", tmp_path / "many").err
    assert (tmp_path / "out" / "trade_off.png").is_file()
    drawn = surgery("figure", "trade-off", tmp_path / "out", "--to", tmp_path / "t.png")
    assert drawn.code == 0, drawn.err
    drawn = surgery(
        "figure", "trade-off", tmp_path / "out", "--to", tmp_path / "u.png", "--x", "text_nll", "--y", "answer_nll"
    )
    assert drawn.code == 0, drawn.err
