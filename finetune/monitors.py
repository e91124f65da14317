"""Hooks into the training loop: any callable ``(model, step) -> {name: number}``, and the flight recorder that calls them.

``every(10, fn)`` says when. A callable alone (or ``sometimes(fn, name)``) is measured as often as a share of the training time allows:
``Recorder(model, [fn, every(10, other)], path, budget=0.03)``. The `Recorder` is a plain TrainerCallback, for Trainer and every TRL trainer.

A measurement borrows the model: it runs in eval mode, without gradients, and the training mode and random states are given back. One
that fails does not end the training: its line says what failed.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import TrainerCallback

from finetune.cadence import Account
from finetune.distributed import is_partitioned, is_sharded
from surgery.borrowing import evaluating, own_draws
from surgery.model import Model
from surgery.whole import write_whole

RECORDER, TRAINING = (
    "recorder",
    "training",
)  # lines that are no monitor's: what the recorder did, and what the trainer logged
OWN = ("step", "monitor", "seconds", "failed", "undefined")  # what every line may hold beside a monitor's numbers
_DETAIL = re.compile(r"(?:^|\.)L?\d+(?:\.|$)")  # of one layer or one site


@runtime_checkable
class Monitor(Protocol):
    """What can be measured while training. It must not change the model.

    Three attributes are looked for. ``before_step = True``: it is called when the gradients of a step are there and the optimizer has not
    acted, as ``monitor(model, step, optimizer)``. ``prepared``: seconds that making it took, which count as spent, and are what a
    measurement is expected to take. ``trial(model)``, or ``trial(model, optimizer)`` before a step: does a small part of a measurement and
    gives its share of the work, in (0, 1], so that the cost of the first measurement is known before it is made.
    """

    def __call__(self, model: Model, step: int) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Watch:
    """A monitor and its cadence: at step 0, every `steps` optimizer steps, and at the end. None: as the budget allows."""

    steps: int | None
    monitor: Callable[..., Mapping[str, float]]
    name: str


def every(steps: int, monitor: Callable[..., Mapping[str, float]], name: str | None = None) -> Watch:
    """Measure at step 0, every so many optimizer steps (not micro-batches), and at the end.

    The name defaults to the monitor's own. Raises ValueError for a cadence below 1.
    """
    if steps < 1:
        raise ValueError(f"every({steps}, ...): a cadence is at least 1 optimizer step.")
    return Watch(steps, monitor, name or _name(monitor))


def sometimes(monitor: Callable[..., Mapping[str, float]], name: str | None = None) -> Watch:
    """Measure as often as the recorder's budget of time allows: at the start and the end first, and then evenly in between."""
    return Watch(None, monitor, name or _name(monitor))


def _name(monitor: Any) -> str:
    return getattr(monitor, "__name__", type(monitor).__name__)


class Recorder(TrainerCallback):
    """The flight recorder: measures during training, and writes each measurement as it is made.

    watches: `every(n, fn)` for a cadence of your own; a callable, or `sometimes(fn, name)`, for one that is chosen from the budget.
    path:    the log, a JSON object a line: ``{"step", "monitor", "seconds", ...numbers}``. A number that is not finite is null, and named
             under ``undefined``; a monitor that raised has ``failed`` and no numbers. ``training`` lines are what the trainer logs (loss, norm of the
             gradients, rewards); ``recorder`` lines say what was planned and what it took.
    budget:  seconds that the measurements without a cadence of their own may take, as a share of those that training takes, 0 or more.
    page:    called with the path when training ends, to make something of the log (`analyses.flight.write_page`).

    How the budget is kept: a training step is timed, without its measurements. Before the first optimizer step acts, when forward and
    backward have been timed, each monitor's `trial` says what a measurement will take (without one, a third of a step is assumed: a forward
    pass), and a quarter more is set aside for the first. The starting values are then taken, for half of the budget at most, and
    `finetune.cadence.plan` deals out the rest anew after every step. Nothing is measured that what is left of the whole run's budget cannot
    pay, so that it is overdrawn by no more than one measurement, or one trial, took longer than was set aside. A monitor that cannot be paid within
    the run is not measured; the ``plan`` line names it, and what it would take, under ``no_time``. Watches with a cadence of their own cost what they
    cost.

    Steps are optimizer steps, however many micro-batches they have. A resumed run continues the file: lines from after the checkpoint
    are dropped first, earlier ones kept, their cost with them (the steps before are taken to have lasted as long as those since). Where several
    processes train, the first measures. Raises ValueError for two monitors of one name, a name that is the recorder's own, a negative budget, and, at
    the start of training, for sharded weights.
    """

    def __init__(
        self,
        model: Model,
        watches: Sequence[Watch | Callable[..., Mapping[str, float]]],
        path: str | Path,
        *,
        budget: float = 0.03,
        page: Callable[[Path], object] | None = None,
    ):
        self._model, self._path, self._page = model, Path(path), page
        self._watches = [w if isinstance(w, Watch) else sometimes(w) for w in watches]
        names = [w.name for w in self._watches]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Two monitors have the same name among {names}: give names with every(n, fn, name=...) or sometimes(fn, name=...)."
            )
        if taken := {RECORDER, TRAINING} & set(names):
            raise ValueError(f"A monitor cannot be called {taken.pop()!r}: lines of that name are the recorder's own.")
        if not budget >= 0:
            raise ValueError(f"budget={budget}: a share of the training time, 0 or more; 0.03 is 3 %.")
        self._account = Account(budget, 0)
        self._measured: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._warned: set[str] = set()
        self._trainer: Any = None
        self._began = self._measuring = self._earlier = 0.0
        self._first = 0
        self._planned = self._open = False
        self._logged: tuple[int, Mapping[str, Any]] | None = None
        self._unsent: list[dict[str, float]] = []

    def attach(self, trainer: Any) -> Recorder:
        """Become a callback of this trainer and send the headline numbers (not those of single layers) through its own log: to its
        ``log_history``, and to TensorBoard or W&B where its ``report_to`` names them, as ``monitor/number``."""
        self.send_through(trainer)
        trainer.add_callback(self)
        reporters_last(trainer)
        return self

    def send_through(self, trainer: Any) -> None:
        """`attach` for a trainer that has this among its callbacks already."""
        self._trainer = trainer

    # --- the trainer's events -----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _refuse_sharded(self._model.module)
        if not _leads(state):
            return
        self._first = state.global_step
        kept = [line for line in read_log(self._path) if line["step"] <= self._first] if self._first else []
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._open_account(kept, getattr(state, "max_steps", 0))
        self._began, self._measuring = time.monotonic(), 0.0
        self._planned, self._open, self._logged = False, True, None
        self._unsent.clear()
        self._say(
            self._first,
            event="begin",
            steps=self._account.steps,
            accumulate=getattr(args, "gradient_accumulation_steps", 1),
            budget=self._account.share,
            every={w.name: w.steps for w in self._watches},
            model=repr(self._model),
        )
        if not self._first:
            self._run(0, [w for w in self._watches if w.steps and not _before(w)])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if not _leads(state):
            return
        step = state.global_step + 1
        if state.global_step == self._first:  # what a step takes is known
            self._clock(1)
            for watch in self._watches:
                if watch.steps is None and watch.name not in self._account.costs:
                    self._expect(watch, *([optimizer] if _before(watch) else []))
        if step == 1:  # the weights are still those of the start
            for watch in self._watches:
                if watch.steps is None and not _before(watch) and self._account.may_start(watch.name):
                    self._run(0, [watch])
        self._send()
        for watch in self._watches:
            if _before(watch) and (self._due(watch, step) or (step == self._account.steps and self._ends(watch))):
                self._run(step, [watch], optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not _leads(state):
            return
        self._send()
        self._clock(state.global_step - self._first)
        if not self._planned:
            self._say_plan(state.global_step)
        for watch in self._watches:  # one after the other: each costs time that the next may not have
            if not _before(watch) and self._due(watch, state.global_step):
                self._run(state.global_step, [watch])
        self._send()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not _leads(state):
            return
        self._flush()
        self._clock(state.global_step - self._first)
        self._account.steps = state.global_step  # fewer than planned where the run was stopped
        for watch in self._watches:
            if not _before(watch) and self._ends(watch):
                self._run(state.global_step, [watch])
        self._send()
        own = {w.name for w in self._watches if w.steps is None}
        self._say(
            state.global_step,
            event="end",
            training_seconds=round(self._account.step_seconds * state.global_step, 3),
            measuring_seconds=round(self._measuring + self._earlier, 3),
            budgeted_seconds=round(sum(s for name, s in self._account.spent.items() if name in own), 3),
            measured=dict(self._counts),
        )
        self._flush()
        self._open = False
        if self._page:
            try:
                self._page(self._path)
            except Exception as error:  # the training is done: it shall not be lost for a page
                _warn(
                    f"The page of {self._path} could not be made ({type(error).__name__}: {error}). The log is whole."
                )

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if self._open and logs and _leads(state):
            self._flush()
            self._logged = state.global_step, logs

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._flush()
        self._send()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._flush()

    # --- when ---------------------------------------------------------------------------------------------------------------

    def _open_account(self, kept: Sequence[Mapping[str, Any]], steps: int) -> None:
        self._account = Account(self._account.share, steps)
        self._measured, self._counts = {}, {}
        self._earlier = sum(getattr(w.monitor, "prepared", 0.0) for w in self._watches)
        self._earlier += sum(line["seconds"] for line in kept)
        own = {w.name: w for w in self._watches}
        for name, watch in own.items():
            if watch.steps is None and (seconds := getattr(watch.monitor, "prepared", 0.0)):
                self._account.charge(name, seconds)
        for line in kept:
            if line.get("event") == "trial" and line["of"] in own:
                self._account.expect(line["of"], line["expected"], line["seconds"])
            if (watch := own.get(line["monitor"])) is None:
                continue
            self._measured[watch.name] = line["step"]
            self._counts[watch.name] = self._counts.get(watch.name, 0) + 1
            if watch.steps is None:
                self._account.charge(watch.name, line["seconds"], line["step"])

    def _clock(self, made: int) -> None:
        self._account.training, self._account.made = time.monotonic() - self._began - self._measuring, made

    def _due(self, watch: Watch, step: int) -> bool:
        return step % watch.steps == 0 if watch.steps else self._account.due(watch.name, step)

    def _ends(self, watch: Watch) -> bool:
        return watch.steps is not None or self._account.closes(watch.name)

    def _say_plan(self, step: int) -> None:
        self._planned = True
        chosen = [w.name for w in self._watches if w.steps is None]
        if chosen:
            found = self._account.plan(step)
            self._say(
                step,
                event="plan",
                step_seconds=round(self._account.step_seconds, 4),
                seconds_allowed=round(self._account.seconds, 3),
                costs={name: round(cost, 4) for name, cost in self._account.costs.items()},
                every={name: found.every.get(name) for name in chosen},
                at_end=[name for name in chosen if name in found.ends],
                no_time={
                    name: round(cost, 4)
                    for name, cost in self._account.costs.items()
                    if name not in found.ends and name not in self._counts
                },
            )

    def _expect(self, watch: Watch, *before: Any) -> None:
        """Find out what a measurement will take, by a trial where there is one and anything to pay it from."""
        trial, account = getattr(watch.monitor, "trial", None), self._account
        if trial is None or not account.used < account.seconds:
            account.expect(watch.name, None)
            return
        began = self._now()
        with _borrowed(self._model.module):
            try:
                share = float(trial(self._model, *before))
                if not 0 < share <= 1:
                    raise ValueError(f"a trial gives a share of a measurement's work, in (0, 1]: got {share}")
                said: dict[str, Any] = {}
            except Exception as error:  # as of a measurement: the line says what failed, and training goes on
                share, said = 1.0, {"failed": f"{type(error).__name__}: {error}"}
        seconds = time.monotonic() - began
        self._measuring += seconds
        expected = None if said else seconds / share
        account.expect(watch.name, expected, seconds)
        self._append(
            {
                "step": self._first, "monitor": RECORDER, "seconds": round(seconds, 4), "event": "trial", "of": watch.name,
                "expected": expected, **said,
            }
        )  # fmt: skip

    # --- measuring and writing ----------------------------------------------------------------------------------------------

    def _run(self, step: int, watches: Sequence[Watch], *before: Any) -> None:
        for watch in watches:
            if self._measured.get(watch.name) == step:
                continue
            began = self._now()
            found = self._measure(watch, step, before)
            seconds = time.monotonic() - began
            self._append({"step": step, "monitor": watch.name, "seconds": round(seconds, 3), **found})
            self._unsent.append(_headlines(watch.name, found))
            self._measured[watch.name] = step
            self._counts[watch.name] = self._counts.get(watch.name, 0) + 1
            seconds = time.monotonic() - began
            self._measuring += seconds
            if watch.steps is None:
                self._account.charge(watch.name, seconds, step)

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)  # what training still computes is not the monitor's time
        return time.monotonic()

    def _measure(self, watch: Watch, step: int, before: tuple[Any, ...]) -> dict[str, Any]:
        with _borrowed(self._model.module):
            try:
                return _said(watch.monitor(self._model, step, *before))
            # What is watched is worth more than the watching: the line says what failed, and training goes on.
            except Exception as error:
                if watch.name not in self._warned:
                    self._warned.add(watch.name)
                    _warn(
                        f"The monitor {watch.name!r} failed at step {step} ({type(error).__name__}: {error}). Training goes on; "
                        f"{self._path} says when it failed."
                    )
                return {"failed": f"{type(error).__name__}: {error}"}

    def _send(self) -> None:
        """Tell the trainer's log what was measured since. Not at once: what is measured before a step is of the step, which the trainer
        counts only after it, and at the start of training the reporters are not there yet."""
        unsent, self._unsent = self._unsent, []
        if self._trainer is None:
            return
        state, control, handler = self._trainer.state, self._trainer.control, self._trainer.callback_handler
        for numbers in filter(None, unsent):
            # past the trainer's own `log`, which would add its averages of the step and reset them
            state.log_history.append({**numbers, "step": state.global_step})
            wanted = control.should_log
            handler.on_log(self._trainer.args, state, control, numbers)
            control.should_log = wanted  # logging takes it for done

    def _flush(self) -> None:
        """Write what the trainer logged last. Not at once: callbacks after this one may add to it."""
        if self._logged is None:
            return
        (step, logs), self._logged = self._logged, None
        mine = tuple(f"{watch.name}/" for watch in self._watches)
        numbers = {
            key: value
            for key, value in logs.items()
            if isinstance(value, int | float) and key not in OWN and not key.startswith(mine)
        }
        if numbers.keys() - {"epoch"}:
            self._append({"step": step, "monitor": TRAINING, "seconds": 0.0, **_said(numbers)})

    def _say(self, step: int, **what: Any) -> None:
        self._append({"step": step, "monitor": RECORDER, "seconds": 0.0, **what})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


@contextmanager
def _borrowed(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode, no gradients; the mode and every random state are given back."""
    with own_draws(), torch.no_grad(), evaluating(module):
        yield


def reporters_last(trainer: Any) -> None:
    """Of a trainer's callbacks TensorBoard, W&B and their like are called last: other callbacks add to a log, and send when training ends."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    reporters = tuple(INTEGRATION_TO_CALLBACK.values())
    trainer.callback_handler.callbacks.sort(key=lambda callback: isinstance(callback, reporters))


def _headlines(name: str, found: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{name}/{key}": float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and not _DETAIL.search(key)
    }


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as JSON holds them: one that is not finite is null, and its name is kept under ``undefined``."""
    if taken := [key for key in values if key in OWN]:
        raise ValueError(f"a monitor cannot give a number called {taken[0]!r}: the log needs that name itself")
    plain = {str(key): value if isinstance(value, int) else float(value) for key, value in values.items()}
    lost = [key for key, value in plain.items() if not math.isfinite(value)]
    return {**plain, **dict.fromkeys(lost), **({"undefined": lost} if lost else {})}


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def _before(watch: Watch) -> bool:
    return bool(getattr(watch.monitor, "before_step", False))


def _leads(state: Any) -> bool:
    return getattr(state, "is_world_process_zero", True)


def _refuse_sharded(module: torch.nn.Module) -> None:
    if dealt := next((name for name, parameter in module.named_parameters() if is_partitioned(parameter)), None):
        raise ValueError(
            f"The recorder reads whole weights, and under ZeRO stage 3 {dealt} is empty between steps. Record at stage 0, 1 or 2, or under "
            "DDP, or train without a recorder."
        )
    if dealt := next((name for name, parameter in module.named_parameters() if is_sharded(parameter)), None):
        raise ValueError(
            f"The recorder reads whole weights, and {dealt} is sharded over processes. Record under DDP, or train without a recorder."
        )


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log, in order; none for a file that is not there. A last line cut short by a kill is left out."""
    if not Path(path).is_file():
        return []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
