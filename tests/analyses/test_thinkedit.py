"""ThinkEdit on a model in which it is known what makes it brief, beside the published algorithm, and on every family."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from analyses import figures
from analyses.controls import PlantedLength, planted_length
from analyses.dose import Cell, Line, Sweep
from analyses.statistics import tango, wilson
from analyses.tasks import Question
from analyses.thinkedit import (
    PAPER,
    Found,
    Judged,
    Recipe,
    ThinkEdit,
    find,
    judge,
    random_heads,
    rank_heads,
    split,
    thinkedit,
)
from probes.attribution import writers_of
from surgery.edits import RemoveDirection
from surgery.model import Model
from surgery.runs import Runs
from surgery.sites import Site
from surgery.transcript import positions
from surgery.weights import apply
from tests.families import FAMILIES, tiny
from tests.oracles import thinkedit as oracle

TWO = Recipe(share=2 / 16)
SHORT = Recipe(share=2 / 16, how="thresholds", rank="short", short=6, long=20)
TEXTS = ["[Fabcde]<think>sabcdefg</think>", "[Uabcde]<think>lg</think>", "[Uabcde]<think>sgfedcba</think>"]


@pytest.fixture(scope="module")
def planted() -> PlantedLength:
    return planted_length(seed=0)


@pytest.fixture(scope="module")
def runs(planted: PlantedLength) -> Runs:
    asked = [q.question for q in planted.questions(36, seed=3)]
    return Runs(tuple(planted.model.generate(asked, samples=6, seed=5, max_new_tokens=60)))


@pytest.fixture(scope="module")
def found(planted: PlantedLength, runs: Runs) -> Found:
    return find(planted.model, runs.of(runs.questions[:24]), runs.of(runs.questions[24:]), TWO)


# --- the planted model --------------------------------------------------------------------------------------------------


def test_the_planted_model_is_what_it_says(planted: PlantedLength, runs: Runs) -> None:
    brief = [t for t in runs if t.thinking and t.thinking.startswith("s")]
    lengthy = [t for t in runs if t.thinking and t.thinking.startswith("l")]
    assert len(brief) + len(lengthy) == len(runs)
    assert len(brief) / len(runs) == pytest.approx(0.5, abs=0.12)

    def mean(some, value):
        return sum(map(value, some)) / len(some)

    def length(t):
        return t.spans["thinking"][1] - t.spans["thinking"][0]

    assert mean(brief, length) == pytest.approx(1 / 0.30 + 0.0, rel=0.25)  # 1 + (1 - p) / p
    assert mean(lengthy, length) > 4 * mean(brief, length)
    ended = [t for t in lengthy if t.answer]
    assert mean(brief, lambda t: t.answer == "7") == pytest.approx(0.5, abs=0.15)
    assert mean(ended, lambda t: t.answer == "7") == pytest.approx(0.95, abs=0.06)
    assert mean([t for t in runs if t.question[0] == "F"], lambda t: t.thinking[0] == "s") == pytest.approx(
        0.75, abs=0.15
    )
    assert planted.direction.norm() == pytest.approx(1, abs=1e-5)
    assert abs(float(planted.direction @ planted.topic)) < 1e-5


def test_the_planted_model_has_two_writers_only(planted: PlantedLength) -> None:
    point = planted.model.weights
    for layer in range(4):
        for head in range(4):
            site = Site(layer, "attn.o", head)
            writes = float((planted.direction @ point[str(site)]).norm())
            assert (writes > 0.1) == (site in planted.heads), site
            assert (float((planted.topic @ point[str(site)]).norm()) > 0.1) == (site == planted.topic_head)
        assert float((planted.direction @ point[f"{layer}.mlp.down"]).norm()) < 1e-4
    norms = {site: float(point[site].norm()) for site in (Site(la, "attn.o", h) for la in range(4) for h in range(4))}
    assert len([s for s in norms if s not in planted.heads and norms[s] > 0.05]) == 14


def test_planting_depends_on_the_seed_alone(planted: PlantedLength) -> None:
    state = torch.get_rng_state()
    again, other = planted_length(seed=0), planted_length(seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(again.model.module.lm_head.weight, planted.model.module.lm_head.weight)
    assert not torch.allclose(other.direction, planted.direction)
    assert len({q.question for q in planted.questions(50, seed=0)}) == 50
    assert planted.questions(9, seed=2) == planted.questions(30, seed=2)[:9]


def test_the_direction_and_exactly_the_two_heads_are_found(planted: PlantedLength, found: Found) -> None:
    for site, unit in found.direction.items():
        if site.layer >= 1:
            assert float(unit @ -planted.direction) > 0.95, site
        assert abs(float(unit @ planted.topic)) < 1e-3, site  # within questions the topic is always the same
    assert set(found.heads()) == set(planted.heads)
    scores = found.frame()["score"]
    assert abs(scores[2]) < 0.05 * scores[1]
    assert list(found.frame()["site"][:2]) == [str(s) for s in found.heads()]
    assert found.frame()["edited"].sum() == 2
    for site in found.direction.sites[1:]:
        assert found.direction.auc[site].low > 0.5


def test_thresholds_take_the_topic_for_length(planted: PlantedLength, runs: Runs) -> None:
    """What pairs are for: short answers come from other questions than long ones."""
    confounded = find(planted.model, runs.of(runs.questions[:24]), runs.of(runs.questions[24:]), SHORT)
    assert abs(float(confounded.direction["1.mid"] @ planted.topic)) > 0.3
    assert planted.topic_head in confounded.heads(3 / 16)


def test_an_answer_that_lacks_the_part_that_is_read_ranks_no_head(planted: PlantedLength, runs: Runs) -> None:
    """As for the direction it is missing: the shortest of the others stands for its question."""
    some, part = runs.of(runs.questions[24:]), replace(TWO, over="thinking[4:]")
    direction = find(planted.model, runs.of(runs.questions[:24]), some, TWO).direction
    there = [t for t in some if len(positions(t, "thinking")) > 4]
    assert {t.question for t in there} == {t.question for t in some}
    expected = rank_heads(planted.model, direction, there, part)
    got = rank_heads(planted.model, direction, some, part)
    assert got.question == expected.question
    torch.testing.assert_close(got.scores, expected.scores)


def test_only_the_first_tokens_may_be_read(planted: PlantedLength, runs: Runs) -> None:
    """At the same places in all answers; the lengths are those of the whole span, and so is what is found here."""
    early = find(
        planted.model, runs.of(runs.questions[:24]), runs.of(runs.questions[24:]), Recipe(2 / 16, over="thinking[:3]")
    )
    assert set(early.heads()) == set(planted.heads)
    counts = early.direction.about["counts"]
    assert counts["mean_tokens_long"] > 10


@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_nothing_is_brief_after_the_edit(planted: PlantedLength, runs: Runs, site: str) -> None:
    recipe = Recipe(share=2 / 16, site=site)
    found = find(planted.model, runs.of(runs.questions[:24]), runs.of(runs.questions[24:]), recipe)
    assert set(found.heads()) == set(planted.heads)
    asked = [q.question for q in planted.questions(12, seed=8)]
    with planted.model.installed(found.edited(planted.model.weights)):
        after = planted.model.generate(asked, samples=4, seed=9, max_new_tokens=40)
    before = planted.model.generate(asked, samples=4, seed=9, max_new_tokens=40)
    short = [sum(t.spans["thinking"][1] - t.spans["thinking"][0] < 6 for t in told) for told in (before, after)]
    assert short[0] > 12
    assert short[1] < short[0] / 2
    assert [t.thinking[0] for t in before] == [t.thinking[0] for t in after]  # moods come as before, and do no more


# --- the published algorithm ----------------------------------------------------------------------------------------------


def examples(runs):
    return [(t.ids, *t.spans["thinking"]) for t in runs]


def test_the_published_recipe_is_the_published_algorithm(planted: PlantedLength, runs: Runs) -> None:
    module, parts = planted.model.module, (runs.of(runs.questions[:24]), runs.of(runs.questions[24:]))
    finished = [Runs(tuple(t for t in part if t.finished)) for part in parts]  # it knows no censoring
    ours = find(planted.model, *finished, SHORT)
    v = oracle.direction(module, examples(finished[0]), short=6, long=20)
    for layer in range(4):
        raw = ours.direction.raw(layer)
        torch.testing.assert_close(raw.double(), v[layer], rtol=1e-4, atol=1e-5)
    scores = oracle.scores(module, examples(finished[1]), v, short=6)
    torch.testing.assert_close(ours.contributions.matrix(), scores, rtol=1e-4, atol=1e-5)
    assert [(s.layer, s.head) for s in ours.heads(4 / 16)] == oracle.top(scores, 4)
    for strength in (0.5, 1.0, 2.0):
        edited = apply(ours.edit(strength), planted.model.weights, at="1.attn.o.h2")["1.attn.o"]
        expected = oracle.edited(module.model.layers[1].self_attn.o_proj.weight.detach(), v[1], [2], 16, strength)
        torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-5)
    assert (PAPER.how, PAPER.rank, PAPER.share, PAPER.strength) == ("thresholds", "short", 0.04, 1.0)
    assert (PAPER.short, PAPER.long, PAPER.site) == (100, 1000, "attention")


# --- identities, on every family ------------------------------------------------------------------------------------------


def told(model: Model, questions: str = "abcdef"):
    """Transcripts of one length and another for each question, of random text: what lengths a random model chooses means nothing."""
    draw = torch.Generator().manual_seed(0)
    texts = ["".join(chr(97 + int(i)) for i in torch.randint(0, 26, (n,), generator=draw)) for n in (4, 11)]
    return [model.transcript(q, f"<think>{text}{q}</think>{q}") for q in questions for text in texts]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_head_writes_no_more_of_its_direction(family: str) -> None:
    model = Model(*tiny(family))
    site = "attention" if "mid" in model.anatomy.streams else "mlp"
    found = find(model, told(model), told(model, "uvwxyz"), Recipe(share=0.25, site=site))
    assert len(found.heads()) == 3
    layer = found.heads()[0].layer
    here = [Site(layer, "attn.o", h) for h in range(2)]  # of one layer, so that what they read stays
    read = found.direction.keep([s for s in found.direction if s.layer == layer + (site == "mlp")])
    runs = told(model, "uvwxyz")
    before = writers_of(model, read, runs)
    for strength in (1.0, 0.5):
        with model.installed(apply(found.edit(strength), model.weights, at=here)):
            after = writers_of(model, read.carried_to(model), runs)
        for head in here:
            scale = before.scores[:, before.sites.index(head)].abs().max()
            rest = after.scores[:, after.sites.index(head)]
            if strength == 1:
                assert rest.abs().max() < 1e-4 * max(1.0, float(scale)), head
                assert scale > 1e-2
            elif "out_norm" not in {s.part.split(".")[-1] for s in model.weights}:
                kept = (1 - strength) * before.scores[:, before.sites.index(head)]
                torch.testing.assert_close(rest, kept, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "qwen2-moe"])
def test_the_edit_is_what_projecting_the_heads_output_is(family: str) -> None:
    """Behind a norm of gain g the stream has no more u where what the head writes has no more of g * u."""
    model = Model(*tiny(family))
    point, anatomy, ids = model.weights, model.anatomy, torch.tensor([told(model)[0].ids])
    u = {layer: torch.randn(32, generator=torch.Generator().manual_seed(layer)) for layer in range(3)}
    heads = [Site(0, "attn.o", 1), Site(2, "attn.o", 3)]
    with torch.no_grad():
        with model.installed(apply(RemoveDirection(u), point, at=heads)):
            edited = model.module(input_ids=ids).logits
        hooks = []
        for head in heads:
            norm, tap = anatomy.norm_after(head), anatomy.tap(Site(head.layer, "attn.z", head.head))
            W, along = (
                point[head].float(),
                u[head.layer] * (1 if norm is None else point[norm].float() + anatomy.gain_offset),
            )

            def project(_, args, out, W=W, along=along, part=tap.head):
                return out - ((args[0][..., part] @ W.T) @ along)[..., None] * along / along.square().sum()

            hooks.append(model.module.get_submodule(tap.path).register_forward_hook(project))
        try:
            projected = model.module(input_ids=ids).logits
        finally:
            for hook in hooks:
                hook.remove()
        plain = model.module(input_ids=ids).logits
    torch.testing.assert_close(edited, projected, rtol=1e-4, atol=1e-4)
    assert (edited - plain).abs().max() > 1e-2


# --- controls and judging -----------------------------------------------------------------------------------------------


def test_random_heads_are_of_the_same_layers_and_others(planted: PlantedLength) -> None:
    anatomy = planted.model.anatomy
    heads = [Site(1, "attn.o", 2), Site(3, "attn.o", 0), Site(3, "attn.o", 1), Site(0, "attn.o", 0)]
    draws = [random_heads(heads, anatomy, seed=s) for s in range(30)]
    for drawn in draws:
        assert sorted(s.layer for s in drawn) == [0, 1, 3, 3]
        assert len(set(drawn)) == 4
        assert not set(drawn) & set(heads)
    assert {s.head for drawn in draws for s in drawn if s.layer == 1} == {0, 1, 3}
    assert random_heads(heads, anatomy, seed=7) == draws[7]
    three = [Site(1, "attn.o", h) for h in (0, 1, 3)]  # fewer others than taken: of all
    assert {len(random_heads(three, anatomy, seed=s)) for s in range(5)} == {3}


def test_questions_are_dealt_apart(planted: PlantedLength) -> None:
    asked = planted.questions(20, seed=0)
    parts = split([*asked, *asked[:5]], seed=3)
    names = [{q.question for q in part} for part in parts]
    assert [len(p) for p in parts] == [8, 4, 8]
    assert set.union(*names) == {q.question for q in asked}
    assert split(asked, seed=4) != split(asked, seed=3)
    with pytest.raises(ValueError, match="4 different questions are too few"):
        split(asked[:4])


@pytest.fixture(scope="module")
def judged(planted: PlantedLength, found: Found) -> Judged:
    return judge(
        planted.model, found, planted.questions(16, seed=21), strengths=(2.0,), shares=(1 / 16,), controls=1, steering=(1.0,),
        layerwise=(-1.0,), samples=2, temperature=1.0, max_new_tokens=40, batch_size=64, texts=TEXTS, seed=2,
    )  # fmt: skip


def test_the_edit_lengthens_and_its_controls_do_not(judged: Judged) -> None:
    effects = judged.effects().set_index("measure")
    length, accuracy = effects.loc["length"], effects.loc["accuracy"]
    assert length["low"] > 0
    assert length["after"] == pytest.approx(length["before"] + length["difference"])
    assert accuracy["difference"] > 0
    assert max(abs(length["heads_low"]), abs(length["heads_high"])) < length["low"]
    assert max(abs(length["directions_low"]), abs(length["directions_high"])) < length["low"]
    assert length["heads_p"] == 0.5  # one control: itself and the edit
    assert length["n"] == 16
    assert effects.loc["kl", "before"] == 0
    swept = (
        judged.frame()
        .query("panel == 'strengths' and arm == 'edit' and draw.isna()")
        .set_index(["measure", "x"])["value"]
    )
    for measure in ("text_nll", "kl"):  # one number of a passage's tokens, whichever table says it
        assert effects.loc[measure, "before"] == pytest.approx(swept[measure, 0.0])
        assert effects.loc[measure, "after"] == pytest.approx(swept[measure, 1.0])
        assert effects.loc[measure, "low"] <= effects.loc[measure, "difference"] <= effects.loc[measure, "high"]


def test_each_control_is_another(planted: PlantedLength, found: Found) -> None:
    asked = planted.questions(2, seed=5)
    options: dict[str, Any] = {"strengths": (0.25,), "shares": (1 / 16,), "texts": ["abc def"], "measures": ("kl",)}
    half = replace(found, recipe=replace(found.recipe, strength=0.5))
    sweeps = judge(planted.model, half, asked, controls=3, **options).sweeps
    kl = {c.line.arm: c.passages["kl"] for c in sweeps["strengths"].cells if c.strength == 0.5}
    shares = [c for c in sweeps["shares"].cells if c.strength]
    assert {c.strength for c in shares} == {0.5}
    own = f" at {half.recipe.share:g}"
    assert {c.line.arm: c.passages["kl"] for c in shares if c.line.arm.endswith(own)} == {
        f"{a}{own}": k for a, k in kl.items()
    }
    assert len({kl[f"random directions {draw}"] for draw in range(3)} | {kl["edit"]}) == 4
    assert len({kl[f"random heads {draw}"] for draw in range(3)}) > 1


def test_a_control_that_changes_as_much_the_other_way_is_as_extreme() -> None:
    rights = {
        "untouched": (True, True, False, None),
        "edit": (True, True, True, None),
        "random heads 0": (False, True, False, None),
        "random heads 1": (True, True, False, None),
    }
    asked = tuple(range(4))
    cells = [Cell(Line(a), float(a != "untouched"), {"question": asked, "right": r}, {}) for a, r in rights.items()]
    row = Judged({"strengths": Sweep(tuple(cells), 0.05, 0)}, Recipe()).effects().set_index("measure").loc["accuracy"]
    assert row[["before", "after", "heads_low", "heads_high"]].tolist() == [
        0.5,
        0.75,
        -0.25,
        0.0,
    ]  # a missing one is not right
    assert row["heads_p"] == 2 / 3  # itself and one of two
    assert (row["low"], row["high"]) == (tango(1, 0, 4).low, tango(1, 0, 4).high)


def test_an_edit_that_changed_no_answer_is_not_known_to_change_none() -> None:
    answers = {"question": (0, 1, 2), "right": (True, True, False), "length": (5, 6, 9), "ended": (True,) * 3}
    cells = tuple(Cell(Line(arm), float(arm == "edit"), answers, {}) for arm in ("untouched", "edit"))
    effects = Judged({"strengths": Sweep(cells, 0.05, 0)}, Recipe()).effects().set_index("measure")
    assert effects.loc["accuracy", ["low", "high"]].tolist() == pytest.approx([-wilson(0, 3).high, wilson(0, 3).high])
    assert effects.loc["length", "difference"] == 0
    assert effects.loc["length", ["low", "high"]].isna().all()


def test_panels_and_figures(judged: Judged, found: Found) -> None:
    table = judged.frame()
    assert list(dict.fromkeys(table["panel"])) == ["strengths", "shares", "steering", "layers"]
    of = dict(iter(table[table["measure"] == "length"].groupby("panel")))
    assert sorted(of["strengths"].query("arm == 'edit'")["x"]) == [0, 1, 2]
    assert sorted(of["shares"].query("arm == 'edit'")["x"]) == [0, 1 / 16, 2 / 16]
    assert set(of["shares"]["arm"]) == {"edit", "random heads", "random directions"}
    assert of["strengths"].query("arm != 'edit'")["draw"].notna().all()
    assert sorted(of["layers"].query("arm == '-1'")["x"]) == [0, 1, 2, 3]
    assert sorted(of["layers"].query("arm == 'random directions, -1' and draw == 0")["x"]) == [0, 1, 2, 3]
    assert set(of["layers"]["arm"]) == {"+0", "-1", "random directions, -1"}
    steered = of["steering"].query("arm == 'steering'").set_index("x")["value"]
    control = of["steering"].query("arm == 'random directions'").set_index("x")["value"]
    assert steered[1.0] > steered[0.0]  # from short to long
    assert abs(control[1.0] - control[0.0]) < steered[1.0] - steered[0.0]
    answers = judged.answers()
    assert answers.groupby("arm").size().to_dict() == {"edited": 32, "untouched": 32}
    for draw, options in (
        (figures.edit_sweep, {"panel": "strengths", "measure": "accuracy"}),
        (figures.edit_sweep, {"panel": "shares", "measure": "length"}),
        (figures.edit_sweep, {"panel": "layers", "measure": "length"}),
        (figures.edit_sweep, {"panel": "steering", "measure": "length"}),
    ):
        drawn = figures.draw(draw, table, **options).axes[0]
        assert drawn.get_xlabel()
        assert any("range of 1" in label for label in drawn.get_legend_handles_labels()[1])
    for draw in (figures.lengths, figures.accuracy_under_length):
        labels = figures.draw(draw, answers).axes[0].get_legend_handles_labels()[1]
        assert [label.split(",")[0] for label in labels] == ["untouched", "edited"]
    with pytest.raises(ValueError, match="no measure 'speed' in a panel 'shares'"):
        figures.edit_sweep(table, panel="shares", measure="speed")


def test_everything_is_saved_and_comes_back(judged: Judged, found: Found, runs: Runs, tmp_path) -> None:
    whole = ThinkEdit(found, judged, runs, (24, 12, 16))
    whole.save(tmp_path / "out")
    again = ThinkEdit.load(tmp_path / "out")
    pd.testing.assert_frame_equal(again.frame(), whole.frame())
    pd.testing.assert_frame_equal(again.judged.frame(), judged.frame())
    pd.testing.assert_frame_equal(again.found.frame(), found.frame())
    assert (again.found.recipe, again.found.heads(), again.parts) == (TWO, found.heads(), (24, 12, 16))
    assert again.runs == runs
    assert len(again.lengths()) == len(runs)


def test_the_whole_goes_on_where_it_stopped(planted: PlantedLength, tmp_path, monkeypatch) -> None:
    options = {"samples": 4, "max_new_tokens": 40, "shares": (), "strengths": (), "controls": 0, "texts": TEXTS}
    options |= {"batch_size": 64, "to": tmp_path / "work"}
    asked = planted.questions(15, seed=4)
    first = thinkedit(planted.model, asked, TWO, **options)
    assert first.parts == (6, 3, 6)
    seeds = {first.runs.about["seed"], first.judged.sweeps["strengths"].seed}
    assert len(seeds) == 2  # other noise than in the answers that were learnt from
    in_files = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.json*")}
    monkeypatch.setattr(Model, "generate", lambda *_, **__: pytest.fail("nothing is left to generate"))
    again = thinkedit(planted.model, asked, TWO, **options)
    pd.testing.assert_frame_equal(again.frame(), first.frame())
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.json*")} == in_files


def test_other_settings_begin_anew_beside_and_the_first_still_go_on(planted: PlantedLength, tmp_path) -> None:
    options = {"samples": 4, "max_new_tokens": 40, "shares": (), "strengths": (), "controls": 0, "texts": TEXTS}
    options |= {"batch_size": 64, "to": tmp_path / "work"}
    asked = planted.questions(15, seed=4)
    with pytest.raises(ValueError, match=r"cut off before .* Generate with more"):
        thinkedit(planted.model, asked, TWO, **{**options, "max_new_tokens": 2})
    first = thinkedit(planted.model, asked, TWO, **options)
    for other in ({"seed": 1}, {"samples": 5}, {"max_new_tokens": 44}):
        assert thinkedit(planted.model, asked, TWO, **{**options, **other}).runs != first.runs
    assert set(thinkedit(planted.model, planted.questions(15, seed=5), TWO, **options).runs.questions) != set(
        first.runs.questions
    )
    again = thinkedit(planted.model, asked, TWO, **options)
    pd.testing.assert_frame_equal(again.frame(), first.frame())


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 0}, "share 0"),
        ({"share": 1.5}, "in (0, 1]"),
        ({"strength": 2.5}, "strength 2.5"),
        ({"strength": float("nan")}, "strength nan"),
        ({"site": "resid"}, "attention or mlp"),
        ({"rank": "norm"}, "contrast or short"),
        ({"over": "thinking[:4]", "how": "thresholds"}, "a whole span, such as thinking"),
    ],
)
def test_a_recipe_that_makes_no_sense(options, said, unchecked) -> None:
    with pytest.raises(ValueError) as raised:
        Recipe(**options)
    assert said in str(raised.value)


def test_what_cannot_be_found_is_one_clear_error(planted: PlantedLength, runs: Runs, found: Found) -> None:
    model = planted.model
    first, rest = runs.of(runs.questions[:24]), runs.of(runs.questions[24:])
    with pytest.raises(ValueError, match="24 questions are used for both"):
        find(model, first, runs, TWO)
    silent = [model.transcript(q, "7") for q in "abcd"]
    with pytest.raises(ValueError, match="has a span thinking"):
        find(model, silent, rest, TWO)
    cut = planted.model.generate(["Fabcd", "Uabcd"], samples=3, seed=1, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"cut off|ended"):
        find(model, cut, rest, TWO)
    with pytest.raises(ValueError, match=r"under 100 tokens|over 1000 tokens"):
        find(model, first, rest, PAPER)
    with pytest.raises(ValueError, match="of the 4 runs counts as short"):
        rank_heads(model, found.direction, silent, TWO)
    other = planted_length(seed=5).model
    with pytest.raises(ValueError, match="another model"):
        rank_heads(other, found.direction, rest, TWO)
    with pytest.raises(ValueError, match="strength 0 does nothing"):
        judge(model, Found(found.direction, found.contributions, Recipe(strength=0)), [Question("Fabcd", "7")])


def test_an_arm_without_a_single_length_has_no_effect_no_p_and_no_crash(judged: Judged) -> None:
    def gone(cell: Cell) -> Cell:
        return replace(cell, answers={**cell.answers, "length": (None,) * len(cell.answers["length"])})

    strengths = judged.sweeps["strengths"]
    for arm, there in (("edit", False), ("random heads 0", True)):
        cells = tuple(gone(c) if c.line.arm == arm else c for c in strengths.cells)
        effects = Judged({"strengths": replace(strengths, cells=cells)}, judged.recipe).effects().set_index("measure")
        assert math.isfinite(effects.loc["length", "difference"]) == there
        assert math.isnan(effects.loc["length", "heads_p"])  # nothing to compare, or nothing to compare it with
        assert effects.loc["accuracy", "n"] == 16


def test_a_contrast_needs_questions_with_a_short_and_a_long_answer(planted: PlantedLength, runs: Runs, found: Found):
    # whatever the thresholds of the direction are, a question's answers are compared with each other
    few = rank_heads(planted.model, found.direction, runs.of(runs.questions[:4]), Recipe(how="thresholds", short=1))
    assert set(few.question) <= set(runs.questions[:4])
    assert few.question
    one_each = Runs(tuple(runs.of([q])[0] for q in runs.questions[:6]))
    with pytest.raises(ValueError, match=r"counts as short|both a shorter and a longer answer"):
        rank_heads(planted.model, found.direction, one_each, TWO)
