"""Which transcripts are learnt, and how much of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from finetune.examples import Example, Over, examples
from finetune.objectives import POSITIVE
from finetune.recipes.equations import equations
from finetune.recipes.retelling import (
    Grader,
    by_question,
    completion_text,
    cut,
    draw,
    noted,
    require_some,
    thinking_length,
)
from surgery.model import Model
from surgery.transcript import Transcript, read_transcript

Prefer = Literal["long", "short", "random"]


def reasoning_path(transcript: Transcript) -> Hashable:
    """The equations of a completion, in order; where it has none, its words."""
    text = completion_text(transcript)
    return tuple(map(str, equations(text))) or " ".join(text.split())


def rejection_sampled(
    transcripts: Sequence[Transcript],
    right: Grader,
    *,
    path: Callable[[Transcript], Hashable] = reasoning_path,
    cap: int | None = None,
    check: bool = True,
) -> list[Transcript]:
    """Rejection sampling: of the samples of each question, the right ones, one for each way of reasoning.

    path:  what makes two samples the same way; by default the list of their equations. Of samples of one path, the one with the greatest
           total edit distance (in tokens of the completion) to the samples of other paths is kept, the earliest of equals.
    cap:   at most so many a question, the earliest paths first, so that easy questions do not outweigh the others; None for all.
    check: leave out samples with an equation that does not hold, though their answer is right.

    Gives the kept transcripts question by question; ``meta["recipes"]`` says of how many samples and right ones. Raises ValueError
    where nothing is kept.
    Source: Yuan et al. 2023 (arXiv 2308.01825), section 3.3 (RFT): 100 samples at temperature 0.7, equation lists.
    Differs: the distance counts tokens, not characters, and a question may be capped.
    """
    if cap is not None and cap < 1:
        raise ValueError(f"cap={cap}: at least 1 a question, or None for all.")
    kept: list[Transcript] = []
    for samples in by_question(transcripts).values():
        good = [t for t in samples if right(t) and (not check or all(e.holds for e in equations(completion_text(t))))]
        ways: dict[Hashable, list[Transcript]] = {}
        for transcript in good:
            ways.setdefault(path(transcript), []).append(transcript)
        for way in list(ways)[:cap]:
            others = [t for other, members in ways.items() if other != way for t in members]
            kept.append(
                noted(
                    _farthest(ways[way], others),
                    "rejection_sampled",
                    samples=len(samples),
                    right=len(good),
                    ways=len(ways),
                )
            )
    require_some(kept, len(transcripts), "none is right" + (" with equations that hold." if check else "."))
    return kept


def _farthest(members: Sequence[Transcript], others: Sequence[Transcript]) -> Transcript:
    if len(members) == 1 or not others:
        return members[0]
    texts = {id(t): t.ids[t.spans["completion"][0] :] for t in (*members, *others)}
    return max(members, key=lambda t: sum(edit_distance(texts[id(t)], texts[id(o)]) for o in others))


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """The fewest insertions, deletions and substitutions that turn one sequence into the other (Levenshtein)."""
    across: Int[np.ndarray, " j"] = np.arange(len(b) + 1)
    steps, target = np.arange(len(b) + 1), np.asarray(b)
    for i, token in enumerate(a, 1):
        row = np.concatenate([[i], np.minimum(across[1:] + 1, across[:-1] + (target != token))])
        across = np.minimum.accumulate(row - steps) + steps  # insertions, all at once
    return int(across[-1])


def seldom_right(transcripts: Sequence[Transcript], right: Grader, *, below: float = 0.1) -> list[str]:
    """The questions whose samples are right less often than `below`, in order of appearance: those left to learn from.

    below: share in (0, 1] of a question's samples; one for which the grader abstains is not right. A question's share is known to about
           1 / (its samples).
    The data to tune on are these questions' worked answers. Raises ValueError for `below` out of range and where no question is left.
    Source: Chen et al., "Rethinking Fine-Tuning when Scaling Test-Time Compute", arXiv 2502.07154: with a chain of thought the chance of
    the answer is estimated from 64 samples, and only examples below 0.1 are trained on.
    """
    if not 0 < below <= 1:
        raise ValueError(f"below={below}: a share of right samples, in (0, 1].")
    kept = []
    for question, samples in by_question(transcripts).items():
        if sum(right(t) is True for t in samples) < below * len(samples):
            kept.append(question)
    require_some(kept, len(transcripts), f"no question is answered rightly by less than {below:g} of its samples.")
    return kept


def shortest_right(transcripts: Sequence[Transcript], right: Grader) -> list[Transcript]:
    """Of each question the completion of the fewest tokens that is right, the earliest of equals. Raises ValueError where none is right.

    Source: Munkhbat et al. 2025 (arXiv 2502.20122), concise self-training by best of N; N is the caller's number of samples.
    """
    kept = []
    for samples in by_question(transcripts).values():
        if good := [t for t in samples if right(t)]:
            kept.append(
                noted(min(good, key=_completion_length), "shortest_right", samples=len(samples), right=len(good))
            )
    require_some(kept, len(transcripts), "none is right.")
    return kept


def _completion_length(transcript: Transcript) -> int:
    begin, end = transcript.require("completion")
    return end - begin


def same_answer(a: Transcript, b: Transcript) -> bool:
    """Whether two transcripts have answers with the same words."""
    return a.answer is not None and b.answer is not None and a.answer.split() == b.answer.split()


def long_short(
    long: Sequence[Transcript],
    short: Sequence[Transcript],
    *,
    short_share: float = 0.5,
    same: Callable[[Transcript, Transcript], bool] = same_answer,
    seed: int = 0,
) -> list[Transcript]:
    """A mixture of long traces and short rewrites of the same questions.

    A short one counts where a long one answers the same question from the same prompt, with more tokens of thinking and the `same`
    answer; of several long ones the first such. Pairs in which it fails are left out, both sides.
    short_share: of the mixture, in (0, 1), in expectation: all pairs give both at 0.5; below it each short one, above it each long one,
                 is kept with the probability that makes the share.

    Raises ValueError where no pair is left. Source: Yu et al. 2025 (arXiv 2505.03469), LS-Mixture SFT.
    Differs: the paper does not state its ratio; 1:1 here. The rewriting itself is the caller's.
    """
    if not 0 < short_share < 1:
        raise ValueError(f"short_share={short_share}: a share strictly between 0 and 1.")
    longs = by_question(long)
    pairs = []
    for brief in short:
        for full in longs.get(brief.question, ()):
            lengths = thinking_length(full), thinking_length(brief)
            longer = None not in lengths and lengths[0] > lengths[1]  # type: ignore[operator]
            if longer and _prompt(full) == _prompt(brief) and same(full, brief):
                pairs.append((full, brief))
                break
    require_some(
        pairs,
        len(long) + len(short),
        "no short one has a longer one with the same question, prompt and answer.",
    )
    mixture = []
    for i, (full, brief) in enumerate(pairs):
        coin = draw("long_short", seed, i).random()
        if coin < (1 - short_share) / short_share:
            mixture.append(noted(full, "long_short", part="long"))
        if coin < short_share / (1 - short_share):
            mixture.append(noted(brief, "long_short", part="short"))
    return mixture


def _prompt(transcript: Transcript) -> tuple[int, ...]:
    return transcript.ids[: transcript.require("prompt")[1]]


def length_pairs(
    transcripts: Sequence[Transcript],
    right: Grader | None = None,
    *,
    prefer: Prefer = "long",
    least_gap: int = 1,
    over: Over = "completion",
    seed: int = 0,
) -> list[tuple[Example, Example]]:
    """The pairs of thinking preference optimisation (ThinkPO): of each question the longest and the shortest thinking, as groups for a preference
    objective.

    The first of a pair is the preferred one (column ``positive`` 1), the second the other (0). Long traces of a reasoner and short ones of
    another model go in together.
    right:     only right answers are paired; None asks nothing.
    prefer:    ``long`` is ThinkPO; ``short`` the opposite; ``random`` a coin for each pair: the control in which length says nothing.
    least_gap: tokens of thinking by which the two must differ, at least 1.

    Raises ValueError where no question has two lengths.
    Source: Yang et al., "Thinking Preference Optimization", arXiv 2502.13173: DPO with the long trace chosen, the short one rejected.
    """
    if prefer not in get_args(Prefer) or least_gap < 1:
        raise ValueError(
            f"prefer={prefer!r}, least_gap={least_gap}: one of {', '.join(get_args(Prefer))}, and at least 1."
        )
    pairs = []
    for i, samples in enumerate(by_question(transcripts).values()):
        thought = [(n, t) for t in samples if (n := thinking_length(t)) is not None and (right is None or right(t))]
        if not thought:
            continue
        (least, short), (most, long) = min(thought, key=lambda x: x[0]), max(thought, key=lambda x: x[0])
        if most - least < least_gap:
            continue
        first = prefer == "long" or (prefer == "random" and draw("length_pairs", seed, i).random() < 0.5)
        chosen, rejected = (long, short) if first else (short, long)
        told = [noted(t, "length_pairs", prefer=prefer, tokens=[most, least]) for t in (chosen, rejected)]
        (pair,) = examples([told], over)
        pairs.append((replace(pair[0], columns={POSITIVE: 1.0}), replace(pair[1], columns={POSITIVE: 0.0})))
    require_some(pairs, len(transcripts), f"no question has two thinkings that differ by {least_gap} tokens or more.")
    return pairs


def prefix_only(
    transcripts: Sequence[Transcript], tokens: int = 16, *, whole_share: float = 0.1, seed: int = 0
) -> list[Transcript]:
    """Unsupervised prefix fine-tuning (UPFT): the first few tokens of one sample of each question, right or wrong, and a share of the samples
    whole.

    tokens:      of the completion; 8 to 32 in the paper. The first sample of a question is taken.
    whole_share: probability in [0, 1] with which an item stays whole, so that its format and its end are not forgotten.

    `prefix_entropy` says how much there is in the prefixes.
    Source: Ji et al., "The First Few Tokens Are All You Need", arXiv 2503.02875.
    Differs: the paper puts a task template before the whole ones; here their prompt is as it was.
    """
    if not 0 <= whole_share <= 1:
        raise ValueError(f"whole_share={whole_share}: a share in [0, 1].")
    kept = []
    for i, (first, *_) in enumerate(by_question(transcripts).values()):
        whole = draw("prefix_only", seed, i).random() < whole_share
        kept.append(noted(first if whole else cut(first, tokens), "prefix_only", tokens=tokens, whole=whole))
    require_some(kept, len(transcripts), "")
    return kept


def one_step_each(transcripts: Sequence[Transcript]) -> list[Example]:
    """Each step of a completion as an example of its own: all before it is given, and the step's tokens alone are learnt, with weight 1.

    The steps are the sentences of the thinking; what opens it belongs to the first, and the rest of the completion, the answer, is the last. A
    completion without thinking is one step. Nothing after a step is in its example. The column ``step`` counts from 0.
    With `finetune.objectives.coverage` this is step-wise direct coverage optimisation: -log(1 - (1 - p)^N) of each step, N being how
    many continuations of a step the search at test time may try.
    Raises ValueError where there are no transcripts, and for one without a completion.
    Source: Chen et al., "Rethinking Fine-Tuning when Scaling Test-Time Compute", arXiv 2502.07154, where steps are proof tactics.
    Differs: steps are sentences, and the answer.
    """
    require_some(transcripts, 0, "")
    found = []
    for transcript in transcripts:
        begin, end = transcript.require("completion")
        ends = sorted({stop for _, stop in transcript.sentences} | {end})
        for number, (first, stop) in enumerate(pairwise([begin, *ends])):
            step = noted(cut(transcript, stop - begin), "one_step_each", step=number)
            weights = (0.0,) * first + (1.0,) * (stop - first)
            found.append(Example(step, weights, {"step": float(number)}))
    return found


def prefix_entropy(transcripts: Sequence[Transcript], tokens: int = 16) -> float:
    """Entropy in nats of the completions' first tokens taken as one symbol: 0 where all begin alike, ``log(n)`` where no two do.

    A templated opening teaches nothing; this is how to notice. Raises ValueError for no transcripts.
    """
    require_some(transcripts, len(transcripts), "")
    begun = Counter(t.ids[b : b + tokens] for t in transcripts for b in [t.require("completion")[0]])
    return -sum(n / len(transcripts) * math.log(n / len(transcripts)) for n in begun.values()) + 0.0


def question_free(model: Model, transcripts: Sequence[Transcript]) -> list[Transcript]:
    """Question-free fine-tuning (QFFT): the completions alone, without question, system prompt and template; before them only what the tokenizer
    itself begins a text with.

    `Transcript.question` still says which question it answered, so that splits by question stay possible; the tokens do not.
    Where the tokenizer begins with nothing, nothing predicts the first token of the completion, and it is not learnt.
    Raises ValueError where no completion has a token to learn.
    Source: Liu et al., "QFFT, Question-Free Fine-Tuning for Adaptive Reasoning", arXiv 2506.12860.
    """
    start = _begins(model)
    kept = []
    for t in transcripts:
        told = read_transcript(model.tokenizer, t.question, start, t.ids[t.require("completion")[0] :], model.markers)
        if len(told.ids) > max(1, len(start)):
            kept.append(noted(replace(told, meta=dict(t.meta)), "question_free", dropped=t.require("prompt")[1]))
    require_some(kept, len(transcripts), "no completion has a token that something precedes.")
    return kept


def _begins(model: Model) -> list[int]:
    """What the tokenizer puts before every text."""
    bare = list(model.tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(model.tokenizer("a")["input_ids"])
    at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    return full[:at]
