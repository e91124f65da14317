"""The notebook and the figure script run as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
ALL = sorted(NOTEBOOKS.glob("*.ipynb"))
SCRIPTS = sorted((NOTEBOOKS / "figures").glob("*.py"))


@pytest.fixture(scope="module")
def specimen() -> Path:
    from surgery.specimen import specimen

    try:
        return specimen()
    except (FileNotFoundError, OSError) as error:
        pytest.skip(f"the specimen cannot be had here: {error}")


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_notebooks_run(path: Path, specimen: Path, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(NOTEBOOKS.parent)})
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert not [out for out in outputs if out.get("name") == "stderr" and "Traceback" in out["text"]]
    assert len(outputs) >= len([cell for cell in notebook.cells if cell.cell_type == "code"]) // 2


def test_there_is_a_notebook_and_a_script() -> None:
    assert ALL
    assert SCRIPTS


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_figure_scripts_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


def draw(folder: Path, image: Path) -> subprocess.CompletedProcess[str]:
    script = NOTEBOOKS / "figures" / "fig_early_answers.py"
    words = [sys.executable, str(script), str(folder), str(image)]
    environment = {**os.environ, "PYTHONPATH": str(NOTEBOOKS.parent)}
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_the_early_answers_figure_is_drawn_from_a_record(tmp_path: Path) -> None:
    from analyses.faithfulness import early_answers
    from analyses.tasks import chained_sums
    from surgery.model import Model
    from surgery.record import Record
    from tests.families import tiny

    model, questions = Model(*tiny("llama")), chained_sums(3, seed=0)
    told = [model.transcript(q.question, q.completion(model.markers)) for q in questions]
    record = Record("measure early-answers", {}, [], seeds={"seed": 0})
    folder = tmp_path / "measured"
    folder.mkdir()
    early_answers(model, questions, told).curve().to_csv(folder / "curve.csv", index=False)
    record.save(folder)
    image = tmp_path / "figure.png"
    done = draw(folder, image)
    assert done.returncode == 0, done.stderr
    assert image.read_bytes().startswith(b"\x89PNG")

    with (folder / "curve.csv").open("a") as file:  # what is not as recorded is not drawn
        file.write("\n")
    done = draw(folder, tmp_path / "other.png")
    assert done.returncode != 0
    assert "curve.csv" in done.stderr
    assert not (tmp_path / "other.png").exists()
