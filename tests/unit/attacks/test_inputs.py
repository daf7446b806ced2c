"""What attacks refuse: each kind of wrong images and labels, with a message that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustflat.attacks.inputs import check_images, check_shapes
from robustflat.errors import UserError

GOOD = torch.full((4, 1, 2, 2), 0.5)
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("x", [GOOD, GOOD.double(), GOOD.bfloat16(), GOOD[:0], GOOD * 2, GOOD * 0])
def test_images_in_range_pass(x: Tensor) -> None:
    check_images(x, LABELS[: len(x)], classes=3)


@pytest.mark.parametrize("y", [LABELS, torch.stack([LABELS, LABELS], 1), torch.eye(3)[LABELS], torch.full((4, 2), 0.5)])
def test_all_forms_of_labels_pass(y: Tensor) -> None:
    check_images(GOOD, y)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (GOOD[0], LABELS, r"shape \(B, C, H, W\), got \(1, 2, 2\)"),
        (GOOD.to(torch.uint8), LABELS, r"got torch.uint8. Divide 0..255 images by 255"),
        (GOOD, LABELS[:3], r"4 images and y of shape \(3,\)"),
        (GOOD, LABELS[0], r"4 images and y of shape \(\)"),
        (GOOD, LABELS.float(), r"probabilities \(B, K\), got shape \(4,\)"),
        (GOOD, LABELS.int(), r"got torch.int32. Use y.long\(\)"),
        (GOOD, LABELS[:, None].expand(4, 3), r"or \(B, 2\) with a target, got \(4, 3\)"),
        (GOOD, LABELS.to("meta"), r"on one device, got cpu and meta"),
    ],
)
def test_wrong_shapes_and_types_are_named(x: Tensor, y: Tensor, message: str) -> None:
    for check in (check_shapes, check_images):
        with pytest.raises(UserError, match=message):
            check(x, y)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (GOOD * 300, r"from 150 to 150. Are they in 0..255 units\?"),
        (GOOD - 0.6, r"from -0.1.* to -0.1.*Normalisation belongs into the model"),
        (GOOD * torch.nan, "got values from nan"),
        (GOOD * torch.inf, "got values from inf"),
    ],
)
def test_images_out_of_range_are_refused_with_a_guess(x: Tensor, message: str) -> None:
    check_shapes(x, LABELS)
    with pytest.raises(UserError, match=message):
        check_images(x, LABELS)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (LABELS + 1, r"labels must be 0..2 for 3 classes, got values from 1 to 3"),
        (LABELS - 1, r"labels must be 0..2 for 3 classes, got values from -1 to 1"),
        (torch.full((4, 2), 0.5), r"one column per class \(3\), got 2"),
        (torch.full((4, 3), 0.5), "sum to 1"),
        (torch.tensor([[1.5, -0.5, 0.0]] * 4), "non-negative"),
    ],
)
def test_labels_that_are_no_classes_are_refused(y: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_images(GOOD, y, classes=3)


def test_negative_labels_are_refused_without_a_number_of_classes() -> None:
    with pytest.raises(UserError, match="labels must be 0 or more"):
        check_images(GOOD, LABELS - 1)
