"""Representation drift: literal oracles, planted drifts, floors and intervals whose truth is known, and the shells."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from analyses.representation import (
    Drift,
    _jackknife,
    drift,
    linear_cka,
    mean_shift,
    output_kl,
    relative_change,
    subspace_angles,
)
from analyses.statistics import resamples
from probes.activations import Activations, collect
from surgery.model import Model
from surgery.rows import rows_now
from surgery.sites import Site
from surgery.transcript import Transcript
from tests.oracles import representation as oracle


def gaussian(rows: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(d, d, seed)).Q


@pytest.mark.parametrize(("rows", "d", "e"), [(60, 8, 8), (20, 30, 12), (12, 5, 40)])
def test_cka_is_its_formula_by_either_route(rows, d, e):
    X, Y = gaussian(rows, d) + 3, gaussian(rows, e, 1) - 1
    Y[:, :3] += X[:, :3]
    assert linear_cka(X, Y) == pytest.approx(oracle.debiased_cka(X.numpy(), Y.numpy()), abs=1e-5)


def test_cka_is_the_u_statistic():
    X, Y = gaussian(9, 4) + 2, gaussian(9, 6, 1)
    Y[:, :2] += X[:, :2]
    assert linear_cka(X, Y) == pytest.approx(oracle.debiased_cka(X.numpy(), Y.numpy(), oracle.hsic_u), abs=1e-5)


def test_cka_ignores_rotation_scale_and_origin():
    X = gaussian(80, 12) * torch.linspace(3, 0.1, 12)
    assert linear_cka(X, X) == 1
    assert linear_cka(X, -2.5 * X @ orthogonal(12) + 7) == pytest.approx(1, abs=1e-5)
    skewed = X * torch.linspace(0.1, 3, 12)
    assert linear_cka(X, skewed) < 0.9


def test_cka_of_unrelated_rows_is_zero_however_few():
    for rows, d in ((30, 60), (60, 60), (300, 20)):
        found = [linear_cka(gaussian(rows, d, i), gaussian(rows, d, 100 + i)) for i in range(30)]
        assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(30) + 0.003
        assert np.std(found) < 0.1  # the plain form says 0.67 for 30 rows of 60


@pytest.mark.parametrize("k", [1, 3, 5])
def test_angles_are_scipys(k):
    X = gaussian(50, 12) * torch.linspace(4, 1, 12) + 5
    Y = X + 0.3 * gaussian(50, 12, 1)
    assert subspace_angles(X, Y, k) == pytest.approx(oracle.subspace_angles(X.numpy(), Y.numpy(), k), rel=1e-5)


@pytest.mark.parametrize("degrees", [1e-3, 5.0, 45.0, 90.0])
def test_a_known_rotation_is_found(degrees):
    X = torch.zeros(40, 6, dtype=torch.float64)
    X[:, :2] = torch.linalg.qr(gaussian(40, 2) - gaussian(40, 2).mean(0)).Q * torch.tensor([5.0, 3.0])
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned = X.clone()
    turned[:, 1], turned[:, 4] = c * X[:, 1], s * X[:, 1]
    mean, largest = subspace_angles(X, turned, 2)
    assert largest == pytest.approx(degrees, rel=1e-5)
    assert mean == pytest.approx(degrees / 2, rel=1e-5)


def test_mean_shift_is_its_formula_and_finds_what_was_planted():
    X = gaussian(100, 7) * 2 + 4
    Y = gaussian(70, 7, 1)
    assert mean_shift(X, Y) == pytest.approx(oracle.mean_shift(X.numpy(), Y.numpy()))
    step = gaussian(1, 7, 2)[0]
    spread = float(X.var(dim=0).sum().sqrt())
    assert mean_shift(X, X + step) == pytest.approx(float(step.norm()) / spread)
    assert mean_shift(5 * X, 5 * (X + step)) == pytest.approx(mean_shift(X, X + step))  # no units


def test_relative_change_is_its_formula_and_bounds_the_shift():
    X = gaussian(60, 7) * 2 + 4
    Y = X + 0.5 * gaussian(60, 7, 1) + 0.2
    assert relative_change(X, Y) == pytest.approx(oracle.relative_change(X.numpy(), Y.numpy()))
    assert mean_shift(X, Y) <= relative_change(X, Y)
    assert relative_change(X, X) == 0


def test_a_base_without_spread_has_no_unit():
    flat = torch.ones(5, 3)
    assert math.isnan(mean_shift(flat, flat + 1))
    assert math.isnan(relative_change(flat, flat + 1))


# Shells. Activations are made by hand where their truth must be known: texts of 10 tokens, of which the thinking is 1-6.

D = 12


def texts(n: int) -> list[Transcript]:
    spans = {"all": (0, 10), "prompt": (0, 1), "completion": (1, 10), "thinking": (1, 6), "answer": (7, 10)}
    return [Transcript(str(i), tuple(range(10)), "", tuple((0, 0) for _ in range(10)), spans, True) for i in range(n)]


def activations(n: int, seed: int = 0, *, alike: float = 1.0) -> Activations:
    """Two layers of rows that share a part (of size `alike`) within a text, with a spectrum that falls off."""
    owner, position = torch.arange(n).repeat_interleave(10), torch.arange(10).repeat(n)
    scale = torch.cat([torch.linspace(4, 3, 3), torch.linspace(1, 0.5, D - 3)]).double()
    values = {}
    for layer in range(2):
        own = alike * gaussian(n, D, 1000 * seed + layer)[owner] + gaussian(10 * n, D, 1000 * seed + 50 + layer)
        values[Site(layer, "resid")] = (own * scale).float()
    return Activations(values, owner, position, torch.zeros_like(owner), ("all",))


def changed(acts: Activations, how) -> Activations:
    return replace(acts, values={s: how(v) for s, v in acts.values.items()})


def noisy(acts: Activations, size: float, seed: int = 9) -> Activations:
    return changed(acts, lambda v: v + size * gaussian(*v.shape, seed).float())


def cell(found: Drift, measure: str, span: str = "thinking", layer: int = 0):
    table = found.frame()
    return table[(table.measure == measure) & (table.span == span) & (table.layer == layer)].iloc[0]


def test_the_shell_gives_what_the_functions_give():
    base = activations(30)
    tuned = noisy(base, 0.5)
    found = drift(base, tuned, texts(30), over=("thinking", "answer"), k=3, draws=50)
    for span, (start, end) in {"thinking": (1, 6), "answer": (7, 10)}.items():
        rows = (base.position >= start) & (base.position < end)
        for layer in range(2):
            X, Y = (a[Site(layer, "resid")][rows] for a in (base, tuned))
            mean, largest = subspace_angles(X, Y, 3)
            expected = {
                "mean_shift": mean_shift(X, Y),
                "relative_change": relative_change(X, Y),
                "cka": linear_cka(X, Y),
                "angle_mean": mean,
                "angle_max": largest,
            }
            for measure, value in expected.items():
                row = cell(found, measure, span, layer)
                assert row.value == pytest.approx(value, rel=1e-4), measure
                assert row.low <= row.value <= row.high
                assert (row.n_rows, row.n_transcripts) == (30 * (end - start), 30)


def test_the_first_token_is_dropped():
    base = activations(20)
    first = base.position == 0
    tuned = changed(base, lambda v: torch.where(first[:, None], v + 1000, v))
    found = drift(base, tuned, texts(20), over="all", k=3, draws=20)
    assert cell(found, "mean_shift", "all").value == 0
    assert cell(found, "cka", "all").value == 1
    assert cell(found, "cka", "all").n_rows == 180


def test_no_change_is_no_drift_under_a_positive_floor():
    base = activations(40)
    found = drift(base, base, texts(40), k=3, draws=50)
    for measure, still in {"mean_shift": 0, "relative_change": 0, "cka": 1, "angle_mean": 0, "angle_max": 0}.items():
        row = cell(found, measure)
        assert row.value == pytest.approx(still, abs=1e-6)
        assert row.low == pytest.approx(still, abs=1e-6)
        assert row.high == pytest.approx(still, abs=1e-6)
    assert cell(found, "mean_shift").floor > 0.05
    assert cell(found, "angle_mean").floor > 1
    assert cell(found, "relative_change").floor == 0  # row with row, the same tokens have no noise
    assert cell(found, "cka").floor == 1


def test_floors_are_what_two_independent_halves_show():
    # the base of 40 texts, split, against two fresh sets of 20 from the same distribution
    floors, fresh = [], []
    for seed in range(8):
        base = activations(40, seed)
        found = drift(base, base, texts(40), over="thinking", layers=[0], k=3, draws=20, seed=seed)
        floors.append([cell(found, "mean_shift").floor, cell(found, "angle_mean").floor])
    for seed in range(60):
        a, b = (activations(20, 500 + 2 * seed + i) for i in range(2))
        X, Y = (h[Site(0, "resid")][(h.position >= 1) & (h.position < 6)] for h in (a, b))
        fresh.append([mean_shift(X, Y), subspace_angles(X, Y, 3)[0]])
    assert np.mean(floors, axis=0) == pytest.approx(np.mean(fresh, axis=0), rel=0.2)


def test_floors_of_row_by_row_measures_follow_the_choice_of_texts():
    base = activations(40)
    level = torch.where(base.transcript < 20, 0.0, 2.0)[:, None]
    even = drift(base, noisy(base, 1.0), texts(40), k=3, draws=50)
    uneven = drift(base, changed(base, lambda v: v + level * gaussian(*v.shape, 9).float()), texts(40), k=3, draws=50)
    assert cell(uneven, "relative_change").floor > 2 * cell(even, "relative_change").floor
    assert cell(uneven, "cka").floor < cell(even, "cka").floor < 1


def test_intervals_cover_the_truth():
    # the limit is taken from many texts, the intervals from 30 of them
    step = 0.4 * gaussian(1, D, 5)[0].float()

    def tune(acts: Activations, seed: int) -> Activations:
        own = gaussian(len(acts) // 10, D, seed).float()[acts.transcript]
        return changed(acts, lambda v: v + step + 0.6 * own)

    many = activations(1500, 77)
    limit = drift(many, tune(many, 8), texts(1500), over="thinking", layers=[0], k=3, draws=20)
    trials, measures = 30, ("mean_shift", "relative_change", "cka", "angle_mean")
    rows = {measure: [] for measure in measures}
    for seed in range(trials):
        base = activations(30, 200 + seed)
        found = drift(base, tune(base, 300 + seed), texts(30), over="thinking", layers=[0], k=3, draws=100, seed=seed)
        for measure in measures:
            rows[measure].append(cell(found, measure))
    for measure in measures[:3]:
        truth = cell(limit, measure).value
        assert sum(row.low <= truth <= row.high for row in rows[measure]) >= 0.8 * trials, measure
    for measure in measures[2:]:  # the jackknife's error against the one seen
        error = np.mean([(row.high - row.low) / 2 / 2.09 for row in rows[measure]])
        assert 0.6 < error / np.std([row.value for row in rows[measure]]) < 1.8, measure


def test_bootstrap_intervals_are_their_literal_restatement():
    base = activations(6)
    tuned = changed(base, lambda v: v + 0.3 * gaussian(6, D, 3).float()[base.transcript] + 0.5)
    found = drift(base, tuned, texts(6), over="thinking", k=3, draws=60, seed=7)
    pieces = [(base.transcript == i) & (base.position >= 1) & (base.position < 6) for i in range(6)]
    X, Y = ([a[Site(0, "resid")][piece] for piece in pieces] for a in (base, tuned))
    for measure, function in {"mean_shift": mean_shift, "relative_change": relative_change}.items():
        drawn = []
        for count in resamples(6, 60, 7):
            chosen = [i for i, times in enumerate(count) for _ in range(times)]
            drawn.append(function(torch.cat([X[i] for i in chosen]), torch.cat([Y[i] for i in chosen])))
        row, value = cell(found, measure), function(torch.cat(X), torch.cat(Y))
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert row.low == pytest.approx(max(0, min(value, 2 * value - high)), rel=1e-4, abs=1e-6)
        assert row.high == pytest.approx(max(value, 2 * value - low), rel=1e-4)


def test_intervals_resample_texts_not_tokens():
    # a shift that is one text's own: the same rows, taken for texts of one token each, look five times as many
    base = activations(30, alike=0.0)
    tuned = changed(base, lambda v: v + 2 * gaussian(30, D, 3).float()[base.transcript] + 1)
    row = cell(drift(base, tuned, texts(30), over="thinking", k=3, draws=400), "mean_shift")
    apart = [replace(a, transcript=torch.arange(300)) for a in (base, tuned)]
    by_token = cell(drift(*apart, texts(300), over="thinking", k=3, draws=400), "mean_shift")
    assert row.value == pytest.approx(by_token.value)
    assert row.high - row.low > 1.6 * (by_token.high - by_token.low)


def test_every_option_changes_something(capsys):
    base = activations(20)
    tuned = noisy(base, 0.5)
    plain = drift(base, tuned, texts(20), k=3, draws=20)
    assert plain == drift(base, tuned, texts(20), k=3, draws=20)
    for option in ({"over": "answer"}, {"layers": [1]}, {"k": 2}, {"draws": 21}, {"seed": 1}):
        other = drift(base, tuned, texts(20), **({"k": 3, "draws": 20} | option))
        assert other.rows != plain.rows, option
    assert capsys.readouterr().err == ""
    drift(base, tuned, texts(20), k=3, draws=20, progress=True)
    assert "drift" in capsys.readouterr().err


def test_a_transcript_without_a_span_adds_nothing():
    base = activations(20)
    short = [Transcript(t.question, t.ids, t.text, t.offsets, dict(t.spans), True) for t in texts(20)]
    for t in short[:10]:
        t.spans.pop("thinking")  # pyright: ignore[reportAttributeAccessIssue]
    row = cell(drift(base, noisy(base, 0.5), short, over="thinking", k=3, draws=20), "cka")
    assert (row.n_rows, row.n_transcripts) == (50, 10)


def test_one_text_gives_values_without_intervals():
    base = activations(1)
    found = drift(base, noisy(base, 0.5), texts(1), over="completion", k=2, draws=20).frame()
    assert found.value.notna().all()
    assert found[["low", "high", "floor"]].isna().all().all()


def test_saved_and_loaded_is_the_same(tmp_path):
    base = activations(20)
    found = drift(base, noisy(base, 0.5), texts(20), k=3, draws=20, seed=4)
    found.save(tmp_path / "drift.json")
    assert Drift.load(tmp_path / "drift.json") == found
    one = drift(activations(1), activations(1, 2), texts(1), over="completion", k=2, draws=20)  # intervals are NaN
    one.save(tmp_path / "drift.json")
    assert Drift.load(tmp_path / "drift.json").frame().equals(one.frame())
    assert "<table" in found._repr_html_()
    assert set(found.frame().columns) >= {"layer", "span", "measure", "value", "low", "high", "floor", "n_rows", "seed"}


def test_a_text_that_holds_nearly_every_row_leaves_no_interval():
    base = activations(2)
    few = base.where((base.transcript == 0) | (base.position == 2))  # of the other text one token of the thinking
    found = drift(few, noisy(few, 0.5), texts(2), over="thinking", k=2, draws=20)
    for measure in ("cka", "angle_mean", "angle_max"):
        row = cell(found, measure)
        assert math.isfinite(row.value)
        assert np.isnan([row.low, row.high, row.floor]).all()


def test_bad_input_is_named(unchecked):
    base = activations(20)
    other = base.where(base.transcript > 0)
    rows = torch.arange(len(base)) % 10 == 2
    for call, says in [
        (lambda: drift(base, other, texts(20)), "same tokens"),
        (lambda: drift(base, base, texts(20), over="nowhere"), "'nowhere' is not a span"),
        (lambda: drift(base, base, texts(20), over=()), "No span"),
        (lambda: drift(base, base, texts(20), layers=[7]), r"at 7.resid: the base's activations have"),
        (
            lambda: drift(base.where(rows), base.where(rows), texts(20), over="thinking", k=12),
            r"need 26 of its tokens, 13 in each half; the 20 .* have 20\. Give about 26 transcripts .* at most 9",
        ),
        (lambda: drift(base, base, texts(20), k=0), "number 1 to"),
        (
            lambda: drift(*[replace(base, position=torch.full_like(base.position, -1))] * 2, texts(20), over="answer"),
            "pool=None",
        ),
        (lambda: linear_cka(gaussian(4, 2), gaussian(5, 2)), "4 and 5"),
        (lambda: linear_cka(gaussian(3, 2), gaussian(3, 2)), "four rows"),
        (lambda: subspace_angles(gaussian(5, 9), gaussian(5, 9), 5), "ask for fewer"),
        (lambda: mean_shift(gaussian(1, 2), gaussian(4, 2)), "two base rows"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


@pytest.fixture(scope="module")
def models() -> tuple[Model, Model]:
    """Two tiny random models, weights drawn wide, head_dim != hidden / heads."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<think>", "</think>", "?", "<", ">", "/", "think", *map(str, range(40))]
    bare = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    bare.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", pad_token="<s>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
    )
    pair = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = LlamaForCausalLM(config)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        pair.append(Model(module, tokenizer))
    return pair[0], pair[1]


def told(model: Model, lengths: list[int]) -> list[Transcript]:
    """Transcripts of various lengths: a prompt of 3 tokens, then thinking, then an answer of two."""
    found = []
    for i, n in enumerate(lengths):
        ids = tuple(torch.randint(9, 49, (3 + n + 2,), generator=torch.Generator().manual_seed(i)).tolist())
        spans = {"all": (0, len(ids)), "prompt": (0, 3), "completion": (3, len(ids))}
        spans |= {"thinking": (3, 3 + n), "answer": (3 + n, 5 + n)}
        found.append(Transcript(str(i), ids, "", tuple((0, 0) for _ in ids), spans, True))
    return found


def test_drift_of_models_is_that_of_their_activations(models):
    base, tuned = models
    transcripts = told(base, [4, 9, 6, 7, 12, 5, 8, 3])
    found = drift(base, tuned, transcripts, k=2, draws=20)
    held = [collect(m, transcripts, over="all") for m in models]
    direct = drift(held[0], held[1], transcripts, k=2, draws=20)
    assert found.frame().layer.unique().tolist() == [0, 1, 2]
    assert np.allclose(found.frame()[["value", "floor"]], direct.frame()[["value", "floor"]], rtol=1e-3, atol=1e-5)
    some = drift(base, tuned, transcripts, layers=[1], k=2, draws=20).frame()
    assert some.layer.unique().tolist() == [1]


def test_the_jackknife_is_students_with_a_group_less_than_there_are():
    left = torch.tensor([1.0, 2.0, 4.0, 9.0])
    error = math.sqrt(3 / 4 * float((left - 4).square().sum()))
    reach = scipy.stats.t.ppf(0.975, 3) * error
    assert _jackknife(5.0, left, -math.inf, 90.0) == pytest.approx((5 - reach, 5 + reach))


def test_padding_changes_nothing(models):
    # a long text beside short ones pads them; alone they are not padded
    base, tuned = models
    short, long = told(base, [4, 5, 6, 5, 4]), told(base, [60])
    alone = drift(base, tuned, short, k=2, draws=20)
    padded = [collect(m, [*short, *long], over="all") for m in models]
    beside = [a.where(a.transcript < 5) for a in padded]
    again = drift(beside[0], beside[1], short, k=2, draws=20)
    assert np.allclose(alone.frame().value, again.frame().value, rtol=1e-3, atol=1e-5)
    kl, mixed = (output_kl(base, tuned, t, "thinking", batch_size=6) for t in (short, [*short, *long]))
    single = output_kl(base, tuned, short, "thinking", batch_size=1)
    assert kl["thinking"].value == pytest.approx(single["thinking"].value, rel=1e-4)
    assert mixed["thinking"].value != pytest.approx(kl["thinking"].value, rel=1e-4)  # the long text counts


def test_output_kl_is_its_formula_over_the_spans_tokens(models):
    base, tuned = models
    transcripts = told(base, [4, 9, 6])
    found = output_kl(base, tuned, transcripts, ("thinking", "answer", "all"), batch_size=2, seed=3)
    for span, estimate in found.items():
        values = []
        for t in transcripts:
            p, q = (m.module(torch.tensor([t.ids])).logits[0].double().detach().numpy() for m in (tuned, base))
            start, end = t.spans[span]
            values += [oracle.kl(p[i - 1], q[i - 1]) for i in range(max(start, 1), end)]
        assert estimate.value == pytest.approx(np.mean(values), rel=1e-4)
        assert estimate.low <= estimate.value <= estimate.high
        assert (estimate.n, estimate.seed) == (3, 3)
    assert output_kl(tuned, base, transcripts)["answer"].value != pytest.approx(found["answer"].value)
    assert output_kl(base, base, transcripts)["answer"].value == 0
    with pytest.raises(ValueError, match="'nowhere'"):
        output_kl(base, tuned, transcripts, "nowhere")
    half = [Model(copy.deepcopy(m.module).bfloat16(), m.tokenizer) for m in (base, tuned)]
    with torch.no_grad():
        q, p = (m.module(torch.tensor([transcripts[0].ids])).logits[0, 2:-3].double() for m in half)
    expected = np.mean([oracle.kl(a, b) for a, b in zip(p.numpy(), q.numpy(), strict=True)])
    assert output_kl(*half, transcripts[:1], "thinking")["thinking"].value == pytest.approx(expected, rel=1e-5)


def test_passes_are_told_whose_rows_they_are(models):
    base, tuned = models
    transcripts = told(base, [9, 4, 6])
    said = []
    hooks = [m.module.register_forward_pre_hook(lambda *_: said.append(rows_now())) for m in models]
    output_kl(base, tuned, transcripts, batch_size=2)
    for hook in hooks:
        hook.remove()
    prompts = [t.spans["prompt"][1] for t in transcripts]
    shortest_first = [(1, 2), (1, 2), (0,), (0,)]
    assert [rows.items for rows in said] == shortest_first
    assert [rows.prompts for rows in said] == [tuple(prompts[i] for i in items) for items in shortest_first]


def test_tokens_of_a_span_can_be_compared(models):
    base, tuned = models
    transcripts = told(base, [12, 9, 14, 11, 10, 13])
    picked = drift(base, tuned, transcripts, over="thinking[:6]", k=2)
    assert {row.n_rows for row in picked.rows} == {36}
    whole = drift(base, tuned, [replace(t, spans={**t.spans, "early": (3, 9)}) for t in transcripts], over="early", k=2)
    assert [row.value for row in picked.rows] == [row.value for row in whole.rows]
    few, all_of = (output_kl(base, tuned, transcripts, over=o)[o].value for o in ("answer[0]", "answer"))
    named = [
        replace(t, spans={**t.spans, "first": (t.spans["answer"][0], t.spans["answer"][0] + 1)}) for t in transcripts
    ]
    assert few == output_kl(base, tuned, named, over="first")["first"].value != all_of
