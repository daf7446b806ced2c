"""Where the time of a few steps goes: by marked phase and by operator, with a trace for a viewer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, schedule

from robustflat.errors import UserError, require_range

STEP = "ProfilerStep"
"""torch's mark of a whole step; what follows is its number."""

PYTHON = "(Python, outside operators)"


class StepProfiler:
    """Records a few steps after some that warm up; it costs time and memory then, and changes no number.

    >>> profiler = StepProfiler(steps=2, warmup=1)
    >>> profiler.start()
    >>> for _ in range(3):
    ...     _ = torch.ones(4) + 1
    ...     profiler.step()
    >>> profiler.steps, "aten::add" in list(profiler.operators()["operator"])
    (2, True)

    Args:
        steps: steps recorded, >= 1; recording ends by itself after them.
        warmup: steps before them, >= 1: the first ones after a start are slowed by it.
        trace: file for the trace in Chrome's JSON format (chrome://tracing, ui.perfetto.dev); `None`: none.

    Attributes:
        steps: steps recorded; 0 until recording has ended. `stop` may have cut the last of them short.

    Raises:
        UserError: for values out of range.
    """

    def __init__(self, *, steps: int = 10, warmup: int = 3, trace: Path | None = None) -> None:
        require_range("profile.steps", steps, low=1)
        require_range("profile.warmup", warmup, low=1)
        self.wanted, self.warmup, self.trace = steps, warmup, trace
        self.steps = self._seen = 0
        self._profile: profile | None = None
        self._events: list[Any] = []
        self._operators: list[Any] = []

    def start(self) -> None:
        """Begin to warm up."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the library writes about itself to the error stream
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=self.warmup, active=self.wanted, repeat=1),
            on_trace_ready=self._take,
            profile_memory=True,
            acc_events=True,  # without it torch warns that events of earlier cycles are lost; there is one cycle
        )
        self._profile.start()

    def step(self) -> None:
        """A step has ended.

        Raises:
            UserError: if the trace cannot be written.
        """
        if self._profile is None:
            return
        self._seen += 1
        self._profile.step()
        if self._seen == self.warmup + self.wanted:
            self.stop()

    def stop(self) -> None:
        """End recording, with fewer steps than wanted if it must be.

        Raises:
            UserError: if the trace cannot be written.
        """
        if self._profile is not None:
            running, self._profile = self._profile, None
            running.stop()

    def phases(self, marks: Sequence[str], rest: str) -> pd.DataFrame:
        """Time by phase, a phase being what a `torch.profiler.record_function` of that name surrounds.

        Args:
            marks: names; marks do not lie within each other.
            rest: name for what is in none of them.

        Returns:
            Columns phase, calls and ms (both per step), share; on a card also device_ms, of its kernels.
        """
        whole, kernels = self._spent([e for e in self._events if e.name.startswith(STEP)]), self._kernels()
        rows, left, left_kernels = [], whole[0], kernels
        for mark in marks:
            found = [e for e in self._events if e.name == mark and e.is_user_annotation and _on_host(e)]
            spent, device = self._spent(found)
            left, left_kernels = left - spent, left_kernels - device
            rows.append((mark, len(found), spent, device))
        rows.append((rest, self.steps, left, left_kernels))
        steps, total = max(self.steps, 1), max(whole[0], 1e-12)
        frame = pd.DataFrame(
            [(name, calls / steps, ms / steps, ms / total, device / steps) for name, calls, ms, device in rows],
            columns=["phase", "calls", "ms", "share", "device_ms"],
        )
        return frame if kernels else frame.drop(columns="device_ms")

    def operators(self) -> pd.DataFrame:
        """Time by operator, most expensive first.

        Returns:
            Columns operator, calls and ms (both per step, without the operators within), share, memory_mib (net, per
            step: taken minus given back); on a card also device_ms and device_share, and the memory is the card's.
        """
        whole, kernels = self._spent([e for e in self._events if e.name.startswith(STEP)])[0], self._kernels()
        steps, total = max(self.steps, 1), max(whole, 1e-12)
        rows, left = [], whole
        for entry in self._operators:
            if entry.is_user_annotation or entry.key.startswith(STEP) or not _on_host(entry):
                continue
            ms, device = entry.self_cpu_time_total / 1e3, entry.self_device_time_total / 1e3
            memory = (entry.self_device_memory_usage if kernels else entry.self_cpu_memory_usage) / 2**20
            left -= ms
            share = device / kernels if kernels else 0.0
            name = entry.key.replace("autograd::engine::evaluate_function: ", "autograd: ")
            rows.append((name, entry.count / steps, ms / steps, ms / total, memory / steps, device / steps, share))
        rows.append((PYTHON, 1.0, left / steps, left / total, 0.0, 0.0, 0.0))
        names = ["operator", "calls", "ms", "share", "memory_mib", "device_ms", "device_share"]
        frame = pd.DataFrame(rows, columns=names).sort_values("device_ms" if kernels else "ms", ascending=False)
        return (frame if kernels else frame.drop(columns=["device_ms", "device_share"])).reset_index(drop=True)

    def _take(self, running: profile) -> None:
        self._events = list(running.events() or [])  # type: ignore[no-untyped-call]
        self._operators = list(running.key_averages())
        self.steps = sum(event.name.startswith(STEP) and _on_host(event) for event in self._events)
        if self.trace is not None:
            temporary = self.trace.with_name(f".{self.trace.name}")
            try:
                self.trace.parent.mkdir(parents=True, exist_ok=True)
                running.export_chrome_trace(str(temporary))
                os.replace(temporary, self.trace)
            except (OSError, RuntimeError) as error:
                with suppress(OSError):
                    temporary.unlink()
                raise UserError(f"Cannot write the trace {self.trace}: {error}. profile=false does without.") from error

    def _spent(self, events: Sequence[Any]) -> tuple[float, float]:
        """Milliseconds of host and card within events."""
        host = [e for e in events if _on_host(e)]
        return sum(e.cpu_time_total for e in host) / 1e3, sum(e.device_time_total for e in host) / 1e3

    def _kernels(self) -> float:
        """Milliseconds of all kernels; 0 without a card."""
        return float(sum(e.self_device_time_total for e in self._operators if _on_host(e))) / 1e3


def _on_host(event: Any) -> bool:
    """Whether an event is of the processor; a card repeats marks and has its kernels as events of their own."""
    return bool(event.device_type.name == "CPU")


@contextmanager
def stepping_with_passes(profiler: StepProfiler) -> Iterator[None]:
    """Inside, every forward pass of whatever network ends a step of a started profiler and begins the next one.

    Other hooks, numbers and networks stay as they are: the hooks are torch's global ones.
    """
    depth = 0

    def before(_: nn.Module, __: object) -> None:
        nonlocal depth
        if depth == 0:
            profiler.step()
        depth += 1

    def after(_: nn.Module, __: object, ___: object) -> None:
        nonlocal depth
        depth -= 1

    handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
