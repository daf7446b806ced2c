"""Processes that share one job: which of them this one is, what it works on, and what they tell each other.

Started by `torchrun --nproc-per-node N train.py ...`, which sets the environment variables read here. A process
that nobody started so is the only rank of one, and nothing here then does anything: code needs no second path.

Every rank runs the same program on the same configuration and must make the same calls in the same order, or
all wait for each other until `TIMEOUT`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from robustflat.errors import UserError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others before it gives up with an error."""


@dataclass(frozen=True)
class Ranks:
    """Number of this process and how many there are.

    Attributes:
        rank: in [0, size).
        size: number of processes, >= 1.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints; always true where there is one rank only."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th of `items`, beginning with this rank's number; shares differ by one item at most.

        A batch is shared so too (`x[rank::size]`): the first half of a share belongs to the batch's first half.
        """
        return items[self.rank :: self.size]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in place, as few large messages."""
        if self.size == 1:
            return
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in groups.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each floating-point tensor by its mean over all ranks, in place."""
        if self.size == 1:
            return
        tensors = list(tensors)
        self.sum_(tensors)
        for tensor in tensors:
            tensor.detach().div_(self.size)

    def collect(self, mine: Sequence[T]) -> list[T]:
        """The items of all ranks in the order in which `share` took them apart; every rank gets all.

        Items travel as pickles between processes of this job only.
        """
        if self.size == 1:
            return list(mine)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(mine))
        longest = max(len(part) for part in parts)
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def agreed(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank; every rank gets the same answer."""
        return any(self.collect([flag]))

    def wait(self) -> None:
        """Return when all ranks have come here."""
        if self.size > 1:
            dist.barrier()


def current() -> Ranks:
    """The ranks that this process has joined, or a single one."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes if torchrun started this one; leave them at the end.

    With CUDA every rank takes the card of its local rank and speaks nccl (gloo for what lies on the CPU), without it
    gloo alone.

    Yields:
        This process's place among them.

    Raises:
        UserError: if there are fewer cards than processes on this machine.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield current()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= cards:
            raise UserError(
                f"torchrun started more processes than this machine has cards ({cards}). Give --nproc-per-node "
                f"{cards}, or hide the cards with CUDA_VISIBLE_DEVICES= to run on the processor."
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield current()
    finally:
        dist.destroy_process_group()
