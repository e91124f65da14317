"""A receipt names what changed; a replay gives the same or says what differs."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from surgery.checkpoint import Checkpoint
from surgery.edits import Scale
from surgery.model import find
from surgery.record import Record, RecordError, compare_environment, environment, replay, source_hash, verify
from surgery.tensorfile import read_header
from surgery.weights import apply
from surgery.writing import write
from tests.families import save_tiny


def scale(model: str, factor: float, to: Path) -> None:
    """A toy command."""
    base = Checkpoint(find(model))
    record = Record("scale", {"model": model, "factor": factor}, inputs={"model": {"ref": model, "hash": base.hash()}})
    write(apply(Scale(factor), base, "*.attn.o"), to)
    record.save(to)


@pytest.fixture
def run(tmp_path):
    scale(str(save_tiny("llama", tmp_path / "model")), 0.5, tmp_path / "run")
    return tmp_path / "run"


def test_all_is_as_recorded(run):
    assert verify(run) == []
    record = Record.load(run)
    assert record.command == "scale"
    assert record.outputs["model.safetensors"]["(header)"]
    assert record.environment == environment()


def test_one_flipped_byte_names_its_tensor(run):
    path = run / "model.safetensors"
    for tensor in read_header(path)[0][::9]:
        raw = bytearray(path.read_bytes())
        raw[tensor.begin] ^= 1
        path.write_bytes(raw)
        assert verify(run) == [f"model.safetensors: tensor {tensor.name} differs"]
        raw[tensor.begin] ^= 1
        path.write_bytes(raw)
    assert verify(run) == []
    whole = path.read_bytes()
    for was, now in ((b'"format":"pt"', b'"format":"tp"'), (b'"shape":[100,32]', b'"shape":[32,100]')):
        path.write_bytes(whole.replace(was, now))
        assert verify(run) == ["model.safetensors: tensor (header) differs"]


def test_missing_extra_and_changed_files(run):
    (run / "tokenizer.json").unlink()
    (run / "stray.txt").touch()
    (run / "config.json").write_text("{}")
    assert verify(run) == ["config.json differs", "stray.txt is not in the record", "tokenizer.json is missing"]


def test_a_replay(run, tmp_path):
    again = replay(run, tmp_path / "again", {"scale": scale})
    assert again.ok
    assert "model.safetensors" in again.equal
    assert again.environment == []
    broken = replay(run, tmp_path / "other", {"scale": lambda model, factor, to: scale(model, 2 * factor, to)})
    assert not broken.ok
    assert broken.differing[0].startswith("model.safetensors: tensor model.layers.0.self_attn.o_proj.weight differs")
    said = json.loads((run / "record.json").read_text())
    said["results"]["reproducible"] = ["*.json"]  # the others may come out otherwise each time
    (run / "record.json").write_text(json.dumps(said))
    partly = replay(run, tmp_path / "partly", {"scale": lambda model, factor, to: scale(model, 2 * factor, to)})
    assert partly.ok
    assert "config.json" in partly.equal
    assert "model.safetensors" not in partly.equal


def test_time_goes_on_from_where_a_record_was_left(tmp_path):
    Record("scale", {}, seconds=5.0).save(tmp_path)
    assert 5 <= Record.load(tmp_path).seconds < 60


def test_a_replay_that_cannot_be(run, tmp_path):
    with pytest.raises(RecordError, match=r"The record's command is 'scale'; this version knows merge"):
        replay(run, tmp_path / "a", {"merge": scale})
    with pytest.raises(RecordError, match=r"a version whose 'scale' knew factor; this one's does not"):
        replay(run, tmp_path / "a", {"scale": lambda model, to: scale(model, 1.0, to)})
    model = Path(Record.load(run).arguments["model"])
    for path in model.iterdir():
        path.unlink()
    save_tiny("llama", model, seed=3)
    with pytest.raises(RecordError, match=r"The input model \(.*model\) is not what it was"):
        replay(run, tmp_path / "b", {"scale": scale})

    def elsewhere(model, factor, to):
        raise FileNotFoundError("../base is not a folder.")

    with pytest.raises(RecordError, match=r"\.\./base is not a folder\. .* replay it from the folder"):
        replay(run, tmp_path / "c", {"scale": elsewhere})


def test_a_replay_finds_what_was_named_where_the_command_ran(tmp_path, monkeypatch):
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    other.mkdir()
    monkeypatch.chdir(ours)
    save_tiny("llama", Path("model"))
    scale("model", 0.5, Path("runs"))
    monkeypatch.chdir(other)
    again = replay("../ours/runs", "again", {"scale": scale})
    assert again.ok
    assert (other / "again" / "record.json").is_file()
    save_tiny("llama", Path("model"), seed=1)  # what is here counts first
    with pytest.raises(RecordError, match=r"is not what it was when this was recorded.* replay it from .*ours\."):
        replay("../ours/runs", "more", {"scale": scale})
    (other / "model").rename("away")
    (ours / "model").rename(ours / "away")
    with pytest.raises(RecordError, match=r"replay it from the folder in which the command ran, .*ours\."):
        replay("../ours/runs", "more", {"scale": scale})
    assert Path.cwd() == other


def test_no_record_and_a_damaged_one(run, tmp_path):
    with pytest.raises(RecordError, match=r"There is no folder .*nowhere: nothing to compare"):
        Record.load(tmp_path / "nowhere")
    with pytest.raises(RecordError, match=r"has no record\.json: it was not made by a surgery command"):
        verify(tmp_path)
    for text in ("{", "[]", '{"command": "x", "arguments": {}, "nonsense": 1}'):
        (run / "record.json").write_text(text)
        with pytest.raises(RecordError, match=r"record\.json is damaged"):
            verify(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["inputs"].update(model=3),
        lambda said: said["inputs"].update(model={"ref": "x"}),
        lambda said: said["environment"].update(packages=None),
        lambda said: said["results"].pop("reproducible"),
        lambda said: said["results"].update(reproducible=3),
        lambda said: said["arguments"].pop("factor"),
    ],
)
def test_a_record_with_a_part_missing_is_told_before_the_command_runs(run, tmp_path, change):
    said = json.loads((run / "record.json").read_text())
    change(said)
    (run / "record.json").write_text(json.dumps(said))
    with pytest.raises(RecordError):
        replay(run, tmp_path / "again", {"scale": scale})
    assert not (tmp_path / "again").exists()


def test_a_loaded_record_can_be_saved_again(run):
    record = Record.load(run)
    started = record.started
    record.results["accuracy"] = 0.5
    record.save(run)
    assert Record.load(run).started == started
    assert verify(run) == []
    assert not (run / "record.partial").exists()
    json.loads((run / "record.json").read_text())


def test_environments_are_compared_gravest_first():
    now = environment()
    then = {**now, "threads": 99, "device": "abacus", "packages": {**now["packages"], "torch": "0.1", "peft": "0.1"}}
    assert [grade for grade, _ in compare_environment(then, now)] == ["high", "high", "medium", "low"]
    assert compare_environment(now, now) == []


def test_what_makes_a_merge_is_recorded_and_grave_for_merges_alone():
    now = environment()
    for package in ("mergekit", "tokenizers", "scikit-learn"):
        then = {**now, "packages": {**now["packages"], package: "0.1"}}
        grade = "high" if package == "mergekit" else "medium"
        said = f"{package}: 0.1 then, {version(package)} now"
        assert compare_environment(then, now, "merge") == [(grade, said)]
        assert compare_environment(then, now, "apply") == [("medium", said)]
    older = {**now, "packages": {k: v for k, v in now["packages"].items() if k != "mergekit"}}
    assert compare_environment(older, now, "merge") == []  # of what a record does not say nothing is said


def test_the_tables_are_source(tmp_path, monkeypatch):
    (tmp_path / "surgery").mkdir()
    (tmp_path / "surgery" / "record.py").touch()
    monkeypatch.setattr("surgery.record.__file__", str(tmp_path / "surgery" / "record.py"))
    found = set()
    for text in ("one", "two"):
        (tmp_path / "surgery" / "anatomies.toml").write_text(text)
        found.add(source_hash())
    assert len(found) == 2
