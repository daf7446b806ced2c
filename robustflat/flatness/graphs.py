"""Graphs of gradients that are kept for further products, as far as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from robustflat.memory import MemoryBudget, budget_bytes, require_memory_budget


class Graph(NamedTuple):
    """One batch, differentiated once.

    Attributes:
        logits: (B, K), with graph.
        labels: (B,).
        slopes: what was pulled back to each weight, with graph: the gradient of the loss, or, for products with a
            Jacobian, J^T `pulled`.
        pulled: (B, K) zeros that the slopes are linear in, or `None`.
    """

    logits: Tensor
    labels: Tensor
    slopes: Sequence[Tensor]
    pulled: Tensor | None


class KeptGraphs:
    """Graphs by the number of their batch, made where they are not kept; kept where they fit.

    A single batch's graph is always kept, since making it takes the memory anyway. With several, the kept ones take
    at most the budget together, and one at a time is made besides.

    Args:
        count: batches there are.
        budget: MiB, "auto" or `None` (no bound), see `robustflat.memory`; "auto" is settled when the first is made.
        device: whose memory.

    Raises:
        UserError: if it is no budget.
    """

    def __init__(self, count: int, budget: MemoryBudget, device: torch.device) -> None:
        require_memory_budget(budget)
        self._count, self._budget, self._device = count, budget, device
        self._allowed: float | None = None
        self._kept: dict[int, Graph] = {}
        self._bytes = 0

    def get(self, index: int, make: Callable[[], Graph]) -> Graph:
        """The graph of a batch, which `make` makes."""
        if index in self._kept:
            return self._kept[index]
        if self._allowed is None:
            self._allowed = budget_bytes(self._budget, self._device)
        saved = SavedBytes()
        with saved.counting():
            graph = make()
        size = saved.total + sum(slope.nbytes for slope in graph.slopes)
        if self._count == 1 or self._bytes + size <= self._allowed:
            self._kept[index] = graph
            self._bytes += size
        return graph

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._bytes, self._allowed = 0, None

    def __len__(self) -> int:
        return len(self._kept)


class SavedBytes:
    """Counts the bytes of what autograd saves inside `counting`, every storage once.

    >>> x, saved = torch.ones(10, requires_grad=True), SavedBytes()
    >>> with saved.counting():
    ...     y = x.square().sum()
    >>> saved.total
    40
    """

    def __init__(self) -> None:
        self._storages: set[int] = set()
        self.total = 0

    def counting(self) -> saved_tensors_hooks:
        """Context manager; storages must not be freed before the count is read."""
        return saved_tensors_hooks(self._saved, _unchanged)

    def _saved(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            self._storages.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor.detach()  # autograd holding its own outputs would be a cycle


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
