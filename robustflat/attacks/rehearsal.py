"""The random draws of an attack without the attack: where its generator will stand afterwards.

The batches of a data set draw from one generator, one after the other. Ranks that share the batches thus need to know
where it stands before each of theirs, without running the attacks of the others.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Rehearsable(Protocol):
    """An attack whose draws depend on the shape of the images alone."""

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw from `generator` what a call on images like x (B, C, H, W) draws; False if that cannot be known."""
        ...


def rehearse(attack: object, x: Tensor, generator: torch.Generator) -> bool:
    """Draw what an attack on images like x (B, C, H, W) would.

    Args:
        attack: any.
        x: images; only their shape, type and device matter.
        generator: on their device.

    Returns:
        False if the attack cannot say: its draws depend on what it finds (those of Square, FAB and AutoAttack do).
        The generator is anywhere then.
    """
    if x.shape[0] == 0:
        return True
    return isinstance(attack, Rehearsable) and attack.rehearse(x, generator)
