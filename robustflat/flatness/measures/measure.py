"""What a sharpness measure is and returns, and how several are taken together."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from robustflat.errors import UserError
from robustflat.flatness.measures.surface import LossSurface
from robustflat.flatness.trace import with_error

BATCH_NORM_SCALING = "batch_norm_scaling"
LAYER_SCALING = "layer_scaling"
BATCH_NORM_FOLDING = "batch_norm_folding"
FOLDING_WITHOUT_BIASES = "batch_norm_folding_without_biases"
TEMPERATURE = "temperature"
PERMUTATION = "permutation"
"""Transformations of a network that a measure may be invariant to; see `robustflat.flatness.audit`."""

NEITHER = frozenset({PERMUTATION})
"""What measures in absolute units of the weights are invariant to."""
PER_LAYER = frozenset({PERMUTATION, BATCH_NORM_SCALING, LAYER_SCALING})
"""What measures in units of each layer's norm are invariant to."""
PER_WEIGHT = PER_LAYER | {FOLDING_WITHOUT_BIASES}
"""What measures in units of each weight are invariant to; folding makes new biases, which count unless left out."""

SMOOTH = ("clean", "frozen")
"""Losses that have second derivatives."""
EVERY = ("clean", "frozen", "robust")
NONE = ("clean",)
"""Of measures that look at the weights alone, and so are taken once."""


@dataclass(frozen=True)
class Reading:
    """One number and how it came about.

    Attributes:
        value: the measure; for all but the controls, larger is sharper.
        standard_error: from random draws (0 if none were made; NaN if there is no estimate); for searches with several
            starts, the standard deviation of what these found.
        example_error: standard error from the choice of examples; NaN where it is not estimated.
        details: further numbers by name.
        loss, parameters, source: what was measured, and the paper; filled in by `take`.
        passes: cost in sweeps over the examples, a gradient counting 3 and a curvature product 4; attacks are not
            counted.
        seconds: duration.
    """

    value: float
    standard_error: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)
    example_error: float = math.nan
    loss: str = ""
    parameters: str = ""
    source: str = ""
    passes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """Value, uncertainty and what was measured."""
        return f"{self.text()} ({self.loss}; {self.parameters}; {self.passes} passes; {self.source})"

    def text(self) -> str:
        """The value to the digits that its standard error leaves, and that error."""
        return with_error(self.value, self.standard_error)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes `None`."""
        return {**_finite(vars(self)), "details": _finite(self.details)}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class Readings(dict[str, Reading]):
    """Readings by name; prints one line each. `left_out`: names of measures that could not be taken, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: dict[str, str] = {}

    def __str__(self) -> str:
        """Name, value and what was measured, aligned; then what was left out."""
        width = max(map(len, (*self, *self.left_out)), default=0)
        lines = [f"{name:<{width}}  {reading}" for name, reading in self.items()]
        return "\n".join([*lines, *(f"{name:<{width}}  left out: {why}" for name, why in self.left_out.items())])


class SharpnessMeasure(Protocol):
    """Looks at a loss surface and returns a reading. Settings are those of its constructor."""

    @property
    def source(self) -> str:
        """The paper that defines it."""
        ...

    @property
    def invariant(self) -> frozenset[str]:
        """Names of the transformations that do not change it by definition; it should change under the others."""
        ...

    @property
    def open(self) -> frozenset[str]:
        """Transformations of which neither can be said: the definition is invariant, its search is not."""
        ...

    @property
    def losses(self) -> tuple[str, ...]:
        """Losses of `surface.LOSSES` that it is defined on."""
        ...

    @property
    def needs(self) -> str:
        """Name of the second network that it compares with (a key of the surface's anchors); "" for none."""
        ...

    def __call__(self, surface: LossSurface) -> Reading:
        """Measure; the network is left as found."""
        ...


class Measure:
    """What most measures say of themselves; a class overrides what differs."""

    source: str = ""
    invariant: frozenset[str] = NEITHER
    open: frozenset[str] = frozenset()
    losses: tuple[str, ...] = EVERY
    needs: str = ""


@torch.inference_mode(False)
def take(measures: Mapping[str, SharpnessMeasure], surface: LossSurface) -> Readings:
    """Readings by name, on one surface, so that all see the same (adversarial) examples.

    Args:
        measures: name -> measure.
        surface: what to look at.

    Raises:
        UserError: if a measure is not defined on this loss or lacks its second network, or whatever it refuses.
    """
    readings = Readings()
    for name, measure in measures.items():
        require_defined(name, measure, surface)
        before, start = surface.passes, time.perf_counter()
        reading = measure(surface)
        readings[name] = replace(
            reading,
            loss=surface.described,
            parameters=surface.parameters,
            source=measure.source,
            passes=surface.passes - before,
            seconds=time.perf_counter() - start,
        )
    return readings


def require_defined(name: str, measure: SharpnessMeasure, surface: LossSurface) -> None:
    """Refuse a measure that this surface does not allow.

    Raises:
        UserError: if it is not defined on this loss, or lacks its second network.
    """
    if surface.loss not in measure.losses:
        raise UserError(
            f"The measure '{name}' is defined on the {', '.join(measure.losses)} loss, not on '{surface.loss}': the "
            f"loss attacked anew at every point has no second derivative. The frozen loss comes closest."
        )
    if measure.needs and measure.needs not in surface.anchors:
        raise UserError(f"The measure '{name}' compares with another network: it needs anchors['{measure.needs}'].")
