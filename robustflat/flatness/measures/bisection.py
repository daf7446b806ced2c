"""The largest size of a displacement that a network still bears, by halving an interval of its logarithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from robustflat.errors import require_range


class Crossing(NamedTuple):
    """Largest size found to be borne, smallest found not to be, their geometric mean; whether one is an end."""

    size: float
    above: float
    middle: float
    at_end: bool


class Bisection:
    """Search for the size at which a condition that holds at small sizes ceases to hold.

    Args:
        low, high: sizes that it is searched between, 0 < low < high.
        halvings: of the interval of the logarithm, >= 1.

    Raises:
        UserError: if a number is out of range.
    """

    def __init__(self, low: float, high: float, halvings: int) -> None:
        require_range("bisections", halvings, low=1)
        require_range("low", low, low=0, low_open=True)
        require_range("high", high, low=low, low_open=True)
        self.low, self.high, self.halvings = low, high, halvings

    def __call__(self, holds: Callable[[float], bool]) -> Crossing:
        """Where `holds` of a size turns from true to false; the ends themselves are not asked."""
        low, high = math.log(self.low), math.log(self.high)
        for _ in range(self.halvings):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(math.exp(middle)) else (low, middle)
        at_end = low == math.log(self.low) or high == math.log(self.high)
        return Crossing(math.exp(low), math.exp(high), math.exp((low + high) / 2), at_end)
