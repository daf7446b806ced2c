"""Stochastic traces and norms against exact ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from robustflat.errors import UserError
from robustflat.flatness.trace import Estimate, root, signs, trace_estimates
from tests.unit.flatness.networks import spectrum

VALUES = torch.cat([torch.logspace(1, -2, 30), -torch.logspace(0, -2, 10)]).double()
MATRIX = spectrum(*VALUES.tolist())
LIKE = torch.zeros(40, dtype=torch.float64)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("estimator", ["hutchinson", "hutch++"])
def test_estimates_are_unbiased_and_their_standard_errors_are_honest(estimator: str) -> None:
    found = [
        trace_estimates(lambda v: v @ MATRIX, LIKE, count=18, generator=draws(s), estimator=estimator)
        for s in range(300)
    ]
    for name, exact in (("trace", VALUES.sum()), ("squared_frobenius", VALUES.square().sum())):
        errors = torch.tensor([getattr(f, name).value - float(exact) for f in found])
        claimed = torch.tensor([getattr(f, name).standard_error for f in found])
        assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(300)
        assert 0.8 < float(claimed.square().mean().sqrt() / errors.std()) < 1.25


def test_signs_are_those_of_drawn_integers_in_little_memory() -> None:
    found = signs((20, 999), LIKE, draws(4))
    assert torch.equal(found, 2.0 * torch.randint(0, 2, (20, 999), generator=draws(4)).double() - 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        signs((20, 999), LIKE, draws(4))
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in record.key_averages())
    assert taken < 1.3 * found.nbytes


def test_hutch_plus_plus_is_sharper_than_hutchinson_for_the_same_products() -> None:
    def spread(estimator: str) -> float:
        values = [
            trace_estimates(lambda v: v @ MATRIX, LIKE, count=45, generator=draws(s), estimator=estimator).trace.value
            for s in range(40)
        ]
        return float(torch.tensor(values).std())

    assert spread("hutch++") < 0.5 * spread("hutchinson")


def test_enough_products_make_hutch_plus_plus_exact() -> None:
    found = trace_estimates(lambda v: v @ MATRIX, LIKE, count=120, generator=draws(0))
    assert found.trace.value == pytest.approx(float(VALUES.sum()), rel=1e-10)
    assert found.frobenius.value == pytest.approx(float(VALUES.norm()), rel=1e-10)
    assert found.trace.standard_error == 0.0
    assert found.products == 80


def test_a_negative_squared_norm_by_chance_has_root_zero_and_small_counts_are_refused() -> None:
    assert root(Estimate(-1.0, 0.5)) == (0.0, 0.5)
    with pytest.raises(UserError, match="trace products must lie in"):
        trace_estimates(lambda v: v, LIKE, count=5, generator=draws(0))
