"""Objectives of logits against their formulas, written out example by example."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robustflat.attacks.objectives import (
    OBJECTIVES,
    Targeted,
    cross_entropy,
    dlr,
    dlr_targeted,
    kl_divergence,
    labels_of,
    margin,
    margin_to_target,
    objective_by_name,
    predicted_wrong,
    with_target,
)
from robustflat.errors import UserError


def random_logits(size: int = 7, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (size,), generator=generator)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def test_cross_entropy_is_minus_the_log_probability_of_the_label() -> None:
    logits, y = random_logits()
    expected = [-math.log(softmax(row)[k]) for row, k in zip(logits.tolist(), y.tolist(), strict=True)]
    assert cross_entropy(logits, y).tolist() == pytest.approx(expected, abs=1e-12)


def test_cross_entropy_of_probabilities_is_the_expected_one() -> None:
    logits, _ = random_logits()
    target = torch.rand(7, 5, dtype=torch.float64)
    target /= target.sum(1, keepdim=True)
    expected = [
        -sum(t * math.log(p) for t, p in zip(ts, softmax(row), strict=True))
        for ts, row in zip(target.tolist(), logits.tolist(), strict=True)
    ]
    assert cross_entropy(logits, target).tolist() == pytest.approx(expected, abs=1e-12)


def test_kl_divergence_matches_its_definition_per_example() -> None:
    logits, _ = random_logits()
    other = torch.randn(7, 5, dtype=torch.float64).softmax(1)
    expected = [
        sum(q * math.log(q / p) for q, p in zip(qs, softmax(row), strict=True))
        for qs, row in zip(other.tolist(), logits.tolist(), strict=True)
    ]
    assert kl_divergence(logits, other).tolist() == pytest.approx(expected, abs=1e-12)


def test_kl_divergence_to_itself_is_zero_and_classes_make_it_the_cross_entropy() -> None:
    logits, y = random_logits()
    assert kl_divergence(logits, logits.softmax(1)).abs().max() < 1e-14
    assert torch.equal(kl_divergence(logits, y), cross_entropy(logits, y))
    one_hot = torch.eye(5, dtype=torch.float64)[y]
    torch.testing.assert_close(kl_divergence(logits, one_hot), cross_entropy(logits, y))


def test_kl_divergence_has_finite_gradients_where_probabilities_vanish() -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    y = torch.tensor([[0.0, 0.0, 1.0]], requires_grad=True)
    value = kl_divergence(logits, y)
    assert value.item() == pytest.approx(400)
    for grad in torch.autograd.grad(value.sum(), (logits, y)):
        assert grad.isfinite().all()


def test_margin_is_best_other_logit_minus_that_of_the_label() -> None:
    logits, y = random_logits()
    expected = [
        max(z for j, z in enumerate(row) if j != k) - row[k] for row, k in zip(logits.tolist(), y.tolist(), strict=True)
    ]
    assert margin(logits, y).tolist() == pytest.approx(expected, abs=0)
    assert torch.equal(margin(logits, y) > 0, predicted_wrong(logits, y))


def test_dlr_divides_the_margin_by_first_minus_third_logit() -> None:
    logits, y = random_logits()
    expected = []
    for row, k in zip(logits.tolist(), y.tolist(), strict=True):
        first, _, third = sorted(row, reverse=True)[:3]
        expected.append((max(z for j, z in enumerate(row) if j != k) - row[k]) / (first - third))
    assert dlr(logits, y).tolist() == pytest.approx(expected, abs=1e-12)


def test_dlr_ignores_shift_and_scale_of_logits() -> None:
    logits, y = random_logits()
    torch.testing.assert_close(dlr(5 * logits - 3, y), dlr(logits, y))


def test_dlr_of_two_classes_is_the_margin() -> None:
    logits, y = random_logits(classes=2)
    assert torch.equal(dlr(logits, y), margin(logits, y))


def test_dlr_of_equal_logits_is_zero_and_differentiable() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    value = dlr(logits, torch.tensor([1]))
    assert value.item() == 0
    assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("classes", [3, 4, 10])
def test_targeted_dlr_matches_its_formula(classes: int) -> None:
    logits, y = random_logits(classes=classes)
    target = (y + 1) % classes
    expected = []
    for row, k, t in zip(logits.tolist(), y.tolist(), target.tolist(), strict=True):
        ordered = sorted(row, reverse=True)
        tail = ordered[2:4]
        expected.append((row[t] - row[k]) / (ordered[0] - sum(tail) / len(tail)))
    assert dlr_targeted(logits, with_target(y, target)).tolist() == pytest.approx(expected, abs=1e-12)


def test_targeted_dlr_of_two_classes_is_the_margin_to_the_target() -> None:
    logits, y = random_logits(classes=2)
    pairs = with_target(y, 1 - y)
    assert torch.equal(dlr_targeted(logits, pairs), margin(logits, y))


def test_margin_to_target_is_the_difference_of_the_two_logits() -> None:
    logits, y = random_logits()
    target = (y + 2) % 5
    expected = [row[t] - row[k] for row, k, t in zip(logits.tolist(), y.tolist(), target.tolist(), strict=True)]
    assert margin_to_target(logits, with_target(y, target)).tolist() == pytest.approx(expected, abs=0)


def test_targeted_is_the_negative_objective_of_the_target() -> None:
    logits, target = random_logits()
    assert torch.equal(Targeted(cross_entropy)(logits, target), -cross_entropy(logits, target))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_gradients_agree_with_finite_differences(name: str, classes: int) -> None:
    logits, y = random_logits(size=3, classes=classes)
    if name in ("margin_to_target", "dlr_targeted"):
        y = with_target(y, (y + 1) % classes)
    objective = objective_by_name(name)
    assert torch.autograd.gradcheck(lambda z: objective(z, y), logits.requires_grad_())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_raised_to_float32(name: str, dtype: torch.dtype) -> None:
    logits, y = random_logits()
    logits = logits.to(dtype)
    pairs = with_target(y, (y + 1) % 5) if name in ("margin_to_target", "dlr_targeted") else y
    value = objective_by_name(name)(logits, pairs)
    assert value.dtype == torch.float32
    assert torch.equal(value, objective_by_name(name)(logits.float(), pairs))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_an_empty_batch_gives_an_empty_value(name: str) -> None:
    y = torch.zeros(0, 2, dtype=torch.int64)
    assert objective_by_name(name)(torch.zeros(0, 4), y).shape == (0,)


def test_labels_are_found_in_every_form_of_y() -> None:
    y = torch.tensor([2, 0])
    probabilities = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]])
    for form in (y, probabilities, with_target(y, torch.tensor([1, 1])), with_target(probabilities, y)):
        assert labels_of(form).tolist() == [2, 0]
    # Two float columns are probabilities of two classes, two integer columns a label and its target.
    assert labels_of(torch.tensor([[0.2, 0.8]])).tolist() == [1]
    assert labels_of(torch.tensor([[0, 8]])).tolist() == [0]


def test_predicted_wrong_compares_the_largest_logit_with_the_label() -> None:
    logits = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert predicted_wrong(logits, torch.tensor([1, 0])).tolist() == [False, True]
    assert predicted_wrong(logits, torch.tensor([[0.4, 0.6], [0.9, 0.1]])).tolist() == [False, True]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"objective must be one of cross_entropy, dlr.*Did you mean 'margin'\?"):
        objective_by_name("margn")


def test_targeted_objectives_ask_for_targets() -> None:
    logits, y = random_logits()
    for wrong in (y, logits.softmax(1), logits[:, :2].softmax(1)):
        with pytest.raises(UserError, match=r"needs pairs \(label, target\).*with_target"):
            dlr_targeted(logits, wrong)


def test_a_margin_needs_two_classes() -> None:
    with pytest.raises(UserError, match="at least 2 classes, got 1"):
        margin(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
