"""Bisection on a logarithm: it brackets a known crossing as tightly as its halvings allow."""

from __future__ import annotations

import math

import pytest

from robustflat.errors import UserError
from robustflat.flatness.measures.bisection import Bisection


@pytest.mark.parametrize("crossing", [0.002, 0.3, 7.0])
def test_a_known_crossing_is_bracketed(crossing: float) -> None:
    found = Bisection(1e-3, 10.0, 12)(lambda size: size <= crossing)
    assert found.size <= crossing <= found.above
    assert math.log(found.above / found.size) == pytest.approx(math.log(1e4) / 2**12)
    assert found.middle == pytest.approx(math.sqrt(found.size * found.above))
    assert not found.at_end


@pytest.mark.parametrize("always", [True, False])
def test_a_crossing_outside_of_the_interval_is_told(always: bool) -> None:
    assert Bisection(0.1, 1.0, 5)(lambda size: always).at_end


@pytest.mark.parametrize("given", [(0.0, 1.0, 5), (1.0, 1.0, 5), (0.1, 1.0, 0)])
def test_numbers_out_of_range_are_refused(given: tuple[float, float, int]) -> None:
    with pytest.raises(UserError):
        Bisection(*given)
