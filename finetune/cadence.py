"""How often to measure: a share of the training time, dealt out among measurements that cost what they cost.

Everything here is arithmetic on seconds and steps; the `Recorder` brings the clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

_ROUNDING = 1e-9  # of a step or of a cost, so that what fits exactly does fit
_FORWARD = 1 / 3  # of a step, which is a forward pass and a backward pass of twice its work
_DOUBT = 1.25  # times what a first measurement was said to take: a trial is short, and what it scales up is not exact
_RECENT = 3  # measurements whose mean cost is expected of the next: the first may do work that is done once


@dataclass(frozen=True)
class Plan:
    """What the time that is left is for.

    every: measurement -> optimizer steps from one to the next; one that is not here has no time between now and the end.
    ends:  measurements that have time to be made at the end.
    """

    every: Mapping[str, int]
    ends: frozenset[str]


def plan(costs: Mapping[str, float], spent: Mapping[str, float], seconds: float, steps: int) -> Plan:
    """Deal out `seconds`, of which some are `spent`, over the `steps` that are left.

    costs:   seconds that one measurement takes, at least 0.
    spent:   seconds each has taken already.
    seconds: for the whole run.
    steps:   optimizer steps until the end, at least 0.

    First each gets one measurement at the end, the dearest going without where that is too much. What is left is shared so that all come to the
    same time in the whole run, and what one cannot use (it is measured at every step, or its share is not enough for one) goes to the
    others. All together never take more than `seconds`, unless they have done so already.
    """
    used = sum(spent.values())
    ends = set(costs)
    while ends and used + sum(costs[name] for name in ends) > seconds:
        ends.remove(_dearest(ends, costs))
    floor = {name: spent.get(name, 0.0) + costs[name] for name in ends}
    free = seconds - used + sum(spent.get(name, 0.0) for name in ends)  # what those that are measured again have in all
    between, given = set(ends) if steps else set(), dict(floor)
    while between:
        rest = free - sum(floor[name] for name in ends - between)
        given |= _level({name: (floor[name], floor[name] + steps * costs[name]) for name in between}, rest)
        short = [name for name in between if given[name] - floor[name] < costs[name] * (1 - _ROUNDING)]
        if not short:
            break
        between.remove(_dearest(short, costs))
    every = {
        name: max(1, math.ceil(steps * costs[name] / (given[name] - floor[name]) - _ROUNDING)) if costs[name] else 1
        for name in costs
        if name in between
    }
    return Plan(every, frozenset(ends))


def _dearest(names: set[str] | list[str], costs: Mapping[str, float]) -> str:
    return max(sorted(names), key=lambda name: costs[name])


def _level(ranges: Mapping[str, tuple[float, float]], seconds: float) -> dict[str, float]:
    """Fill ranges (least, most) to one level, as water does: the amounts come to `seconds` in all, or to all that they can hold."""

    def filled(level: float) -> dict[str, float]:
        return {name: min(max(level, least), most) for name, (least, most) in ranges.items()}

    low = 0.0
    for high in sorted({bound for both in ranges.values() for bound in both}):
        held, more = sum(filled(low).values()), sum(filled(high).values())
        if more > seconds:  # between two bounds what is held grows in a straight line
            return filled(low + (high - low) * (seconds - held) / (more - held)) if held < seconds else filled(low)
        low = high
    return filled(low)


@dataclass
class Account:
    """The time that measurements may take of one run, and have taken.

    Nothing is measured that the rest of the time cannot pay: where a first measurement takes no more than a quarter longer than was said,
    and later ones what the last ones took, all together never take more than `seconds`; else more by no more than one of them took beyond that.

    share:    of the seconds that training itself takes, at least 0.
    steps:    optimizer steps of the whole run.
    training: seconds that training has taken for the last `made` steps, measuring left out.
    spent:    seconds each measurement has taken. last: the step at which it was made last.
    """

    share: float
    steps: int
    training: float = 0.0
    made: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    _costs: dict[str, list[float]] = field(default_factory=dict)
    _expected: dict[str, float | None] = field(default_factory=dict)
    _planned: tuple[tuple[float, int, int], Plan] | None = None

    @property
    def step_seconds(self) -> float:
        """What an optimizer step takes, on average."""
        return self.training / self.made if self.made else 0.0

    @property
    def seconds(self) -> float:
        """What all measurements of the run may take together, if the steps to come take as long as those made."""
        return self.share * self.step_seconds * self.steps

    @property
    def used(self) -> float:
        return sum(self.spent.values())

    @property
    def costs(self) -> dict[str, float]:
        """What one measurement is taken to cost: the mean of the last ones made, before the first one a quarter more than was said to
        `expect`."""
        unknown = _FORWARD * self.step_seconds
        first = {name: _DOUBT * (unknown if said is None else said) for name, said in self._expected.items()}
        return first | {name: sum(some) / len(some) for name, some in self._costs.items()}

    def expect(self, name: str, seconds: float | None, spent: float = 0.0) -> None:
        """What a measurement that is yet to be made the first time is expected to take, and what finding that out took.

        None: nobody knows, and it is taken for a forward pass over a step's batch, a third of a step.
        """
        self._expected[name] = seconds
        self.spent[name] = self.spent.get(name, 0.0) + spent
        self._planned = None

    def charge(self, name: str, seconds: float, step: int | None = None) -> None:
        """A measurement took some seconds; `step` is None for one that only prepared others."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds
        self._costs[name] = [*self._costs.get(name, []), seconds][-_RECENT:]
        self._planned = None
        if step is not None:
            self.last[name] = step

    def may_start(self, name: str) -> bool:
        """Whether there is time to measure on the starting weights: half of the whole is kept for later measurements."""
        return self._pays(name, self.seconds / 2)

    def due(self, name: str, step: int) -> bool:
        """Whether to measure after this step."""
        if not self._pays(name, self.seconds):
            return False
        every = self.plan(step).every.get(name)
        return every is not None and step - self.last.get(name, 0) >= every

    def closes(self, name: str) -> bool:
        """Whether there is time to measure at the end, now that it is reached."""
        return self._pays(name, self.seconds) and name in self.plan(self.steps).ends

    def plan(self, step: int) -> Plan:
        """What the time that is left after this step is for."""
        now = (self.training, self.made, step)
        if self._planned is None or self._planned[0] != now:
            to_come = {name: cost for name, cost in self.costs.items() if self.last.get(name) != self.steps}
            self._planned = now, plan(to_come, self.spent, self.seconds, max(0, self.steps - step))
        return self._planned[1]

    def _pays(self, name: str, seconds: float) -> bool:
        """Whether one measurement more leaves all of them within `seconds`, of which there must be some."""
        cost = self.costs.get(name, math.inf)
        return seconds > 0 and self.used + cost <= seconds * (1 + _ROUNDING)
