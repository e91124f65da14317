"""The arithmetic that a text claims: ``equations("so 12 + 5 = 17.")`` is one equation, and it holds."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

_RUN = re.compile(r"[-+*/().,\d\s=]+")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "·": "*"})
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_LONGEST = 200  # characters of a side: what is longer is not somebody's arithmetic


@dataclass(frozen=True)
class Equation:
    """Two sides without white space, ``12+5`` and ``17``."""

    left: str
    right: str

    @property
    def holds(self) -> bool:
        """Whether the sides are equal; a right side written with decimals may be rounded. False for a division by zero."""
        left, right = evaluate(self.left), evaluate(self.right)
        if left is None or right is None:
            return False
        decimals = re.fullmatch(r"-?\d*\.(\d+)", self.right)
        slack = Fraction(1, 2 * 10 ** len(decimals[1])) if decimals else 0
        return abs(left - right) <= slack

    def __str__(self) -> str:
        return f"{self.left}={self.right}"


def equations(text: str) -> tuple[Equation, ...]:
    """Every equation between numbers in a text, in order; ``3 + 4 = 7 + 2 = 9`` claims two. Currency and thousands marks are dropped.

    What has a letter in it is no equation; ``2 x 3`` is read as ``2 * 3``.
    """
    found = []
    for line in text.translate(_SIGNS).splitlines():
        line = re.sub(r"(?<=\d)\s*[xX]\s*(?=\d)", "*", _BULLET.sub("", line))
        line = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", line).replace("$", "")
        for run in _RUN.finditer(line):
            sides, before = run[0].split("="), line[: run.start()].rstrip()[-1:]
            for place, (left, right) in enumerate(pairwise(sides)):
                ends = _suffix(left, "" if place else before), _prefix(right)
                if ends[0] and ends[1]:
                    found.append(Equation(*ends))
    return tuple(found)


def evaluate(expression: str) -> Fraction | None:
    """The exact value of sums, differences, products and quotients of numbers; None where it has none, or is anything else."""
    if len(expression) > _LONGEST:
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
    raise ValueError(f"{ast.dump(node)} is no arithmetic")


def _suffix(side: str, before: str) -> str:
    """The longest end of a side that is an expression, without white space; "" where there is none. before: the character before it."""
    words = side.strip(" ,").split()
    return _first(
        " ".join(words[n:]) for n in range(len(words)) if _may_begin(words[n - 1][-1] if n else before, words[n:])
    )


def _may_begin(before: str, words: Sequence[str]) -> bool:
    """Whether words can be all of a side, after that character: not with an operator before them, or as their first, whose left side is
    no number ("x + 3", "20% * 50"); nor as a lone number that something is said of ("half of 50").
    """
    if before and before in "+-*/(":
        return False
    if not (before.isalnum() or before == "%"):
        return True
    return words[0] not in ("+", "-", "*", "/") and any(c in "+-*/" for c in "".join(words).lstrip("-"))


def _prefix(side: str) -> str:
    """The longest beginning that is one. A full stop or comma after it belongs to the sentence."""
    words = side.split()
    return _first(" ".join(words[: len(words) - n]).rstrip(".,(") for n in range(len(words)))


def _first(candidates: Iterator[str]) -> str:
    return next(("".join(text.split()) for text in candidates if _is_expression(text)), "")


def _is_expression(text: str) -> bool:
    if len(text) > _LONGEST:
        return False
    try:
        _value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
