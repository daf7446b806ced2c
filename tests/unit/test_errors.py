"""Range and choice checks: what passes, and what the refusal says."""

from __future__ import annotations

import math

import pytest

from robustflat.errors import UserError, require_one_of, require_range


def test_ends_belong_to_the_interval_unless_open():
    require_range("x", 0, low=0, high=1)
    require_range("x", 1.0, low=0, high=1)
    with pytest.raises(UserError, match=r"x must lie in \(0, 1\], got 0"):
        require_range("x", 0, low=0, high=1, low_open=True)
    with pytest.raises(UserError, match=r"x must lie in \[0, 1\), got 1"):
        require_range("x", 1, low=0, high=1, high_open=True)


@pytest.mark.parametrize("value", [math.nan, -1, 2, math.inf, -math.inf])
def test_values_outside_are_refused_with_the_hint(value):
    with pytest.raises(UserError, match="Write less"):
        require_range("x", value, low=0, high=1, hint="Write less.")


def test_free_ends_are_infinite():
    require_range("x", 1e300, low=0)
    require_range("x", -1e300, high=0)
    with pytest.raises(UserError, match=r"\(-inf, 0\]"):
        require_range("x", 1, high=0)


def test_choices_are_listed_and_the_closest_suggested():
    require_one_of("mode", "eval", ("eval", "train"))
    with pytest.raises(UserError, match=r"mode must be one of eval, train, got 'evil'\. Did you mean 'eval'\?"):
        require_one_of("mode", "evil", ("eval", "train"))
