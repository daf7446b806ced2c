"""Clean accuracy as a self-check of networks that come from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from robustflat.errors import UserError, require_range
from robustflat.evaluation.metrics import Interval, wilson_interval

CONFIDENCE = 0.99
"""Of the interval around the measured accuracy in which an expected one must lie."""


@dataclass(frozen=True)
class Accuracy:
    """Share of examples that are classified correctly without attack, and on what it was measured."""

    correct: int
    count: int
    data: str

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return self.correct / self.count

    @property
    def interval(self) -> Interval:
        """Wilson interval of `CONFIDENCE`."""
        return wilson_interval(self.correct, self.count, CONFIDENCE)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"clean accuracy {self.value:.4f} ({self.correct} of {self.count}, {CONFIDENCE:.0%} interval "
            f"{low:.4f} to {high:.4f}) on {self.data}"
        )


def require_agreement(found: Accuracy, expected: float, tolerance: float | None) -> None:
    """Refuse an accuracy that is not the expected one.

    Args:
        found: measured.
        expected: in [0, 1].
        tolerance: largest difference; `None`: `expected` must lie in the interval of `CONFIDENCE` around `found`.

    Raises:
        UserError: if it is not.
    """
    require_range("expected", expected, low=0, high=1, hint="Give a fraction, such as 0.8349.")
    low, high = found.interval if tolerance is None else (found.value - tolerance, found.value + tolerance)
    if not low <= expected <= high:
        raise UserError(
            f"the converted network is not the expected one: {found}, expected {expected:.4f}. Nothing was written. "
            "Check the standardisation (--mean, --std), the activation, and whether these are the images it was "
            "evaluated on."
        )
