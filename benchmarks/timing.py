"""Runs in turn, with processor seconds and wall-clock seconds of each, here or in a process that keeps its memory."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

from robustflat.models.inference import keep_freed_memory


@dataclass(frozen=True)
class Ran:
    """One run: what it found, processor and wall-clock seconds."""

    result: Any
    processor: float
    wall: float


@dataclass(frozen=True)
class Timing:
    """Times of one way in seconds: medians of processor and wall-clock time, and the spread of the one that counts."""

    processor: float
    wall: float
    spread: float
    rounds: int
    result: Any = field(default=None, repr=False, compare=False)

    def seconds(self, device: str) -> float:
        """The figure to compare: processor time, or wall-clock time where an accelerator works."""
        return self.wall if on_cuda(device) else self.processor


def on_cuda(device: str | torch.device) -> bool:
    """Whether a device is a CUDA card."""
    return torch.device(device).type == "cuda"


def synchronize(device: str | torch.device = "cpu") -> None:
    """Wait for an accelerator; nothing to do on a CPU."""
    if on_cuda(device):
        torch.cuda.synchronize(device)


def in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, *, device: str = "cpu", warm: bool = True
) -> dict[str, Timing]:
    """Run all ways `rounds` times, one after the other each time, so that a change of the machine hits all alike.

    Args:
        runs: by name; one that returns a `Ran` has looked at the clocks itself.
        rounds: >= 1.
        device: waited for before a clock is read.
        warm: run each once before; the result is then of that run, otherwise of the first timed one.
    """
    seen: dict[str, list[Ran]] = {name: [] for name in runs}
    for _ in range(rounds + warm):
        for name, run in runs.items():
            ran = _timed(run, device)
            seen[name].append(ran if not seen[name] else Ran(None, ran.processor, ran.wall))  # the first result is kept
    return {name: _timing(found, found[warm:], device) for name, found in seen.items()}


def _timed(run: Callable[[], object], device: str) -> Ran:
    synchronize(device)
    start, start_busy = time.perf_counter(), processor_seconds()
    result = run()
    synchronize(device)
    if isinstance(result, Ran):
        return result
    return Ran(result, processor_seconds() - start_busy, time.perf_counter() - start)


def _timing(found: Sequence[Ran], timed: Sequence[Ran], device: str) -> Timing:
    busy, wall = [ran.processor for ran in timed], [ran.wall for ran in timed]
    spread = _spread(wall if on_cuda(device) else busy)
    return Timing(median(busy), median(wall), spread, len(timed), found[0].result)


@contextmanager
def keeping_memory(runs: Mapping[str, Callable[[], object]]) -> Iterator[dict[str, Callable[[], Ran]]]:
    """The same runs in a process forked for them, which keeps the memory it frees as our commands do; one thread.

    Raises:
        SystemExit: if a run fails there; it has said why.
    """
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def serve() -> None:
        ours.close()
        torch.set_num_threads(1)
        keep_freed_memory()
        with suppress(EOFError):
            while True:
                theirs.send_bytes(pickle.dumps(_timed(runs[theirs.recv()], "cpu")))

    def ask(name: str) -> Ran:
        try:
            ours.send(name)
            answer: Ran = pickle.loads(ours.recv_bytes())
        except (EOFError, BrokenPipeError):
            raise SystemExit(f"{name}: failed") from None
        return answer

    process = multiprocessing.get_context("fork").Process(target=serve)
    process.start()
    theirs.close()
    try:
        yield {name: functools.partial(ask, name) for name in runs}
    finally:
        ours.close()
        process.join()


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
