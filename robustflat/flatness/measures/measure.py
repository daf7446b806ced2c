"""What a sharpness measure is and returns, and how several are taken together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from robustflat.flatness.measures.surface import LossSurface


@dataclass(frozen=True)
class Reading:
    """One number and how it came about.

    Attributes:
        value: the measure; for all but the controls, larger is sharper.
        standard_error: from random draws (0 if none were made; NaN if there is no estimate).
        details: further numbers by name.
        loss, parameters: what was measured, in words; filled in by `take`.
        passes: cost in sweeps over the examples; attacks are not counted.
    """

    value: float
    standard_error: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)
    loss: str = ""
    parameters: str = ""
    passes: int = 0

    def __str__(self) -> str:
        """Value, uncertainty and what was measured."""
        spread = f" +- {self.standard_error:.1g}" if self.standard_error > 0 else ""
        known = "" if not math.isnan(self.standard_error) else " (one draw)"
        return f"{self.value:.6g}{spread}{known} ({self.loss}; {self.parameters}; {self.passes} passes)"


class SharpnessMeasure(Protocol):
    """Looks at a loss surface and returns a reading. Settings are those of its constructor."""

    def __call__(self, surface: LossSurface) -> Reading:
        """Measure; the network is left as found."""
        ...


def take(measures: Mapping[str, SharpnessMeasure], surface: LossSurface) -> dict[str, Reading]:
    """Readings by name, on one surface, so that all see the same (adversarial) examples.

    Args:
        measures: name -> measure.
        surface: what to look at.

    Raises:
        UserError: whatever a measure refuses.
    """
    readings = {}
    for name, measure in measures.items():
        before = surface.passes
        reading = measure(surface)
        readings[name] = Reading(
            reading.value,
            reading.standard_error,
            reading.details,
            surface.described,
            surface.parameters,
            surface.passes - before,
        )
    return readings
