"""Hooks into the training loop: any callable ``(model, step) -> {name: number}``, every so many steps, one JSON line each.

``every(10, fn)`` says when; the `Recorder` is the TrainerCallback that listens. A measurement borrows the model: it runs in eval
mode, without gradients, and the training mode and random state are given back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import TrainerCallback

from surgery.model import Model
from surgery.sites import Site
from surgery.weights import linear_sites


@runtime_checkable
class Monitor(Protocol):
    """What can be measured while training. It must not change the model."""

    def __call__(self, model: Model, step: int) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Watch:
    """A monitor and its cadence: at step 0, every `steps` optimizer steps, and at the end."""

    steps: int
    monitor: Monitor
    name: str


def every(steps: int, monitor: Monitor, name: str | None = None) -> Watch:
    """Measure at step 0, every so many optimizer steps (not micro-batches), and at the end.

    The name defaults to the monitor's own. Raises ValueError for a cadence below 1.
    """
    if steps < 1:
        raise ValueError(f"every({steps}, ...): a cadence is at least 1 optimizer step.")
    return Watch(steps, monitor, name or getattr(monitor, "__name__", type(monitor).__name__))


class Recorder(TrainerCallback):
    """Runs watches during training and writes ``{"step", "monitor", "seconds", ...}`` lines as it goes.

    A resumed run continues the file: lines from after the checkpoint are dropped first, earlier ones kept.
    """

    def __init__(self, model: Model, watches: Sequence[Watch], path: str | Path):
        self._model, self._watches, self._path = model, list(watches), Path(path)
        names = [w.name for w in self._watches]
        if len(set(names)) < len(names):
            raise ValueError(f"Two monitors have the same name among {names}: give names with every(n, fn, name=...).")
        self._measured: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(self._path) if line["step"] <= state.global_step] if state.global_step else []
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._measured = {line["monitor"]: line["step"] for line in kept}
        if not state.global_step:
            self._run(0, self._watches)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run(state.global_step, [w for w in self._watches if state.global_step % w.steps == 0])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run(state.global_step, self._watches)

    def _run(self, step: int, watches: Sequence[Watch]) -> None:
        module = self._model.module
        for watch in watches:
            if self._measured.get(watch.name) == step:
                continue
            training = module.training
            began = time.monotonic()
            with torch.random.fork_rng(), torch.no_grad():
                module.eval()
                try:
                    values = dict(watch.monitor(self._model, step))
                finally:
                    module.train(training)
            line = {"step": step, "monitor": watch.name, "seconds": round(time.monotonic() - began, 3), **values}
            with self._path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            self._measured[watch.name] = step


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The measurements of a log, in order; none for a file that is not there. A last line cut short by a kill is left out."""
    if not Path(path).is_file():
        return []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class ChangeNorm:
    """A monitor: how far each matrix has moved since training began.

    Gives ``‖W - W_0‖_F / ‖W_0‖_F`` at each site and over all of them (``all``). Holds a copy of the matrices it watches.
    """

    __name__ = "change"

    def __init__(self, model: Model, sites: Sequence[Site] | None = None):
        weights = model.weights
        self._start = {s: weights[s].clone() for s in (linear_sites(weights) if sites is None else sites)}
        self._norms = {s: float(w.float().norm()) for s, w in self._start.items()}

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        weights = model.weights
        moved = {s: float((weights[s].float() - start.float()).norm()) for s, start in self._start.items()}
        total = sum(m**2 for m in moved.values()) ** 0.5 / sum(n**2 for n in self._norms.values()) ** 0.5
        return {"all": total, **{str(s): moved[s] / self._norms[s] for s in moved}}
