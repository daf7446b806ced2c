"""`profile=true`: where the time of training steps and of the parts of an evaluation goes, as tables and traces."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from robustflat.apps.config import _safe_name
from robustflat.apps.run_folder import write_text
from robustflat.errors import UserError, require_range
from robustflat.models.profiling import StepProfiler, stepping_with_passes
from robustflat.ranks import current
from robustflat.store.tables import as_text, write_table
from robustflat.training.profiling import PHASES, REST, Profiling

if TYPE_CHECKING:
    from robustflat.apps.train import Session

FOLDER = "profile"
"""In the run folder."""

SHOWN = 10
"""Operators printed, and written in Markdown; the CSV file has all."""

PASSES = 4
"""Forward passes of a part of an evaluation that are recorded for each step asked for: a step of training has several,
and a part begins with a few that rewrite and check the network."""

Frames = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class ProfileSettings:
    """How much is recorded.

    Attributes:
        steps: training steps, >= 1; of each part of an evaluation, a quarter of the forward passes.
        warmup: such steps before, >= 1.
    """

    steps: int = 10
    warmup: int = 3


def profile_settings(value: Any) -> ProfileSettings | None:
    """What the key `profile` asks for; `None`: nothing.

    Args:
        value: true, false, null, or a mapping with steps and warmup.

    Raises:
        UserError: for anything else.
    """
    if value is None or isinstance(value, bool):
        return ProfileSettings() if value else None
    plain = OmegaConf.to_container(value) if isinstance(value, DictConfig) else value
    keys = tuple(ProfileSettings.__dataclass_fields__)
    if not isinstance(plain, Mapping) or not all(k in keys and type(v) is int for k, v in plain.items()):
        raise UserError(f"profile must be true, false or {{steps: 10, warmup: 3}} (whole numbers), got {plain!r}.")
    settings = ProfileSettings(**{str(key): number for key, number in plain.items()})
    require_range("profile.steps", settings.steps, low=1)
    require_range("profile.warmup", settings.warmup, low=1)
    return settings


@contextmanager
def profiled(session: Session) -> Iterator[None]:
    """Record the first steps of training inside, if `profile` says so; tables follow when it ends, however it ends."""
    settings = profile_settings(session.config.profile)
    if settings is None or not current().first:
        yield
        return
    folder = session.folder.path / FOLDER / "training"
    watch = Profiling(steps=settings.steps, warmup=settings.warmup, trace=folder / "trace.json")
    session.trainer.callbacks[FOLDER] = watch
    try:
        yield
    finally:
        del session.trainer.callbacks[FOLDER]
        recorder = watch.recorder
        recorder.stop()
        if recorder.steps:
            frames = {"phases": recorder.phases(PHASES, REST), "operators": recorder.operators()}
            title = f"Training: {recorder.steps} steps after {settings.warmup} that warmed up, all figures per step"
            write_profile(folder, title, frames, session.console)
        else:
            session.console.print(f"profile: training ended within the {settings.warmup} steps that warm up")


class Parts:
    """Times the parts of an evaluation, and records the first forward passes of each.

    Args:
        settings: `None`: nothing is timed or recorded.
        folder: of the run.
        console: where the tables go.
    """

    def __init__(self, settings: ProfileSettings | None, folder: Path, console: Console) -> None:
        self.settings, self.console = settings if current().first else None, console
        self.folder = folder / FOLDER / "evaluation"
        self._parts: list[tuple[str, float, int]] = []
        self._operators: list[pd.DataFrame] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is inside is one part.

        Raises:
            UserError: if the trace cannot be written.
        """
        if self.settings is None:
            yield
            return
        trace = self.folder / f"{_safe_name(name)}.json"
        steps, warmup = PASSES * self.settings.steps, PASSES * self.settings.warmup
        recorder = StepProfiler(steps=steps, warmup=warmup, trace=trace)
        recorder.start()
        start = time.perf_counter()
        try:
            with stepping_with_passes(recorder):
                yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        finally:
            recorder.stop()
        self._parts.append((name, seconds, recorder.steps))
        if recorder.steps:
            frame = recorder.operators()
            frame.insert(0, "part", name)
            self._operators.append(frame)

    def write(self) -> None:
        """Write and print what was found.

        Raises:
            UserError: if a file cannot be written.
        """
        if self.settings is None:
            return
        if not self._parts:
            self.console.print("profile: everything is stored already, nothing was measured (force=true measures anew)")
            return
        parts = pd.DataFrame(self._parts, columns=["part", "seconds", "passes recorded"])
        parts.insert(2, "share", parts["seconds"] / parts["seconds"].sum())
        frames = {"phases": parts}
        if self._operators:
            frames["operators"] = pd.concat(self._operators, ignore_index=True)
        title = "Evaluation: seconds by part; operators in milliseconds per forward pass, of the passes recorded"
        write_profile(self.folder, title, frames, self.console)


def write_profile(folder: Path, title: str, frames: Frames, console: Console) -> None:
    """Write tables as CSV (all) and Markdown (the most expensive), and print them.

    Args:
        folder: made if needed.
        title: what was recorded.
        frames: name -> table.
        console: where they are printed.

    Raises:
        UserError: if a file cannot be written.
    """
    parts = [f"# {title}\n"]
    console.print(f"\n[bold]{title}[/bold]")
    for name, frame in frames.items():
        write_table(frame, folder / f"{name}.csv")
        for label, shown in _shortened(frame):
            heading = f"{name}: {label}" if label else name
            parts.append(f"## {heading}\n\n{as_text(shown, 'md')}")
            console.print(_printed(shown, heading))
    write_text(folder / "profile.md", "\n".join(parts))
    console.print(f"profile      {folder} (traces: open the .json files in ui.perfetto.dev)", markup=False)


def _shortened(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The first operators, of each part where there are parts; other tables as they are."""
    if "operator" not in frame:
        yield "", frame
    elif "part" not in frame:
        yield "", frame.head(SHOWN)
    else:
        for part in frame["part"].unique():
            yield str(part), frame[frame["part"] == part].drop(columns="part").head(SHOWN)


def _printed(frame: pd.DataFrame, heading: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title=heading, title_justify="left", title_style="")
    for number, column in enumerate(frame.columns):
        table.add_column(str(column), justify="right" if number else "left")
    for row in frame.itertuples(index=False):
        cells = zip(frame.columns, row, strict=True)
        table.add_row(*(f"{value:.1%}" if "share" in str(name) else _cell(value) for name, value in cells))
    return table


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
