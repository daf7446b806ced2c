"""What every augmentation promises, whatever it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from robustflat.data import augment
from robustflat.errors import UserError

MAKERS: dict[str, Callable[[int], object]] = {
    "pad_crop": lambda side: augment.PadCrop(padding=side // 8),
    "pad_crop_coloured": lambda side: augment.PadCrop(padding=2, fill=0.3),
    "pad_resize": lambda side: augment.PadResize(max_pad=side // 8),
    "flip": lambda side: augment.Flip(),
    "cutout": lambda side: augment.Cutout(size=side // 2),
    "rotate90": lambda side: augment.Rotate90(),
    "auto_cifar10": lambda side: augment.AutoAugment(policy="cifar10", fill=0.5),
    "auto_svhn": lambda side: augment.AutoAugment(policy="svhn"),
    "auto_imagenet": lambda side: augment.AutoAugment(policy="imagenet"),
    "rand_augment": lambda side: augment.RandAugment(num_ops=3, magnitude=15),
    "trivial_augment": lambda side: augment.TrivialAugment(max_translation=min(32, side)),
    "color_jitter": lambda side: augment.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.2),
    "torchvision": lambda side: augment.TorchvisionTransform(v2.RandomErasing(p=0.9)),
    "mix_up": lambda side: augment.MixUp(alpha=1.0),
    "cut_mix": lambda side: augment.CutMix(alpha=1.0),
}
NAMES = sorted(MAKERS)
BYTES_TOO = ["cutout", "flip", "pad_crop", "rotate90"]


def images(channels: int = 3, side: int = 32, count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator) / 255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(name: str, x: Tensor, generator: torch.Generator) -> Tensor:
    entry = MAKERS[name](x.shape[-1])
    if getattr(entry, "mixes_labels", False):
        return entry(x, torch.arange(len(x)) % 5, 5, generator)[0]  # type: ignore[operator,no-any-return]
    return entry(x, generator)  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize("side", [8, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_shape_type_and_range_are_kept_for_grey_and_colour_images_of_all_sizes(
    name: str, channels: int, side: int
) -> None:
    x = images(channels, side)
    out = call(name, x, seeded())
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert not torch.equal(out, x)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_generator_state_gives_the_same_batch_and_the_next_draw_another(name: str) -> None:
    generator, x = seeded(), images()
    first, second = call(name, x, generator), call(name, x, generator)
    assert torch.equal(first, call(name, x, seeded()))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_the_images_passed_in_are_not_modified(name: str) -> None:
    x = images()
    before = x.clone()
    call(name, x, seeded())
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("mix", "cut_mix"))])
def test_copies_of_one_image_come_out_differently(name: str) -> None:
    x = images(count=1).expand(24, -1, -1, -1)
    out = call(name, x, seeded())
    assert len(torch.unique(out.flatten(1), dim=0)) > 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "torchvision"])
def test_the_global_generator_is_not_used(name: str) -> None:
    state = torch.get_rng_state()
    call(name, images(), seeded())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_stays_empty(name: str) -> None:
    assert call(name, images()[:0], seeded()).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("name", BYTES_TOO)
def test_uint8_images_are_moved_like_float_images(name: str) -> None:
    levels = (images() * 255).round().to(torch.uint8)
    out = call(name, levels, seeded())
    assert out.dtype == torch.uint8
    assert torch.equal(out, (call(name, levels.float() / 255, seeded()) * 255).round().to(torch.uint8))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BYTES_TOO and name != "pad_crop_coloured"])
def test_uint8_images_are_refused_where_arithmetic_would_overflow(name: str) -> None:
    with pytest.raises(UserError, match=r"takes images in float32 in \[0, 1\], got torch.uint8"):
        call(name, images().to(torch.uint8), seeded())


@pytest.mark.parametrize("name", NAMES)
def test_a_single_image_without_batch_dimension_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"takes images \(B, C, H, W\), got \(3, 32, 32\)"):
        call(name, images()[0], seeded())


@pytest.mark.parametrize("name", ["auto_cifar10", "rand_augment", "trivial_augment", "color_jitter"])
def test_colour_arithmetic_refuses_other_numbers_of_channels(name: str) -> None:
    with pytest.raises(UserError, match="needs images with 1 or 3 channels, got 2"):
        call(name, images(2), seeded())


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in NAMES if name != "torchvision"])
def test_the_host_never_waits_for_the_gpu(name: str, no_waiting: None) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    entry, x, y = MAKERS[name](32), images().cuda(), torch.zeros(12, dtype=torch.int64, device="cuda")
    arguments = (x, y, 5, generator) if getattr(entry, "mixes_labels", False) else (x, generator)
    entry(*arguments)  # type: ignore[operator]  # tables are copied to the device once
    torch.cuda.set_sync_debug_mode("error")
    entry(*arguments)  # type: ignore[operator]
