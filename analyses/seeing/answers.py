"""What a model makes of questions with pictures: its answers, how likely it finds the gold ones, and what each answer got."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from analyses.scoring import quiet
from analyses.seeing.learning import collate, taught
from analyses.seeing.pictures import pixels_of
from analyses.tasks import Question, grade
from surgery.decoding import pad_after_prefix
from surgery.model import Model
from surgery.transcript import Transcript, read_transcript


def answers(
    model: Model,
    questions: Sequence[Question],
    pixels: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 128,
) -> list[Transcript]:
    """Greedy answers to questions with pictures (or, where they have none, in text), one each.

    Raises ValueError where a question has pictures and no pixels are given.
    """
    from transformers import GenerationConfig

    if pixels is None and any(q.meta.get("pictures") for q in questions):
        raise ValueError(
            "Questions with pictures need the pictures' pixels, as in answers(model, questions, digits.pixels)."
        )
    prompts = [model.prompt_ids(q.question) for q in questions]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=model.tokenizer.eos_token_id, pad_token_id=model.pad_id
    )  # fmt: skip
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    found: dict[int, Transcript] = {}
    with quiet(model.module):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            ids, mask, _ = pad_after_prefix([prompts[i] for i in batch], model.pad_id, share=False)
            inputs = {"input_ids": ids, "attention_mask": mask, **pixels_of([questions[i] for i in batch], pixels)}
            made: Any = model.module.generate(**inputs, generation_config=config)  # type: ignore[operator]
            for i, row in zip(batch, made[:, ids.shape[1] :].tolist(), strict=True):
                found[i] = read_transcript(model.tokenizer, questions[i].question, prompts[i], row, model.markers)
    return [found[i] for i in range(len(questions))]


def surprise(
    model: Model, questions: Sequence[Question], pixels: Tensor | None = None, *, batch_size: int = 128
) -> Float[np.ndarray, " question"]:
    """Negative log-likelihood of each gold completion after its question, in nats a token."""
    rows, found = taught(model, questions), np.zeros(len(questions))
    with quiet(model.module):
        for first in range(0, len(rows), batch_size):
            batch = collate(rows[first : first + batch_size], model.pad_id, pixels)
            labels = batch.pop("labels")[:, 1:]
            logits = model.module(**batch, use_cache=False).logits[:, :-1].float()
            nats = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            found[first : first + len(labels)] = (nats.sum(1) / (labels != -100).sum(1)).numpy()
    return found


def judge(questions: Sequence[Question], given: Sequence[Transcript]) -> dict[str, list[float]]:
    """What each answer got, 1 or 0: ``right`` (missing is not), ``read`` (the first line of the thinking is the expression), ``worked`` (the
    answer is the value of what that line says, read rightly or not)."""
    found: dict[str, list[float]] = {"right": [], "read": [], "worked": []}
    for question, transcript in zip(questions, given, strict=True):
        said = (transcript.thinking or "").split("\n")[0]
        is_sum = re.fullmatch(r"\d([+-]\d)*", said) is not None
        found["right"].append(float(grade(question, transcript) is True))
        found["read"].append(float(said == question.meta["said"]))
        found["worked"].append(float(is_sum and grade(Question("", str(_value(said))), transcript) is True))
    return found


def _value(expression: str) -> int:
    return sum(int(term) for term in re.findall(r"[+-]?\d", expression))
