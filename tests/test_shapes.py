"""Types and shapes of the project's functions are checked while its tests run."""

import numpy as np
import pytest

from analyses.faithfulness import aoc
from surgery.sites import Site


def test_types_are_checked_where_no_shape_is_named():
    with pytest.raises(TypeError, match="part"):
        Site(1, 2)  # type: ignore[arg-type]


def test_shapes_are_checked_where_one_is_named():
    with pytest.raises(TypeError, match="same"):
        aoc(np.zeros((2, 2)))


def test_neither_where_a_test_asks_for_it(unchecked):
    assert Site(1, 2).part == 2  # type: ignore[arg-type]
    aoc(np.zeros((2, 2)))
