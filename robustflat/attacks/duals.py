"""Nearest points under a box constraint, each found by a search in one dimension instead of by sorting.

All take flat images (B, D) and solve, per example, one monotone piecewise linear (or step) equation in a scalar
t. Products with 0/1 masks stand where a reader expects `torch.where`: on a CPU they are several times faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustflat.errors import require_one_of
from robustflat.geometry.numerics import positive

_L1_STEPS = 16
_CLOSE = 1e-5
_EXACT = 1e-6
_BOUNDARY_STEPS = 8
_THRESHOLD_STEPS = 16
_FAR = 1e30  # moves every pixel to the border; times zero it is zero


def shortest_to_plane(norm: str, point: Tensor, normal: Tensor, gap: Tensor, low: float, high: float) -> Tensor:
    """Smallest step d in the given norm with <normal, d> = gap and point + d inside the box.

    Where the box leaves no solution, d is the step in the box that comes closest to the plane. Every pixel moves
    by sign(gap * normal) times a length that the dual variable t fixes: min(t, room) for L-infinity,
    min(t |normal|, room) for L2. Their projection on the normal is concave in t, so Newton's method started at 0
    climbs to the solution and is exact once the set of pixels at the box's border is right. In L1 the pixels with
    the largest |normal| move all the way, and t is the threshold between those and the rest.

    Args:
        norm: "linf", "l2" or "l1".
        point: images (B, D) inside the box, or several points for each plane, (P, B, D).
        normal: normal of the plane, (B, D).
        gap: how far <normal, d> must go, (B,) or (P, B), of any sign.
        low, high: ends of the box.

    Returns:
        The steps d, shaped like point; zero where the normal is zero.
    """
    require_one_of("norm", norm, ("linf", "l2", "l1"))
    slope = normal.abs()
    scale = positive(slope.amax(dim=-1, keepdim=True))
    slope = slope.div_(scale)  # at most 1: gradients of any magnitude can be squared and summed
    wanted = gap.abs().unsqueeze(-1) / scale
    direction = normal.sign() * gap.sign().unsqueeze(-1)
    room = _room(point, direction, low, high)
    if norm == "l1":
        return direction.mul_(_fill_largest(slope, room, wanted))
    return direction.mul_(_climb(None if norm == "linf" else slope, slope, room, wanted))


def project_l1(delta: Tensor, centre: Tensor, epsilon: float, low: float, high: float) -> Tensor:
    """The perturbation nearest to delta (Euclidean) with L1 norm <= epsilon and centre + result inside the box.

    With a = |delta| and r the room that the box leaves in delta's direction, pixel i moves by
    min(max(a_i - t, 0), r_i), t >= 0 chosen so that these sum to epsilon ("Mind the box", Croce and Hein, ICML
    2021). Newton steps with a bisection as safeguard find t; the end kept is the one inside the ball.

    Args:
        delta: perturbations (B, D).
        centre: images (B, D) inside the box.
        epsilon: radius, kept to up to 1e-5 of it.
        low, high: ends of the box.
    """
    direction = delta.sign()
    distance = delta.abs()
    room = _room(centre, direction, low, high)
    kept = torch.minimum(distance, room)
    excess = kept.sum(dim=1, keepdim=True) - epsilon
    too_small = torch.zeros_like(excess)  # ends of the bracket around t
    enough = distance.amax(dim=1, keepdim=True) * (excess > 0)
    threshold = too_small
    shortfall = enough  # what the result lacks to epsilon; 0 where delta lies in the ball already
    beyond, free = distance.clone(), torch.empty_like(distance)
    for _ in range(_L1_STEPS):
        torch.gt(kept, 0, out=free).mul_(torch.lt(beyond, room, out=beyond))
        slope = free.sum(dim=1, keepdim=True)
        newton = threshold + excess / slope.clamp_min(1)
        usable = (newton > too_small) & (newton < enough) & (slope > 0)
        threshold = torch.where(usable, newton, (too_small + enough) / 2)
        torch.minimum(torch.sub(distance, threshold, out=beyond).clamp_min_(0), room, out=kept)
        excess = kept.sum(dim=1, keepdim=True) - epsilon
        inside = excess <= _CLOSE * epsilon
        enough = torch.where(inside, threshold, enough)
        shortfall = torch.where(inside & (threshold > 0), -excess, shortfall)
        too_small = torch.where(inside, too_small, threshold)
        if delta.device.type == "cpu" and bool((shortfall <= _CLOSE * epsilon).all()):
            break  # asking costs nothing on a CPU; typical after five steps
    return direction * torch.minimum((distance - enough).clamp_min(0), room)


def kth_largest(values: Tensor, count: Tensor) -> Tensor:
    """The count-th largest entry of each row of values (B, D), for counts (B,) in 1..D -> (B, 1)."""
    ordered = torch.sort(values, dim=1, descending=True).values
    return ordered.gather(1, (count.long() - 1).clamp(0, values.shape[1] - 1).unsqueeze(1))


def _room(point: Tensor, direction: Tensor, low: float, high: float) -> Tensor:
    """Distance from the point to the box's border in each pixel's direction (0 for direction 0 is harmless)."""
    # (low + high) / 2 + direction * (high - low) / 2 is the border ahead.
    ahead = direction * ((high - low) / 2) + (low + high) / 2
    return (ahead - point).mul_(direction).clamp_min_(0)


def _climb(speed: Tensor | None, slope: Tensor, room: Tensor, wanted: Tensor) -> Tensor:
    """min(t * speed, room) for the t with sum(slope * that) = wanted, or the whole room if that is too little.

    `speed` of `None` is 1 everywhere.
    """
    power = slope if speed is None else slope * speed
    t = (wanted / positive(power.sum(dim=-1, keepdim=True))).clamp_max(_FAR)
    pace = torch.empty_like(room)
    free = torch.empty_like(room)
    for _ in range(_BOUNDARY_STEPS):
        reach = t if speed is None else torch.mul(speed, t, out=pace)
        rate = torch.gt(room, reach, out=free).mul_(power).sum(dim=-1, keepdim=True)
        moved = torch.minimum(room, reach, out=pace).mul_(slope).sum(dim=-1, keepdim=True)
        missing = (wanted - moved).clamp_min_(0)
        if room.device.type == "cpu" and bool(((missing <= _EXACT * wanted) | (rate == 0)).all()):
            break  # asking costs nothing on a CPU; typical after two or three steps
        # Without any free pixel the plane is out of reach; t stays and every pixel is at the border already.
        t = torch.where(rate > 0, t + missing / positive(rate), t).clamp_max(_FAR)
    return torch.minimum(room, t if speed is None else speed * t)


def _fill_largest(slope: Tensor, room: Tensor, wanted: Tensor) -> Tensor:
    """Whole room of the pixels with the largest slope, a share of that at the threshold: the L1 solution.

    slope lies in [0, 1]. The reach of a threshold, the sum of slope * room above it, falls from everything at 0
    to nothing at 1; the bracket around `wanted` shrinks by false position and bisection in turn. Pixels left
    inside the final bracket have practically equal slopes and share what is missing.
    """
    reach = slope * room
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
    at_low, at_high = reach.sum(dim=-1, keepdim=True), torch.zeros_like(wanted)
    above = torch.empty_like(reach)
    for step in range(_THRESHOLD_STEPS):
        share = 0.5 if step % 2 else ((at_low - wanted) / positive(at_low - at_high)).clamp(0.02, 0.98)
        threshold = low + (high - low) * share
        got = torch.gt(slope, threshold, out=above).mul_(reach).sum(dim=-1, keepdim=True)
        enough = got >= wanted
        low, at_low = torch.where(enough, threshold, low), torch.where(enough, got, at_low)
        high, at_high = torch.where(enough, high, threshold), torch.where(enough, at_high, got)
    full = (slope > high).to(slope.dtype)
    between = (slope > low).to(slope.dtype) - full
    share = ((wanted - at_high) / positive(at_low - at_high)).clamp(0, 1)
    return room * (full + between * share)
