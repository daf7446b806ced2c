"""Metrics against slow definitions written out here, against scikit-learn and scipy, and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest, ttest_rel
from sklearn.metrics import roc_auc_score

from robustflat.errors import UserError
from robustflat.evaluation import metrics


@pytest.fixture
def clean() -> torch.Tensor:
    return 2 * torch.randn(60, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adversarial() -> torch.Tensor:
    return 2 * torch.randn(60, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def labels(clean: torch.Tensor) -> torch.Tensor:
    noisy = clean + 2 * torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    return noisy.argmax(dim=1)


def slow_loss(row: torch.Tensor, label: int) -> float:
    exponentials = [math.exp(float(z)) for z in row]
    return -math.log(exponentials[label] / sum(exponentials))


def test_error_and_loss_equal_a_loop_over_examples(clean: torch.Tensor, labels: torch.Tensor) -> None:
    mistakes = sum(max(range(4), key=lambda k: float(row[k])) != int(y) for row, y in zip(clean, labels, strict=True))
    losses = [slow_loss(row, int(y)) for row, y in zip(clean, labels, strict=True)]
    assert 0 < mistakes < 60
    assert metrics.error(clean, labels) == mistakes / 60
    assert metrics.loss(clean, labels) == pytest.approx(sum(losses) / 60, rel=1e-12)


def test_loss_is_not_capped_where_a_float32_probability_is_zero() -> None:
    logits = torch.tensor([[500.0, 0.0]])
    assert metrics.loss(logits, torch.tensor([1])) == 500.0


def test_robust_error_counts_examples_wrong_clean_or_under_attack() -> None:
    # wrong clean and right under attack; right and wrong; right and right; wrong and wrong
    clean = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    adversarial = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.zeros(4, dtype=torch.int64)
    assert metrics.robust_error(clean, adversarial, labels) == 0.75
    assert metrics.error(adversarial, labels) == 0.5
    assert metrics.success_rate(clean, adversarial, labels) == 0.5


def test_nine_of_ten_as_in_one_clean_and_eight_other_adversarial_mistakes() -> None:
    labels = torch.zeros(10, dtype=torch.int64)
    clean, adversarial = torch.tensor([[1.0, 0.0]]).repeat(10, 1), torch.tensor([[1.0, 0.0]]).repeat(10, 1)
    clean[0] = torch.tensor([0.0, 1.0])
    adversarial[1:9] = torch.tensor([0.0, 1.0])
    assert metrics.robust_error(clean, adversarial, labels) == 0.9


def test_robust_loss_splits_into_correct_and_incorrect_examples(
    clean: torch.Tensor, adversarial: torch.Tensor, labels: torch.Tensor
) -> None:
    right = [
        slow_loss(a, int(y)) for c, a, y in zip(clean, adversarial, labels, strict=True) if int(c.argmax()) == int(y)
    ]
    wrong = [
        slow_loss(a, int(y)) for c, a, y in zip(clean, adversarial, labels, strict=True) if int(c.argmax()) != int(y)
    ]
    assert metrics.robust_loss_on_correct(clean, adversarial, labels) == pytest.approx(sum(right) / len(right))
    assert metrics.robust_loss_on_incorrect(clean, adversarial, labels) == pytest.approx(sum(wrong) / len(wrong))
    total = (sum(right) + sum(wrong)) / 60
    assert metrics.robust_loss(adversarial, labels) == pytest.approx(total)


def test_a_mean_over_no_examples_is_not_a_number() -> None:
    logits, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert math.isnan(metrics.robust_loss_on_incorrect(logits, logits, labels))
    assert math.isnan(metrics.robust_loss_on_correct(-logits, logits, labels))


def test_worst_restart_takes_the_highest_cross_entropy_per_example(
    clean: torch.Tensor, adversarial: torch.Tensor, labels: torch.Tensor
) -> None:
    worst = metrics.worst_restart(torch.stack([clean, adversarial]), labels)
    for row, first, second, y in zip(worst, clean, adversarial, labels, strict=True):
        expected = first if slow_loss(first, int(y)) >= slow_loss(second, int(y)) else second
        assert torch.equal(row, expected)


def test_standard_error_of_known_numbers() -> None:
    assert metrics.standard_error(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(math.sqrt(5 / 3 / 4))
    assert math.isnan(metrics.standard_error(torch.tensor([1.0])))


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (3, 10), (10, 10), (577, 1000), (1, 1)])
def test_wilson_interval_agrees_with_scipy(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert metrics.wilson_interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_interval_approaches_the_normal_one_and_is_repeatable() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    low, high = metrics.bootstrap_interval(values)
    half = 1.96 * metrics.standard_error(values)
    assert low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)
    assert metrics.bootstrap_interval(values) == (low, high)
    assert metrics.bootstrap_interval(torch.full((5,), 2.0)) == (2.0, 2.0)


def test_error_at_confidence_equals_a_loop(clean: torch.Tensor, labels: torch.Tensor) -> None:
    kept = [(int(r.argmax()) != int(y)) for r, y in zip(clean, labels, strict=True) if float(r.softmax(0).max()) >= 0.7]
    assert metrics.error_at_confidence(clean, labels, 0.7) == sum(kept) / len(kept)
    assert metrics.error_at_confidence(clean, labels, 0.0) == metrics.error(clean, labels)
    assert metrics.error_at_confidence(clean, labels, 1.1) == 0.0


def test_robust_error_at_confidence_equals_a_loop(
    clean: torch.Tensor, adversarial: torch.Tensor, labels: torch.Tensor
) -> None:
    numerator = denominator = 0
    for c, a, y in zip(clean, adversarial, labels, strict=True):
        sure, adversarially_sure = float(c.softmax(0).max()) >= 0.6, float(a.softmax(0).max()) >= 0.6
        correct, fooled = int(c.argmax()) == int(y), int(a.argmax()) != int(y) and adversarially_sure
        numerator += (not correct and sure) + (correct and fooled)
        denominator += sure or (correct and fooled)
    assert metrics.robust_error_at_confidence(clean, adversarial, labels, 0.6) == numerator / denominator
    expected = metrics.robust_error(clean, adversarial, labels)
    assert metrics.robust_error_at_confidence(clean, adversarial, labels, 0.0) == expected
    assert metrics.robust_error_at_confidence(clean, adversarial, labels, 1.1) == 0.0


def test_threshold_at_tpr_keeps_that_fraction_of_the_correct_examples(
    clean: torch.Tensor, labels: torch.Tensor
) -> None:
    threshold = metrics.threshold_at_tpr(clean, labels, 0.9)
    correct = metrics.confidences(clean)[~metrics.wrong(clean, labels)]
    assert 0.9 <= float((correct >= threshold).double().mean()) < 0.9 + 1.5 / len(correct)
    with pytest.raises(UserError, match="gets all of them wrong"):
        metrics.threshold_at_tpr(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), 0.9)


def test_roc_auc_agrees_with_scikit_learn_with_ties() -> None:
    scores = torch.randint(0, 12, (80,), generator=torch.Generator().manual_seed(0)).double() / 12
    positive = torch.rand(80, generator=torch.Generator().manual_seed(1)) < 0.4 + 0.4 * scores
    expected = roc_auc_score(positive.numpy(), scores.numpy())
    assert metrics.roc_auc(scores[positive], scores[~positive]) == pytest.approx(expected, abs=1e-12)
    assert metrics.roc_auc(scores, scores[:0]) == 1.0


def test_expected_calibration_error_equals_a_loop_over_bins(clean: torch.Tensor, labels: torch.Tensor) -> None:
    confidence, correct = metrics.confidences(clean), ~metrics.wrong(clean, labels)
    expected = 0.0
    for i in range(10):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        if inside.any():
            gap = correct[inside].double().mean() - confidence[inside].mean()
            expected += float(inside.sum()) / 60 * abs(float(gap))
    assert metrics.expected_calibration_error(clean, labels, bins=10) == pytest.approx(expected, abs=1e-12)


def test_classwise_error_weighted_by_class_size_is_the_error(clean: torch.Tensor, labels: torch.Tensor) -> None:
    counts = torch.bincount(labels, minlength=4)
    rates = metrics.classwise_error(clean, labels)
    assert float((rates * counts).sum()) / 60 == pytest.approx(metrics.error(clean, labels))
    assert float(rates[2]) == pytest.approx(float((clean[labels == 2].argmax(1) != 2).double().mean()))
    absent = metrics.classwise_error(torch.eye(3), torch.tensor([0, 1, 1]))
    assert absent[1] == 0.5
    assert math.isnan(float(absent[2]))


@pytest.mark.parametrize(("first_only", "second_only"), [(0, 0), (3, 9), (9, 3), (40, 41), (0, 12)])
def test_mcnemar_p_value_is_the_exact_binomial_one(first_only: int, second_only: int) -> None:
    both = torch.tensor([True] * 5 + [False] * 7)
    first = torch.cat([torch.ones(first_only, dtype=torch.bool), torch.zeros(second_only, dtype=torch.bool), both])
    second = torch.cat([torch.zeros(first_only, dtype=torch.bool), torch.ones(second_only, dtype=torch.bool), both])
    discordant = first_only + second_only
    expected = binomtest(first_only, discordant).pvalue if discordant else 1.0
    result = metrics.mcnemar_test(first, second)
    assert result[:2] == (first_only, second_only)
    assert result.p_value == pytest.approx(expected, abs=1e-12)


def test_generalization_gap_is_positive_for_overfitting() -> None:
    assert metrics.generalization_gap(0.5, 0.2) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), r"logits of shape \(N, K\)"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), r"logits of shape \(N, K\)"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "at least one example"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "Labels run from 0 to 2, but the logits have 2 classes"),
    ],
)
def test_misfitting_inputs_are_refused(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        metrics.loss(logits, labels)


def test_other_refusals_say_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"hits must lie in \[0, 3\], got 4"):
        metrics.wilson_interval(4, 3)
    with pytest.raises(UserError, match="N >= 1"):
        metrics.bootstrap_interval(torch.zeros(0))
    with pytest.raises(UserError, match="R >= 1"):
        metrics.worst_restart(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="same examples"):
        metrics.mcnemar_test(torch.zeros(2, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(UserError, match="one length and labels below 2"):
        metrics.classwise(torch.zeros(2), torch.tensor([0, 2]), 2)
    with pytest.raises(UserError, match="bins must lie in"):
        metrics.expected_calibration_error(torch.zeros(2, 2), torch.tensor([0, 1]), bins=0)


def test_paired_bootstrap_agrees_with_the_paired_t_test_where_the_normal_law_holds() -> None:
    draws = torch.Generator().manual_seed(0)
    hard = 3 * torch.randn(400, generator=draws)  # what both models share
    first, second = hard + torch.randn(400, generator=draws) + 0.15, hard + torch.randn(400, generator=draws)
    found = metrics.paired_bootstrap(first, second, resamples=4000)
    peer = ttest_rel(first.numpy(), second.numpy())
    low, high = peer.confidence_interval(0.95)
    assert found.difference == pytest.approx(float((first - second).mean()), rel=1e-5)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    assert found.p_value == pytest.approx(peer.pvalue, abs=0.02)


def test_paired_bootstrap_of_equal_models_finds_no_difference_and_of_clear_ones_a_bound() -> None:
    values = torch.arange(10.0)
    assert metrics.paired_bootstrap(values, values) == (0.0, 0.0, 0.0, 1.0)
    assert metrics.paired_bootstrap(values + 1, values, resamples=500).p_value == 1 / 500
    with pytest.raises(UserError, match="on the same examples"):
        metrics.paired_bootstrap(values, values[:5])
