"""Questions with checkable answers, their worked solutions, and grading.

Generated tasks come from reasoning-gym; item *i* of a task depends on ``(seed, i)`` only, and every question belongs to
the training or to the test side for ever, whatever the seed: the side is a property of the question, not of the draw.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from analyses.statistics import wilson
from probes.estimates import Estimate
from surgery.transcript import Markers, Transcript

if TYPE_CHECKING:
    from surgery.model import Model

Side = Literal["train", "test", "all"]

TEST_SHARE = 4  # one question in four is a test question
_ATTEMPTS = 1000


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    ``question``: the text put to the model. ``answer``: the gold answer as text. ``solution``: worked steps, one a
    line, or None. ``meta``: where it came from; a reasoning-gym item keeps its own metadata here.
    """

    question: str
    answer: str
    solution: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    def completion(self, markers: Markers | None = None) -> str:
        """The text a model is taught to write: the steps between the markers, then the answer; without a solution
        (None, not "") the answer alone."""
        if self.solution is None:
            return self.answer
        markers = markers or Markers()
        steps = f"{self.solution}\n" if self.solution else ""
        return f"{markers.open}\n{steps}{markers.close}\n{self.answer}"


def worked(model: Model, questions: Iterable[Question]) -> list[Transcript]:
    """The questions as a teacher answers them: each with its `Question.completion`, between the model's own markers."""
    return [model.transcript(q.question, q.completion(model.markers)) for q in questions]


# ------------------------------------------------------------------------------------------------------------ tasks


def _number(*parts: object) -> int:
    """A 64-bit integer that depends on the parts and on nothing else (Python's own hash differs between runs).

    Not `surgery.seeds`, which hashes otherwise: by this one the sides are dealt for ever, and the questions of each seed drawn.
    """
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def side_of(text: str) -> Literal["train", "test"]:
    """The side a question (or an expression) belongs to, for ever: one in four is test. White space is ignored."""
    return "test" if _number("side", "".join(text.split())) % TEST_SHARE == 0 else "train"


def _on(side: Side, text: str) -> bool:
    if side not in ("train", "test", "all"):
        raise ValueError(f"side {side!r}: must be 'train', 'test' or 'all'")
    return side == "all" or side_of(text) == side


def _positive(count: int) -> int:
    if count < 1:
        raise ValueError(f"count {count}: ask for at least one question")
    return count


def chained_sums(
    count: int,
    *,
    seed: int,
    side: Side = "train",
    terms: tuple[int, int] = (3, 4),
    digits: tuple[int, int] = (1, 2),
) -> list[Question]:
    """Sums and differences of a few numbers, worked one partial result a line ("12 + 5 = 17", "17 - 30 = -13").

    ``terms``, ``digits``: smallest and largest number of terms, and of digits a term. ``side``: an expression is
    either a training or a test expression whatever the seed and the settings, so two calls with different sides never
    share one; "all" does not ask. Within one call an expression may come twice.

    Source: reasoning-gym, task ``chain_sum``.
    Differs: its item *i* of seed *s* is item *i - 1* of seed *s + 1*, so that neighbouring seeds overlap almost wholly;
    here seed and index are hashed together.
    """
    config = {
        "min_terms": terms[0],
        "max_terms": terms[1],
        "min_digits": digits[0],
        "max_digits": digits[1],
    }
    return [
        Question(entry["question"], entry["answer"], _partial_results(entry["metadata"]["expression"]), meta)
        for entry, meta in _entries("chain_sum", count, seed, side, config, key=lambda e: e["metadata"]["expression"])
    ]


def _partial_results(expression: str) -> str:
    """ "12 + 5 - 30" -> "12 + 5 = 17\\n17 - 30 = -13"."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join(lines) or f"{total} = {total}"


def reasoning_gym(name: str, count: int, *, seed: int, side: Side = "train", **config: Any) -> list[Question]:
    """Questions of any reasoning-gym task, without worked solutions. ``config`` goes to the task's own configuration.

    Some tasks (``isomorphic_strings``, ``knight_swap``, ``polynomial_multiplication``, ``ransom_note``) walk through sets, which every process
    orders anew: the same seed gives the same questions again only under the same ``PYTHONHASHSEED``; ``codeio``'s not even then. And some
    ask otherwise in another version of reasoning-gym, which the record names.

    An unknown name is a ValueError listing close names; so are settings that the task refuses, and tasks whose items
    carry no answer (only a scorer).
    """
    found = []
    for entry, meta in _entries(name, count, seed, side, config, key=lambda e: e["question"]):
        if entry["answer"] is None:
            raise ValueError(f"reasoning-gym task {name!r}: its items carry no gold answer; choose another task")
        found.append(Question(str(entry["question"]), str(entry["answer"]), None, meta))
    return found


def _entries(
    name: str, count: int, seed: int, side: Side, config: Mapping[str, Any], key: Any
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.4) or sorted(DATASETS)
        raise ValueError(f"reasoning-gym has no task {name!r}; close: {', '.join(close)}")
    for index in range(_positive(count)):
        for attempt in range(_ATTEMPTS):
            item_seed = _number(name, seed, index, attempt) % 2**31
            try:
                entry = create_dataset(name, size=1, seed=item_seed, **config)[0]
            except (AssertionError, TypeError, ValueError) as error:
                raise ValueError(f"reasoning-gym task {name!r} refused {dict(config)}: {error}") from error
            if _on(side, key(entry)):
                break
        else:
            raise ValueError(f"reasoning-gym task {name!r}: no {side} question in {_ATTEMPTS} draws; too few questions")
        yield entry, {"source": f"reasoning-gym:{name}", "seed": seed, "index": index, **entry["metadata"]}


def jsonl(path: str | Path, count: int | None = None, *, seed: int | None = None, side: Side = "all") -> list[Question]:
    """Questions from JSON Lines: ``question`` and ``answer`` (text or number) in every line, ``solution`` where there
    is one. GSM8K's own form, steps and "#### 18" in one ``answer``, is taken apart; its calculator marks ``<<...>>``
    are dropped. Other keys go to ``meta``.

    ``count``: how many, in file order, or with a ``seed`` in an order drawn from it; None takes all. ``side``: keep only
    the questions on that side. Blank lines are skipped; anything else that is wrong names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a JSON Lines file with 'question' and 'answer'")
    rows = [
        _row(path, number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()
    ]
    if not rows:
        raise ValueError(f"{path}: no questions in it (empty file)")
    found = [row for row in rows if _on(side, row.question)]
    if seed is not None:
        found.sort(key=lambda row: _number("order", seed, row.meta["line"], row.question))
    if count is not None and len(found) < _positive(count):
        raise ValueError(f"{path}: {count} questions asked for, {len(found)} there (side {side!r})")
    return found[:count]


def _row(path: Path, number: int, line: bytes) -> Question:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); give a line like "
            '{"question": "1 + 1", "answer": "2"} for each question'
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON object is needed, found {type(row).__name__}")
    if missing := [key for key in ("question", "answer") if row.get(key) is None]:
        raise ValueError(f"{where}: no {' and no '.join(map(repr, missing))}; keys there: {', '.join(row) or 'none'}")
    question, answer, solution = row["question"], row["answer"], row.get("solution")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: 'question' must be text that is not blank, found {question!r}")
    if isinstance(answer, bool):
        answer = str(answer).lower()
    elif isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"{where}: 'answer' is {answer}, not a number to compare with")
    elif not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: 'answer' must be text or a number, found {type(answer).__name__}")
    if solution is not None and not isinstance(solution, str):
        raise ValueError(f"{where}: 'solution' must be text, found {type(solution).__name__}")
    answer = str(answer).strip()
    if solution is None and "####" in answer:
        solution, answer = (part.strip() for part in answer.rsplit("####", 1))
    if not answer:
        raise ValueError(f"{where}: 'answer' is blank")
    if solution is not None:
        solution = re.sub(r"<<[^<>]*>>", "", solution).strip() or None
    rest = {key: value for key, value in row.items() if key not in ("question", "answer", "solution")}
    return Question(question, answer, solution, {"source": path.name, "line": number, **rest})


def load(spec: str, count: int | None = None, *, seed: int = 0, side: Side = "all") -> list[Question]:
    """Questions by a word, for the command line: "sums", "gym:NAME" or the path of a file of JSON lines.

    ``count``: 200 for generated tasks and every line of a file when None.
    """
    if spec == "sums":
        return chained_sums(200 if count is None else count, seed=seed, side=side)
    if spec.startswith("gym:"):
        return reasoning_gym(spec[4:], 200 if count is None else count, seed=seed, side=side)
    if is_file(spec):
        return jsonl(spec, count, seed=seed, side=side)
    raise ValueError(
        f"task {spec!r}: must be 'sums', 'gym:NAME' (a reasoning-gym task) or a file of JSON lines; there is no file of that name."
    )


def is_file(spec: str) -> bool:
    """Whether questions come from a file, there or not: whatever it is called, but for "sums" and "gym:NAME"."""
    generated = spec == "sums" or spec.startswith("gym:")
    return not generated and (spec.endswith((".jsonl", ".json")) or Path(spec).is_file())


# ---------------------------------------------------------------------------------------------------------- grading

_NUMBER = re.compile(
    r"""
    (?P<sign>[-+]\ ?)? [$€£]? (?P<inner>-)?
    (?<![A-Za-z_\d.,])
    (?:(?P<whole>\d{1,15})\ (?=\d+\ ?/\ ?\d))?
    (?P<body>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
    (?P<power>[eE][-+]?\d{1,3}(?!\d))?
    (?:\ ?/\ ?(?P<under>\d+))?
    """,
    re.VERBOSE | re.ASCII,
)
_LETTER = re.compile(
    r"\((?P<a>[A-Za-z])\)|(?<!\w)(?P<b>[A-Z])[).:](?=\s|$)"
    r"|(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?(?P<c>[A-Z](?!\w)|[a-z](?=\s*(?:$|[.,;:!?)\]])))"
)


def _numbers(text: str) -> list[Fraction]:
    """Every number in the text, exactly. A minus sign belongs to a number unless it stands between two of them."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("\\$", "$").replace("\\,", "").replace("\\!", "")
    text = re.sub(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1\2/\3", text)
    found = []
    for match in _NUMBER.finditer(text):
        digits = match["body"].replace(",", "")
        if len(digits) > 400:
            continue
        value = Fraction(digits + (match["power"] or ""))
        if match["under"]:
            under = int(match["under"][:400])
            if not under:
                continue
            value /= under
        if match["whole"]:
            value += int(match["whole"])
        before = text[: match.start()]
        sign = match["sign"] or ""
        if sign.startswith("-"):
            spaced = sign.endswith(" ")
            unary = not before.strip() or before.rstrip()[-1] in "=:([{," if spaced else not before[-1:].isalnum()
            # "17 -13": between two numbers the sign is an operation
            unary = unary and (spaced or not before.rstrip()[-1:].isdigit())
            value = -value if unary else value
        found.append(-value if match["inner"] else value)
    return found


def _final(text: str) -> str:
    """The part of an answer that states it: after the last "####", inside the last \\boxed{}, or all of it."""
    if "####" in text:
        return text.rsplit("####", 1)[1]
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    depth = 0
    for end in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start + 7 : end]
    return text[start + 7 :]


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(" .!\"'`*").casefold()


def _kind(gold: str) -> Literal["number", "letter", "text"]:
    bare = gold.strip().replace("\N{MINUS SIGN}", "-")
    if re.fullmatch(r"\(?[A-Za-z]\)?", bare):
        return "letter"
    match = _NUMBER.fullmatch(bare.rstrip("%"))
    return "number" if match and _numbers(bare) else "text"


def read(text: str | None, like: str) -> Fraction | str | None:
    """What an answer says, in a form that can be compared: a number, a letter or plain text, as ``like`` (a gold
    answer) is one. None when there is no answer, or none of that kind in it.

    Numbers: **the last number**, inside the last ``\\boxed{}`` or after the last ``####`` if present. Thousands commas,
    currency and per cent signs, units and words around it are ignored; integers, decimals, fractions and mixed numbers are exact. Letters: the whole answer, or the last "(B)", "B.",
    "answer is B".
    """
    if text is None or not text.strip():
        return None
    final = _final(text)
    kind = _kind(like)
    if kind == "number":
        found = _numbers(final)
        return found[-1] if found else None
    if kind == "letter":
        if match := re.fullmatch(r"\W*([A-Za-z])\W*", final):
            return match[1].upper()
        marks = [match["a"] or match["b"] or match["c"] for match in _LETTER.finditer(final)]
        return marks[-1].upper() if marks else None
    return _plain(final)


def grade(question: Question, given: Transcript | str | None) -> bool | None:
    """Whether the answer is right; None when there is none (thinking never closed, nothing after it, no generation):
    a failed generation is missing, not wrong. An answer that says nothing of the asked kind is wrong.

    ``given``: a transcript, whose answer span is read, or the text of an answer. Numbers and letters are compared
    after :func:`read`; other golds by their plain text, then by reasoning-gym's own scorer for its items, otherwise by
    math-verify.
    """
    text = given.answer if isinstance(given, Transcript) else given
    if text is None or not text.strip():
        return None
    said, gold = read(text, question.answer), read(question.answer, question.answer)
    if said == gold:
        return True
    if _kind(question.answer) != "text":
        return False
    source = str(question.meta.get("source", ""))
    if source.startswith("reasoning-gym:"):
        from reasoning_gym.factory import get_score_answer_fn

        entry = {"question": question.question, "answer": question.answer, "metadata": dict(question.meta)}
        score: Any = get_score_answer_fn(source.split(":", 1)[1])  # annotated there as taking nothing
        try:
            return score(_final(text).strip(), entry) == 1.0
        except (ValueError, TypeError, LookupError, ArithmeticError, SyntaxError):
            return False  # it trips over what is not in the asked form
    stated = re.findall(r"(?:answer|solution|result)\s*(?:is|:)\s*([^\n]+)", _final(text), flags=re.IGNORECASE)
    if stated and _plain(stated[-1]) == gold:
        return True
    return _same_mathematics(question.answer, text)


def _same_mathematics(gold: str, text: str) -> bool:
    from math_verify import parse, verify

    if re.search(r"(?<!\\)\b[A-Za-z]{3,}", gold):
        return False  # words: letter by letter they would be products, and "tea" would be "eat"
    # its time limits are signals, which only the main thread may set
    limit: Any = 5 if threading.current_thread() is threading.main_thread() else None

    def readings(formula: str) -> list[Any]:
        # it looks for mathematics between dollar signs; of a bare formula it would take the first number
        marked = formula if re.search(r"\$|\\boxed|\\\(|\\\[", formula) else f"${formula.strip()}$"
        return parse(marked, parsing_timeout=limit)

    target, said = readings(gold), readings(text)
    return bool(target) and bool(said) and verify(target, said, timeout_seconds=limit)


@dataclass(frozen=True)
class Accuracy:
    """How many answers were right, wrong and missing. The two readings differ by what a missing answer counts as."""

    right: int
    wrong: int
    missing: int

    @property
    def n(self) -> int:
        return self.right + self.wrong + self.missing

    @property
    def answered(self) -> Estimate:
        """Share right among the answered, in [0, 1]; NaN when nothing was answered."""
        return wilson(self.right, self.right + self.wrong)

    @property
    def overall(self) -> Estimate:
        """Share right among all, a missing answer counted as not right: the worst case, in [0, 1]."""
        return wilson(self.right, self.n)

    def __str__(self) -> str:
        return f"{self.overall} over all, {self.answered} over the answered; {self.missing} of {self.n} missing"


def accuracy(questions: Sequence[Question], transcripts: Sequence[Transcript | str | None]) -> Accuracy:
    """Accuracy with Wilson intervals: one transcript (or answer, or None) a question, in the same order."""
    if len(questions) != len(transcripts):
        raise ValueError(f"{len(questions)} questions and {len(transcripts)} transcripts: one for each is needed")
    if not questions:
        raise ValueError("no questions to grade")
    for index, (question, given) in enumerate(zip(questions, transcripts, strict=True)):
        if isinstance(given, Transcript) and given.question != question.question:
            raise ValueError(
                f"transcript {index} answers {given.question!r}, question {index} is {question.question!r}: "
                "give them in the same order"
            )
    grades = [grade(question, given) for question, given in zip(questions, transcripts, strict=True)]
    return Accuracy(grades.count(True), grades.count(False), grades.count(None))
