"""The self-check of converted networks."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from robustflat.errors import UserError
from robustflat.evaluation.accuracy import CONFIDENCE, Accuracy, require_agreement

FOUND = Accuracy(8334, 10_000, "cifar10 test")


def test_the_interval_is_wilsons_and_the_text_says_what_was_measured():
    expected = binomtest(8334, 10_000).proportion_ci(CONFIDENCE, method="wilson")
    assert FOUND.interval == pytest.approx((expected.low, expected.high))
    assert str(FOUND).startswith("clean accuracy 0.8334 (8334 of 10000, 99% interval 0.82")
    assert str(FOUND).endswith("on cifar10 test")


def test_an_expectation_agrees_within_the_interval_or_the_tolerance():
    low, high = FOUND.interval
    for expected in (low, 0.8334, high):
        require_agreement(FOUND, expected, None)
    require_agreement(FOUND, 0.8434, 0.01001)
    for expected, tolerance in ((low - 1e-6, None), (high + 1e-6, None), (0.8335, 1e-5)):
        with pytest.raises(UserError, match="not the expected one"):
            require_agreement(FOUND, expected, tolerance)
    with pytest.raises(UserError, match=r"such as 0\.8349"):
        require_agreement(FOUND, 83.34, None)
