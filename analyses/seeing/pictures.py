"""Sums whose digits are pictures: the handwritten digits, the questions in text, and the same with pictures in them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.tasks import Question, Side, chained_sums, side_of
from surgery.seeds import seed_from_words

PICTURE = "#"  # the token that stands for a piece of a picture
PIECES = 4  # tokens a picture: quarters of 4 x 4 pixels


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits. pixels: in [-1, 1]. A picture is on the training or the test side for ever: one in four is test."""

    pixels: Float[Tensor, "picture 1 8 8"]
    labels: Int[Tensor, " picture"]
    sides: tuple[str, ...]

    def of(self, digit: int, side: Side) -> list[int]:
        """The pictures of a digit on a side."""
        return [i for i, label in enumerate(self.labels.tolist()) if label == digit and side in ("all", self.sides[i])]


def handwritten() -> Digits:
    """The 1797 pictures of `sklearn.datasets.load_digits`, which come with the library.

    Source: Alpaydin and Kaynak (1998), optical recognition of handwritten digits, UCI; its test part, reduced to 8 x 8.
    """
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return Digits(pixels, torch.tensor(found.target), tuple(side_of(f"picture {i}") for i in range(len(pixels))))


def written_sums(count: int, *, seed: int, side: Side = "train", terms: tuple[int, int] = (3, 4)) -> list[Question]:
    """Sums of one-digit terms as text: the question ``7+5-9=``, worked as ``7+5-9``, ``7+5=12``, ``12-9=3``, a line each.

    The sides are those of `chained_sums`: an expression is on one of them for ever. Item i depends on (seed, i).
    """
    found = []
    for sum_ in chained_sums(count, seed=seed, side=side, terms=terms, digits=(1, 1)):
        said = str(sum_.meta["expression"]).replace(" ", "")
        steps = (sum_.solution or "").replace(" ", "")
        found.append(Question(f"{said}=", sum_.answer, f"{said}\n{steps}", {"source": "written sums", "said": said}))
    return found


def aloud(questions: Sequence[Question]) -> list[Question]:
    """The same expressions to be read aloud only: the question ``7+5-9``, without its last sign, is answered ``7+5-9``."""
    return [Question(q.question.removesuffix("="), str(q.meta["said"]), None, dict(q.meta)) for q in questions]


def pictured(questions: Sequence[Question], digits: Digits, *, seed: int, side: Side = "train") -> list[Question]:
    """The same questions with a picture in the place of every digit; ``meta["pictures"]`` says which, in order.

    A digit's pictures are drawn from those of a side; those of item i depend on (seed, i).
    """
    choice = {digit: digits.of(digit, side) for digit in range(10)}
    found = []
    for index, question in enumerate(questions):
        draw = random.Random(f"pictures {seed} {index}")
        text, shown = question.question, [int(c) for c in question.question if c.isdigit()]
        meta = {**question.meta, "source": "pictured sums", "pictures": tuple(draw.choice(choice[d]) for d in shown)}
        found.append(replace(question, question=re.sub(r"\d", PICTURE * PIECES, text), meta=meta))
    return found


def pixels_of(questions: Sequence[Question], pixels: Tensor | None) -> dict[str, Tensor]:
    """The pictures of some questions in order, as a model takes them; nothing where there are none."""
    pictures = [picture for q in questions for picture in q.meta.get("pictures", ())]
    return {} if pixels is None or not pictures else {"pixel_values": pixels[pictures]}


def stream(seed: int, name: str) -> int:
    """A seed of its own for everything that is drawn by a name."""
    return seed_from_words("seeing", seed, name) % 2**32
