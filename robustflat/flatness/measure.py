"""What a flatness measure is to those who only run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from robustflat.flatness.result import FlatnessResult
from robustflat.types import Batch


class FlatnessMeasure(Protocol):
    """Measures how much the loss of a network rises near its weights, on batches in a fixed order."""

    @property
    def reference_settings(self) -> str | None:
        """All that decides the loss at the undisplaced weights, in words; `None` if it cannot be shared.

        Measures that agree in this and in the seed have the same reference, whatever their radius.
        """
        ...

    def measure(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        reference: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> FlatnessResult:
        """Measure; `reference` (N,) is the loss at the undisplaced weights where it is known.

        Within `robustflat.ranks.sharing_work` every rank makes the call, does a share of it and gets the result.
        """
        ...
