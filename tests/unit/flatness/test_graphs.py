"""Which graphs are kept for further products, and how large they are."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.flatness.graphs import Graph, KeptGraphs, SavedBytes

CPU = torch.device("cpu")
SAVED = 1000 * 1000 * 4  # bytes of the one tensor that each graph here saves
SLOPE = 4


class Maker:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Graph:
        self.count += 1
        weight = torch.ones(1, requires_grad=True)
        logits = weight * torch.ones(1000, 1000)
        return Graph(logits, torch.zeros(1000, dtype=torch.int64), [torch.zeros(1)], None)


@pytest.mark.parametrize(("graphs", "kept"), [(0, 0), (0.9, 0), (1.01, 1), (2.5, 2), (9, 3)])
def test_as_many_are_kept_as_fit_and_the_others_made_anew(graphs: float, kept: int) -> None:
    store, make = KeptGraphs(3, graphs * (SAVED + SLOPE) / 2**20, CPU), Maker()
    for _ in range(2):
        for index in range(3):
            store.get(index, make)
    assert len(store) == kept
    assert make.count == 3 + (3 - kept)


@pytest.mark.parametrize("budget", ["auto", None])
def test_by_itself_or_without_bound_all_of_these_small_ones_are_kept(budget: str | None) -> None:
    store, make = KeptGraphs(3, budget, CPU), Maker()
    first = [store.get(index, make) for index in range(3)]
    assert all(store.get(index, make) is graph for index, graph in enumerate(first))


def test_the_graph_of_a_single_batch_is_kept_whatever_the_budget() -> None:
    store, make = KeptGraphs(1, 0, CPU), Maker()
    assert store.get(0, make) is store.get(0, make)


def test_cleared_graphs_are_gone() -> None:
    store = KeptGraphs(2, None, CPU)
    gone = weakref.ref(store.get(0, Maker()).logits)
    store.clear()
    assert len(store) == 0
    assert gone() is None


def test_no_budget_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="memory_budget"):
        KeptGraphs(1, "much", CPU)


def test_views_of_one_storage_count_once_and_gradients_of_a_counted_graph_are_right() -> None:
    x, saved = torch.arange(6.0, requires_grad=True), SavedBytes()

    def value() -> Tensor:
        y = x.exp()  # saves its own output
        return y.view(2, 3).square().sum() + y.view(3, 2).square().sum()

    with saved.counting():
        counted = value()
        (slope,) = torch.autograd.grad(counted, x, create_graph=True)
        again = slope.sin().sum()
    assert torch.equal(slope, torch.autograd.grad(value(), x)[0])
    exact = 4 * torch.exp(2 * x.detach())  # d/dx of 2 e^2x, and then the chain rule
    assert torch.allclose(torch.autograd.grad(again, x)[0], slope.detach().cos() * 2 * exact)
    # x.exp(), then for its second derivative 2 y and 4 y, and the argument of the sine: no storage twice
    assert 3 * 24 <= saved.total <= 8 * 24
