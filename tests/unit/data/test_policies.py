"""The policies: tables and images against torchvision's, draws against their distributions."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
from scipy.stats import binomtest, chisquare
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from robustflat.data.policies import AutoAugment, RandAugment, TrivialAugment
from robustflat.data.policy_ops import Step
from robustflat.data.policy_tables import (
    AUTO_AUGMENT,
    OPERATIONS,
    SEARCHED,
    SIGNED,
    narrow_reach,
    strengths,
    wide_reach,
)
from robustflat.errors import UserError

CPU = torch.device("cpu")
SPACES = {
    "narrow": (v2.AutoAugment._AUGMENTATION_SPACE, 10, narrow_reach),
    "narrow, fine": (v2.RandAugment._AUGMENTATION_SPACE, 31, narrow_reach),
    "wide": (v2.TrivialAugmentWide._AUGMENTATION_SPACE, 31, lambda height, width: wide_reach(32.0)),
}


def theirs(name: str) -> str:
    """Our name of an operation as torchvision writes it."""
    return "AutoContrast" if name == "autocontrast" else "".join(part.capitalize() for part in name.split("_"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def many(count: int) -> Tensor:
    return torch.zeros(count, 1, 32, 32)


@pytest.mark.parametrize("policy", sorted(AUTO_AUGMENT))
def test_sub_policies_are_the_published_ones(policy: str) -> None:
    peer = v2.AutoAugment(v2.AutoAugmentPolicy(policy))
    ours = [tuple((theirs(name), p, level) for name, p, level in row) for row in AUTO_AUGMENT[policy]]
    assert ours == [tuple((name, p, level or 0) for name, p, level in row) for row in peer._policies]


@pytest.mark.parametrize("space", sorted(SPACES))
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 48)])
def test_strengths_are_those_of_torchvision(space: str, size: tuple[int, int]) -> None:
    peer, num_bins, reach = SPACES[space]
    table = strengths(reach(*size), num_bins, CPU)
    for name, row in zip(OPERATIONS, table, strict=True):
        if theirs(name) not in peer:
            continue
        make, signed = peer[theirs(name)]
        values = make(num_bins, *size)
        assert signed == (name in SIGNED)
        expected = torch.zeros(num_bins) if values is None else values.float()
        torch.testing.assert_close(row, expected.trunc() if name.startswith("translate") else expected)


def test_the_searched_operations_are_those_of_torchvision() -> None:
    assert {theirs(name) for name in SEARCHED} == set(v2.RandAugment._AUGMENTATION_SPACE)
    assert {theirs(name) for name in SEARCHED} == set(v2.TrivialAugmentWide._AUGMENTATION_SPACE)


def peer_result(image: Tensor, steps: list[Step], index: int) -> Tensor:
    """The steps of image number `index` by torchvision, on uint8 (C, H, W)."""
    peer = v2.AutoAugment(fill=0)
    for step in steps:
        name, strength = OPERATIONS[int(step.operation[index])], float(step.strength[index])
        image = peer._apply_image_or_video_transform(
            image, theirs(name), strength, InterpolationMode.NEAREST, peer._fill
        )
    return image


@pytest.mark.parametrize(
    "policy",
    [
        AutoAugment(policy="cifar10"),
        AutoAugment(policy="svhn"),
        AutoAugment(policy="imagenet"),
        RandAugment(num_ops=2, magnitude=12),
        TrivialAugment(max_translation=16),
    ],
    ids=["cifar10", "svhn", "imagenet", "rand", "trivial"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_whole_policies_equal_torchvision_applied_image_by_image(policy: AutoAugment, channels: int) -> None:
    ramp = torch.arange(32.0).view(1, 1, 1, 32) + 3 * torch.arange(32.0).view(1, 1, 32, 1)
    levels = (ramp + torch.randint(0, 80, (60, channels, 32, 32))).to(torch.uint8)
    steps = policy.draw(levels, seeded())
    out = policy(levels / 255, seeded()) * 255
    expected = torch.stack([peer_result(image, steps, i) for i, image in enumerate(levels)]).float()
    disagree = ((out - expected).abs() > 1.01).float().mean((1, 2, 3))
    # one grey level of difference, or a pixel half-way between two, can grow in the next operation
    assert float(disagree.mean()) <= 0.005
    assert float((disagree == 0).float().mean()) >= 0.8


@pytest.mark.parametrize("policy", sorted(AUTO_AUGMENT))
def test_pairs_of_operations_occur_as_often_as_the_sub_policies_say(policy: str) -> None:
    first, second = AutoAugment(policy=policy).draw(many(20000), seeded())
    seen = Counter(zip(first.operation.tolist(), second.operation.tolist(), strict=True))
    expected: dict[tuple[int, int], float] = defaultdict(float)
    for (name, p, _), (other, q, _) in AUTO_AUGMENT[policy]:
        a, b = OPERATIONS.index(name), OPERATIONS.index(other)
        for pair, share in {(a, b): p * q, (a, 0): p * (1 - q), (0, b): (1 - p) * q, (0, 0): (1 - p) * (1 - q)}.items():
            expected[pair] += share * 20000 / 25
    pairs = [pair for pair, count in expected.items() if count > 0]
    assert set(seen) <= set(pairs)
    assert chisquare([seen[pair] for pair in pairs], [expected[pair] for pair in pairs]).pvalue > 1e-3


def test_strengths_of_auto_augment_come_from_the_drawn_row() -> None:
    first, _ = AutoAugment(policy="cifar10").draw(many(5000), seeded())
    table = strengths(narrow_reach(32, 32), 10, CPU)
    for name in ("rotate", "shear_y", "solarize", "brightness"):
        index = OPERATIONS.index(name)
        allowed = {float(table[index, row[0][2]]) for row in AUTO_AUGMENT["cifar10"] if row[0][0] == name}
        drawn = first.strength[first.operation == index].abs().tolist()
        assert set(drawn) == allowed, name


def test_half_of_the_signed_strengths_are_negative_and_no_unsigned_one() -> None:
    (step,) = TrivialAugment().draw(many(8000), seeded())
    signed = torch.tensor([name in SIGNED for name in OPERATIONS])[step.operation] & (step.strength != 0)
    negative = int((step.strength[signed] < 0).sum())
    assert binomtest(negative, int(signed.sum()), 0.5).pvalue > 1e-3
    assert int((step.strength[~signed] < 0).sum()) == 0


def test_rand_augment_draws_every_pair_of_operations_equally_often() -> None:
    first, second = RandAugment(num_ops=2, magnitude=9).draw(many(8000), seeded())
    places = {OPERATIONS.index(name): i for i, name in enumerate(SEARCHED)}
    pair = [
        places[a] * 14 + places[b] for a, b in zip(first.operation.tolist(), second.operation.tolist(), strict=True)
    ]
    assert chisquare(torch.bincount(torch.tensor(pair), minlength=196).numpy()).pvalue > 1e-3


def test_trivial_augment_draws_every_strength_equally_often() -> None:
    (step,) = TrivialAugment(num_bins=11).draw(many(20000), seeded())
    chosen = step.strength[step.operation == OPERATIONS.index("rotate")].abs()
    counts = torch.bincount((chosen / 13.5).round().long(), minlength=11)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_rand_augment_uses_one_strength_for_all() -> None:
    steps = RandAugment(num_ops=3, magnitude=30).draw(many(500), seeded())
    assert len(steps) == 3
    for step in steps:
        rotations = step.strength[step.operation == OPERATIONS.index("rotate")]
        assert set(rotations.abs().tolist()) == {30.0}


def test_the_fill_colour_shows_where_pixels_come_from_outside() -> None:
    out = AutoAugment(policy="svhn", fill=(0.2, 0.4, 0.6))(torch.zeros(100, 3, 16, 16), seeded())
    levels = (out * 255).round().movedim(1, -1).reshape(-1, 3)
    assert bool((levels == torch.tensor([51.0, 102.0, 153.0])).all(1).any())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: AutoAugment(policy="cifar"),
            "policy must be one of cifar10, imagenet, svhn, got 'cifar'. Did you mean",
        ),
        (lambda: AutoAugment(fill=2.0), r"fill must lie in \[0, 1\]"),
        (lambda: RandAugment(num_ops=0), "num_ops must lie in"),
        (lambda: RandAugment(magnitude=31), r"magnitude must lie in \[0, 30\], got 31. Or raise num_bins"),
        (lambda: RandAugment(num_bins=1), "num_bins must lie in"),
        (lambda: TrivialAugment(num_bins=1), "num_bins must lie in"),
        (lambda: TrivialAugment(max_translation=-1), "max_translation must lie in"),
    ],
)
def test_impossible_parameters_are_refused(make: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        make()  # type: ignore[operator]


def test_trivial_augment_does_not_silently_shift_small_images_out_of_sight() -> None:
    with pytest.raises(UserError, match="max_translation must be at most 8 for images of 8 x 8 pixels, got 32"):
        TrivialAugment()(torch.zeros(1, 1, 8, 8), seeded())
