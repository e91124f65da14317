"""The main job: tune a real model two ways, look inside, judge it, and put it all on one page.

Stages write whole files and are skipped when their file is there, so an interrupted study goes on where it stopped:

    questions -> each arm: tune, task vector -> held-out answers -> strength sweep -> early answers -> drift -> geometry -> page
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analyses.plan import Plan
from analyses.shelf import Shelf, require_unfinished
from analyses.tasks import accuracy, chained_sums, worked
from probes.estimates import Estimate
from surgery.borrowing import give_back_memory
from surgery.checkpoint import Checkpoint
from surgery.model import Model, find
from surgery.record import Record, typed
from surgery.weights import Delta

if TYPE_CHECKING:
    from pandas import DataFrame

ARMS: dict[str, dict[str, Any]] = {
    "lift": {"method": "lift", "lr": 1e-3, "density": 0.05, "filter_rank": 16},
    "full": {"method": "full", "lr": 1e-4},
}
STRENGTHS = (-0.5, 0.0, 0.5, 1.0, 1.5)


def study(plan: Plan, to: str | Path, *, progress: bool = True) -> Path:
    """Run the study into a folder and give the path of its page, ``report.html``.

    A folder that holds an unfinished study of the same plan and model is resumed. Raises FileExistsError for a finished one, or one of
    another plan or of other weights.
    """
    folder = Path(to)
    require_unfinished(folder, "study")
    record = Record("study", {**asdict(plan), "to": str(folder)}, typed(), seeds={"seed": plan.seed})
    study = _Study(plan, folder, progress)
    study.shelf.claim()
    for name, stage in study.stages():
        study.run(name, stage)
    from analyses.report import write_report

    record.inputs = {"model": {"ref": plan.model, "hash": study.base_hash}}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record.results = {"headline": study.headline(), "seconds": study.clock(), "peak_resident_mib": round(peak)}
    write_report(study.results(), folder, record)
    record.save(folder, reproducible=["tables/*.json", "arms/*/vector/*"])
    return folder / "report.html"


class _Study:
    """The stages, and what they share."""

    def __init__(self, plan: Plan, folder: Path, progress: bool):
        self.plan, self.folder, self.progress = plan, folder, progress
        self._models: dict[str, Model] = {}
        self.base = Checkpoint(find(plan.model))  # both task vectors are measured from it
        self.base_hash = self.base.hash()
        self.shelf = Shelf(folder, "study", {**asdict(plan), "weights": self.base_hash})
        self.train = chained_sums(plan.steps * plan.batch_size, seed=plan.seed, side="train")
        wanted = max(plan.held_out, plan.sweep_items, plan.faith_items, plan.drift_items)
        self.test = chained_sums(wanted, seed=plan.seed + 1, side="test")
        self.watched = chained_sums(plan.watch_items, seed=plan.seed + 2, side="test")

    def stages(self) -> list[tuple[str, Callable[[], Any]]]:
        tuned = [(f"arms/{arm}/tuned", lambda arm=arm: self.tune(arm)) for arm in ARMS]
        return [
            *tuned,
            ("tables/accuracy", self.accuracy),
            ("tables/sweep", self.sweep),
            ("tables/early_answers", self.early_answers),
            ("tables/drift", self.drift),
            ("tables/geometry", self.geometry),
        ]

    def run(self, name: str, stage: Callable[[], Any]) -> None:
        if self.shelf.find(name) is not None:
            return
        began = time.monotonic()
        self._say(name)
        self.shelf.keep(name, stage())
        self.shelf.keep("clock", self.clock() | {name: round(time.monotonic() - began, 1)})
        give_back_memory()

    def clock(self) -> dict[str, float]:
        """Seconds each finished stage took."""
        return self.shelf.find("clock") or {}

    def results(self) -> dict[str, Any]:
        """Every stage's table, and the watches' lines."""
        from finetune.monitors import read_log

        tables = {name: self.shelf.find(name) for name, _ in self.stages()}
        logs = {arm: read_log(self.folder / "arms" / arm / "log.jsonl") for arm in ARMS}
        return {
            "plan": asdict(self.plan),
            "arms": {arm: tables[f"arms/{arm}/tuned"] for arm in ARMS},
            "logs": logs,
            **{name.removeprefix("tables/"): table for name, table in tables.items() if name.startswith("tables/")},
            "clock": self.clock(),
            "example": asdict(self.test[0]),
        }

    def headline(self) -> dict[str, str]:
        rows = self.shelf.find("tables/accuracy")["rows"]
        return {row["arm"]: f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] (n={row['n']})" for row in rows}

    # --- stages ---------------------------------------------------------------------------------------------------------------

    def tune(self, arm: str) -> dict[str, Any]:
        """Tune a fresh copy of the model; keep its task vector."""
        from analyses.general_text import GENERAL_TEXT
        from analyses.watch import watches
        from finetune.tune import tune
        from surgery.delta import save_delta

        model = Model.load(self.plan.model, device=self.plan.device, dtype="float32")
        home = self.folder / "arms" / arm
        taught = worked(model, self.train)
        names = ("accuracy", "nll", "drift", "drift-general", "change")
        watched = watches(
            names,
            model,
            self.watched,
            GENERAL_TEXT[:12],
            self.plan.watch_every,
            max_new_tokens=self.plan.max_new_tokens,
        )
        done = tune(
            model,
            taught,
            steps=self.plan.steps,
            batch_size=self.plan.batch_size,
            seed=self.plan.seed,
            watch=watched,
            log=home / "log.jsonl",
            progress=self.progress,
            **ARMS[arm],
        )
        if (home / "vector").exists():
            import shutil

            shutil.rmtree(home / "vector")
        vector = model.weights - self.base
        save_delta(vector, home / "vector", base_hash=self.base_hash)
        return asdict(done)

    def accuracy(self) -> dict[str, Any]:
        """Held-out accuracy of the base and of each arm as stored; the answers are kept."""
        rows, answers, questions = [], {}, self.test[: self.plan.held_out]
        for arm in ("base", *ARMS):
            with self.arm(arm, stored=True) as model:
                given = model.generate(
                    [q.question for q in questions],
                    max_new_tokens=self.plan.max_new_tokens,
                    batch_size=64,
                    progress=self.progress,
                )
            found = accuracy(questions, given)
            rows.append({"arm": arm, **_numbers(found.overall), "missing": found.missing})
            answers[arm] = [t.completion for t in given]
        return {"rows": rows, "answers": answers}

    def sweep(self) -> list[dict[str, Any]]:
        """Accuracy and general-text NLL along each task vector; strength 0 is the base for both arms."""
        from analyses.dose import sweep
        from analyses.general_text import GENERAL_TEXT

        found = sweep(
            self._load("stored", "auto"),
            {arm: self.vector(arm) for arm in ARMS},
            STRENGTHS,
            questions=self.test[: self.plan.sweep_items],
            measures=("accuracy", "text_nll"),
            controls=0,
            texts=GENERAL_TEXT[: self.plan.sweep_texts],
            max_new_tokens=self.plan.max_new_tokens,
            batch_size=64,
            seed=self.plan.seed,
            progress=self.progress,
        )
        return _rows(found.frame().drop(columns=["layers", "span", "draw", "knee"]))

    def early_answers(self) -> dict[str, Any]:
        """Cut the gold thinking (all three models, the same traces) and each arm's own (whose self-splice must not change)."""
        from analyses.faithfulness import early_answers

        questions = self.test[: self.plan.faith_items]
        found: dict[str, Any] = {"curves": [], "summary": []}
        for arm in ("base", *ARMS):
            with self.arm(arm) as model:
                gold = worked(model, questions)
                traces = {"gold": gold}
                if arm != "base":
                    traces["own"] = model.generate(
                        [q.question for q in questions], max_new_tokens=self.plan.max_new_tokens, batch_size=64
                    )
                for kind, transcripts in traces.items():
                    shared = {"arm": arm, "traces": kind}
                    if not any(t.thinking and t.answer for t in transcripts):  # too little training to write any
                        found["summary"].append(
                            {**shared, "measure": "self-splice change", "missing": len(transcripts)}
                        )
                        continue
                    read = early_answers(model, questions, transcripts, seed=self.plan.seed, progress=self.progress)
                    found["curves"] += [{**shared, **row} for row in _rows(read.curve())]
                    found["summary"] += [{**shared, **row} for row in _rows(read.summary())]
                    extra = {"missing": read.missing, "value": read.self_splice, "n": read.n}
                    found["summary"].append({**shared, "measure": "self-splice change", **extra})
        return found

    def drift(self) -> dict[str, Any]:
        """How far each arm's residual stream moved: on the task's own text, and on general text."""
        from analyses.general_text import GENERAL_TEXT
        from analyses.representation import drift, output_kl
        from analyses.watch import as_transcripts
        from probes.activations import collect

        model = self.model
        task = worked(model, self.test[: self.plan.drift_items])
        general = as_transcripts(model, GENERAL_TEXT[: self.plan.drift_items])
        texts = {"task": (task, ("thinking", "answer")), "general": (general, ("all",))}
        rows: list[dict[str, Any]] = []
        divergence: list[dict[str, Any]] = []
        with self.arm("base") as model:
            before = {name: collect(model, ts, over=over, progress=self.progress) for name, (ts, over) in texts.items()}
        for arm in ARMS:
            with self.arm(arm) as model:
                for name, (ts, over) in texts.items():
                    after = collect(model, ts, over=over, progress=self.progress)
                    found = drift(before[name], after, ts, over=over, seed=self.plan.seed, progress=self.progress)
                    rows += [{"arm": arm, "text": name, **row} for row in _rows(found.frame())]
                for name, (ts, over) in texts.items():
                    found_kl = output_kl(
                        self.untouched, model, ts[: max(1, self.plan.drift_items // 3)], over, seed=self.plan.seed
                    )
                    divergence += [
                        {"arm": arm, "text": name, "span": span, **_numbers(kl)} for span, kl in found_kl.items()
                    ]
        return {"rows": rows, "kl": divergence}

    def geometry(self) -> dict[str, Any]:
        """What each task vector is, as a change of matrices."""
        from analyses.geometry import geometry

        found = geometry(self.base, {arm: self.vector(arm) for arm in ARMS}, progress=self.progress)
        return {"rows": _rows(found.frame()), "summary": _rows(found.summary(seed=self.plan.seed))}

    # --- what stages share ----------------------------------------------------------------------------------------------------

    def _load(self, role: str, dtype: str) -> Model:
        if role not in self._models:
            self._models[role] = Model.load(self.plan.model, device=self.plan.device, dtype=dtype)
        return self._models[role]

    @property
    def model(self) -> Model:
        """The base model in fp32, loaded once; arms are installed into it."""
        return self._load("host", "float32")

    @property
    def untouched(self) -> Model:
        """A second copy of the base, for comparing outputs side by side."""
        return self._load("untouched", "float32")

    def vector(self, arm: str) -> Delta:
        from surgery.delta import StoredDelta

        return StoredDelta(self.folder / "arms" / arm / "vector")

    def arm(self, arm: str, *, stored: bool = False):
        """The base with an arm's task vector installed for the length of a ``with`` block.

        In fp32, or with `stored` as the checkpoint's own dtype would keep it: what a user of the written model would run, and faster.
        """
        host = self._load("stored", "auto") if stored else self.model
        return host.installed(self.base if arm == "base" else self.base + self.vector(arm))

    def _say(self, name: str) -> None:
        if self.progress:
            from tqdm.auto import tqdm

            tqdm.write(f"{name.split('/')[-2] if name.startswith('arms') else Path(name).stem.replace('_', ' ')} ...")


def _numbers(e: Estimate) -> dict[str, Any]:
    return {"value": e.value, "low": e.low, "high": e.high, "n": e.n, "seed": e.seed, "method": e.method}


def _rows(frame: DataFrame) -> list[dict[str, Any]]:
    return json.loads(str(frame.to_json(orient="records", double_precision=15)))


def frames(results: Mapping[str, Any]) -> dict[str, DataFrame]:
    """The study's tables as DataFrames, by the name of the figure that draws them."""
    import pandas as pd

    drift = pd.DataFrame(results["drift"]["rows"])
    logs: list[dict[str, Any]] = []
    for arm, found in results["arms"].items():
        logs += [{"arm": arm, "step": i + 1, "measure": "loss", "value": v} for i, v in enumerate(found["losses"])]
        for line in results["logs"][arm]:
            logs += [
                {"arm": arm, "step": line["step"], "measure": measure, "value": line[key]}
                | {k: line.get(k) for k in ("low", "high", "n")}
                for measure, key in _watched(line)
                if key in line  # a monitor that failed says so in place of numbers
            ]
    return {
        "before-after": pd.DataFrame(results["accuracy"]["rows"]),
        "training": pd.DataFrame(logs),
        "sweep": pd.DataFrame(results["sweep"]),
        "early-answers": pd.DataFrame(results["early_answers"]["curves"]),
        "early-answers-summary": pd.DataFrame(results["early_answers"]["summary"]),
        "drift": drift,
        "geometry": pd.DataFrame(results["geometry"]["rows"]),
        "geometry-summary": pd.DataFrame(results["geometry"]["summary"]),
    }


def _watched(line: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Which numbers of a log line are drawn: measure's name in the figure, key in the line."""
    return {
        "accuracy": [("held-out accuracy", "accuracy")],
        "nll": [("answer NLL (nats per token)", "answer_nll")],
        "drift": [("drift on task text", "all")],
        "drift-general": [("drift on general text", "all")],
        "change": [("relative change of the weights", "all")],
    }.get(line["monitor"], [])
