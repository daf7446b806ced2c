"""What AutoAttack, PGD and evaluate() do with models and examples that are odd: a sentence, or a result named here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustflat import AutoAttack, LinfBall, Pgd, evaluate
from robustflat.errors import UserError

Door = Callable[[nn.Module, Tensor, Tensor], Any]
DOORS: dict[str, Door] = {
    "autoattack": lambda model, x, y: AutoAttack(epsilon=0.1, version="custom", attacks=["apgd-ce", "fab-t"])(
        model, x, y
    ),
    "pgd": lambda model, x, y: Pgd(LinfBall(0.1), steps=3, step_size=0.05)(model, x, y),
    "evaluate": lambda model, x, y: evaluate(model, x, y, epsilon=0.1),
}
LABELS = torch.tensor([0, 1, 2, 0])
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def images() -> Tensor:
    return torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Detached(nn.Module):
    """Constant logits that do not depend on the images at all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(x), 3)


class Flat(nn.Module):
    """Constant logits with a gradient of zero: class 0 for every image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0, 0.0]]) + 0 * x.flatten(1)[:, :3]


class NotANumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * torch.nan


def linear(classes: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval()


def wrong(result: Any) -> list[bool]:
    """Which examples are wrong under attack, whatever front door answered."""
    if hasattr(result, "robust"):
        return (~result.robust).tolist()
    return (result.robustly_wrong if hasattr(result, "robustly_wrong") else result.fooled).tolist()


@every_door
def test_a_constant_model_cannot_be_differentiated_and_is_told_so(door: Door) -> None:
    with pytest.raises(UserError, match="cannot be differentiated"):
        door(Detached(), images(), LABELS)


@every_door
def test_a_gradient_of_zero_breaks_nothing_that_was_right(door: Door) -> None:
    result = door(Flat(), images(), LABELS)
    assert wrong(result) == [False, True, True, False]
    if hasattr(result, "sanity"):
        assert {"unbounded attack", "gradients of the margin"} <= {f.check for f in result.sanity.warnings}


@pytest.mark.parametrize("door", ["autoattack", "evaluate"])
def test_logits_that_are_no_numbers_are_refused_by_front_doors(door: str) -> None:
    with pytest.raises(UserError, match="logits are not finite for 4 of 4 examples"):
        DOORS[door](NotANumber(), images(), LABELS)


def test_logits_that_are_no_numbers_fool_nobody_in_pgd() -> None:
    found = DOORS["pgd"](NotANumber(), images(), LABELS)
    assert not found.fooled.any()
    assert found.value.isnan().all()
    assert LinfBall(0.1).size(found.x_adv, images()).max() <= 0.1 + 1e-6


@every_door
def test_integer_images_are_refused(door: Door) -> None:
    with pytest.raises(UserError, match=r"floating point in \[0, 1\], got torch.int64"):
        door(linear(), (255 * images()).long(), LABELS)


@pytest.mark.parametrize("door", ["autoattack", "evaluate"])
def test_bytes_are_taken_as_parts_of_255_by_front_doors(door: str) -> None:
    bytes_ = (255 * images()).round().to(torch.uint8)
    assert wrong(DOORS[door](linear(), bytes_, LABELS)) == wrong(DOORS[door](linear(), bytes_ / 255, LABELS))


@every_door
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 255 * x, "Are they in 0..255 units"),
        (lambda x: 2 * x - 1, "Normalisation belongs into the model"),
        (lambda x: x * torch.nan, r"images must lie in \[0, 1\], got values from nan"),
    ],
)
def test_images_outside_the_box_are_refused(door: Door, change: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        door(linear(), change(images()), LABELS)


@every_door
@pytest.mark.parametrize("labels", [LABELS + 1, LABELS - 1, LABELS + 100])
def test_labels_out_of_range_are_refused(door: Door, labels: Tensor) -> None:
    with pytest.raises(UserError, match=r"labels must be 0|a label is"):
        door(linear(), images(), labels)


@pytest.mark.parametrize("door", ["autoattack", "evaluate"])
def test_no_images_are_refused_by_front_doors(door: str) -> None:
    with pytest.raises(UserError, match="There are no images"):
        DOORS[door](linear(), images()[:0], LABELS[:0])


def test_an_empty_batch_gives_an_empty_result_in_pgd() -> None:
    found = DOORS["pgd"](linear(), images()[:0], LABELS[:0])
    assert (found.x_adv.shape, found.value.shape, found.fooled.shape) == ((0, 1, 4, 4), (0,), (0,))


@every_door
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_any_number_of_classes_works(door: Door, classes: int) -> None:
    """A large epsilon lets every attack through: the mean image of a linear model is moved across its boundary."""
    model, x = linear(classes), images()
    y = model(x).argmax(1)
    epsilon = 0.9
    door = {
        "autoattack": lambda: AutoAttack(epsilon=epsilon, budget="preview")(model, x, y),
        "pgd": lambda: Pgd(LinfBall(epsilon), steps=20, step_size=0.3, keep="fooled")(model, x, y),
        "evaluate": lambda: evaluate(model, x, y, epsilon=epsilon),
    }[next(name for name, known in DOORS.items() if known is door)]
    assert wrong(door()) == [True] * 4
