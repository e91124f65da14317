"""Laws of dealing out time: never more than there is, to all alike, evenly over the run."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.cadence import Account, plan

COST = st.floats(0.001, 50)
NAMES = ("a", "b", "c", "d")


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[str, float], dict[str, float], float, int]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    costs = {name: draw(COST) for name in names}
    spent = {name: draw(st.sampled_from([0.0, costs[name], 3 * costs[name]])) for name in names}
    return costs, spent, draw(st.floats(0, 300)), draw(st.integers(0, 400))


@given(situations())
@settings(max_examples=150, deadline=None)
def test_a_plan_never_takes_more_time_than_there_is(
    case: tuple[dict[str, float], dict[str, float], float, int],
) -> None:
    costs, spent, seconds, steps = case
    found = plan(*case)
    taken = sum(spent.values()) + sum(costs[name] for name in found.ends)
    taken += sum(costs[name] * (steps // n) for name, n in found.every.items())
    assert taken <= max(seconds, sum(spent.values())) * (1 + 1e-9)
    assert set(found.every) <= found.ends <= set(costs)
    assert all(n >= 1 for n in found.every.values())


@given(situations())
@settings(max_examples=150, deadline=None)
def test_nobody_who_waits_is_overtaken(case: tuple[dict[str, float], dict[str, float], float, int]) -> None:
    """One that is measured again, and not at every step, is given no less time in the whole run than any other that is."""
    costs, spent, _, steps = case
    found = plan(*case)
    floor = {name: spent[name] + costs[name] for name in found.every}  # with its end
    # a cadence is a whole number of steps, rounded up: what was given lies between these two
    least = {name: floor[name] + steps * costs[name] / n for name, n in found.every.items()}
    most = {name: floor[name] + steps * costs[name] / (n - 1) for name, n in found.every.items() if n > 1}
    for one, other in itertools.permutations(found.every, 2):
        if one in most and least[other] > floor[other] + costs[other]:  # more than its first one in between
            assert most[one] * (1 + 1e-9) >= least[other]


def test_with_time_for_everything_all_are_measured_at_every_step() -> None:
    found = plan({"a": 1.0, "b": 2.0, "free": 0.0}, {}, 1e6, 10)
    assert found.every == {"a": 1, "b": 1, "free": 1}
    assert found.ends == {"a", "b", "free"}


def test_rounding_puts_nothing_off() -> None:
    costs = {"a": 2.0, "b": 1.9381628105231667}  # twice, and the end, is all of what b can use, but for the last bit
    assert plan(costs, {}, 12.0, 2).every == {"a": 1, "b": 1}


def test_with_no_time_nothing_is() -> None:
    found = plan({"a": 1.0, "b": 2.0}, {}, 0.0, 10)
    assert not found.every
    assert not found.ends


def test_the_end_comes_first_and_the_dearest_goes_without() -> None:
    found = plan({"cheap": 1.0, "dear": 10.0}, {}, 10.5, 100)
    assert found.ends == {"cheap"}
    assert found.every == {"cheap": 11}  # 9.5 seconds are left of the 10.5
    assert plan({"cheap": 1.0, "dear": 10.0}, {}, 11.0, 100).ends == {"cheap", "dear"}


def test_time_is_shared_alike_and_what_one_cannot_use_goes_to_the_others() -> None:
    # 5 seconds each: after their ends 4 and 3 are left, which is 4 and 1.5 measurements
    assert plan({"a": 1.0, "b": 2.0}, {}, 10.0, 100).every == {"a": 25, "b": 67}
    # the first can use 1.1 seconds at most, so that the others have 4.5 each
    assert plan({"quick": 0.1, "a": 0.5, "b": 0.5}, {}, 10.1, 10).every == {"quick": 1, "a": 2, "b": 2}
    # what one has spent counts as had: the other catches up first
    assert plan({"a": 1.0, "b": 1.0}, {"a": 5.0}, 16.0, 100).every == {"a": 50, "b": 15}


def run(
    share: float,
    steps: int,
    costs: dict[str, float],
    second: float = 1.0,
    expected: dict[str, float | None] | None = None,
) -> dict[str, list[int]]:
    """A run of steps that take `second` each, whose measurements take exactly what they cost, and are `expected` to (default: as they do)."""
    account, made = Account(share, steps), {name: [] for name in costs}

    def measure(name: str, step: int) -> None:
        account.charge(name, costs[name], step)
        made[name].append(step)

    account.training, account.made = second, 1
    for name in costs:
        account.expect(name, (expected or costs)[name])
    for name in costs:
        if account.may_start(name):
            measure(name, 0)
    for step in range(1, steps + 1):
        account.training, account.made = second * step, step
        for name in costs:
            if account.due(name, step):
                measure(name, step)
    for name in costs:
        if account.last.get(name) != steps and account.closes(name):
            measure(name, steps)
    return made


@given(
    st.dictionaries(st.sampled_from(NAMES), st.just(0.0) | st.floats(0.01, 20), min_size=1),
    st.sampled_from([0.0, 0.01, 0.03, 0.2]),
    st.integers(1, 50),
    st.lists(st.sampled_from([0.0, 0.1, 0.8, 1.0, 3.0, None]), min_size=len(NAMES), max_size=len(NAMES)),
)
@settings(max_examples=50, deadline=None)
def test_a_run_keeps_to_its_share(costs: dict[str, float], share: float, steps: int, known: list[float | None]) -> None:
    """Where first measurements take up to a quarter more than was said it is never overdrawn; else by no more than one took beyond that."""

    def taken(made: dict[str, list[int]]) -> float:
        return sum(costs[name] * len(at) for name, at in made.items())

    allowed = share * steps * (1 + 1e-9)
    made = run(share, steps, costs)
    assert taken(made) <= allowed
    expected = {name: None if of is None else of * costs[name] for name, of in zip(costs, known, strict=False)}
    assumed = {name: 5 / 4 * (1 / 3 if said is None else said) for name, said in expected.items()}
    wrong = max(0.0, *(costs[name] - assumed[name] for name in costs), 0.0)
    assert taken(run(share, steps, costs, expected=expected)) <= allowed + wrong
    if not share:
        assert not any(made.values())


def test_what_nobody_can_pay_is_not_measured() -> None:
    """A first measurement is paid with a quarter to spare."""
    assert run(0.03, 40, {"dear": 1.0, "cheap": 0.1})["dear"] == []
    # more than half of 1.2: not at the start, for the end is worth as much
    assert run(0.03, 40, {"dear": 0.9})["dear"] == [40]
    assert run(0.03, 40, {"dear": 0.48})["dear"] == [0, 40]


def test_an_unknown_cost_is_taken_for_a_forward_pass_until_it_is_known() -> None:
    account = Account(0.03, 100)
    account.training, account.made = 6.0, 2
    account.expect("a", None)
    account.expect("b", 0.5, spent=0.125)
    assert account.costs == {"a": 1.25, "b": 0.625}
    assert account.used == 0.125
    account.training = 12.0
    assert account.costs == {"a": 2.5, "b": 0.625}
    account.charge("a", 7.0, 3)
    account.charge("b", 0.25, 3)
    assert account.costs == {"a": 7.0, "b": 0.25}
    for seconds in (1.0, 1.0, 4.0):
        account.charge("a", seconds, 4)
    assert account.costs["a"] == 2.0  # the mean of the last three: what was done once is forgotten


def test_a_run_is_measured_evenly_from_start_to_end() -> None:
    made = run(0.03, 1000, {"a": 1.0, "b": 0.25})
    for at in made.values():
        assert at[0] == 0
        assert at[-1] == 1000
        gaps = [b - a for a, b in itertools.pairwise(at)]
        assert max(gaps) <= 1.5 * min(gaps), gaps
    # 30 seconds, 15 each
    assert 14 <= len(made["a"]) <= 15
    assert 56 <= len(made["b"]) <= 60
    assert run(3.0, 20, {"a": 1.0, "b": 0.25}) == {name: list(range(21)) for name in "ab"}  # time for every step


def test_what_is_too_dear_to_be_measured_again_goes_without_and_the_others_go_on() -> None:
    made = run(0.03, 200, {"cheap": 0.1, "dear": 5.0}, expected={"cheap": 0.1, "dear": 0.5})  # it looked cheap
    assert made["dear"] == [0]
    assert made["cheap"][0] == 0
    assert made["cheap"][-1] == 200
    assert len(made["cheap"]) * 0.1 + 5 <= 6.0


@pytest.mark.parametrize("share", [0.03, 0.06])
def test_a_larger_share_measures_more(share: float) -> None:
    count = len(run(share, 500, {"a": 1.0})["a"])
    assert count == pytest.approx(share * 500, abs=1)


def test_steps_that_become_slower_earn_more() -> None:
    """What a step takes is measured as the run goes: the account is of the real run, not of its first step."""
    account = Account(0.1, 100)
    account.training, account.made = 1.0, 1
    account.charge("a", 1.0, 0)
    before = account.seconds
    account.training, account.made = 100.0, 50
    assert account.seconds == 2 * before == pytest.approx(20.0)


def test_what_was_measured_at_the_last_step_leaves_the_end_to_the_others() -> None:
    account = Account(0.1, 100)
    account.training, account.made = 100.0, 100
    account.charge("b", 4.0, 0)
    account.charge("a", 2.0, 100)
    assert account.closes("b")  # 6 of 10 are spent, and 4 are all it takes
    assert not account.closes("a")


def test_preparing_counts_as_spent_and_says_what_one_costs() -> None:
    account = Account(0.1, 100)
    account.training, account.made = 1.0, 1
    account.charge("a", 4.0)
    assert account.costs == {"a": 4.0}
    assert account.used == 4.0
    assert not account.may_start("a")  # 8 of 10 would be gone, and half is kept for later
    assert not account.last
