"""What a training costs: passes, images, seconds and memory, in one small file that survives a resume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from robustflat.loggers.base import Null
from robustflat.loggers.jsonl import replace_file, writing
from robustflat.types import Scalars

LEDGER = "ledger.json"
Reading = Mapping[str, float]
"""Totals so far: "forwards", "backwards", "images"; and "peak_memory_mib", of which the largest counts."""


class LedgerLogger(Null):
    """Keeps a book of the compute of a training: {"training": {...}, "watching": {...}}.

    "watching" is the periodic evaluation. Whatever was spent since the last call belongs to "training" when the
    trainer logs an epoch or is stopped, and to "watching" when an evaluation logs. A resumed training adds to what is
    in the file; epochs that a kill undid are not in it.

    Args:
        path: the file, by convention ledger.json in the run folder.
        read: totals so far, see `Reading`.
    """

    def __init__(self, path: str | Path, read: Callable[[], Reading]) -> None:
        self.path = Path(path)
        self._read = read
        self._book: dict[str, dict[str, float]] = {}
        self._before: dict[str, float] = {}
        self._start = 0.0
        self._mark()

    def rewind(self, step: int) -> None:
        """Training starts here: from what the file says, or anew at step 0."""
        self._book = read_ledger(self.path) if step else {}
        self._mark()

    def log(self, metrics: Scalars, *, step: int) -> None:
        """Enter what was spent since the last entry.

        Raises:
            UserError: if the file cannot be written.
        """
        phase = "training" if "epoch" in metrics else ""
        if not phase and any(name.startswith("evaluation") for name in metrics):
            phase = "watching"
        if phase:
            self._enter(phase)

    def finish(self, status: str) -> None:
        """Enter what a training spent that was stopped, and saved, in the middle of an epoch.

        Raises:
            UserError: if the file cannot be written.
        """
        if status == "stopped":
            self._enter("training")

    def _enter(self, phase: str) -> None:
        now, seconds = dict(self._read()), time.perf_counter()
        peak = now.pop("peak_memory_mib", 0.0)
        entry = self._book.setdefault(phase, {})
        for name, value in {**now, "seconds": seconds}.items():
            before = self._start if name == "seconds" else self._before[name]
            entry[name] = entry.get(name, 0) + value - before
        entry["peak_memory_mib"] = max(peak, entry.get("peak_memory_mib", 0.0))
        self._before, self._start = now, seconds
        content = (json.dumps(self._book, indent=1) + "\n").encode()
        writing(self.path, partial(replace_file, self.path, content))

    def _mark(self) -> None:
        self._before = {name: value for name, value in self._read().items() if name != "peak_memory_mib"}
        self._start = time.perf_counter()


def read_ledger(path: str | Path) -> dict[str, dict[str, float]]:
    """Content of a ledger file by phase; empty if it is not there or damaged."""
    try:
        content = json.loads(Path(path).read_text())
        return {phase: {name: float(v) for name, v in entry.items()} for phase, entry in content.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}
