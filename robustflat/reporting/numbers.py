"""Numbers as text for people."""

from __future__ import annotations

import math

DASH = "–"
"""Stands for a number that there is not."""


def number(value: float, digits: int = 4) -> str:
    """Four significant digits without an exponent where that is short; a dash for NaN."""
    if math.isnan(value):
        return DASH
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:.0f}"
    return f"{value:.{digits - 1}e}"


def with_error(value: float, error: float) -> str:
    """The value, rounded to two digits of its standard error where that is known."""
    if math.isnan(value) or math.isnan(error) or error <= 0:
        return number(value)
    places = min(max(0, 1 - math.floor(math.log10(error))), 6)
    return f"{value:.{places}f} ± {error:.{places}f}"
