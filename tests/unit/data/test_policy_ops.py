"""Every operation of the policies against torchvision's kernels on uint8 images, one image at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from robustflat.data.policy_ops import Step, apply_steps
from robustflat.data.policy_tables import (
    ENHANCEMENT,
    OPERATIONS,
    PLACEMENT,
    SIGNED,
    narrow_reach,
    strengths,
    wide_reach,
)

CPU = torch.device("cpu")


def bytes_of(channels: int, height: int, width: int) -> Tensor:
    """Noise, a dull copy of it, a smooth ramp, a constant image, and one of two levels: uint8 (5, C, H, W)."""
    noise = torch.randint(0, 256, (channels, height, width))
    ramp = torch.arange(height * width).view(height, width) * 255 // (height * width)
    constant = torch.full_like(noise, 77)
    two = torch.where(noise > 100, 12, 200)
    return torch.stack([noise, noise // 3 + 60, ramp.expand_as(noise), constant, two]).to(torch.uint8)


def peer(image: Tensor, name: str, strength: float, fill: list[float] | None = None) -> Tensor:
    """The operation by torchvision, on a uint8 image (C, H, W); fill in grey levels."""
    affine = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "fill": fill}
    degrees = math.degrees(math.atan(strength))
    kernels = {
        "identity": lambda: image,
        "shear_x": lambda: TF.affine(image, **{**affine, "shear": [degrees, 0.0]}, center=[0, 0]),
        "shear_y": lambda: TF.affine(image, **{**affine, "shear": [0.0, degrees]}, center=[0, 0]),
        "translate_x": lambda: TF.affine(image, **{**affine, "translate": [int(strength), 0]}),
        "translate_y": lambda: TF.affine(image, **{**affine, "translate": [0, int(strength)]}),
        "rotate": lambda: TF.rotate(image, strength, fill=fill),
        "brightness": lambda: TF.adjust_brightness(image, 1 + strength),
        "color": lambda: TF.adjust_saturation(image, 1 + strength),
        "contrast": lambda: TF.adjust_contrast(image, 1 + strength),
        "sharpness": lambda: TF.adjust_sharpness(image, 1 + strength),
        "posterize": lambda: TF.posterize(image, int(strength)),
        "solarize": lambda: TF.solarize(image, 255 * strength),
        "autocontrast": lambda: TF.autocontrast(image),
        "equalize": lambda: TF.equalize(image),
        "invert": lambda: TF.invert(image),
    }
    result: Tensor = kernels[name]()  # type: ignore[no-untyped-call]
    return result


def step_of(names: list[str], values: list[float]) -> Step:
    return Step(torch.tensor([OPERATIONS.index(name) for name in names]), torch.tensor(values), frozenset(names))


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 64), (20, 33)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_agree_with_torchvision_to_one_grey_level(name: str, channels: int, size: tuple[int, int]) -> None:
    levels = bytes_of(channels, *size)
    rows = [strengths(narrow_reach(*size), 10, CPU), strengths(wide_reach(min(size)), 7, CPU)]
    values = sorted({float(v) for row in rows for v in row[OPERATIONS.index(name)]})
    values += [-v for v in values if name in SIGNED]
    image = levels.float().repeat_interleave(len(values), 0) / 255
    all_values = values * len(levels)
    out = apply_steps(image, [step_of([name] * len(image), all_values)], (0.0,)) * 255
    expected = torch.stack([peer(original, name, value) for original in levels for value in values])
    exact = name in ("identity", "posterize", "solarize", "equalize", "invert")
    disagree = (out - expected.float()).abs() > (0.01 if exact else 1.01)
    # a source half-way between two pixels may be rounded to either of them
    assert float(disagree.float().mean()) <= (0.01 if name in PLACEMENT else 0.0)


@pytest.mark.parametrize("name", PLACEMENT)
def test_pixels_from_outside_get_the_fill_colour(name: str) -> None:
    levels = bytes_of(3, 32, 32)[:1].clamp(min=1)
    value = 12.0 if name.startswith("translate") or name == "rotate" else 0.3
    out = apply_steps(levels / 255, [step_of([name], [value])], (125 / 255, 122 / 255, 113 / 255)) * 255
    expected = peer(levels[0], name, value, [125.0, 122.0, 113.0])
    assert float(((out[0] - expected).abs() > 0.5).float().mean()) <= 0.01


def test_a_translation_moves_right_and_down_by_whole_pixels() -> None:
    x = bytes_of(3, 9, 7)[:1] / 255
    right = apply_steps(x, [step_of(["translate_x"], [2.0])], (0.0,))
    down = apply_steps(x, [step_of(["translate_y"], [3.0])], (0.0,))
    torch.testing.assert_close(right[..., 2:], x[..., :-2])
    torch.testing.assert_close(down[..., 3:, :], x[..., :-3, :])
    assert float(right[..., :2].max()) == float(down[..., :3, :].max()) == 0.0


def test_a_full_turn_by_90_degrees_is_counter_clockwise() -> None:
    x = bytes_of(1, 8, 8)[:1] / 255
    out = apply_steps(x, [step_of(["rotate"], [90.0])], (0.0,))
    torch.testing.assert_close(out, torch.rot90(x, 1, (-2, -1)))


@pytest.mark.parametrize("packed", [True, False])
def test_every_image_of_a_mixed_batch_gets_its_own_operation(packed: bool) -> None:
    names = list(OPERATIONS)
    values = [15.0 if n in PLACEMENT else 4.0 if n == "posterize" else 0.4 for n in names]
    values = [0.2 if n.startswith("shear") else v for n, v in zip(names, values, strict=True)]
    levels = bytes_of(3, 16, 16)[1]
    batch = levels.expand(len(names), -1, -1, -1).float() / 255
    out = apply_steps(batch, [step_of(names, values)], (0.0,), packed=packed) * 255
    for name, value, result in zip(names, values, out, strict=True):
        disagree = (result - peer(levels, name, value)).abs() > 1.01
        assert float(disagree.float().mean()) <= 0.01, name


def test_packed_and_unpacked_computation_agree_bit_for_bit() -> None:
    x = torch.rand(60, 3, 16, 16)
    names = [OPERATIONS[i % len(OPERATIONS)] for i in range(60)]
    steps = [step_of(names, [0.3 + 0.1 * (i % 5) for i in range(60)]) for _ in range(2)]
    results = [apply_steps(x, steps, (0.2,), packed=packed) for packed in (True, False)]
    assert torch.equal(*results)


def test_images_without_an_operation_stay_bit_for_bit_even_between_grey_levels() -> None:
    x = torch.rand(4, 3, 8, 8)
    out = apply_steps(x, [step_of(["identity", "invert", "identity", "brightness"], [0.0, 0.0, 0.0, 0.3])], (0.0,))
    assert torch.equal(out[[0, 2]], x[[0, 2]])
    torch.testing.assert_close(out[1], 1 - x[1], atol=0.5 / 255 + 1e-6, rtol=0)


def test_the_second_step_works_on_the_result_of_the_first() -> None:
    levels = bytes_of(3, 16, 16)[:1]
    steps = [step_of(["solarize"], [0.5]), step_of(["posterize"], [3.0])]
    out = apply_steps(levels / 255, steps, (0.0,)) * 255
    torch.testing.assert_close(out[0], peer(peer(levels[0], "solarize", 0.5), "posterize", 3.0).float())


@pytest.mark.parametrize("name", ENHANCEMENT)
@pytest.mark.parametrize("strength", [0.9, -0.9])
def test_enhancement_of_a_uniform_image_moves_no_pixel_relative_to_another(name: str, strength: float) -> None:
    out = apply_steps(torch.full((1, 3, 8, 8), 100 / 255), [step_of([name], [strength])], (0.0,))
    assert float(out.max() - out.min()) == 0.0


def test_images_of_two_pixels_cannot_be_sharpened_and_stay() -> None:
    x = torch.randint(0, 256, (1, 3, 2, 5)) / 255
    assert torch.equal(apply_steps(x, [step_of(["sharpness"], [0.9])], (0.0,)), x)
