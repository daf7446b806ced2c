"""The flatness measures of the paper on a loss surface, and what the curve of flatness against the radius says."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustflat.errors import UserError, require_range
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.measures.average import rises_at
from robustflat.flatness.measures.bisection import Bisection
from robustflat.flatness.measures.measure import NEITHER, PER_LAYER, Measure, Reading
from robustflat.flatness.measures.surface import LossSurface
from robustflat.flatness.result import FlatnessResult
from robustflat.flatness.trace import mean_of
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.weight_ball import WeightBall
from robustflat.types import Weights


def invariance_of(ball: WeightBall) -> frozenset[str]:
    """What displacements in this ball make a measure invariant to."""
    return PER_LAYER if ball.relative and ball.grouping != "global" else NEITHER


class AverageRise(Measure):
    """E[L(w + nu)] - L(w), nu uniform in a ball and drawn anew for every batch: `AverageFlatness` on any loss.

    The reference is one run of the surface's attack, the same that is run at displaced weights.

    Args:
        ball: in weight space; `None`: radius 0.5, relative to each layer (paper).
        draws: >= 1.
    """

    source = "Stutz et al., ICCV 2021"

    def __init__(self, ball: WeightBall | None = None, draws: int = 10) -> None:
        require_range("draws", draws, low=1)
        self.ball, self.draws = ball or WeightBall(0.5), draws
        self.invariant = invariance_of(self.ball)

    def __call__(self, surface: LossSurface) -> Reading:
        """Rise of the loss, in nats."""
        attacked = surface.loss == "robust"
        measure = AverageFlatness(
            self.ball,
            trials=self.draws,
            loss="robust" if attacked else "clean",
            attack=surface.attack if attacked else None,
            reference_attack=surface.attack if attacked else None,
            norm_layers=surface.norm_layers,
            biases=surface.biases,
        )
        batches = surface.found.batches if attacked else surface.fixed
        result = measure.measure(surface.found.model, batches, generator=surface.generator("average"))
        surface.passes += self.draws + 1
        return _reading(result)


class WorstRise(Measure):
    """max L(w + nu) - L(w) over nu in a ball, for every batch: `WorstFlatness` on any loss.

    On the re-attacked loss images and weights ascend jointly, the images in the ball of the surface's attack.

    Args:
        ball: in weight space; `None`: radius 0.003, relative to each layer (paper).
        restarts: ascents, >= 1.
        steps: of each, >= 1.
    """

    source = "Stutz et al., ICCV 2021"

    def __init__(self, ball: WeightBall | None = None, restarts: int = 5, steps: int = 20) -> None:
        require_range("restarts", restarts, low=1)
        require_range("steps", steps, low=1)
        self.ball, self.restarts, self.steps = ball or WeightBall(0.003), restarts, steps
        self.invariant = invariance_of(self.ball)

    def __call__(self, surface: LossSurface) -> Reading:
        """Rise of the loss, in nats.

        Raises:
            UserError: on the re-attacked loss, if the attack has no ball and step size to ascend with.
        """
        attacked = surface.loss == "robust"
        ball, step = getattr(surface.attack, "ball", None), getattr(surface.attack, "step_size", None)
        if attacked and (ball is None or not isinstance(step, int | float)):
            raise UserError("Worst-case flatness of the re-attacked loss needs an attack with a ball and a step size.")
        options = {"input_ball": ball, "input_step": step, "reference_attack": surface.attack} if attacked else {}
        measure = WorstFlatness(
            self.ball,
            restarts=self.restarts,
            steps=self.steps,
            loss="robust" if attacked else "clean",
            norm_layers=surface.norm_layers,
            biases=surface.biases,
            **options,  # type: ignore[arg-type]
        )
        batches = surface.found.batches if attacked else surface.fixed
        result = measure.measure(surface.found.model, batches, generator=surface.generator("worst"))
        surface.passes += self.restarts * (3 * self.steps + 1) + 1
        return _reading(result)


class InverseNoiseRadius(Measure):
    """1 / xi for the smallest radius xi at which random displacements in the ball raise the loss by `rise` on average.

    The inverse of average-case flatness as a function of its radius, by bisection on common draws.

    Args:
        rise: of the loss, in nats, > 0.
        ball: its radius does not matter; `None`: relative to each layer.
        draws: >= 1 per radius.
        bisections: halvings of the interval of log xi, >= 1.
        low, high: the interval that xi is searched in.
    """

    source = "after Stutz et al., ICCV 2021"

    def __init__(
        self,
        rise: float = 0.5,
        *,
        ball: WeightBall | None = None,
        draws: int = 10,
        bisections: int = 10,
        low: float = 1e-3,
        high: float = 10.0,
    ) -> None:
        require_range("rise", rise, low=0, low_open=True)
        require_range("draws", draws, low=1)
        self.rise, self.draws, self.search = rise, draws, Bisection(low, high, bisections)
        self.ball = _unit(ball)
        self.invariant = invariance_of(self.ball)

    def __call__(self, surface: LossSurface) -> Reading:
        """1 / xi; xi, and whether it met the end of the search, are in the details."""
        found = self.search(lambda size: float(self._rises(surface, size).mean()) < self.rise)
        radius = found.middle
        # How far the error of the mean rise moves the radius, by the slope of the curve there.
        here, above = self._rises(surface, radius).mean(dim=1), self._rises(surface, 1.1 * radius).mean(dim=1)
        slope = float(above.mean() - here.mean()) / (0.1 * radius)
        error = mean_of(here).standard_error / slope / radius**2 if slope > 0 else math.nan
        return Reading(1 / radius, error, {"radius": radius, "at_end": float(found.at_end)})

    def _rises(self, surface: LossSurface, radius: float) -> Tensor:
        return _scaled_rises(surface, self.ball, radius, self.draws)


class CurveArea(Measure):
    """Area under average-case flatness as a function of log xi, from the radius `low` to `high`.

    Args:
        low, high: radii, 0 < low < high.
        points: of the trapezoidal rule, equally spaced in log xi, >= 2.
        ball: its radius does not matter; `None`: relative to each layer.
        draws: directions, the same at all radii, >= 1.
    """

    source = "after Stutz et al., ICCV 2021"

    def __init__(
        self,
        low: float = 0.05,
        high: float = 1.0,
        *,
        points: int = 7,
        ball: WeightBall | None = None,
        draws: int = 10,
    ) -> None:
        require_range("low", low, low=0, low_open=True)
        require_range("high", high, low=low, low_open=True)
        require_range("points", points, low=2)
        require_range("draws", draws, low=1)
        self.low, self.high, self.points, self.draws = low, high, points, draws
        self.ball = _unit(ball)
        self.invariant = invariance_of(self.ball)

    def __call__(self, surface: LossSurface) -> Reading:
        """In nats (times the logarithm of a ratio of radii); divided by log(high / low) in the details."""
        logs = torch.linspace(math.log(self.low), math.log(self.high), self.points, dtype=torch.float64)
        curve = [_scaled_rises(surface, self.ball, math.exp(float(x)), self.draws) for x in logs]
        areas = torch.trapezoid(torch.stack(curve), logs.to(curve[0]), dim=0)  # (draws, N)
        found, over_examples = mean_of(areas.mean(dim=1)), mean_of(areas.mean(dim=0))
        mean = found.value / math.log(self.high / self.low)
        return Reading(*found, {"mean_height": mean}, over_examples.standard_error)


def _unit(ball: WeightBall | None) -> WeightBall:
    found = ball or WeightBall(1.0)
    return WeightBall(1.0, norm=found.norm, grouping=found.grouping, relative=found.relative)


def _scaled_rises(surface: LossSurface, unit: WeightBall, radius: float, draws: int) -> Tensor:
    """Rises (draws, N) at displacements of the ball with this radius, in the same directions for any radius."""

    def drawn(number: int) -> Weights:
        nu = unit.sample(surface.weights, surface.generator("curve", number), sampling="ball")
        return {name: radius * step for name, step in nu.items()}

    return rises_at(surface, map(drawn, range(draws)))


def _reading(result: FlatnessResult) -> Reading:
    details = {"reference_loss": result.reference_loss, "radius": result.radius}
    error = result.standard_error
    if result.reduction == "max":  # of searches, the deviation of what single ones found counts: see `Reading`
        error *= math.sqrt(len(result.losses))
    return Reading(result.value, error, details, result.standard_error_over_examples)
