"""Augmentation policies: AutoAugment, RandAugment and TrivialAugment, with a draw for each image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from robustflat.data.draws import integers, uniform
from robustflat.data.pixels import checked_fill, require_fits, require_images
from robustflat.data.policy_ops import Step, apply_steps
from robustflat.data.policy_tables import (
    AUTO_AUGMENT,
    OPERATIONS,
    SEARCHED,
    SIGNED,
    narrow_reach,
    strengths,
    wide_reach,
)
from robustflat.errors import require_one_of, require_range

AUTO_BINS = 10


class AutoAugment:
    """One of 25 sub-policies for each image: two operations, each with its own probability and strength.

    Cubuk et al., CVPR 2019. Pixels are moved with nearest-neighbour interpolation, as in
    `torchvision.transforms.v2.AutoAugment`.

    Args:
        policy: the data the policy was found on: "cifar10", "svhn" or "imagenet".
        fill: colour in [0, 1] of pixels that come from outside the image, one number or one per channel; the
            released code uses the mean colour of CIFAR-10.

    Raises:
        UserError: for an unknown policy or a fill outside [0, 1]; when called, for images without 1 or 3
            channels.
    """

    def __init__(self, *, policy: str = "cifar10", fill: float | Sequence[float] = 0.0) -> None:
        require_one_of("policy", policy, AUTO_AUGMENT)
        self.policy = policy
        self.fill = checked_fill(fill)

    def draw(self, x: Tensor, generator: torch.Generator) -> list[Step]:
        """The two operations of each image of x (B, C, H, W)."""
        operations, probabilities, bins = _policy_tensors(self.policy, x.device)
        table = strengths(narrow_reach(*x.shape[-2:]), AUTO_BINS, x.device)
        row = integers(len(operations), (x.shape[0],), generator, x.device)
        lots = uniform((2, 2, x.shape[0]), generator, x.device)
        steps = []
        for k in (0, 1):
            applied = lots[k, 0] < probabilities[row, k]
            operation = torch.where(applied, operations[row, k], 0)
            strength = table[operation, bins[row, k]]
            possible = frozenset(sub_policy[k][0] for sub_policy in AUTO_AUGMENT[self.policy])
            steps.append(Step(operation, _signed(operation, strength, lots[k, 1]), possible))
        return steps

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images x (B, C, H, W), float in [0, 1], C = 1 or 3."""
        require_images(x, "AutoAugment", colours=True)
        return apply_steps(x, self.draw(x, generator), self.fill)


class RandAugment:
    """`num_ops` operations for each image, each uniform among 14 (one of them: none), all of one strength.

    Cubuk et al., NeurIPS 2020, with the strengths and the list of operations of
    `torchvision.transforms.v2.RandAugment`.

    Args:
        num_ops: operations per image, >= 1.
        magnitude: strength, 0 .. num_bins - 1.
        num_bins: number of strengths, >= 2; the last one is the largest.
        fill: colour in [0, 1] of pixels that come from outside the image.

    Raises:
        UserError: for a number outside its range; when called, for images without 1 or 3 channels.
    """

    def __init__(
        self, *, num_ops: int = 2, magnitude: int = 9, num_bins: int = 31, fill: float | Sequence[float] = 0.0
    ) -> None:
        require_range("num_ops", num_ops, low=1, hint="For no operation leave RandAugment out.")
        require_range("num_bins", num_bins, low=2)
        require_range("magnitude", magnitude, low=0, high=num_bins - 1, hint="Or raise num_bins.")
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.num_bins = num_bins
        self.fill = checked_fill(fill)

    def draw(self, x: Tensor, generator: torch.Generator) -> list[Step]:
        """The operations of each image of x (B, C, H, W)."""
        strength = strengths(narrow_reach(*x.shape[-2:]), self.num_bins, x.device)[:, self.magnitude]
        steps = []
        for _ in range(self.num_ops):
            operation = _searched(x, generator)
            sign = uniform((x.shape[0],), generator, x.device)
            steps.append(Step(operation, _signed(operation, strength[operation], sign), frozenset(SEARCHED)))
        return steps

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images x (B, C, H, W), float in [0, 1], C = 1 or 3."""
        require_images(x, "RandAugment", colours=True)
        return apply_steps(x, self.draw(x, generator), self.fill)


class TrivialAugment:
    """One operation for each image, uniform among 14 (one of them: none), of uniformly random strength.

    Mueller and Hutter, ICCV 2021, the "wide" strengths; as `torchvision.transforms.v2.TrivialAugmentWide`.

    Args:
        num_bins: number of strengths, >= 2.
        max_translation: pixels that images are moved by at most, >= 0; at most their height and width. The
            publication has 32; take 4 or so for images of 8 x 8.
        fill: colour in [0, 1] of pixels that come from outside the image.

    Raises:
        UserError: for a number outside its range; when called, for images smaller than `max_translation` or
            without 1 or 3 channels.
    """

    def __init__(self, *, num_bins: int = 31, max_translation: int = 32, fill: float | Sequence[float] = 0.0) -> None:
        require_range("num_bins", num_bins, low=2)
        require_range("max_translation", max_translation, low=0)
        self.num_bins = num_bins
        self.max_translation = max_translation
        self.fill = checked_fill(fill)

    def draw(self, x: Tensor, generator: torch.Generator) -> list[Step]:
        """The operation of each image of x (B, C, H, W), as a list of one step."""
        table = strengths(wide_reach(float(self.max_translation)), self.num_bins, x.device)
        operation = _searched(x, generator)
        strength = table[operation, integers(self.num_bins, (x.shape[0],), generator, x.device)]
        sign = uniform((x.shape[0],), generator, x.device)
        return [Step(operation, _signed(operation, strength, sign), frozenset(SEARCHED))]

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images x (B, C, H, W), float in [0, 1], C = 1 or 3."""
        require_images(x, "TrivialAugment", colours=True)
        require_fits("TrivialAugment", "max_translation", self.max_translation, x, largest=min(x.shape[-2:]))
        return apply_steps(x, self.draw(x, generator), self.fill)


def _signed(operation: Tensor, strength: Tensor, lot: Tensor) -> Tensor:
    """Turn the strength round where the lot, from U[0, 1), is below 1/2 and the operation knows both signs."""
    signed = _positions(tuple(sorted(SIGNED)), operation.device)
    knows_signs = (operation.unsqueeze(1) == signed).any(1)
    return torch.where(knows_signs & (lot < 0.5), -strength, strength)


def _searched(x: Tensor, generator: torch.Generator) -> Tensor:
    """A uniformly random entry of `SEARCHED` for each image, as a position in `OPERATIONS`, int64 (B,)."""
    return _positions(SEARCHED, x.device)[integers(len(SEARCHED), (x.shape[0],), generator, x.device)]


@lru_cache(maxsize=16)
def _positions(names: tuple[str, ...], device: torch.device) -> Tensor:
    """Positions of operations in `OPERATIONS`, int64; kept on the device, do not modify."""
    return torch.tensor([OPERATIONS.index(name) for name in names], device=device)


@lru_cache(maxsize=16)
def _policy_tensors(policy: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Operations, probabilities and strengths (25, 2) of a policy; kept on the device, do not modify."""
    rows = AUTO_AUGMENT[policy]
    operations = torch.tensor([[OPERATIONS.index(entry[0]) for entry in row] for row in rows], device=device)
    probabilities = torch.tensor([[entry[1] for entry in row] for row in rows], device=device)
    return operations, probabilities, torch.tensor([[entry[2] for entry in row] for row in rows], device=device)
