"""Shapes of the project's functions are checked while its tests run; types alone are pyright's."""

import numpy as np
import pytest

from analyses.faithfulness import aoc


def test_shapes_are_checked_where_one_is_named():
    with pytest.raises(TypeError, match="same"):
        aoc(np.zeros((2, 2)))


def test_not_where_a_test_asks_for_it(unchecked):
    aoc(np.zeros((2, 2)))
