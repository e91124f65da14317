"""Finished parts of long work: found again, and where a file of theirs is damaged, said so in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from analyses.shelf import Shelf, require_unfinished

PLAN = {"seeds": [0, 1], "rate": 0.5}
DAMAGES = (b"", b'{"seeds": [0,', b"\xff\xfe", b"[" * 100_000)


@pytest.mark.parametrize("damage", [*DAMAGES, b"[]", b"3"])
def test_a_damaged_plan(damage: bytes, tmp_path: Path) -> None:
    Shelf(tmp_path / "work", "sweep", PLAN).keep("one", {"score": 1.0})
    assert Shelf(tmp_path / "work", "sweep", PLAN).find("one") == {"score": 1.0}
    (tmp_path / "work" / "plan.json").write_bytes(damage)
    with pytest.raises(
        ValueError, match=r"work/plan\.json is damaged \(.+\)\. Choose another folder, or remove .*work: the sweep"
    ) as error:
        Shelf(tmp_path / "work", "sweep", PLAN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part(damage: bytes, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "work", "sweep", PLAN)
    shelf.keep("one", {"score": 1.0})
    (tmp_path / "work" / "one.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"work/one\.json is damaged \(.+\)\. Remove that file") as error:
        shelf.find("one")
    assert "\n" not in str(error.value)


def test_only_work_of_the_same_plan_goes_on(tmp_path: Path) -> None:
    work = tmp_path / "work"
    Shelf(work, "sweep", PLAN | {"old": 1}).keep("one", 1)
    assert Shelf(work, "sweep", {"seeds": (0, 1), "rate": 0.5}).find("one") == 1  # as JSON holds it
    for plan, differs in ((PLAN | {"rate": 0.25}, "rate"), (PLAN | {"new": 2}, "new")):
        with pytest.raises(FileExistsError, match=f"work holds a sweep with other {differs} "):
            Shelf(work, "sweep", plan)


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_what_is_no_unfinished_work_is_left_alone(there: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    if there == "folder":
        work.mkdir()
        Shelf(work, "sweep", PLAN)  # an empty one will do
        require_unfinished(work, "sweep")
        (work / "notes.txt").write_text("mine")
    elif there == "file":
        work.write_text("mine")
    else:
        work.symlink_to(tmp_path / "nowhere")
    for ask in (lambda: Shelf(work, "sweep", PLAN), lambda: require_unfinished(work, "sweep")):
        with pytest.raises(FileExistsError, match="work exists and is not a sweep"):
            ask()


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path) -> None:
    work = tmp_path / "work"
    require_unfinished(work, "sweep")
    there = f"from pathlib import Path; from analyses.shelf import require_unfinished; require_unfinished(Path({str(work)!r}), 'sweep')"
    other = subprocess.run([sys.executable, "-c", there], capture_output=True, text=True)
    assert "Another command is at work on" in other.stderr
