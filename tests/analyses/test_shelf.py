"""Finished parts of long work: found again, and where a file of theirs is damaged, said so in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from analyses.shelf import Shelf

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
