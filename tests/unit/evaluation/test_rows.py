"""Rows against numbers worked out by hand, and against literal loops."""

from __future__ import annotations

import math

import pytest
import torch

from robustflat.errors import UserError
from robustflat.evaluation.rows import any_wrong, attack_rows, clean_rows, flatness_rows, gap_rows

LABELS = torch.tensor([0, 1, 2, 0])
CLEAN = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [2.0, 0, 0], [2.0, 1, 0]])  # the third is wrong
RUNS = torch.tensor(
    [
        [[1.0, 0, 0], [0, 1.0, 0], [3.0, 0, 0], [0, 1.0, 0]],  # fools the fourth
        [[0.0, 2, 0], [0, 1.5, 0], [2.0, 0, 0], [1.0, 0, 0]],  # fools the first
    ]
)


def by_metric(rows):
    return {row["metric"]: row for row in rows}


def cross_entropy(logits, label):
    return math.log(sum(math.exp(v) for v in logits)) - logits[label]


def test_clean_rows_by_hand():
    rows = by_metric(clean_rows(CLEAN, LABELS))
    assert rows["error"]["value"] == 0.25
    assert rows["error"]["count"] == 4
    assert rows["error"]["low"] < 0.25 < rows["error"]["high"]
    losses = [cross_entropy(z, y) for z, y in zip(CLEAN.tolist(), LABELS.tolist(), strict=True)]
    assert rows["loss"]["value"] == pytest.approx(sum(losses) / 4)
    assert [rows[f"error_class_{k}"]["value"] for k in range(3)] == [0, 0, 1]
    assert {row["kind"] for row in rows.values()} == {"clean"}


def test_robust_error_counts_an_example_that_any_run_fools():
    rows = by_metric(attack_rows("pgd", CLEAN, RUNS, LABELS))
    assert rows["robust_error"]["value"] == 0.75
    assert rows["success_rate"]["value"] == pytest.approx(2 / 3)
    assert any_wrong(CLEAN, RUNS, LABELS).tolist() == [True, False, True, True]
    assert rows["robust_error_class_1"]["value"] == 0


def test_robust_loss_takes_the_highest_loss_of_the_runs():
    rows = by_metric(attack_rows("pgd", CLEAN, RUNS, LABELS))
    each = [[cross_entropy(z, y) for z, y in zip(run.tolist(), LABELS.tolist(), strict=True)] for run in RUNS]
    worst = [max(pair) for pair in zip(*each, strict=True)]
    assert rows["robust_loss"]["value"] == pytest.approx(sum(worst) / 4)
    assert rows["robust_loss_on_correct"]["value"] == pytest.approx((worst[0] + worst[1] + worst[3]) / 3)
    assert rows["robust_loss_on_incorrect"]["value"] == pytest.approx(worst[2])
    assert rows["robust_loss_of_one_run"]["value"] == pytest.approx(sum(map(sum, each)) / 8)


def test_roc_auc_is_between_all_clean_examples_and_the_ones_that_the_attack_turned_wrong():
    runs = RUNS.clone()
    runs[:, 2] = torch.tensor([9.0, 0, 0])  # wrong without attack, too: sure of itself, but no success of the attack
    rows = by_metric(attack_rows("pgd", CLEAN, runs, LABELS))
    each = [[cross_entropy(z, y) for z, y in zip(run.tolist(), LABELS.tolist(), strict=True)] for run in runs]
    worst = [max(range(2), key=lambda r, i=i: each[r][i]) for i in range(4)]
    sure = CLEAN.softmax(dim=1).amax(dim=1).tolist()
    fooled = [float(runs[worst[i], i].softmax(dim=0).max()) for i in (0, 3)]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in sure for b in fooled]
    assert rows["roc_auc"]["value"] == pytest.approx(sum(pairs) / len(pairs))
    assert rows["roc_auc"]["value"] != 1


def test_an_attack_that_stops_early_has_no_losses():
    assert "robust_loss" not in by_metric(attack_rows("aa", CLEAN, RUNS, LABELS, losses=False))


def test_sets_that_are_empty_give_no_row_instead_of_a_number():
    right = torch.eye(3)[LABELS] * 5
    rows = by_metric(attack_rows("pgd", right, right[None], LABELS))
    assert "robust_loss_on_incorrect" not in rows
    wrong = by_metric(clean_rows(-right, LABELS))
    assert wrong["error"]["value"] == 1
    assert "error_at_99tpr" not in wrong


def test_gaps_are_test_minus_train_with_errors_added_in_squares():
    test, train = attack_rows("pgd", CLEAN, RUNS, LABELS), attack_rows("pgd", CLEAN, CLEAN[None], LABELS)
    rows = by_metric(gap_rows(test, train))
    assert rows["robust_error_gap"]["value"] == 0.5
    a, b = by_metric(test)["robust_error"]["stderr"], by_metric(train)["robust_error"]["stderr"]
    gap = rows["robust_error_gap"]
    assert gap["stderr"] == pytest.approx(math.hypot(a, b))
    # 95 % of a normal distribution lie within 1.96 standard errors.
    assert (gap["low"], gap["high"]) == pytest.approx((0.5 - 1.96 * math.hypot(a, b), 0.5 + 1.96 * math.hypot(a, b)))
    assert set(rows) == {"robust_error_gap", "robust_loss_gap"}
    assert gap_rows(test, clean_rows(CLEAN, LABELS)) == []


def test_average_flatness_is_the_mean_rise_with_the_spread_of_the_trials():
    losses, reference = torch.tensor([[1.0, 2, 3, 4], [3, 2, 1, 8]]), torch.tensor([1.0, 1, 1, 1])
    rows = by_metric(flatness_rows("a", losses, reference, reduction="mean", groups=[2, 2], radius=0.5,
                                   labels=LABELS, classes=3))  # fmt: skip
    assert rows["flatness"]["value"] == 2.0
    assert rows["flatness"]["stderr"] == pytest.approx(0.5)  # trials 1.5 and 2.5
    over_examples = rows["flatness_over_examples"]
    assert (over_examples["value"], over_examples["stderr"]) == (2.0, pytest.approx(1.0))  # examples rise by 1, 1, 1, 5
    assert rows["flatness_max_of_trials"]["value"] == 2.5
    assert rows["flatness_sd_of_trials"]["value"] == pytest.approx(0.5**0.5)
    assert rows["reference_loss"]["value"] == 1
    assert rows["flatness"]["radius"] == 0.5
    assert rows["flatness_class_0"]["value"] == pytest.approx((1 + 5) / 2)


def test_worst_flatness_takes_the_largest_trial_of_each_group():
    losses, reference = torch.tensor([[1.0, 2, 3, 4], [3, 2, 1, 8]]), torch.tensor([1.0, 1, 1, 1])
    rows = by_metric(flatness_rows("w", losses, reference, reduction="max", groups=[2, 2], radius=0.1))
    assert rows["flatness"]["value"] == pytest.approx((1.5 + 3.5) / 2)
    one_group = by_metric(flatness_rows("w", losses, reference, reduction="max", groups=[4], radius=0.1))
    assert one_group["flatness"]["value"] == 2.5


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"\(N, K\) and \(R, N, K\)"):
        attack_rows("pgd", CLEAN, CLEAN, LABELS)
    with pytest.raises(UserError, match="groups that sum to N"):
        flatness_rows("a", torch.zeros(2, 4), torch.zeros(4), reduction="mean", groups=[3], radius=1.0)
