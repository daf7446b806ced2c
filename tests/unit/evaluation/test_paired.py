"""Paired tests of two networks against scipy and closed forms, and text."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from robustflat.attacks.pgd import Pgd
from robustflat.errors import UserError
from robustflat.evaluation.evaluate import evaluate
from robustflat.evaluation.paired import Comparison, compare_attacks, compare_clean, compare_values
from robustflat.geometry.input_ball import LinfBall


def logits(*wrong: bool) -> torch.Tensor:
    """Two classes, label 0: wrong where asked for."""
    return torch.tensor([[0.0, 1.0] if w else [1.0, 0.0] for w in wrong])


LABELS = torch.zeros(10, dtype=torch.int64)
FIRST = logits(*[True] * 7, *[False] * 3)
SECOND = logits(*[False] * 6, *[True] * 2, *[False] * 2)


def test_errors_are_compared_by_the_exact_sign_test() -> None:
    error, loss = compare_clean(FIRST, SECOND, LABELS)
    assert (error.first, error.second, error.examples) == (0.7, 0.2, 10)
    assert error.difference == pytest.approx(0.5)
    assert error.p_value == pytest.approx(stats.binomtest(1, 7, 0.5).pvalue)
    assert error.low < 0.5 < error.high
    assert loss.difference == pytest.approx(0.5)  # a wrong answer costs one nat more than a right one
    assert "McNemar, 6 and 1" in error.test


def test_robust_errors_count_any_run_and_losses_the_highest() -> None:
    runs = torch.stack([FIRST, logits(*[False] * 9, True)])
    error, loss = compare_attacks("pgd", (FIRST, runs), (SECOND, SECOND[None]), LABELS)
    assert (error.first, error.second) == (0.8, 0.2)
    assert loss.first - loss.second == pytest.approx(0.6)
    assert len(compare_attacks("aa", (FIRST, runs), (SECOND, SECOND[None]), LABELS, losses=False)) == 1


def test_values_of_other_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="flatness \\(average\\): the networks were not measured on the same examples"):
        compare_values("average", "flatness", torch.zeros(3), torch.zeros(4))


def test_text_has_a_line_for_each_figure() -> None:
    text = str(Comparison(tuple(compare_clean(FIRST, SECOND, LABELS)))).splitlines()
    assert len(text) == 3
    assert text[1].startswith("error ")
    assert "70.000" in text[1] and "+50.000" in text[1] and "0.12" in text[1]


def test_two_results_of_evaluate_are_compared() -> None:
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval() for _ in range(2))
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    attack = Pgd(LinfBall(0.1), steps=2, step_size=0.05)
    one, other = (evaluate(model, x, y, attack=attack) for model in (first, second))
    found = {d.metric: d for d in one.compare(other).differences}
    assert found.keys() == {"error", "loss", "robust_error", "robust_loss"}
    assert found["robust_error"].difference == pytest.approx(one.robust_error - other.robust_error)
    assert found["robust_loss"].difference == pytest.approx(one.robust_loss - other.robust_loss)
    with pytest.raises(UserError, match=r"different threat models: linf 0\.1 and linf 0\.2"):
        one.compare(evaluate(second, x, y, attack=Pgd(LinfBall(0.2), steps=2, step_size=0.05)))
    with pytest.raises(UserError, match="different examples"):
        one.compare(evaluate(second, x, (y + 1) % 3, attack=attack))
