"""Balls around each image, intersected with the box of allowed pixel values: L-infinity, L2 and L1.

Shapes: images, perturbations and gradients are (B, ...), usually (B, C, H, W); everything per example is (B,).
x itself must lie in the box. Half-precision images are handled in float32 and rounded towards x at the end, so
a result never leaves the ball. Nothing here waits for the device, and nothing is differentiable.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from robustflat.errors import UserError, require_one_of, require_range
from robustflat.geometry.numerics import normal, positive, uniform, wide


class InputBall(ABC):
    """All images z in the box with size(z - x) <= epsilon; what the three norms share.

    Args:
        epsilon: radius in units of the pixel values, which lie in [0, 1]: 8/255 is 0.03137.
        low, high: ends of the box.

    Raises:
        UserError: if epsilon is not positive and finite (L-infinity: not in (0, 1]) or the box is empty.
    """

    norm: ClassVar[str]
    _largest: ClassVar[float] = math.inf

    def __init__(self, epsilon: float, low: float = 0.0, high: float = 1.0) -> None:
        if not low < high:  # also for not-a-number
            raise UserError(f"low must be smaller than high, got low={low:g} and high={high:g}.")
        hint = "For no attack use attack=none."
        if epsilon > self._largest:
            hint = "Is it in 0..255 units? Write 8/255 as 0.03137."
        unbounded = math.isinf(self._largest)
        require_range("epsilon", epsilon, low=0, high=self._largest, low_open=True, high_open=unbounded, hint=hint)
        self.epsilon = epsilon
        self.low = low
        self.high = high

    def __repr__(self) -> str:
        return f"{type(self).__name__}(epsilon={self.epsilon:g}, low={self.low:g}, high={self.high:g})"

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest allowed image (Euclidean), in ball and box at once; allowed images come back bit for bit.

        Args:
            x_adv: images to bring in, (B, ...).
            x: centres, same shape, inside the box.
        """

    def onto(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for fixed centres x, for searches that project often; the same bits."""
        return lambda x_adv: self.project(x_adv, x)

    @torch.no_grad()
    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform in the ball around x, then clipped into the box, (B, ...)."""
        return self._attach(self._draw(x, generator), x)

    @torch.no_grad()
    def sample_uniform_norm(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Start of the released code: x + epsilon * u * g / size(g), then clipped into the box.

        g is Gaussian per pixel and u uniform in [0, 1) per example, so the *size* is uniform, which for images
        lies much closer to x than `sample` does (L-infinity, D = 3072: mean |delta| 0.11 epsilon, not 0.5).
        """
        gaussian = normal(x.shape, x, generator)
        factor = self.epsilon * uniform(_per_example(x), x, generator)
        return self._attach(gaussian * (factor / positive(self._norm(gaussian))), x)

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Distance of each image from its original in the norm of this ball, (B,)."""
        return self._norm(wide(x_adv) - wide(x)).flatten()

    @abstractmethod
    def steepest(self, grad: Tensor) -> Tensor:
        """Direction of norm 1 that increases a linear function with gradient `grad` the most; zero stays zero.

        Args:
            grad: (B, ...); each example has its own direction.
        """

    @abstractmethod
    def _norm(self, delta: Tensor) -> Tensor:
        """Norm per example with all dimensions kept: (B, ...) -> (B, 1, ...)."""

    @abstractmethod
    def _draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Perturbations uniform in the ball, shape of x."""

    @torch.no_grad()
    def _project(self, x_adv: Tensor, x: Tensor, shorten: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Projection that keeps directions: `shorten` maps distances from x and the box's room to distances.

        Only examples whose clamped image lies outside of the ball take what `shorten` says.
        """
        boxed = x_adv.clamp(self.low, self.high)
        outside = self.size(boxed, x) > self.epsilon
        centre = wide(x)
        delta = wide(x_adv) - centre
        ahead = (delta > 0).to(delta.dtype) * (self.high - self.low) + self.low
        room = (ahead - centre).abs()
        nearest = self._attach(delta.sign() * shorten(delta.abs(), room), x)
        return torch.where(outside.view(_per_example(x)), nearest.to(x_adv.dtype), boxed)

    def _attach(self, delta: Tensor, x: Tensor) -> Tensor:
        """Image x + delta inside ball and box, for a delta of size epsilon up to rounding; dtype of x."""
        # Rounding can leave the norm a few units in the last place above epsilon.
        norm = self._norm(delta)
        margin = 1 - 4 * torch.finfo(delta.dtype).eps
        delta = delta * torch.where(norm > self.epsilon, self.epsilon * margin / positive(norm), 1.0)
        moved = (wide(x) + delta).to(x.dtype).clamp(self.low, self.high)
        return _towards(moved, x, delta.abs())


class LinfBall(InputBall):
    """Each pixel within epsilon of its original: |z - x| <= epsilon. epsilon must lie in (0, 1].

    Customary: 8/255 = 0.03137 on CIFAR-10, 0.3 on MNIST.
    """

    norm = "linf"
    _largest = 1.0

    @torch.no_grad()
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest allowed image: every pixel is clamped. Exact; allowed pixels stay bit for bit."""
        centre = wide(x)
        clamped = torch.clamp(wide(x_adv), centre - self.epsilon, centre + self.epsilon)
        return _towards(clamped.clamp(self.low, self.high).to(x_adv.dtype), x, self.epsilon)

    @torch.no_grad()
    def onto(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for fixed centres x: the ends of every pixel's interval are computed once, a call is one clamp."""
        least, most = (self.project(torch.full_like(x, end), x) for end in (-torch.inf, torch.inf))

        def project(x_adv: Tensor) -> Tensor:
            # Between its ends a number of the centres' type needs no rounding; of another type it may.
            return x_adv.clamp(least, most) if x_adv.dtype == x.dtype else self.project(x_adv, x)

        return project

    def steepest(self, grad: Tensor) -> Tensor:
        """Sign of the gradient."""
        return grad.sign()

    def _norm(self, delta: Tensor) -> Tensor:
        return delta.abs().amax(dim=_dims(delta), keepdim=True)

    def _draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return (2 * uniform(x.shape, x, generator) - 1) * self.epsilon


class L2Ball(InputBall):
    """Euclidean distance at most epsilon from each original. Customary: 0.5 (128/255) on CIFAR-10."""

    norm = "l2"
    _newton_steps: ClassVar[int] = 8

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest image in ball and box at once; allowed images come back bit for bit.

        With a = |x_adv - x| and r the room that the box leaves in that direction, the nearest image is at
        distance min(t * a, r) in each pixel, for the t <= 1 that gives size epsilon. t^2 is the root of a
        concave piecewise linear function; Newton steps reach it from inside the ball, usually exactly after
        three to five of the eight.
        """
        return self._project(x_adv, x, self._shorten)

    def steepest(self, grad: Tensor) -> Tensor:
        """Gradient over its Euclidean norm, safe for gradients of any magnitude."""
        slope = wide(grad)
        scaled = slope / positive(slope.abs().amax(dim=_dims(slope), keepdim=True))
        return (scaled / positive(self._norm(scaled))).to(grad.dtype)

    def _norm(self, delta: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(delta, dim=_dims(delta), keepdim=True)
        return norm

    def _draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        gaussian = normal(x.shape, x, generator)
        radius = uniform(_per_example(x), x, generator).pow(1 / max(x.shape[1:].numel(), 1))
        return gaussian * (self.epsilon * radius / positive(self._norm(gaussian)))

    def _shorten(self, distance: Tensor, room: Tensor) -> Tensor:
        # Solve sum(min(s * a^2, r^2)) = epsilon^2 for s = t^2, per example; s grows from below.
        squares, most, target = distance.square(), room.square(), self.epsilon**2
        dims = _dims(distance)
        s = target / positive(squares.sum(dim=dims, keepdim=True))
        for _ in range(self._newton_steps):
            scaled = s * squares
            reached = torch.minimum(scaled, most).sum(dim=dims, keepdim=True)
            slope = (squares * (scaled < most)).sum(dim=dims, keepdim=True)
            s = s + (target - reached).clamp_min(0) / positive(slope)
            s = s.clamp_max(1.0)
        return torch.minimum(s.sqrt() * distance, room)


class L1Ball(InputBall):
    """Sum of absolute changes at most epsilon from each original. Customary: 12 on CIFAR-10."""

    norm = "l1"

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest image in ball and box at once, exact; allowed images come back bit for bit.

        With a = |x_adv - x| and r the room that the box leaves in that direction, the nearest image is at
        distance min(max(a - t, 0), r) in each pixel. The t that gives size epsilon comes from sorting the 2 D
        kinks of that piecewise linear function. (Croce and Hein, "Mind the box", 2021, say why projecting onto
        ball and box one after the other is not enough for L1.)
        """
        return self._project(x_adv, x, self._shorten)

    def steepest(self, grad: Tensor) -> Tensor:
        """Sign of the largest entry at its place, zero elsewhere; of equal entries one is taken."""
        flat = grad.flatten(1)
        where = flat.abs().argmax(dim=1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, where, flat.gather(1, where).sign()).view(grad.shape)

    def _norm(self, delta: Tensor) -> Tensor:
        return delta.abs().sum(dim=_dims(delta), keepdim=True)

    def _draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        # D exponentials over the sum of D + 1 are uniform in the corner of the simplex.
        parts = -torch.log1p(-uniform(x.shape, x, generator))
        rest = -torch.log1p(-uniform(_per_example(x), x, generator))
        signs = uniform(x.shape, x, generator) - 0.5
        total = positive(self._norm(parts) + rest)
        return torch.copysign(parts, signs) * (self.epsilon / total)

    def _shorten(self, distance: Tensor, room: Tensor) -> Tensor:
        threshold = _l1_threshold(distance.flatten(1), room.flatten(1), self.epsilon)
        threshold = threshold.view(_per_example(distance))
        kept = torch.minimum((distance - threshold).clamp_min(0), room)
        # One Newton step takes out the rounding errors that the cumulative sums gathered.
        free = (kept > 0) & (kept < room)
        slope = free.sum(dim=_dims(distance), keepdim=True).clamp_min(1)
        threshold = (threshold + (self._norm(kept) - self.epsilon) / slope).clamp_min(0)
        return torch.minimum((distance - threshold).clamp_min(0), room)


def _l1_threshold(distance: Tensor, room: Tensor, epsilon: float) -> Tensor:
    """The t with sum(min(max(a - t, 0), r)) = epsilon, for a, r (B, D) -> (B, 1).

    As t falls, pixel i starts to count at t = a_i and is full at t = a_i - r_i; between two such kinks the sum
    grows linearly, by the number of pixels that count and are not full.
    """
    pixels = distance.shape[1]
    kinks, order = torch.cat([distance, distance - room], dim=1).sort(dim=1, descending=True)
    counting = (2 * (order < pixels) - 1).cumsum(dim=1)[:, :-1].to(distance.dtype)  # (B, 2 D - 1)
    sums = (counting * -kinks.diff(dim=1)).cumsum(dim=1)
    first = (sums < epsilon).sum(dim=1, keepdim=True).clamp_max(2 * pixels - 2)
    overshoot = (sums.gather(1, first) - epsilon) / counting.gather(1, first).clamp_min(1)
    return (kinks.gather(1, first + 1) + overshoot).clamp_min(0)


def _towards(moved: Tensor, x: Tensor, limit: Tensor | float) -> Tensor:
    """`moved`, one floating-point number closer to x wherever rounding put it farther away than `limit`."""
    too_far = (wide(moved) - wide(x)).abs() > limit
    closer = torch.nextafter(moved, x.to(moved.dtype))
    # With weights 0 and 1 lerp selects exactly; torch.where takes three times as long on a CPU for such masks.
    return torch.lerp(moved, closer, too_far.to(moved.dtype))


def _dims(v: Tensor) -> tuple[int, ...]:
    return tuple(range(1, v.ndim))


def _per_example(v: Tensor) -> tuple[int, ...]:
    """(B, 1, ...) for a (B, ...) tensor."""
    return (len(v), *[1] * (v.ndim - 1))


def input_ball(norm: str, epsilon: float) -> LinfBall | L2Ball | L1Ball:
    """The ball of a norm given by name, for configurations in which the norm is a value.

    Args:
        norm: "linf", "l2" or "l1".
        epsilon: radius in [0, 1] units.

    Raises:
        UserError: for another name, or an epsilon that the ball refuses.
    """
    kinds: dict[str, type[LinfBall | L2Ball | L1Ball]] = {"linf": LinfBall, "l2": L2Ball, "l1": L1Ball}
    require_one_of("norm", norm, kinds)
    return kinds[norm](epsilon)
