"""Means of device scalars."""

from __future__ import annotations

import pytest
import torch

from robustflat.training.means import RunningMeans


def test_window_and_total_means_are_plain_averages():
    means = RunningMeans()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value)})
    assert means.read() == {"loss": 3.0}
    means.add({"loss": torch.tensor(11.0)})
    assert means.read() == {"loss": 11.0}
    assert means.read_all() == {"loss": 5.0}
    assert means.read() == means.read_all() == {}


def test_names_that_come_and_go_are_averaged_over_their_own_steps():
    means = RunningMeans()
    means.add({"loss": torch.tensor(1.0)})
    means.add({"loss": torch.tensor(3.0), "ascent": torch.tensor(5.0)})
    assert means.read() == {"loss": 2.0, "ascent": 5.0}


def test_half_precision_values_do_not_saturate():
    means = RunningMeans()
    for _ in range(1000):
        means.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert means.read()["loss"] == 1.0


def test_nothing_keeps_a_graph_alive():
    weight = torch.tensor(2.0, requires_grad=True)
    means = RunningMeans()
    means.add({"loss": weight * 3})
    assert not any(value.requires_grad for value in means._window.values())
    assert means.read()["loss"] == pytest.approx(6.0)


def test_one_value_that_is_not_finite_is_enough():
    means = RunningMeans()
    assert means.finite()
    means.add({"loss": torch.tensor(1.0)})
    assert means.finite()
    means.add({"ascent": torch.tensor(torch.inf)})
    assert not means.finite()
    means.read()
    assert means.finite()
