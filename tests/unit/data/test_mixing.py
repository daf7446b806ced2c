"""MixUp and CutMix against loops over images, and the distribution of their draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import beta, chisquare, ks_2samp, kstest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from robustflat.data.draws import _handed_over, symmetric_beta
from robustflat.data.mixing import CutMix, MixUp
from robustflat.errors import UserError

CLASSES = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(side: int = 16, channels: int = 3, count: int = 30) -> tuple[Tensor, Tensor]:
    return torch.rand(count, channels, side, side), torch.randint(0, CLASSES, (count,))


def one_hot(y: Tensor) -> NDArray[np.float32]:
    labels: NDArray[np.float32] = np.eye(CLASSES, dtype=np.float32)[y.numpy()]
    return labels


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (64, 3)])
def test_mix_up_is_the_weighted_mean_of_images_and_labels(side: int, channels: int) -> None:
    mix, (x, y) = MixUp(alpha=1.0), batch(side, channels)
    partner, share = mix.draw(x, seeded())
    mixed, probabilities = mix(x, y, CLASSES, seeded())
    labels = one_hot(y)
    for i, (j, s) in enumerate(zip(partner.tolist(), share.tolist(), strict=True)):
        torch.testing.assert_close(mixed[i], s * x[i] + (1 - s) * x[j])
        np.testing.assert_allclose(probabilities[i], s * labels[i] + (1 - s) * labels[j], atol=1e-6)


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (64, 3)])
def test_cut_mix_pastes_the_rectangle_and_weighs_labels_by_area(side: int, channels: int) -> None:
    mix, (x, y) = CutMix(alpha=1.0), batch(side, channels)
    (partner, _), boxes = mix.draw(x, seeded())
    mixed, probabilities = mix(x, y, CLASSES, seeded())
    labels = one_hot(y)
    for i, (j, top, bottom, left, right) in enumerate(torch.stack([partner, *boxes], 1).tolist()):
        expected = x[i].numpy().copy()
        expected[:, top:bottom, left:right] = x[j].numpy()[:, top:bottom, left:right]
        assert np.array_equal(mixed[i].numpy(), expected)
        share = 1 - (bottom - top) * (right - left) / side**2
        np.testing.assert_allclose(probabilities[i], share * labels[i] + (1 - share) * labels[j], atol=1e-6)


def test_cut_mix_boxes_are_distributed_as_published() -> None:
    x = torch.zeros(4000, 1, 32, 24)
    (_, kept), boxes = CutMix(alpha=1.0).draw(x, seeded())
    rng = np.random.default_rng(0)
    shares, tops = [], []
    for _ in range(4000):
        share = rng.beta(1.0, 1.0)
        high, wide = int(32 * np.sqrt(1 - share)), int(24 * np.sqrt(1 - share))
        row, column = rng.integers(32), rng.integers(24)
        top, bottom = np.clip([row - high // 2, row + high // 2], 0, 32)
        left, right = np.clip([column - wide // 2, column + wide // 2], 0, 24)
        shares.append(1 - (bottom - top) * (right - left) / (32 * 24))
        tops.append(top)
    assert ks_2samp(kept.numpy(), shares).pvalue > 1e-3
    assert ks_2samp(boxes.top.numpy(), tops).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    drawn = symmetric_beta(alpha, 4000, seeded(), torch.device("cpu"))
    assert kstest(drawn.double().numpy(), beta(alpha, alpha).cdf).pvalue > 1e-3


class Copies(TorchDispatchMode):
    """Stands for copies between devices (one of them without values) and notes whether the host waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._to_copy.default:
            return func(*args, **(kwargs or {}))
        self.waits.append(not kwargs.get("non_blocking", False))
        return torch.empty(args[0].shape, device=kwargs["device"])


def test_the_host_waits_for_draws_that_come_to_it_and_for_no_others() -> None:
    with Copies() as copies:
        _handed_over(torch.empty(3, device="meta"), torch.device("cpu"))
        _handed_over(torch.empty(3), torch.device("meta"))
    assert copies.waits == [True, False]


def test_a_tiny_alpha_gives_shares_near_zero_or_one_and_no_nan() -> None:
    drawn = symmetric_beta(1e-3, 2000, seeded(), torch.device("cpu"))
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    assert float(((drawn < 0.01) | (drawn > 0.99)).float().mean()) > 0.3


@pytest.mark.parametrize("mix", [MixUp(), CutMix()], ids=["mix_up", "cut_mix"])
def test_partners_are_a_uniform_permutation(mix: MixUp) -> None:
    generator, x = seeded(), torch.zeros(6, 1, 4, 4)
    firsts = []
    for _ in range(900):
        drawn = mix.draw(x, generator)[0]
        partner = drawn.partner if hasattr(drawn, "partner") else drawn
        assert sorted(partner.tolist()) == list(range(6))
        firsts.append(int(partner[0]))
    assert chisquare(np.bincount(firsts, minlength=6)).pvalue > 1e-3


@pytest.mark.parametrize("mix", [MixUp(alpha=0.5), CutMix(alpha=0.5)], ids=["mix_up", "cut_mix"])
def test_probabilities_can_be_mixed_again_and_sum_to_one(mix: MixUp) -> None:
    x, y = batch()
    assert mix.mixes_labels is True
    generator = seeded()
    mixed, probabilities = mix(x, y, CLASSES, generator)
    _, again = mix(mixed, probabilities, CLASSES, generator)
    assert probabilities.dtype == again.dtype == torch.float32
    torch.testing.assert_close(again.sum(1), torch.ones(30))
    assert float(again.min()) >= 0


@pytest.mark.parametrize("mix", [MixUp(), CutMix()], ids=["mix_up", "cut_mix"])
def test_each_image_has_a_share_of_its_own(mix: MixUp) -> None:
    x = torch.zeros(40, 1, 32, 32)
    _, probabilities = mix(x, torch.arange(40), 40, seeded())
    assert len(set(probabilities.max(1).values.tolist())) > 20


@pytest.mark.parametrize(
    ("y", "text"),
    [
        (torch.zeros(3, dtype=torch.int64), r"labels must be classes \(30,\) or probabilities \(30, 4\).*got \(3,\)"),
        (torch.zeros(30, 5), "label probabilities have 5 columns, but the data has 4 classes"),
        (torch.full((30,), 4), r"labels must lie in 0..3, got 4..4"),
        (torch.full((30,), -1), r"labels must lie in 0..3, got -1..-1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(y: Tensor, text: str) -> None:
    with pytest.raises(UserError, match=text):
        CutMix()(batch()[0], y, CLASSES, seeded())


@pytest.mark.parametrize("alpha", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("make", [MixUp, CutMix])
def test_an_impossible_alpha_is_refused(make: type[MixUp], alpha: float) -> None:
    with pytest.raises(UserError, match=rf"alpha must lie in \(0, inf\), got {alpha}. To mix nothing leave"):
        make(alpha=alpha)
