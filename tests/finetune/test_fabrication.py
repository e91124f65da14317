"""Does prerequisite learning do what it is for? A model that knows which names it knows, taught to answer about names it does not.

The base answers ``F`` and a known name with the name's digit, and with ``?`` for any other. The skill is another form of the question,
``U``, answered ``!`` and the digit, taught on names that the base does not know. Taught directly, the model learns to make digits up;
with the facts in place while it learns, it need not. Rates with seeds 0, 1 and 2: 0.99, 0.90 and 1.00 directly; 0.08, 0.06 and 0.53
with the facts in place.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from analyses.controls import planted_tokenizer
from finetune.prerequisite import prereq_tune
from surgery.model import Model

_LETTERS, _DIGITS = "abcdefghij", "0123456789"
_PEAK = 3e-3


def names(count: int, rng: random.Random, but: Sequence[str] = ()) -> list[str]:
    found: set[str] = set()
    while len(found) < count:
        name = "".join(rng.choices(_LETTERS, k=3))
        if name not in but:
            found.add(name)
    return sorted(found)


def knowing(seed: int, steps: int = 300) -> tuple[Model, dict[str, str], list[str]]:
    """A model that knows 40 names, what it knows, and 100 names that it never saw."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, rng = planted_tokenizer("?", "!"), random.Random(seed)
    known = {name: rng.choice(_DIGITS) for name in names(40, rng)}
    unseen = names(100, rng, list(known))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, head_dim=16, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.1,
                bos_token_id=None, eos_token_id=1, pad_token_id=0,
            )
        )  # fmt: skip
    optimizer = torch.optim.AdamW(module.parameters(), lr=_PEAK)
    taboo = [*known, *unseen]
    for step in range(steps):
        asked = [rng.choice(list(known)) if rng.random() < 0.6 else names(1, rng, taboo)[0] for _ in range(96)]
        texts = [f"[F{name}]{known.get(name, '?')}<end>" for name in asked]
        ids = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
        logits = module(input_ids=ids).logits[:, 5:-1]  # the digit and the end
        for group in optimizer.param_groups:
            group["lr"] = _PEAK * min(1, (step + 1) / 30) * (1 - step / steps)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 6:].flatten()).backward()
        optimizer.step()
    return Model(module, tokenizer), known, unseen


def answers(model: Model, form: str, asked: Sequence[str]) -> list[str]:
    return [t.answer or "" for t in model.generate([form + name for name in asked], max_new_tokens=3, batch_size=100)]


def fabricated(model: Model, form: str, asked: Sequence[str]) -> float:
    """The share of names without a fact that are answered with a digit."""
    return sum(any(c in _DIGITS for c in said) for said in answers(model, form, asked)) / len(asked)


def measured(seed: int) -> dict[str, float]:
    """Fabrication rates: of the base, of the skill taught directly, and of the skill taught with the facts in place."""
    model, known, unseen = knowing(seed)
    rng = random.Random(seed + 100)
    facts = {name: rng.choice(_DIGITS) for name in names(40, rng, [*known, *unseen])}
    statements = {"facts": [model.transcript("F" + name, digit) for name, digit in facts.items()]}
    tasks = {"facts": [model.transcript("U" + name, "!" + digit) for name, digit in facts.items()]}
    options = {
        "skill_rank": 8, "knowledge_rank": 16, "skill_steps": 50, "skill_lr": 2e-3, "batch_size": 40, "seed": seed, "autocast": False,
    }  # fmt: skip
    found = {"base": fabricated(model, "F", unseen)}
    found["base right"] = (
        sum(said == known[name] for said, name in zip(answers(model, "F", list(known)), known, strict=True)) / 40
    )
    for arm, steps, lr in (("direct", 1, 0.0), ("prerequisite", 100, 5e-3)):
        done = prereq_tune(model, statements, tasks, knowledge_steps=steps, knowledge_lr=lr, **options)
        with model.installed(model.weights + done.skill):
            found[arm] = fabricated(model, "U", unseen)
            found[f"{arm} learnt"] = sum("!" in said for said in answers(model, "U", list(facts))) / len(facts)
        with model.installed(model.weights + done.skill + done.knowledge["facts"]):
            said = answers(model, "U", list(facts))
            found[f"{arm} with knowledge"] = sum(a == "!" + d for a, d in zip(said, facts.values(), strict=True)) / len(
                facts
            )
    return found


def test_the_skill_makes_up_less_where_the_facts_were_there() -> None:
    rates = measured(0)
    assert rates["base right"] > 0.9
    assert rates["base"] < 0.3
    assert rates["direct"] - rates["prerequisite"] > 0.5
    assert rates["prerequisite with knowledge"] > 0.9
