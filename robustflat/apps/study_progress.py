"""How far a study is: read from the run folders, so that it does not matter where the runs are made."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from robustflat.apps.records import store_names
from robustflat.apps.study_runs import StudyRun
from robustflat.loggers.console import duration

TRAINING = 0.6
"""Share of a run that its training is taken to be."""

_TAIL = 2048  # bytes at the end of a file in which its last line is looked for


def fraction_done(run: StudyRun) -> float:
    """How far a run is, in [0, 1]: training counts `TRAINING`, the rest are evaluations."""
    if run.complete():
        return 1.0
    if not run.trained():
        return TRAINING * min(1.0, training_progress(run.folder))
    return TRAINING + (1 - TRAINING) * min(0.99, len(store_names(run.folder)) / max(run.pieces, 1))


def training_progress(folder: Path) -> float:
    """Finished part of a training, from the last line of its timings; 0 if there is none."""
    try:
        with open(folder / "timings.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL))
            lines = file.read().split(b"\n")[:-1]
        return float(json.loads(lines[-1]).get("time/progress", 0.0))
    except (OSError, ValueError, IndexError, AttributeError, TypeError):
        return 0.0


@contextmanager
def watched(runs: Sequence[StudyRun], console: Console, *, every: float = 2.0) -> Iterator[None]:
    """Show overall progress and time left while the body runs.

    On a terminal a bar moves; elsewhere a line is printed when a run is done.

    Args:
        runs: all runs of the study, done ones included.
        console: where to write; must not follow a redirected standard output.
        every: seconds between two looks at the folders.
    """
    watcher = _Watcher(runs, console)
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(every):
            watcher.look()

    thread = threading.Thread(target=look, daemon=True)
    with watcher.progress:
        watcher.look()
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            watcher.look()


class _Watcher:
    """Fractions of all runs, and how they are shown."""

    def __init__(self, runs: Sequence[StudyRun], console: Console) -> None:
        self.runs = runs
        self.console = console
        self.start = time.perf_counter()
        self.before: float | None = None
        self.done = {run.folder for run in runs if run.complete()}
        columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}", markup=False))
        self.progress = Progress(
            *columns, console=console, redirect_stdout=False, redirect_stderr=False, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("", total=len(runs))

    def look(self) -> None:
        """Read all folders of unfinished runs and show what has changed."""
        fractions = {run.folder: 1.0 if run.folder in self.done else fraction_done(run) for run in self.runs}
        total = sum(fractions.values())
        self.before = total if self.before is None else self.before
        made, left = total - self.before, len(self.runs) - total
        text = f"{duration((time.perf_counter() - self.start) / made * left)} left" if made > 0.02 else ""
        busy = [f"{run.name} {fractions[run.folder]:.0%}" for run in self.runs if 0 < fractions[run.folder] < 1]
        for run in self.runs:
            if fractions[run.folder] == 1.0 and run.folder not in self.done:
                self.done.add(run.folder)
                now = duration(time.perf_counter() - self.start)
                line = f"{now}  {len(self.done)}/{len(self.runs)}  {run.name} done{f', {text}' if text else ''}"
                self.console.print(line, markup=False)
        parts = [f"{len(self.done)}/{len(self.runs)} runs", text, ", ".join(busy[:4])]
        self.progress.update(self.task, completed=total, description="  ".join(part for part in parts if part))
