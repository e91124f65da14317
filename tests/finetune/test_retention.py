"""Terms that keep what a model knew: each against its formula by hand, what it draws, what it gives back, and its effect on training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from analyses.tasks import chained_sums
from finetune.examples import Example
from finetune.retention import EWC, BehaviourCloning, Fisher, Kickstarting, Replay, drawn, fisher_diagonal
from finetune.tune import tune
from surgery.model import Model
from surgery.transcript import Transcript
from tests.families import tiny
from tests.oracles import objectives as oracle

SUMS = chained_sums(12, seed=5, terms=(2, 3))
WORDS = ["Name a colour.", "Say hello.", "What is a cat?", "Where is north?", "Count to two.", "Spell dog."]
OPTIONS: dict[str, Any] = {"method": "full", "batch_size": 4, "autocast": False, "lr": 1e-2}


def model(seed: int = 0) -> Model:
    return Model(*tiny("llama", seed=seed))


def moved(scale: float = 0.05) -> Model:
    m = model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in m.module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return m


def taught(m: Model) -> list[Transcript]:
    return [m.transcript(q.question, q.completion(m.markers)) for q in SUMS]


def source(m: Model, count: int = len(WORDS)) -> list[Transcript]:
    return [m.transcript(question, f"{question[::-1]}!") for question in WORDS[:count]]


def logits(m: Model, t: Transcript) -> list[list[float]]:
    with torch.no_grad():
        return m.module(input_ids=torch.tensor([t.ids])).logits[0].double().tolist()


def as_texts(
    m: Model, transcripts: list[Transcript], weight: Callable[[int], float] = lambda i: 1.0
) -> list[oracle.Text]:
    """Completions as the oracles' lists, each token with a weight by its place."""
    found = []
    for t in transcripts:
        own, (begin, end) = logits(m, t), t.spans["completion"]
        found.append([(own[i - 1], t.ids[i], weight(i)) for i in range(begin, end)])
    return found


def by_place(i: int) -> float:
    return (0.25, 3.0)[i % 2]


def weighed(t: Transcript) -> Example:
    begin, end = t.spans["completion"]
    return Example(t, tuple(by_place(i) if begin <= i < end else 0.0 for i in range(len(t.ids))))


def value(term: Any, m: Model, step: int = 0) -> float:
    return float(term(m.module, step).detach())


# --- what is drawn --------------------------------------------------------------------------------------------------------


def test_every_text_is_drawn_once_before_any_is_drawn_again() -> None:
    taken = [i for step in range(6) for i in drawn(9, 3, seed=1, step=step)]
    assert sorted(taken[:9]) == sorted(taken[9:]) == list(range(9))
    assert taken[:9] != taken[9:]
    assert drawn(9, 3, seed=1, step=4) == taken[12:15]
    assert [i for step in range(3) for i in drawn(9, 3, seed=2, step=step)] != taken[:9]
    across = [i for step in range(5) for i in drawn(5, 4, seed=0, step=step)]
    assert [sorted(across[k : k + 5]) for k in range(0, 20, 5)] == [list(range(5))] * 4


# --- behaviour cloning, kickstarting, replay ------------------------------------------------------------------------------


def test_cloning_is_the_divergence_from_the_start_by_hand() -> None:
    start, now = model(), moved()
    told = source(start)
    term = BehaviourCloning(start, told, weight=0.7, batch_size=6)
    expected = 0.7 * oracle.kl_to_base(as_texts(now, told), as_texts(start, told))
    assert value(term, now) == pytest.approx(expected, rel=1e-4)
    other = oracle.kl_from_base(as_texts(now, told), as_texts(start, told))
    assert abs(0.7 * other - expected) > 0.01 * expected


def test_cloning_wants_nothing_at_the_start_and_its_gradient_is_the_learners() -> None:
    start, now = model(), model()
    term = BehaviourCloning(start, source(start), batch_size=6)
    modes: list[bool] = []
    start.module.train().model.layers[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    loss = term(now.module, 0)
    assert set(modes) == {False}  # or what was dropped would be learnt
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert max(float(p.grad.abs().max()) for p in now.module.parameters() if p.grad is not None) < 1e-3
    assert all(p.grad is None for p in start.module.parameters())
    far = moved()
    term(far.module, 0).backward()
    assert max(float(p.grad.abs().max()) for p in far.module.parameters() if p.grad is not None) > 1e-2


def test_cloning_takes_its_batch_by_seed_and_step() -> None:
    start, now = model(), moved()
    told = source(start)

    def of(**options: Any) -> BehaviourCloning:
        return BehaviourCloning(start, told, **{"batch_size": 2, **options})

    first = [value(of(), now, step) for step in range(3)]
    assert [value(of(), now, step) for step in range(3)] == first
    assert len(set(first)) == 3
    chosen = [told[i] for i in drawn(6, 2, seed=0, step=1)]
    expected = oracle.kl_to_base(as_texts(now, chosen), as_texts(start, chosen))
    assert first[1] == pytest.approx(expected, rel=1e-4)
    assert value(of(batch_size=9), now) == value(of(batch_size=6), now)  # no text twice in a step
    for options in ({"seed": 1}, {"batch_size": 3}, {"weight": 2.0}, {"over": "completion[:3]"}):
        assert value(of(**options), now) != pytest.approx(first[0], rel=1e-4)
        assert repr(of(**options)) != repr(of())


def test_replay_is_the_sources_own_loss() -> None:
    now = moved()
    told = source(now)
    term = Replay(told, weight=0.5, batch_size=6)
    assert value(term, now) == pytest.approx(0.5 * oracle.nll(as_texts(now, told)), rel=1e-4)
    uneven = Replay([weighed(t) for t in told], batch_size=6)
    assert value(uneven, now) == pytest.approx(oracle.nll(as_texts(now, told, by_place)), rel=1e-4)
    chosen = [told[i] for i in drawn(6, 2, seed=4, step=2)]
    few = Replay(told, batch_size=2, seed=4)
    assert value(few, now, 2) == pytest.approx(oracle.nll(as_texts(now, chosen)), rel=1e-4)


def test_kickstarting_is_the_divergence_to_the_start_on_what_the_learner_says() -> None:
    start, now = model(), moved()
    term = Kickstarting(now, start, WORDS, weight=0.5, batch_size=3, max_new_tokens=5, until=10)
    said = term.answers(2)
    assert [t.question for t in said] == [WORDS[i] for i in drawn(6, 3, seed=0, step=2)]
    assert all(0 < t.spans["completion"][1] - t.spans["completion"][0] <= 5 for t in said)
    assert [t.ids for t in term.answers(2)] == [t.ids for t in said]
    expected = oracle.kl_from_base(as_texts(now, said), as_texts(start, said))
    assert value(term, now, 2) == pytest.approx(0.5 * 0.8 * expected, rel=1e-3)
    assert [term.weight_at(step) for step in (0, 5, 10, 20)] == pytest.approx([0.5, 0.25, 0, 0])
    kept = Kickstarting(now, start, WORDS, weight=0.5)
    assert kept.weight_at(1000) == 0.5


def test_kickstarting_says_nothing_once_its_weight_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    start, now = model(), moved()
    term = Kickstarting(now, start, WORDS, batch_size=2, max_new_tokens=4, until=3)
    asked: list[int] = []
    answers = term.answers
    monkeypatch.setattr(term, "answers", lambda step: asked.append(step) or answers(step))
    values = [value(term, now, step) for step in range(6)]
    assert all(v > 0 for v in values[:3])
    assert values[3:] == [0, 0, 0]
    assert asked == [0, 1, 2]
    with pytest.raises(ValueError, match="learner is not the model that trains"):
        Kickstarting(start, start, WORDS, until=1)(now.module, 1)


def test_kickstarting_says_something_else_by_seed_step_temperature_and_weights() -> None:
    start, now = model(), moved()

    def ids(learner: Model = now, step: int = 0, **options: Any) -> list[tuple[int, ...]]:
        settings = {"batch_size": 3, "max_new_tokens": 5} | options
        return [t.ids for t in Kickstarting(learner, start, WORDS, **settings).answers(step)]

    first = ids()
    for other in (ids(seed=1), ids(step=1), ids(temperature=0.2), ids(moved(0.5))):
        assert other != first
    same = [
        Kickstarting(now, start, WORDS[:1], batch_size=1, max_new_tokens=5).answers(step)[0].ids for step in range(3)
    ]
    assert len(set(same)) > 1  # the same question anew


def test_terms_give_back_mode_gradients_and_random_state() -> None:
    start, now = model(), moved()
    start.module.eval()
    now.module.train()
    state = torch.get_rng_state()
    asked = Kickstarting(now, start, WORDS, batch_size=2, max_new_tokens=4)
    asked(now.module, 0)
    BehaviourCloning(start, source(start))(now.module, 0)
    modes: list[bool] = []
    seen = now.module.model.layers[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    asked.answers(0)
    fisher_diagonal(now, source(now, 2), sampled=True)
    seen.remove()
    assert set(modes) == {False}  # nothing is dropped where it is said, or measured
    assert torch.equal(torch.get_rng_state(), state)
    assert now.module.training
    assert not start.module.training
    assert all(p.grad is None for m in (start, now) for p in m.module.parameters())


def test_a_term_s_name_tells_its_data() -> None:
    """By it a checkpoint is told from another run's."""
    start, now = model(), moved()
    told, settings = source(start), {"max_new_tokens": 5}
    assert repr(Replay(told)) == repr(Replay(list(told)))
    assert repr(Replay(told)) != repr(Replay(told[1:] + told[:1]))
    assert repr(Replay(told)) != repr(Replay(told, over="completion[:3]"))
    asked = Kickstarting(now, start, WORDS, **settings)
    assert repr(asked) == repr(Kickstarting(now, start, list(WORDS), **settings))
    for other in (
        Kickstarting(now, start, WORDS[::-1], **settings),
        Kickstarting(now, start, WORDS, until=3, **settings),
    ):
        assert repr(other) != repr(asked)


@pytest.mark.usefixtures("unchecked")
def test_what_terms_refuse() -> None:
    start, now = model(), moved()
    told = source(start)
    with pytest.raises(ValueError, match="starting model is the one that trains"):
        BehaviourCloning(now, told)(now.module, 0)
    with pytest.raises(ValueError, match="learner is not the model that trains"):
        Kickstarting(start, start, WORDS)(now.module, 0)
    with pytest.raises(ValueError, match="starting model is the one that trains"):
        Kickstarting(now, now, WORDS, max_new_tokens=2)(now.module, 0)
    for wrong, message in (
        (lambda: Replay(told, weight=0), r"Replay\(weight=0\): the weight is above 0"),
        (lambda: BehaviourCloning(start, told, weight=-1), "above 0"),
        (lambda: Replay([]), "no transcripts"),
        (lambda: Replay(told, over="thinking"), "Transcript 0"),
        (lambda: Replay(told, batch_size=0), "at least one text"),
        (lambda: Kickstarting(now, start, []), "no questions"),
        (lambda: Kickstarting(now, start, WORDS, until=0), "until=0"),
        (lambda: fisher_diagonal(now, told, at="*.attn.nothing"), "nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_terms_are_where_the_model_that_trains_is() -> None:
    """What EWC holds on the CPU goes to where the weights are, and a weight that has faded to 0 is there too."""
    m, start = model(), model()
    ewc = EWC(fisher_diagonal(m, source(m, 2)))
    kick = Kickstarting(m, start, WORDS, until=3)
    m.module.to("meta")
    for term in (ewc, kick):
        assert term(m.module, 3).device.type == "meta"


# --- elastic weights ------------------------------------------------------------------------------------------------------


def test_the_diagonal_is_the_mean_of_squared_gradients_a_sequence_at_a_time() -> None:
    m = model()
    told = source(m, 3)
    expected = {name: torch.zeros_like(p) for name, p in m.module.named_parameters()}
    for t in told:
        m.module.zero_grad()
        begin, end = t.spans["completion"]
        logs = m.module(input_ids=torch.tensor([t.ids])).logits[0].log_softmax(-1)
        sum(by_place(i) * logs[i - 1, t.ids[i]] for i in range(begin, end)).backward()
        for name, p in m.module.named_parameters():
            expected[name] += p.grad.square() / 3
    m.module.zero_grad()
    first, *others = map(weighed, told)
    found = fisher_diagonal(m, [first, others])  # each sequence of a group is one
    assert found.sequences == 3
    for name, p in m.module.named_parameters():
        scale = float(expected[name].max())
        torch.testing.assert_close(found.diagonal[name], expected[name], rtol=1e-3, atol=1e-5 * scale)
        assert torch.equal(found.start[name], p)
        assert found.start[name].data_ptr() != p.data_ptr()


def test_sampled_it_is_the_fisher_information() -> None:
    """One learnt token: the expectation over the whole vocabulary, exactly, against many draws."""
    m = model()
    (t,) = source(m, 1)
    place, weight = "1.mlp.down", m.weights.parameter("1.mlp.down")
    begin = t.spans["completion"][0]
    logs = m.module(input_ids=torch.tensor([t.ids])).logits[0, begin - 1].log_softmax(-1)
    chances = logs.detach().exp().double()
    squares = []
    for v in range(len(logs)):
        (slope,) = torch.autograd.grad(logs[v], weight, retain_graph=True)
        squares.append(float(slope.double().square().sum()))
    each = torch.tensor(squares, dtype=torch.float64)
    mean = float((chances * each).sum())
    deviation = float((chances * (each - mean).square()).sum()) ** 0.5
    draws = 600
    found = fisher_diagonal(m, [t] * draws, over="completion[:1]", at=place, sampled=True)
    assert list(found.diagonal) == ["model.layers.1.mlp.down_proj.weight"]
    trace = float(next(iter(found.diagonal.values())).double().sum())
    assert abs(trace - mean) < 4 * deviation / draws**0.5
    empirical = float(next(iter(fisher_diagonal(m, [t], over="completion[:1]", at=place).diagonal.values())).sum())
    assert empirical == pytest.approx(float(each[t.ids[begin]]), rel=1e-3)
    assert abs(empirical - mean) > 8 * deviation / draws**0.5


def test_a_draw_depends_on_seed_and_sequence() -> None:
    m = model()
    told = source(m, 2)

    def of(seed: int, transcripts: list[Transcript] = told) -> Tensor:
        found = fisher_diagonal(m, transcripts, at="0.mlp.up", sampled=True, seed=seed)
        return found.diagonal["model.layers.0.mlp.up_proj.weight"]

    assert torch.equal(of(0), of(0))
    assert not torch.equal(of(0), of(1))
    assert not torch.allclose(of(0, told[:1] * 4), of(0, told[:1]), rtol=1e-2)  # each of the four draws for itself


def test_the_spring_is_the_papers() -> None:
    start, now = model(), moved()
    fisher = fisher_diagonal(start, source(start))
    term = EWC(fisher, weight=3.0)
    flat = [
        torch.cat([t.detach().flatten().double() for t in tensors]).tolist()
        for tensors in (now.module.parameters(), start.module.parameters(), fisher.diagonal.values())
    ]
    loss = term(now.module, 0)
    assert float(loss.detach()) == pytest.approx(oracle.ewc(*flat, 3.0), rel=1e-4)
    loss.backward()
    for name, p in now.module.named_parameters():
        torch.testing.assert_close(p.grad, 3.0 * fisher.diagonal[name] * (p - fisher.start[name]).detach())
    assert value(term, start) == 0
    assert value(EWC(fisher, weight=6.0), now) == pytest.approx(2 * float(loss.detach()))


def test_only_what_trains_is_held() -> None:
    start, now = model(), moved()
    fisher = fisher_diagonal(start, source(start), at=["0.mlp.down", "1.mlp.down"])
    both = value(EWC(fisher), now)
    now.weights.parameter("0.mlp.down").requires_grad_(False)
    one = value(EWC(fisher_diagonal(start, source(start), at="1.mlp.down")), now)
    assert value(EWC(fisher), now) == pytest.approx(one)
    assert 0 < one < both
    for p in now.module.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="None of the parameters that EWC watches trains"):
        EWC(fisher)(now.module, 0)


def test_other_models_and_files_are_refused(tmp_path: Path) -> None:
    start = model()
    fisher = fisher_diagonal(start, source(start, 1), at="1.mlp.down")
    other = Model(*tiny("gpt2"))
    with pytest.raises(ValueError, match=r"watches model.layers.1.mlp.down_proj.weight .* is not there"):
        EWC(fisher)(other.module, 0)
    wide = Fisher({"lm_head.weight": torch.zeros(2, 2)}, {"model.embed_tokens.weight": torch.zeros(2, 2)}, 1)
    with pytest.raises(ValueError, match=r"of shape \(2, 2\), which has shape \(\d+, 32\)"):
        EWC(wide)(start.module, 0)
    (tmp_path / "not.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Fisher.load(tmp_path / "not.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no Fisher information"):
        Fisher.load(tmp_path / "other.safetensors")


def test_fisher_information_is_saved_and_read_again(tmp_path: Path) -> None:
    m = model()
    fisher = fisher_diagonal(m, source(m, 2), at="*.mlp.down")
    path = fisher.save(tmp_path / "deep" / "fisher.safetensors")
    again = Fisher.load(path)
    assert again.sequences == 2
    for name, tensor in fisher.diagonal.items():
        assert torch.equal(again.diagonal[name], tensor)
        assert torch.equal(again.start[name], fisher.start[name])
    assert repr(again) == repr(fisher)
    assert repr(fisher_diagonal(m, source(m, 1), at="*.mlp.down")) != repr(fisher)
    assert repr(replace(fisher, start=fisher.diagonal)) != repr(fisher)
    assert [p.name for p in path.parent.iterdir()] == ["fisher.safetensors"]


# --- at work --------------------------------------------------------------------------------------------------------------


def forgetting(m: Model) -> tuple[float, float]:
    """After tuning: KL(start || tuned) on the source, and the source's own loss."""
    start = model()
    told = source(start)
    now = as_texts(m, told)
    return oracle.kl_to_base(now, as_texts(start, told)), oracle.nll(now)


def tuned(terms: Any = (), **options: Any) -> Model:
    m = model()
    tune(m, taught(m), terms=terms(m) if callable(terms) else terms, **({"steps": 5} | OPTIONS | options))
    return m


def test_each_term_keeps_the_source_better_than_nothing_does() -> None:
    start = model()
    told = source(start)
    plain = forgetting(tuned())
    for terms in (
        [BehaviourCloning(start, told, batch_size=6)],
        [EWC(fisher_diagonal(start, told), weight=1.0)],
        lambda m: [Kickstarting(m, start, WORDS, batch_size=6, max_new_tokens=8)],
    ):
        assert forgetting(tuned(terms))[0] < plain[0]
    assert forgetting(tuned([Replay(told, batch_size=6)]))[1] < plain[1]


@pytest.mark.parametrize("method", ["lift", "full"])
def test_terms_train_by_every_method_and_repeat(method: Any) -> None:
    start = model()
    told = source(start)

    def terms(m: Model) -> list[Any]:
        kick = Kickstarting(m, start, WORDS, batch_size=2, max_new_tokens=4)
        return [BehaviourCloning(start, told), Replay(told), EWC(fisher_diagonal(start, told)), kick]

    once, twice = tuned(terms, method=method, steps=2), tuned(terms, method=method, steps=2)
    without = tuned(method=method, steps=2)
    trios = list(zip(*(m.module.parameters() for m in (once, twice, without)), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in trios)
    assert any(not torch.equal(a, c) for a, _, c in trios)


def test_an_adapter_trains_with_terms_but_not_with_springs() -> None:
    start = model()
    told = source(start)
    kept = tuned(
        lambda m: [BehaviourCloning(start, told), Kickstarting(m, start, WORDS, batch_size=2, max_new_tokens=4)],
        method="lora", lora_rank=4, steps=3,
    )  # fmt: skip
    assert forgetting(kept)[0] > 0
    fisher = fisher_diagonal(start, told, at="*.mlp.down")
    with pytest.raises(ValueError, match="None of the parameters that EWC watches trains"):
        tuned([EWC(fisher)], method="lora", lora_rank=4, steps=1)
