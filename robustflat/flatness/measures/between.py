"""Measures that compare with a second network: distance from where training began, barrier on the way to another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.batch_norm import recalibrated
from robustflat.flatness.directions import direction_to, total_norm
from robustflat.flatness.measures.measure import NONE, TEMPERATURE, Measure, Reading
from robustflat.flatness.measures.surface import LossSurface
from robustflat.flatness.trace import mean_of


class DistanceFromStart(Measure):
    """|w - w_0|_2 to the weights that training began with, the surface's anchor "start" (Jiang et al., ICLR 2020)."""

    source = "Jiang et al., ICLR 2020"
    invariant = frozenset({TEMPERATURE})
    losses = NONE
    needs = "start"

    def __call__(self, surface: LossSurface) -> Reading:
        """The distance; relative to |w| in the details; no pass over the examples.

        Raises:
            UserError: if the state dict does not fit.
        """
        distance = total_norm(direction_to(surface.weights, surface.anchors["start"]))
        return Reading(distance, details={"relative": distance / max(total_norm(surface.weights), 1e-300)})


class InterpolationBarrier(Measure):
    """max over t of L(w_t) - ((1 - t) L(w_0) + t L(w_1)), w_t = (1 - t) w_0 + t w_1 (Frankle et al., ICML 2020).

    w_0 is the network itself, w_1 the surface's anchor "other". All parameters and statistics are interpolated.

    Args:
        points: values of t, both ends included, >= 3.
        batch_norm: "interpolate" statistics like weights; or "recalibrate": those of the clean examples at every w_t.
    """

    source = "Frankle et al., ICML 2020"
    invariant = frozenset()
    needs = "other"

    def __init__(self, points: int = 11, batch_norm: str = "interpolate") -> None:
        require_range("points", points, low=3)
        require_one_of("batch_norm", batch_norm, ("interpolate", "recalibrate"))
        self.points, self.batch_norm = points, batch_norm

    def __call__(self, surface: LossSurface) -> Reading:
        """In nats; 0 or less means no barrier. Where it is highest, and the losses of both ends, are in the details.

        Raises:
            UserError: if the other network's state dict does not fit.
        """
        mine = {name: t.clone() for name, t in surface.found.model.state_dict().items()}
        theirs = _matching(mine, surface.anchors["other"])
        moved = copy.deepcopy(surface.found.model)
        steps = torch.linspace(0, 1, self.points, dtype=torch.float64).tolist()
        losses = torch.stack([self._losses(surface, moved, mine, theirs, t) for t in steps])
        ends = torch.stack([(1 - t) * losses[0] + t * losses[-1] for t in steps])
        heights = losses - ends
        highest = int(heights.mean(dim=1).argmax())
        details = {"at": steps[highest], "loss": float(losses[0].mean()), "other_loss": float(losses[-1].mean())}
        found = mean_of(heights[highest])
        return Reading(found.value, 0.0, details, found.standard_error)

    def _losses(
        self, surface: LossSurface, model: nn.Module, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], t: float
    ) -> Tensor:
        """Loss of each example at w_t."""
        state = {n: torch.lerp(w, theirs[n], t) if w.is_floating_point() else w for n, w in mine.items()}
        model.load_state_dict(state)
        again = self.batch_norm == "recalibrate"
        with recalibrated(model, surface.found.batches) if again else nullcontext():
            losses = surface.of(model).losses()
        surface.passes += 2 if again else 1
        return losses


def _matching(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other's tensors under our names.

    Raises:
        UserError: if one is missing or has another shape.
    """
    wrong = [name for name, t in mine.items() if name not in other or other[name].shape != t.shape]
    if wrong:
        raise UserError(
            f"The other network has no {', '.join(wrong[:3])} of the same shape: interpolation needs equal networks."
        )
    return {name: other[name].to(t) for name, t in mine.items()}
