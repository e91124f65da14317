"""The vision-language study: what it is made of, that its arms differ by what they are said to differ by, and that its numbers are right."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from analyses.arms import UNTUNED
from analyses.seeing import ARMS, Course, Seeing, Tuning, seeing, world
from analyses.seeing.answers import answers, judge, surprise
from analyses.seeing.models import Between, duplicate, holding
from analyses.seeing.pictures import aloud, handwritten, pictured, written_sums
from analyses.tasks import Question, side_of
from finetune.rules import merge_coefficients
from surgery.model import Model
from surgery.weights import linear_sites
from tests.families import _widen_, tiny

TINY = Course(
    width=32,
    layers=2,
    long=(2, 3),
    base=2,
    expert=5,
    encoder=120,
    reading=2,
    steps=3,
    examples=16,
    batch_size=16,
    develop=8,
)
SHORT = replace(TINY, short=(2, 2), long=(2, 2), encoder=1, base=1, expert=2, reading=1, steps=1)


@pytest.fixture(scope="module")
def digits():
    return handwritten()


@pytest.fixture(scope="module")
def made():
    return world(0, TINY)


@pytest.fixture(scope="module")
def shown(made):
    return pictured(written_sums(6, seed=5, side="test", terms=(2, 4)), made.digits, seed=5, side="test")


@pytest.fixture(scope="module")
def tuning(made):
    return Tuning(made, TINY)


def same(a: Model, b: Model) -> bool:
    pairs = zip(a.module.parameters(), b.module.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# --- what is asked ------------------------------------------------------------------------------------------------------


def test_sums_are_worked_rightly_line_by_line():
    for question in written_sums(60, seed=1, terms=(2, 4)):
        said, *steps = question.solution.split("\n")
        assert question.question == said + "="
        assert str(eval(said)) == question.answer == steps[-1].split("=")[1]
        assert all(eval(line.split("=")[0]) == int(line.split("=")[1]) for line in steps)
        assert len(steps) == sum(c.isdigit() for c in said) - 1


def test_aloud_asks_for_the_expression_alone():
    (question,) = aloud([Question("7+5=", "12", "7+5\n7+5=12", {"said": "7+5"})])
    assert (question.question, question.answer, question.solution) == ("7+5", "7+5", None)


def test_pictures_are_of_the_digits_and_of_the_side(digits):
    for side in ("train", "test"):
        questions = written_sums(40, seed=2, side=side)
        for question, text in zip(pictured(questions, digits, seed=3, side=side), questions, strict=True):
            labels = digits.labels[list(question.meta["pictures"])].tolist()
            assert labels == [int(c) for c in text.question if c.isdigit()]
            assert {digits.sides[i] for i in question.meta["pictures"]} == {side}
            assert question.question.replace("####", "d") == "".join("d" if c.isdigit() else c for c in text.question)
            assert side_of(text.meta["said"]) == side


def test_an_item_depends_on_its_seed_and_its_place_only(digits):
    questions = written_sums(9, seed=4)
    assert written_sums(5, seed=4) == questions[:5]
    assert pictured(questions, digits, seed=1)[:5] == pictured(questions[:5], digits, seed=1)
    assert pictured(questions, digits, seed=1) != pictured(questions, digits, seed=2)


def test_the_pictures_are_all_there(digits):
    assert digits.pixels.shape == (1797, 1, 8, 8)
    assert float(digits.pixels.min()) == -1
    assert float(digits.pixels.max()) == 1
    assert 0.2 < digits.sides.count("test") / 1797 < 0.3
    parts = [set(digits.of(7, side)) for side in ("train", "test", "all")]
    assert parts[0] | parts[1] == parts[2]
    assert not parts[0] & parts[1]


# --- what is made -------------------------------------------------------------------------------------------------------


def test_a_world_is_a_function_of_its_seed_and_leaves_the_process_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    a, b = (world(1, SHORT) for _ in range(2))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    for part in ("base", "expert", "host"):
        assert same(getattr(a, part), getattr(b, part))
        assert not getattr(a, part).module.training


def test_the_encoder_names_pictures_it_has_not_seen(made):
    assert made.encoder > 0.9


def test_the_prior_takes_the_tower_to_the_expert(made):
    there = holding(made.host, made.host.weights + made.prior)
    sites = linear_sites(made.expert.weights)
    assert list(made.prior) == sites
    assert any(bool(made.prior[site].any()) for site in sites)
    for site in sites:
        assert torch.allclose(there.weights[site], made.expert.weights[site], atol=1e-6)
    assert torch.equal(there.weights["embed"], made.host.weights["embed"])
    assert not same(there, made.host)


def test_an_expert_of_another_shape_is_refused(made):
    module, tokenizer = tiny("llama")
    with pytest.raises(ValueError, match=r"not of the tower's shape: \d+ sites differ, first 0\.attn"):
        Between(Model(module, tokenizer).weights, made.host.weights)


# --- what is measured ---------------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_what_else_is_asked(made, shown):
    wide = duplicate(made.host)  # drawn wide, so that answers differ
    _widen_(wide.module, torch.Generator().manual_seed(0))
    together = answers(wide, shown, made.digits.pixels, max_new_tokens=12)
    alone = [answers(wide, [q], made.digits.pixels, max_new_tokens=12)[0] for q in shown]
    assert [t.ids for t in together] == [t.ids for t in alone]
    assert [t.question for t in together] == [q.question for q in shown]
    assert len({t.ids[t.spans["prompt"][1] :] for t in together}) > 1


def test_surprise_is_the_likelihood_token_by_token(made, shown):
    pixels, host = made.digits.pixels, made.host
    expected = []
    for question in shown:
        ids = [*host.prompt_ids(question.question)]
        told = host.tokenizer(question.completion() + "<end>", add_special_tokens=False)["input_ids"]
        nats = 0.0
        for token in told:
            inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels[list(question.meta["pictures"])]}
            with torch.no_grad():
                nats -= float(host.module(**inputs).logits[0, -1].log_softmax(-1)[token])
            ids.append(token)
        expected.append(nats / len(told))
    found = surprise(host, shown, pixels, batch_size=4)
    assert found == pytest.approx(expected, abs=1e-4)
    turned = surprise(host, shown[::-1], pixels, batch_size=4)
    assert turned[::-1] == pytest.approx(expected, abs=1e-4)


def test_what_is_seen_matters(made, shown):
    question = shown[0]
    others = tuple(made.digits.of(9 - int(made.digits.labels[i]), "test")[0] for i in question.meta["pictures"])
    other = replace(question, meta={**question.meta, "pictures": others})
    assert surprise(made.host, [question], made.digits.pixels) != surprise(made.host, [other], made.digits.pixels)
    with pytest.raises(ValueError, match=r"need the pictures' pixels"):
        answers(made.host, [question])


@pytest.mark.parametrize(
    ("completion", "right", "read", "worked"),
    [
        ("<think>\n7+5-9\n7+5=12\n12-9=3\n</think>\n3", 1, 1, 1),
        ("<think>\n7+5-4\n7+5=12\n12-4=8\n</think>\n8", 0, 0, 1),
        ("<think>\n7+5-9\n7+5=13\n13-9=4\n</think>\n4", 0, 1, 0),
        ("<think>\n7+6-8\n7+6=11\n11-8=3\n</think>\n3", 1, 0, 0),
        ("<think>\n7+5-9\n7+5=12\n12-9=3", 0, 1, 0),
        ("<think>\n7++9\n</think>\n3", 1, 0, 0),
        ("7+5-9", 0, 0, 0),
    ],
    ids=["right", "misread", "miscounted", "by luck", "unfinished", "no sum", "aloud"],
)
def test_right_read_and_worked_are_three_things(made, completion, right, read, worked):
    asked = Question("####+####-####=", "3", None, {"said": "7+5-9"})
    found = judge([asked], [made.host.transcript(asked.question, completion)])
    assert found == {"right": [right], "read": [read], "worked": [worked]}


# --- what the arms do ---------------------------------------------------------------------------------------------------


def test_merges_come_as_far_along_the_prior_as_drift_at_every_site(made, tuning):
    start, prior = made.host.weights, made.prior
    along = {
        arm: merge_coefficients(start, tuning.model(arm).weights, prior)
        for arm in ("sft", "drift", "sft-merge", "merge-sft")
    }
    assert along["drift"].overall > along["sft"].overall + 0.01
    for site, coefficient in along["drift"].sites.items():
        assert along["sft-merge"].sites[site] == pytest.approx(coefficient, abs=1e-4)
    assert along["merge-sft"].overall == pytest.approx(along["drift"].overall, abs=0.1)
    assert not same(tuning.model("sft-merge"), tuning.model("drift"))
    assert not same(tuning.model("merge-sft"), tuning.model("sft-merge"))


def test_without_strength_drift_is_sft_and_a_merge_does_nothing(made, tuning):
    idle = Tuning(made, TINY, alpha=0.0)
    assert same(idle.model("drift"), tuning.model("sft"))
    assert same(idle.model("sft-merge"), tuning.model("sft"))
    assert not same(tuning.model("drift"), tuning.model("sft"))


def test_the_rule_and_the_controls_matter(made, tuning):
    other = Tuning(made, TINY, rule="norm").model("drift")
    assert not same(other, tuning.model("drift"))
    start, prior = made.host.weights, made.prior
    flipped = merge_coefficients(start, tuning.model("flipped").weights, prior).overall
    random_ = merge_coefficients(start, tuning.model("random").weights, prior).overall
    drift = merge_coefficients(start, tuning.model("drift").weights, prior).overall
    assert flipped < 0 < drift
    assert flipped < random_ < drift


def test_only_the_tower_learns_and_the_host_stays(made, tuning):
    before = {name: p.clone() for name, p in made.host.module.named_parameters()}
    after = dict(tuning.model("drift").module.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in made.host.module.named_parameters())
    for name, parameter in after.items():
        kept = "vision_tower" in name or "multi_modal_projector" in name
        assert torch.equal(parameter, before[name]) == kept, name
    assert made.host.module is not tuning.model("drift").module


def test_the_share_of_a_merge_is_the_best_of_those_tried(made, tuning):
    cost = tuning.shares()
    along = merge_coefficients(made.host.weights, tuning.model("merge").weights, made.prior).overall
    assert cost[round(along, 3)] == min(cost.values()) < max(cost.values())
    questions = pictured(written_sums(60, seed=0, terms=TINY.long), made.digits, seed=0)  # others, of the same kind
    far, near = (holding(made.host, made.host.weights + share * made.prior) for share in (1.0, 0.1))
    gap = surprise(far, questions, made.digits.pixels).mean() - surprise(near, questions, made.digits.pixels).mean()
    assert cost[1.0] - cost[0.1] == pytest.approx(gap, rel=0.3)


# --- the study ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study") / "kept"


@pytest.fixture(scope="module")
def found(folder):
    return seeing((0, 1), course=SHORT, arms=("sft", "drift"), items=5, to=folder)


def test_the_table_is_the_means_and_the_differences_are_paired(found):
    frame = found.frame().set_index(["arm", "measure"])
    assert list(dict.fromkeys(found.frame()["arm"])) == [UNTUNED, "sft", "drift"]
    nll = {arm: found.runs.table(arm, "nll") for arm in ("sft", "drift")}
    assert nll["sft"].shape == (2, 5)
    assert len(set(nll["sft"][:, 0])) == 2  # each seed has models of its own
    assert frame.loc[("sft", "nll"), "value"] == pytest.approx(nll["sft"].mean())
    assert frame.loc[(UNTUNED, "nll"), "coefficient"] == 0
    assert frame.loc[("drift", "nll"), "coefficient"] == pytest.approx(np.mean(found.coefficients["drift"]))
    change = found.differences("drift").set_index(["arm", "measure"]).loc[("sft", "nll")]
    assert change["value"] == pytest.approx((nll["sft"] - nll["drift"]).mean())
    assert change["low"] <= change["value"] <= change["high"]
    assert set(found.donors) == {"base, as text", "expert, as text", "encoder, held-out pictures"}
    assert all(len(shares) == 2 for shares in found.donors.values())


def test_a_study_is_kept_and_goes_on(found, folder, tmp_path):
    found.save(tmp_path / "study.json")
    assert Seeing.load(tmp_path / "study.json").frame().equals(found.frame())
    kept = json.loads((folder / "seed-1.json").read_text())
    kept["donors"]["base, as text"] = 0.125
    (folder / "seed-1.json").write_text(json.dumps(kept))
    again = seeing((0, 1), course=SHORT, arms=("sft", "drift"), items=5, to=folder)
    assert again.donors["base, as text"] == (found.donors["base, as text"][0], 0.125)
    assert again.frame().equals(found.frame())
    with pytest.raises(FileExistsError, match="holds a study with other alpha"):
        seeing((0,), course=SHORT, arms=("sft", "drift"), items=5, alpha=0.5, to=folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a study"):
        seeing((0,), course=SHORT, to=tmp_path / "other")


@pytest.mark.usefixtures("unchecked")
def test_a_figure_has_a_bar_an_arm_and_a_dot_a_seed(found):
    from matplotlib.figure import Figure

    ax = found.plot(Figure().subplots(), measure="nll")
    assert len(ax.patches) == 3
    assert [len(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"] == [2, 2, 2]
    assert "nats" in ax.get_ylabel()
    with pytest.raises(ValueError, match="no measure 'accuracy'"):
        found.plot(Figure().subplots(), measure="accuracy")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": ()}, "one seed or more"),
        ({"seeds": (1, 1)}, "each once"),
        ({"arms": ("sft", "nothing")}, f"no arm 'nothing'. Choose of {ARMS[0]}"),
        ({"arms": ()}, "one arm or more"),
        ({"rule": "none"}, "rule 'none' at alpha 1.0: choose of absolute"),
        ({"alpha": float("nan")}, "at a finite strength"),
        ({"items": 0}, "at least one held-out sum"),
    ],
)
def test_bad_input_is_one_clear_error(given, message):
    with pytest.raises(ValueError, match=message):
        seeing(given.pop("seeds", (0,)), course=SHORT, **given)


def test_a_course_of_no_steps_or_of_uneven_heads_is_refused():
    with pytest.raises(ValueError, match="expert=0: all counts are at least 1"):
        Course(expert=0)
    with pytest.raises(ValueError, match="width=30"):
        Course(width=30)
