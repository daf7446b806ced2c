"""Processes that share one job: which of them this one is, what it works on, and what they tell each other.

Started by `torchrun --nproc-per-node N train.py ...`, which sets the environment variables read here. A process
that nobody started so is the only rank of one, and nothing here then does anything: code needs no second path.

Every rank runs the same program on the same configuration and must make the same calls in the same order, or
all wait for each other until `TIMEOUT`.
"""

from __future__ import annotations

import copy
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from robustflat.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others before it gives up with an error."""


_SHARING: ContextVar[bool] = ContextVar("sharing", default=False)


@contextmanager
def sharing_work() -> Iterator[None]:
    """Inside, evaluations and measures share their work among the ranks, and every rank gets all results.

    Every rank must come here with the same network, the same examples in the same order, and the same settings.
    Outside, they are computed by whoever calls them, as scripts expect that measure on one rank only.
    """
    token = _SHARING.set(True)
    try:
        yield
    finally:
        _SHARING.reset(token)


def workers() -> Ranks:
    """The ranks that share the work of an evaluation or a measure: one, but inside `sharing_work`."""
    return current() if _SHARING.get() else Ranks()


@contextmanager
def _alone() -> Iterator[None]:
    token = _SHARING.set(False)
    try:
        yield
    finally:
        _SHARING.reset(token)


def _dealt_back(parts: Sequence[Sequence[T]]) -> list[T]:
    """One list from shares, in the order in which `Ranks.share` took it apart."""
    longest = max(len(part) for part in parts)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_on_cpu(part) for part in value]
    if isinstance(value, tuple):
        parts = [_on_cpu(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _sendable(error: Exception) -> Exception:
    """The error itself, or its traceback as text if it does not survive a pickle."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # is made like the error that another rank receives
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


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
        """Every size-th of `items`, beginning with this rank's number; shares differ by one item at most."""
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
            for tensor, part in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each floating-point tensor by its mean over all ranks, in place."""
        if self.size == 1:
            return
        tensors = list(tensors)
        self.sum_(tensors)
        for tensor in tensors:
            tensor.detach().div_(self.size)

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean over all ranks of each tensor, as new tensors; for those that share memory with others, too."""
        if self.size == 1:
            return list(tensors)
        copies = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
        self.mean_(copies)
        return copies

    def collect(self, mine: Sequence[T]) -> list[T]:
        """The items of all ranks in the order in which `share` took them apart; every rank gets all.

        Items travel as pickles between processes of this job only.
        """
        if self.size == 1:
            return list(mine)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(mine))
        return _dealt_back(parts)

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`[work(item) for item in items]`, each item on the rank that `share` gives it; every rank gets all.

        Within `work` a rank is on its own: what it calls is not shared once more. With several ranks, tensors in the
        results (also inside lists, tuples and dictionaries) end on the CPU, as ranks have different cards.

        Raises:
            Exception: what `work` raised on any rank, on every rank, once all have done their share or failed.
        """
        if self.size == 1:
            return [work(item) for item in items]
        done: list[R] = []
        failure: Exception | None = None
        with _alone():
            try:
                for item in self.share(items):
                    done.append(_on_cpu(work(item)))
            except Exception as error:  # raised again below, on all ranks
                failure = error
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, (done, None if failure is None else _sendable(failure)), group=_patient())
        for rank, (_, sent) in enumerate(parts):
            if sent is not None:
                self._let_the_first_speak()
                raise failure if failure is not None and rank == self.rank else sent
        return _dealt_back([part for part, _ in parts])

    def on_first(self, work: Callable[[], R]) -> R:
        """What `work` returns on the first rank, on every rank; the others do not call it.

        Within `work` the first rank is on its own, and tensors end on the CPU, as in `map`.

        Raises:
            Exception: what `work` raised, on every rank.
        """
        if self.size == 1:
            return work()
        result: Any = None
        failure: Exception | None = None
        if self.first:
            with _alone():
                try:
                    result = _on_cpu(work())
                except Exception as error:  # raised again below, on all ranks
                    failure = error
        box = [result, None if failure is None else _sendable(failure)]
        dist.broadcast_object_list(box, src=0, group=_patient())
        if box[1] is not None:
            self._let_the_first_speak()
            raise failure or box[1]
        return result if self.first else box[0]  # type: ignore[no-any-return]

    def _let_the_first_speak(self) -> None:
        """Wait a moment, so that the first rank prints an error of all: torchrun ends all once one has ended."""
        if not self.first:
            time.sleep(0.5)

    def agreed(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the first rank's, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            copy = tensor.detach().contiguous()
            dist.broadcast(copy, src=0)
            tensor.detach().copy_(copy)

    def same(self, tensors: Iterable[Tensor]) -> bool:
        """Whether the tensors are equal on all ranks, bit for bit (by a sum of their bits); the same answer on all."""
        if self.size == 1:
            return True
        return len(set(self.collect([_bits(tensors)]))) == 1

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank; every rank gets the same answer. Does not wait for a GPU."""
        if self.size == 1:
            return flag
        count = torch.tensor(int(flag))
        dist.all_reduce(count)
        return bool(count)

    def wait(self) -> None:
        """Return when all ranks have come here, which may take days: the first one may be measuring alone."""
        if self.size > 1:
            dist.barrier(group=_patient())


_PATIENT: list[Any] = []
"""The group of all ranks that waits for days; within `joined`."""


def _patient() -> Any:
    return _PATIENT[0] if _PATIENT else None


def _bits(tensors: Iterable[Tensor]) -> int:
    """Sum of all bytes, each tensor's times its place: independent of the order of the additions."""
    sums = [t.detach().contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64) for t in tensors]
    if not sums:
        return 0
    found = torch.stack(sums)
    return int((found * torch.arange(1, len(sums) + 1, device=found.device)).sum())


def current() -> Ranks:
    """The ranks that this process has joined, or a single one."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def started() -> int:
    """How many processes torchrun has started for the job of this one; 1 if nobody has."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1


_SPEAKS: list[bool] = []
"""Once this process has failed among others: whether it was the first one to fail."""

_LOST = ("onnection closed by peer", "onnection reset by peer", "imed out waiting", "Broken pipe", "NCCL")


def speaks() -> bool:
    """Whether this process may print an error: of processes that share a job only the first that failed does.

    Where none has failed within `joined`, that is the first rank: what is wrong then is wrong on all of them.
    """
    return _SPEAKS[-1] if _SPEAKS else int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes if torchrun started this one; leave them at the end.

    With CUDA every rank takes the card of its local rank and speaks nccl (gloo for what lies on the CPU), without it
    gloo alone. A rank that fails takes the others with it: they lose the connection, or are ended by torchrun.

    Yields:
        This process's place among them.

    Raises:
        UserError: if there are fewer cards than processes on this machine, or another rank has gone.
    """
    if started() < 2 or dist.is_initialized():
        yield current()
        return
    _SPEAKS.clear()
    backend = _backend()
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=TIMEOUT)
    _PATIENT.append(dist.new_group(backend="gloo", timeout=timedelta(days=30)))
    try:
        yield current()
    except BaseException as error:
        _SPEAKS.append(_is_first_failure(store))
        if backend == "gloo":
            dist.destroy_process_group()  # nccl would wait here for ranks that wait for this one
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST):
            raise UserError(
                "Another process of this job has gone: it was killed, perhaps because memory ran out, or does not "
                "answer. The same command goes on from the last checkpoint."
            ) from error
        raise
    else:
        dist.destroy_process_group()
    finally:
        _PATIENT.clear()


def _backend() -> str:
    """Backend for this machine, after taking the card of this rank."""
    if not torch.cuda.is_available():
        return "gloo"
    local, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= cards:
        raise UserError(
            f"torchrun started more processes than this machine has cards ({cards}). Give --nproc-per-node "
            f"{cards}, or hide the cards with CUDA_VISIBLE_DEVICES= to run on the processor."
        )
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def _is_first_failure(store: Store) -> bool:
    try:
        return bool(store.add("failures", 1) == 1)
    except RuntimeError:  # whoever kept the store has gone, and has said why
        return False
