"""Objectives against closed forms on tiny logits, and the laws that all of them obey."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune import objectives
from finetune.objectives import (
    Glow,
    MaskedThought,
    Objective,
    aft,
    asft,
    coverage,
    coverage_factor,
    dft,
    dpo,
    entropy,
    improbable,
    kl_divergence,
    kl_from_base,
    kl_to_base,
    nll,
    objective,
)
from finetune.predictions import Predictions, Totals
from tests.oracles import objectives as oracle

VOCABULARY = 5


# --- tiny logits --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Some sequences of few tokens: as predictions, and as the oracles' lists."""

    p: Predictions
    lengths: tuple[int, ...]

    def texts(self, logits: Tensor | None = None) -> list[oracle.Text]:
        rows = self.p.logits if logits is None else logits
        tokens = list(zip(rows.tolist(), self.p.targets.tolist(), self.p.weights.tolist(), strict=True))
        return [[t for t, row in zip(tokens, self.p.row.tolist(), strict=True) if row == r] for r in range(self.p.rows)]

    def base(self) -> list[oracle.Text]:
        assert self.p.reference is not None
        return self.texts(self.p.reference())


def case(
    lengths: Sequence[int] = (3, 1, 4, 2), groups: Sequence[int] = (0, 0, 1, 1), positive: Sequence[float] = (1, 0, 0, 1),
    seed: int = 0, weighted: bool = True, spread: float = 1.0,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, base = spread * draw(count, VOCABULARY), draw(count, VOCABULARY)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5 if weighted else torch.ones(count)
    p = Predictions(
        raw=logits.requires_grad_(),
        targets=torch.randint(VOCABULARY, (count,), generator=generator),
        weights=weights.double(),
        row=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        rows=len(lengths),
        sample=torch.arange(len(lengths)) + 10,
        group=torch.tensor(groups),
        totals=Totals(float(weights.sum()), float(len(lengths)), float(len(set(groups)))),
        columns={"positive": torch.tensor(positive, dtype=torch.float64)},
        reference=lambda: base,
    )
    return Case(p, tuple(lengths))


def part(p: Predictions, rows: Sequence[int]) -> Predictions:
    """A micro-batch of some rows, with the totals of the whole step."""
    chosen = torch.tensor(rows)
    kept = torch.isin(p.row, chosen)
    number = {row: i for i, row in enumerate(rows)}
    assert p.reference is not None
    base = p.reference()[kept]
    return replace(
        p,
        raw=p.raw[kept],
        targets=p.targets[kept],
        weights=p.weights[kept],
        row=torch.tensor([number[r] for r in p.row[kept].tolist()]),
        rows=len(rows),
        sample=p.sample[chosen],
        group=p.group[chosen],
        columns={name: values[chosen] for name, values in p.columns.items()},
        reference=lambda: base,
    )


def value(of: Objective, p: Predictions) -> float:
    return float(of(p).detach())


def gradient(of: Objective, p: Predictions) -> Tensor:
    (found,) = torch.autograd.grad(of(replace(p)), p.logits)  # a copy: what is cached belongs to one graph
    return found


def with_history(glow: Glow) -> Glow:
    glow.before = {10: 2.5, 11: 0.4, 13: 1.9}  # of the four sequences, 12 has none
    return glow


MADE: dict[str, Callable[[], Objective]] = {
    "nll": lambda: nll,
    "dft": lambda: dft,
    "entropy": lambda: entropy,
    "kl_to_base": lambda: kl_to_base,
    "kl_from_base": lambda: kl_from_base,
    "asft": lambda: asft(0.3),
    "coverage": lambda: coverage(16),
    "glow": lambda: with_history(Glow()),
    "aft": lambda: aft(),
    "aft-boundary": lambda: aft(0.5, likelihood=0.25),
    "dpo": lambda: dpo(0.3),
    "dpo-per-token": lambda: dpo(0.3, per_token=True),
    "sum": lambda: nll - 0.1 * entropy + 0.5 * coverage(4),
}


def literal(name: str, c: Case) -> float:
    texts, base = c.texts(), c.base()
    pairs = [(texts[0], texts[1]), (texts[3], texts[2])]
    start = [(base[0], base[1]), (base[3], base[2])]
    graded = [[(texts[0], 1.0), (texts[1], 0.0)], [(texts[2], 0.0), (texts[3], 1.0)]]
    before = [2.5, 0.4, None, 1.9]
    now = [oracle.mean_loss(t) for t in texts]
    weights = [1.0 if b is None else oracle.glow_weight(b, n, 3, 10, 0.5, 5) for b, n in zip(before, now, strict=True)]

    def mean_margin(pair: tuple[oracle.Text, oracle.Text], other: tuple[oracle.Text, oracle.Text]) -> float:
        gains = [oracle.mean_loss(b) - oracle.mean_loss(t) for t, b in zip(pair, other, strict=True)]
        return -math.log(1 / (1 + math.exp(-0.3 * (gains[0] - gains[1]))))

    return {
        "nll": lambda: oracle.nll(texts),
        "dft": lambda: oracle.dft(texts),
        "entropy": lambda: oracle.entropy(texts),
        "kl_to_base": lambda: oracle.kl_to_base(texts, base),
        "kl_from_base": lambda: oracle.kl_from_base(texts, base),
        "asft": lambda: oracle.dft(texts) + 0.3 * oracle.kl_to_base(texts, base),
        "coverage": lambda: oracle.coverage(texts, 16),
        "glow": lambda: sum(w * n for w, n in zip(weights, now, strict=True)) / 4,
        "aft": lambda: oracle.aft(graded, None, 1.0),
        "aft-boundary": lambda: oracle.aft(graded, 0.5, 0.25),
        "dpo": lambda: oracle.dpo(pairs, start, 0.3),
        "dpo-per-token": lambda: sum(map(mean_margin, pairs, start)) / 2,
        "sum": lambda: oracle.nll(texts) - 0.1 * oracle.entropy(texts) + 0.5 * oracle.coverage(texts, 4),
    }[name]()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", MADE)
def test_value_is_the_closed_form(name: str, seed: int) -> None:
    c = case(seed=seed)
    assert value(MADE[name](), c.p) == pytest.approx(literal(name, c), rel=1e-9)


@pytest.mark.parametrize("name", MADE)
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    """The sum over micro-batches with the totals of the step is the whole batch's value, and so are the gradients."""
    c = case(lengths=(3, 1, 4, 2, 2, 5), groups=(0, 0, 1, 1, 2, 2), positive=(1, 0, 0, 1, 1, 0), seed=4)
    whole = value(MADE[name](), c.p)
    expected = gradient(MADE[name](), c.p)
    for split in ([[0, 1], [2, 3], [4, 5]], [[0, 1, 2, 3], [4, 5]], [[4, 5, 0, 1], [2, 3]]):
        total = torch.stack([MADE[name]()(part(c.p, rows)) for rows in split]).sum()
        assert float(total.detach()) == pytest.approx(whole, rel=1e-12)
        (found,) = torch.autograd.grad(total, c.p.logits)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def finite_differences(of: Objective, p: Predictions, step: float = 1e-6) -> Tensor:
    start, found = p.logits.detach(), torch.zeros_like(p.logits)
    for i in range(start.numel()):
        ends = []
        for sign in (1, -1):
            moved = start.clone()
            moved.view(-1)[i] += sign * step
            ends.append(value(of, replace(p, raw=moved)))
        found.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("name", ["nll", "entropy", "kl_to_base", "kl_from_base", "coverage", "dpo", "dpo-per-token", "sum"])  # fmt: skip
def test_gradient_is_the_value_s_own(name: str) -> None:
    """By finite differences, where nothing is held fixed in the formula."""
    c = case(seed=7)
    torch.testing.assert_close(gradient(MADE[name](), c.p), finite_differences(MADE[name](), c.p), rtol=1e-5, atol=1e-8)


def test_dft_s_gradient_is_that_of_the_probabilities() -> None:
    c = case(seed=3)
    expected = torch.tensor(oracle.dft_logit_gradient(c.texts()), dtype=torch.float64)
    torch.testing.assert_close(gradient(dft, c.p), expected)
    wide = case((9,), (0,), (1,), spread=3.0)
    chances = [oracle.probability(token) for token in wide.texts()[0]]
    assert improbable(wide.p).tolist() == [chance < 0.01 for chance in chances]
    assert any(0.01 < chance < 0.1 for chance in chances)


@pytest.mark.parametrize("of", [kl_to_base, kl_from_base, entropy], ids=repr)
def test_a_vocabulary_in_strips_changes_nothing(of: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case()
    before, slope = value(of, c.p), gradient(of, c.p)
    monkeypatch.setattr(objectives, "_STRIP", 3 * VOCABULARY)  # ten tokens: three strips of three, and one
    assert value(of, c.p) == pytest.approx(before, rel=1e-12)
    torch.testing.assert_close(gradient(of, c.p), slope, rtol=1e-12, atol=1e-15)


def test_divergence_from_itself_is_nothing_and_its_direction_matters() -> None:
    a, b = case(seed=1).p.logits.detach(), case(seed=2).p.logits.detach()
    assert float(kl_divergence(a, a).abs().max()) < 1e-15
    assert not torch.allclose(kl_divergence(a, b), kl_divergence(b, a))


# --- the chance of a hit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "factor"), [(1e-4, 0.9993), (0.01, 0.926), (0.1, 0.404), (0.3, 0.023)])
def test_coverage_factor_of_sixteen_tries(p: float, factor: float) -> None:
    found = float(coverage_factor(torch.tensor([math.log(p)]), 16))
    assert found == pytest.approx(factor, abs=6e-4)
    literally = 16 * p * (1 - p) ** 15 / (1 - (1 - p) ** 16)
    assert found == pytest.approx(literally, rel=1e-5)
    assert coverage_factor(torch.tensor([0.0, 1e-7]), 16).tolist() == [
        0.0,
        0.0,
    ]  # certain, also where a sum was rounded up


def certain(log_p: float) -> Predictions:
    """One sequence of one token with this log-probability, in float32."""
    rest = math.log(-math.expm1(log_p)) if log_p else -math.inf
    logits = torch.tensor([[log_p, max(rest, -1e30)]], requires_grad=True)
    one = torch.zeros(1, dtype=torch.long)
    return Predictions(logits, one, torch.ones(1), one, 1, one, one, Totals(1, 1, 1))


@pytest.mark.parametrize("samples", [1, 2, 16, 1000])
@pytest.mark.parametrize("log_p", [-2000.0, -120.0, -80.0, -37.0, -20.0, -5.0, -0.5, -1e-3, -1e-6, 0.0])
def test_coverage_is_right_from_impossible_to_certain(log_p: float, samples: int) -> None:
    """Against rational arithmetic of 1500 digits."""
    import mpmath

    with mpmath.workdps(1500):
        exact = mpmath.exp(mpmath.mpf(log_p))
        hit = 1 - (1 - exact) ** samples
        loss = float(-mpmath.log(hit))
        factor = float(samples * exact * (1 - exact) ** (samples - 1) / hit)
    p = certain(log_p)
    assert value(coverage(samples), p) == pytest.approx(loss, rel=2e-5, abs=1e-6)
    slope, plain = gradient(coverage(samples), p), gradient(nll, p)
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(slope, factor * plain, rtol=1e-3, atol=1e-6)


def test_coverage_of_one_try_is_the_sequences_cross_entropy() -> None:
    c = case(weighted=False)
    assert value(coverage(1), c.p) == pytest.approx(value(nll, c.p) * 10 / 4)
    torch.testing.assert_close(gradient(coverage(1), c.p), gradient(nll, c.p) * 10 / 4)


# --- gains --------------------------------------------------------------------------------------------------------------


def test_glow_is_plain_at_first_and_then_favours_what_learns_slowly() -> None:
    c, glow = case(), Glow()
    means = torch.tensor([oracle.mean_loss(t) for t in c.texts()])
    assert value(glow, c.p) == pytest.approx(float(means.mean()))
    assert glow.before == pytest.approx(dict(zip([10, 11, 12, 13], means.tolist(), strict=True)))
    now = means - torch.tensor([0.4, 0.05, 0.0, -0.3])
    found = glow.weights(c.p.sample, now.double())
    expected = [oracle.glow_weight(b, n, 3, 10, 0.5, 5) for b, n in zip(means.tolist(), now.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert (found.diff() > 0).all()
    assert float(glow.weights(torch.tensor([99]), torch.tensor([1.0]))) == 1.0
    bounded = Glow(low=0.9, high=1.1)
    bounded.before = glow.before
    assert {0.9, 1.1} == {round(w, 6) for w in bounded.weights(c.p.sample[[0, 3]], now[[0, 3]].double()).tolist()}
    assert value(with_history(Glow(low=1, high=1)), c.p) == value(Glow(), c.p)


def test_glow_remembers_training_only_and_through_a_checkpoint(tmp_path: Path) -> None:
    c, glow = case(), with_history(Glow())
    before = dict(glow.before)
    with torch.no_grad():
        glow(c.p)
    assert glow.before == before
    glow(c.p)
    assert glow.before != before
    torch.save(glow.state_dict(), tmp_path / "state.pt")
    again = Glow()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.before == glow.before
    assert value(again, c.p) == value(glow, c.p)


def test_the_processes_of_a_run_share_what_glow_remembers(tmp_path: Path) -> None:
    """Two processes, each with half of the sequences: afterwards both know all four."""
    script = tmp_path / "share.py"
    script.write_text(
        "import json, sys, torch\n"
        "import torch.distributed as dist\n"
        "from finetune.objectives import Glow\n"
        "from tests.finetune.test_objectives import case, part\n"
        "rank = int(sys.argv[1])\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=rank, world_size=2)\n"
        "glow = Glow()\n"
        "glow(part(case().p, [[0, 1], [2, 3]][rank]))\n"
        f"open(f'{tmp_path}/{{rank}}.json', 'w').write(json.dumps(sorted(glow.before.items())))\n"
        "dist.destroy_process_group()\n"
    )
    running = [subprocess.Popen([sys.executable, str(script), str(rank)], env=_env()) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    alone = Glow()
    alone(case().p)
    import json

    for rank in (0, 1):
        known = dict(json.loads((tmp_path / f"{rank}.json").read_text()))
        assert known == pytest.approx(alone.before)


def _env() -> dict[str, str]:
    import os

    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


# --- groups -------------------------------------------------------------------------------------------------------------


def scored(*scores: float, positive: Sequence[float]) -> Predictions:
    """A group of answers of one token with these log-probabilities."""
    rows = torch.tensor([[s, math.log(-math.expm1(s))] for s in scores], dtype=torch.float64)
    first = torch.arange(len(scores))
    zero = torch.zeros(len(scores), dtype=torch.long)
    return Predictions(
        rows.requires_grad_(), zero, torch.ones(len(scores), dtype=torch.float64), first, len(scores), first, zero,
        Totals(len(scores), len(scores), 1), {"positive": torch.tensor(positive, dtype=torch.float64)},
    )  # fmt: skip


@pytest.mark.parametrize(("worse", "sign"), [(-1.2, 1), (-2.4, 1), (-2.5, 0), (-2.6, -1), (-4.0, -1)])
def test_aft_pushes_down_to_the_boundary_and_up_from_below_it(worse: float, sign: int) -> None:
    p = scored(-1.0, worse, positive=(1, 0))  # boundary 1.5: at -1.0 - 1.5
    slope = float(gradient(aft(1.5, likelihood=0.0), p)[1, 0])
    assert slope == pytest.approx(0, abs=1e-12) if sign == 0 else slope * sign > 1e-6


def test_aft_lifts_better_answers_by_the_ranking_alone() -> None:
    """The boundary holds worse answers; what it is measured from has no gradient by it."""
    p = scored(-1.0, -1.2, positive=(1, 0))
    inside = 1 + math.exp(-0.2) + math.exp(2 * -1.0 - 2 * 1.5 + 1.0 + 1.2)
    chance = math.exp(-1.0)
    slope = float(gradient(aft(1.5, likelihood=0.0), p)[0, 0])
    assert slope == pytest.approx(-math.exp(-0.2) / inside * (1 - chance))


def test_aft_without_a_boundary_leaves_worse_answers_alone() -> None:
    p = scored(-1.0, -0.5, -3.0, positive=(1, 0, 0))
    slope = gradient(aft(), p)
    assert (slope[1:] == 0).all()
    assert float(slope[0, 0]) < 0


def test_aft_s_gradient_on_better_answers_is_the_value_s_own() -> None:
    p = scored(-1.0, -2.0, -0.5, positive=(1, 1, 0))
    torch.testing.assert_close(gradient(aft(), p)[:2], finite_differences(aft(), p)[:2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("boundary", [None, 0.7])
def test_aft_compares_all_pairs_of_unequal_grades(boundary: float | None) -> None:
    c = case(groups=(0, 0, 0, 0), positive=(2, 0, 1, 1), seed=5)
    texts = list(zip(c.texts(), (2.0, 0.0, 1.0, 1.0), strict=True))
    assert value(aft(boundary), c.p) == pytest.approx(oracle.aft([texts], boundary, 1.0))


@pytest.mark.parametrize(
    ("of", "positive", "message"),
    [
        (aft(), (1, 1, 0, 1), r"group of sequences 10, 11: All of its 2 answers have positive = 1"),
        (dpo(), (1, 0, 0, 0), r"group of sequences 12, 13: Its positive is 0, 0: dpo compares two answers"),
    ],
)
def test_equal_answers_cannot_be_compared(of: Objective, positive: Sequence[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(case(positive=positive).p)


def test_dpo_wants_pairs() -> None:
    with pytest.raises(ValueError, match=r"sequences 10, 11, 12: .* two answers"):
        dpo()(case(groups=(0, 0, 0, 1)).p)


@pytest.mark.parametrize("name", ["coverage", "glow", "aft", "dpo", "dpo-per-token"])
def test_a_sequence_without_a_learnt_token_has_no_score(name: str) -> None:
    p = case().p
    silent = replace(p, weights=torch.where(p.row == 2, 0.0, p.weights))
    with pytest.raises(ValueError, match="Sequences 12 have no token to learn"):
        MADE[name]()(silent)


def test_what_is_missing_is_named() -> None:
    p = case().p
    with pytest.raises(ValueError, match="needs the column 'positive' of the data; its columns are: length"):
        aft()(replace(p, columns={"length": p.columns["positive"]}))
    for of in (kl_to_base, dpo(), asft()):
        with pytest.raises(ValueError, match="nobody offers its logits"):
            of(replace(p, reference=None))


# --- arithmetic ---------------------------------------------------------------------------------------------------------


def test_objectives_add_up_like_numbers() -> None:
    p = case().p

    def own(p: Predictions) -> Tensor:
        return p.logits.square().sum()

    a, b, c = (value(of, p) for of in (nll, entropy, own))
    for found, expected in (
        (nll + entropy, a + b),
        (nll - entropy, a - b),
        (2 * (nll + 0.5 * entropy), 2 * a + b),
        (-nll, -a),
        (nll * 3, 3 * a),
        (nll + own, a + c),
        (own + nll, a + c),
        (nll - (entropy + nll), -b),
        (sum([nll, entropy, nll]), 2 * a + b),
    ):
        assert value(found, p) == pytest.approx(expected)
    assert repr(nll + 0.1 * kl_to_base - dpo(0.3)) == "nll + 0.1 * kl_to_base + -1 * dpo(0.3)"
    assert repr(nll + own) == "nll + own"


def test_a_sum_needs_what_its_parts_need() -> None:
    both = nll + 0.1 * aft()
    assert (both.columns, both.grouped, both.reference) == (("positive",), True, False)
    more = both + kl_to_base + dpo()
    assert (more.columns, more.grouped, more.reference) == (("positive",), True, True)
    assert both.fault({"positive": [1.0, 1.0]})
    assert not both.fault({"positive": [1.0, 0.0, 0.0]})
    assert "two answers" in str((both + dpo()).fault({"positive": [1.0, 0.0, 0.0]}))
    plain = nll + dft
    assert plain.fault({}) is None
    assert (plain.columns, plain.grouped, plain.reference) == ((), False, False)

    @objective(reference=True, columns=("length",))
    def own(p: Predictions) -> Tensor:
        """Says what it needs."""
        return p.logits.sum()

    assert (own.reference, own.columns, repr(own), own.__doc__) == (True, ("length",), "own", "Says what it needs.")
    assert (nll + own).reference


def test_a_sum_remembers_what_its_parts_do() -> None:
    c, first = case(), nll + 0.5 * Glow() + Glow(beta=5.0)
    first(c.p)
    again = nll + 0.5 * Glow() + Glow(beta=5.0)
    again.load_state_dict(first.state_dict())
    moved = replace(c.p, raw=c.p.raw * 1.1)
    assert value(again, moved) == value(first, moved)
    assert value(again, moved) != value(nll + 0.5 * Glow() + Glow(beta=5.0), moved)
    with pytest.raises(ValueError, match=r"The state has parts \['1', '2'\]"):
        (nll + Glow()).load_state_dict(first.state_dict())


@pytest.mark.usefixtures("unchecked")
def test_nonsense_is_refused() -> None:
    for wrong in (lambda: nll + 3, lambda: nll * "2", lambda: nll - "nll", lambda: True * nll):  # type: ignore[operator]
        with pytest.raises(TypeError):
            wrong()
    for wrong in (
        lambda: math.nan * nll,
        lambda: asft(-0.1),
        lambda: coverage(0),
        lambda: coverage(1.5),  # type: ignore[arg-type]
        lambda: Glow(alpha=0),
        lambda: Glow(low=2, high=1),
        lambda: aft(likelihood=-1),
        lambda: dpo(0),
        lambda: MaskedThought(0, rate=1.5),
        lambda: MaskedThought(0, warmup=-0.1),
    ):
        with pytest.raises(ValueError, match=r".+"):
            wrong()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (asft(0.05), asft(0.1)), (asft(0.0), asft(0.1)), (coverage(4), coverage(16)), (dpo(0.1), dpo(0.2)), (dpo(), dpo(per_token=True)),
        (aft(), aft(0.5)), (aft(0.5), aft(1.0)), (aft(), aft(likelihood=0.5)), (kl_to_base, kl_from_base),
        (with_history(Glow()), with_history(Glow(alpha=2))), (with_history(Glow()), with_history(Glow(beta=2))),
        (with_history(Glow()), with_history(Glow(low=1))), (with_history(Glow()), with_history(Glow(high=1))),
    ],
    ids=lambda of: repr(of),
)  # fmt: skip
def test_every_setting_changes_the_gradient_and_the_name(one: Objective, other: Objective) -> None:
    c = case(seed=6)
    assert not torch.allclose(gradient(one, c.p), gradient(other, c.p))
    assert repr(one) != repr(other)


def test_asft_without_an_anchor_is_dft() -> None:
    c = case()
    assert asft(0.0) is dft
    expected = gradient(dft, c.p) + 0.2 * gradient(kl_to_base, c.p)
    torch.testing.assert_close(gradient(asft(0.2), c.p), expected)


# --- the likelihood itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_nll_of_a_large_vocabulary_is_cross_entropy_in_float32(dtype: torch.dtype) -> None:
    """In strips, whatever they leave over; from bf16 logits with the gradient in bf16, as a cast and torch's own loss give it."""
    generator = torch.Generator().manual_seed(0)
    raw = (5 * torch.randn(29, 50_021, generator=generator)).to(dtype).requires_grad_()
    targets, one = torch.randint(50_021, (29,), generator=generator), torch.zeros(29, dtype=torch.long)
    weights = torch.randn(29, generator=generator)
    p = Predictions(raw, targets, torch.ones(29), one, 1, one[:1], one[:1], Totals(29, 1, 1))
    wide = raw if dtype == torch.float64 else raw.float()
    expected = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    assert p.nll.dtype == p.logits.dtype == wide.dtype
    torch.testing.assert_close(p.nll, expected)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), raw)[0] for x in (p.nll, expected))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)
