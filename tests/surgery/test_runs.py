"""Transcripts as a file: what is read is what was written, and a file that is not whole says so."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.model import Model
from surgery.runs import Runs, fingerprint
from surgery.transcript import Transcript, read_transcript
from tests.families import characters, save_tiny, tiny

TOKENIZER = characters()


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(*tiny("llama"))


@pytest.fixture(scope="module")
def runs(model: Model) -> Runs:
    told = model.generate(["How many?", "Who?"], samples=3, seed=4, max_new_tokens=7)
    return Runs(tuple(told), fingerprint(model), {"samples": 3, "seed": 4})


def test_what_is_read_is_what_was_written(runs: Runs, tmp_path: Path) -> None:
    assert len({t.finished for t in runs}) or len(runs) == 6
    path = runs.save(tmp_path / "deep" / "runs.jsonl")
    again = Runs.load(path)
    assert again == runs
    assert [t.sentences for t in again] == [t.sentences for t in runs]
    assert (tmp_path / "deep" / "again.jsonl") == again.save(tmp_path / "deep" / "again.jsonl")
    assert path.read_bytes() == (tmp_path / "deep" / "again.jsonl").read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["again.jsonl", "runs.jsonl"]


@given(
    st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=30),
    st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5) | st.lists(st.booleans())),
)
@settings(max_examples=60, deadline=None)
def test_any_tokens_and_any_meta_come_back(tmp_path_factory, prompt, completion, meta) -> None:
    made = read_transcript(TOKENIZER, "\u2028 Q\n\x85", prompt, completion)
    told = replace(made, meta=meta)
    path = tmp_path_factory.mktemp("any") / "runs.jsonl"
    Runs((told, made)).save(path)
    assert Runs.load(path) == Runs((told, made))


def test_runs_are_a_sequence(runs: Runs) -> None:
    assert len(runs) == 6
    assert runs.questions == ["How many?", "Who?"]
    assert list(runs)[2] is runs[2]
    assert runs[1:3].transcripts == runs.transcripts[1:3]
    assert runs[1:3].model == runs.model
    assert [t.question for t in runs.of(["Who?"])] == ["Who?"] * 3
    with pytest.raises(ValueError, match="None of the 6 transcripts"):
        runs.of(["Why?"])


def test_the_model_is_known_by_its_values(runs: Runs, model: Model, tmp_path: Path) -> None:
    runs.require(model)
    Runs(runs.transcripts).require(model)  # not known
    folder = save_tiny("llama", tmp_path / "half", dtype=torch.bfloat16)
    half, whole = (Model.load(folder, device="cpu", dtype=d) for d in ("bfloat16", "float32"))
    assert fingerprint(half) == fingerprint(whole)
    Runs(runs.transcripts, fingerprint(half)).require(whole)
    with torch.no_grad():
        whole.weights.parameter("1.attn.o")[0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        Runs(runs.transcripts, fingerprint(half)).require(whole)


def test_what_json_would_change_is_refused_and_nothing_is_left(runs: Runs, tmp_path: Path) -> None:
    for bad in ({"span": (1, 2)}, {"x": float("nan")}, {"t": torch.ones(1)}, {"deep": {3: 1}}):
        spoiled = replace(runs[0], meta=bad)
        with pytest.raises(ValueError, match=r"meta .* JSON does not give back"):
            Runs((runs[1], spoiled)).save(tmp_path / "runs.jsonl")
        with pytest.raises(ValueError, match="about"):
            Runs((runs[1],), None, bad).save(tmp_path / "runs.jsonl")
    assert not list(tmp_path.iterdir())


def spoiled_line(**change: object) -> list[str]:
    row = {"question": "Q", "text": "ab", "ids": [5, 6], "offsets": [[0, 1], [1, 2]], "spans": {"all": [0, 2]}}
    row |= {"finished": True, "meta": {}} | change
    return [json.dumps({k: v for k, v in row.items() if v != "gone"})]


HEAD = json.dumps({"runs": 1, "model": None, "about": {}, "count": 1})


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"question": "1 + 1", "answer": "2"}'], "does not begin with the line"),
        ([""], "line 1: not JSON"),
        (["question,answer"], "Transcripts are a .jsonl file that `surgery generate` writes"),
        (["[]"], "line 1: a JSON object is needed"),
        ([HEAD], "holds 0 transcripts where its first line says 1"),
        ([HEAD, *spoiled_line(), *spoiled_line()], "holds 2 transcripts"),
        ([HEAD, spoiled_line()[0][:-9]], "line 2: not JSON"),
        ([HEAD, *spoiled_line(text="gone")], "line 2: text is not there"),
        ([HEAD, *spoiled_line(finished=1)], "line 2: finished is not what it should be"),
        ([HEAD, *spoiled_line(ids=[5])], "1 token ids and 2 offsets"),
        ([HEAD, *spoiled_line(ids=[5, "6"])], "an id is a whole number"),
        ([HEAD, *spoiled_line(offsets=[[0, 1], [1]])], "a span is two whole numbers"),
        ([HEAD, *spoiled_line(spans={"answer": [1, 3]})], "the span answer is not within its 2 tokens"),
        ([HEAD, *spoiled_line(offsets=[[1, 2], [0, 1]])], "the offsets are not within"),
        ([HEAD, *spoiled_line(offsets=[[-3, 1], [1, 2]])], "the offsets are not within"),
        ([HEAD, *spoiled_line(offsets=[[0, 1], [2, 1]])], "the offsets are not within"),
        ([HEAD, *spoiled_line(ids=[5, True])], "an id is a whole number"),
        ([HEAD, *spoiled_line(ids=[5, -6])], "an id is a whole number"),
    ],
)
def test_a_damaged_file_says_where(lines: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        Runs.load(path)
    assert str(path) in str(raised.value)


def test_the_good_line_is_good_and_no_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join([HEAD, *spoiled_line()]) + "\n")
    assert Runs.load(path)[0] == Transcript("Q", (5, 6), "ab", ((0, 1), (1, 2)), {"all": (0, 2)}, True, {})
    with pytest.raises(FileNotFoundError, match="surgery generate"):
        Runs.load(tmp_path / "none.jsonl")
