"""Cross-entropy, label smoothing and label noise against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.losses.labels import noisy, smoothed
from robustflat.types import AdvBatch


class Recorded(nn.Module):
    """Returns given logits whatever the images."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(x)]


def batch_for(y: torch.Tensor) -> AdvBatch:
    x = torch.zeros(len(y), 1, 2, 2)
    return AdvBatch(x, x, y)


def test_value_is_the_mean_negative_log_probability_of_the_label():
    logits = torch.randn(5, 4, dtype=torch.float64)
    y = torch.tensor([0, 3, 1, 1, 2])
    terms = CrossEntropy()(Recorded(logits), batch_for(y))
    slow = sum(-math.log(math.exp(logits[i, y[i]]) / sum(math.exp(z) for z in logits[i].tolist())) for i in range(5))
    assert terms.total.item() == pytest.approx(slow / 5, abs=1e-12)
    assert terms.parts["loss"].item() == terms.total.item()
    assert terms.total.requires_grad
    assert not any(value.requires_grad for value in terms.parts.values())


def test_error_counts_images_whose_largest_logit_is_wrong():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 5.0]])
    terms = CrossEntropy()(Recorded(logits), batch_for(torch.tensor([0, 0, 1, 1])))
    assert terms.parts["error"].item() == 0.5


@pytest.mark.parametrize(
    ("target", "on_label", "elsewhere"),
    [("paper", 0.7, 0.3 / 3), ("uniform", 0.7 + 0.3 / 4, 0.3 / 4)],
)
def test_smoothing_puts_the_documented_probabilities(target, on_label, elsewhere):
    rows = smoothed(torch.tensor([1, 3]), 4, amount=0.3, target=target)
    expected = torch.full((2, 4), elsewhere)
    expected[0, 1] = expected[1, 3] = on_label
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(2))


def test_smoothed_loss_is_the_expectation_under_the_smoothed_label():
    logits = torch.randn(3, 5, dtype=torch.float64)
    y = torch.tensor([4, 0, 2])
    loss = CrossEntropy(label_smoothing=0.2)(Recorded(logits), batch_for(y)).total
    log_p = logits.log_softmax(dim=1)
    slow = 0.0
    for i in range(3):
        for k in range(5):
            slow -= (0.8 if k == y[i] else 0.05) * log_p[i, k].item() / 3
    assert loss.item() == pytest.approx(slow, abs=1e-7)


def test_smoothing_of_mixed_labels_is_the_mixture_of_smoothed_labels():
    one, other = (smoothed(torch.tensor([k]), 4, amount=0.3) for k in (0, 2))
    mixed = smoothed(torch.tensor([[0.25, 0.0, 0.75, 0.0]]), 4, amount=0.3)
    torch.testing.assert_close(mixed, 0.25 * one + 0.75 * other)


def test_noise_changes_the_expected_share_of_labels_and_hits_all_classes():
    y = torch.full((20000,), 3)
    generator = torch.Generator().manual_seed(1)
    found = noisy(y, 10, amount=0.4, generator=generator)
    share = (found != y).float().mean().item()
    assert share == pytest.approx(0.4 * 9 / 10, abs=4 * math.sqrt(0.36 * 0.64 / 20000))
    assert set(found.tolist()) == set(range(10))
    assert found.dtype == torch.int64


def test_noise_on_mixed_labels_replaces_whole_rows_by_one_class():
    y = torch.tensor([[0.5, 0.5, 0.0]]).repeat(300, 1)
    found = noisy(y, 3, amount=0.5, generator=torch.Generator().manual_seed(0))
    changed = (found != y).any(dim=1)
    assert 100 < int(changed.sum()) < 200
    assert (found[changed].max(dim=1).values == 1).all()
    assert (found.sum(dim=1) == 1).all()


def test_noise_is_drawn_anew_each_call_and_only_from_the_generator():
    logits = torch.randn(64, 10)
    y = torch.zeros(64, dtype=torch.int64)
    loss, model = CrossEntropy(label_noise=0.5), Recorded(logits)
    generator = torch.Generator().manual_seed(0)
    values = [loss(model, batch_for(y), generator).total.item() for _ in range(2)]
    again = loss(model, batch_for(y), torch.Generator().manual_seed(0)).total.item()
    assert values[0] == again
    assert values[0] != values[1]


def test_noise_and_smoothing_leave_the_logged_error_about_the_true_labels():
    logits = torch.eye(10) * 5
    loss = CrossEntropy(label_noise=1.0, label_smoothing=0.5)
    terms = loss(Recorded(logits), batch_for(torch.arange(10)), torch.Generator().manual_seed(0))
    assert terms.parts["error"].item() == 0


def test_without_noise_no_random_number_is_drawn():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    CrossEntropy()(Recorded(torch.randn(2, 3)), batch_for(torch.tensor([0, 1])), generator)
    assert torch.equal(before, generator.get_state())


def test_half_precision_logits_are_scored_in_float32():
    model = Recorded(torch.randn(4, 3).bfloat16())
    assert CrossEntropy()(model, batch_for(torch.tensor([0, 1, 2, 0]))).total.dtype == torch.float32


@pytest.mark.parametrize("name", ["label_smoothing", "label_noise"])
def test_shares_outside_the_unit_interval_are_refused(name):
    with pytest.raises(UserError, match=rf"{name} must lie in \[0, 1\], got 1.5"):
        CrossEntropy(**{name: 1.5})


def test_unknown_smoothing_target_lists_the_known_ones():
    with pytest.raises(UserError, match=r"must be one of paper, uniform, got 'unifrom'. Did you mean 'uniform'"):
        CrossEntropy(label_smoothing_target="unifrom")
