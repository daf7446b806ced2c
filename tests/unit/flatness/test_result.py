"""Flatness results: reductions by hand, text and JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch

from robustflat.errors import UserError
from robustflat.flatness.result import FlatnessResult


def result(losses: list[list[float]], reference: list[float], **changes) -> FlatnessResult:
    settings = {
        "reduction": "mean",
        "groups": (len(reference),),
        "loss": "robust",
        "radius": 0.5,
        "ball": "WeightBall(radius=0.5)",
        "protocol": "paper",
        "sampling": "ball",
        "parameters": "10 weights in 2 tensors",
        "tensors": 2,
        "weights": 10,
        "attack": "Pgd(steps=20)",
        "reference_attack": "worst of 10 runs of Pgd(steps=20)",
        "batch_norm": "running",
        "precision": "fp32",
        "seed": 0,
        "seconds": 1.25,
    }
    return FlatnessResult(losses=torch.tensor(losses), reference=torch.tensor(reference), **(settings | changes))


LOSSES = [[1.0, 2.0, 3.0], [2.0, 0.0, 7.0]]


def test_mean_over_trials_by_hand() -> None:
    found = result(LOSSES, [1.0, 1.0, 1.0])
    assert found.trials.tolist() == [1.0, 2.0]
    assert found.value == 1.5
    assert found.standard_error == pytest.approx(0.5)
    assert found.per_example.tolist() == [0.5, 0.0, 4.0]
    assert found.value_against_trials() == [1.0, 1.5]
    assert found.value_against_steps() == []


def test_max_over_trials_is_taken_in_every_group() -> None:
    found = result(LOSSES, [1.0, 1.0, 1.0], reduction="max", groups=(2, 1))
    # Groups: (1, 2 | 3) and (2, 0 | 7): the first group is worst in trial one, the second in trial two.
    assert found.per_example.tolist() == [0.0, 1.0, 6.0]
    assert found.value == pytest.approx(7 / 3)
    assert found.value_against_trials() == pytest.approx([1.0, 7 / 3])
    assert result(LOSSES, [1.0, 1.0, 1.0], reduction="max").value == 2.0


def test_value_against_steps_takes_the_best_restart() -> None:
    trace = torch.tensor([[0.0, 1.0, 1.5], [0.5, 0.75, 2.0]])
    assert result(LOSSES, [1.0, 1.0, 1.0], reduction="max", trace=trace).value_against_steps() == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("steps", "trials", "converged"),
    [
        ([0.0, 1.0, 1.8, 1.95, 2.0], [2.0, 1.96], True),  # the last quarter of the steps added 2.5 %
        ([0.0, 1.0, 1.5, 1.6, 2.0], [2.0, 1.96], False),  # ... 20 %
        ([0.0, 1.0, 1.8, 1.95, 2.0], [1.5, 2.0], False),  # the second restart added 25 %
        ([0.0, 1.0, 2.0], [2.0, 1.96], None),
        ([0.0, 1.0, 1.8, 1.95, 2.0], [2.0], None),
    ],
)
def test_a_worst_case_that_late_steps_or_restarts_still_raise_has_not_converged(steps, trials, converged) -> None:
    trace = torch.tensor([steps] * len(trials))
    found = result([[1 + t] for t in trials], [1.0], reduction="max", trace=trace)
    assert found.converged is converged
    words = {True: "converged: the last", False: "not converged", None: "convergence unknown"}[converged]
    assert found.convergence().startswith(words)
    assert str(found).endswith(found.convergence())
    assert found.to_dict()["convergence"] == found.convergence()


def test_an_average_has_a_standard_error_instead_of_a_verdict() -> None:
    found = result(LOSSES, [1.0, 1.0, 1.0])
    assert (found.converged, found.convergence()) == (None, "")


def test_text_is_one_line_with_value_and_error() -> None:
    text = str(result(LOSSES, [1.0, 1.0, 1.0]))
    assert text.startswith("1.5 +- 0.5 (average-case flatness of the robust loss, WeightBall(radius=0.5), 2 draws")
    assert "\n" not in text
    for part in ("3 examples", "Pgd(steps=20)", "protocol paper", "fp32", "batch norm running", "seed 0"):
        assert part in text
    worst = str(result(LOSSES, [1.0, 1.0, 1.0], reduction="max"))
    assert worst.startswith("2 (worst-case flatness of the robust loss, WeightBall(radius=0.5), 2 restarts")


def test_dictionary_is_valid_json_even_where_there_is_no_standard_error() -> None:
    plain = result([[1.5]], [1.0]).to_dict(arrays=True)
    text = json.dumps(plain, allow_nan=False)
    assert json.loads(text)["standard_error"] is None
    assert plain["value"] == 0.5
    assert plain["losses"] == [[1.5]]
    assert plain["protocol"] == "paper"
    assert math.isnan(result([[1.5]], [1.0]).standard_error)
    assert "losses" not in result([[1.5]], [1.0]).to_dict()


def test_misfitting_parts_are_refused() -> None:
    with pytest.raises(UserError, match=r"losses \(T, N\) and reference \(N,\)"):
        result(LOSSES, [1.0, 1.0])
    with pytest.raises(UserError, match="groups must sum to the 3 examples, got 2"):
        result(LOSSES, [1.0, 1.0, 1.0], groups=(2,))
    with pytest.raises(UserError, match="reduction must be one of max, mean"):
        result(LOSSES, [1.0, 1.0, 1.0], reduction="median")
