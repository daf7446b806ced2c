"""Costs as formulas that stay true when they are put together."""

from __future__ import annotations

import dataclasses

import pytest

from robustflat.explanation import BACKWARD, FORWARD, INPUT_BACKWARD, NOTHING, unknown_cost


def pgd(steps: int):
    return (FORWARD + INPUT_BACKWARD).times(steps, "K", K=steps) + FORWARD


def test_adversarial_training_as_the_literature_writes_it():
    cost = pgd(10) + FORWARD + BACKWARD
    assert cost.formula == "K (F + Bx) + F + F + B"
    assert (cost.forward, cost.backward, cost.input_backward) == (12, 1, 10)
    assert str(cost) == "K (F + Bx) + F + F + B, K = 10: 12 F + 1 B + 10 Bx"


def test_one_name_with_two_values_becomes_two_names():
    cost = pgd(7) + pgd(20) + pgd(7)
    assert cost.formula == "K (F + Bx) + F + K2 (F + Bx) + F + K (F + Bx) + F"
    assert cost.symbols == {"K": 7, "K2": 20}
    assert cost.forward == 8 + 21 + 8


def test_a_factor_may_use_a_name_that_is_taken():
    cost = pgd(7).times(3, "K", K=3)
    assert cost.formula == "K (K2 (F + Bx) + F)"
    assert cost.symbols == {"K": 3, "K2": 7}
    assert cost.forward == 24


def test_nothing_adds_nothing():
    assert NOTHING + FORWARD == FORWARD == FORWARD + NOTHING
    assert str(NOTHING) == "nothing" == NOTHING.numbers()
    assert NOTHING.times(3, "n", n=3) == NOTHING


def test_a_bound_stays_a_bound():
    bound = dataclasses.replace(FORWARD, at_most=True)
    for cost in (bound + BACKWARD, BACKWARD + bound, bound.times(2, "2") + BACKWARD):
        assert cost.numbers().startswith("at most ")
    assert not (FORWARD + BACKWARD).numbers().startswith("at most")


@pytest.mark.parametrize("cost", [unknown_cost("X") + FORWARD, FORWARD + unknown_cost("X").times(2, "2")])
def test_what_is_unknown_stays_unknown(cost):
    assert "cost(X)" in cost.formula
    assert "not known" in cost.numbers()
