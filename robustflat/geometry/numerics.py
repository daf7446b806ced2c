"""Random numbers and safe divisors that input balls and weight balls share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustflat.rng import drawn_for_batch


def precision(v: Tensor) -> torch.dtype:
    """Type to compute in: float64 for float64, else float32 (also for half precision)."""
    return torch.promote_types(v.dtype, torch.float32)


def wide(v: Tensor) -> Tensor:
    """`v` in the precision to compute in."""
    return v.to(precision(v))


_ROOM = 2**20


def positive(v: Tensor) -> Tensor:
    """`v`, in float32 or wider, as a divisor: 0 / 0 becomes 0, and s / 0 no infinity for s up to a million or so."""
    return v.clamp_min(torch.finfo(v.dtype).tiny * _ROOM)


def uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform in [0, 1), at least float32, drawn where the generator lives and brought to `like`'s device."""
    device = like.device if generator is None else generator.device

    def draw(size: tuple[int, ...]) -> Tensor:
        return torch.rand(size, generator=generator, dtype=precision(like), device=device)

    return drawn_for_batch(draw, shape).to(like.device)


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal, at least float32, drawn where the generator lives and brought to `like`'s device."""
    device = like.device if generator is None else generator.device

    def draw(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, dtype=precision(like), device=device)

    return drawn_for_batch(draw, shape).to(like.device)
