"""Metrics as JSON lines: one object per call, nothing that differs between two identical runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from robustflat.errors import DataError, UserError
from robustflat.loggers.base import Null
from robustflat.types import Scalars

TIMINGS = "timings.jsonl"
_TIME = "time/"


class JsonlLogger(Null):
    """Appends `{"step": n, name: value, ...}` lines to a file.

    Names that start with "time/" (seconds, images per second, memory) go to `timings.jsonl` beside it, so that
    the metrics file of two identical runs is the same bit for bit, also when one was interrupted and resumed.
    Values that JSON cannot hold are the strings "NaN", "Infinity" and "-Infinity", which `float()` reads.

    Args:
        path: the metrics file; its folder is made if needed, and lines are added to a file that is there. A
            last line that was cut off by a crash is removed.

    Raises:
        UserError: if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.timings_path = self.path.with_name(TIMINGS)
        if self.timings_path == self.path:
            raise UserError(f"the metrics file must not be called {TIMINGS}, which is for the timings beside it.")
        self._files: dict[Path, TextIO] = {}
        writing(self.path, lambda: self.path.parent.mkdir(parents=True, exist_ok=True))
        for file in (self.path, self.timings_path):
            if file.exists():
                writing(file, partial(_keep_lines, file, lambda line: True))

    def log(self, metrics: Scalars, *, step: int) -> None:
        """Append a line to each of the two files that has something to hold.

        Raises:
            UserError: if the disk is full or not writable.
        """
        timings = {name: value for name, value in metrics.items() if name.startswith(_TIME)}
        others = {name: value for name, value in metrics.items() if name not in timings}
        for path, values in ((self.path, others), (self.timings_path, timings)):
            if values:
                self._append(path, {"step": step, **values})

    def rewind(self, step: int) -> None:
        """Remove lines of later steps, and a torn last line, from both files; each is replaced in one go.

        Raises:
            UserError: if a file cannot be written.
        """
        self._close()
        for path in (self.path, self.timings_path):
            if path.exists():
                writing(path, partial(_keep_lines, path, lambda line: bool(line["step"] <= step)))

    def finish(self, status: str) -> None:
        """Close the files."""
        self._close()

    def _append(self, path: Path, values: Mapping[str, float]) -> None:
        text = json.dumps({name: _plain(value) for name, value in values.items()}, allow_nan=False)

        def write() -> None:
            if path not in self._files:
                self._files[path] = open(path, "a", encoding="utf-8")  # noqa: SIM115  # open until `finish`
            self._files[path].write(text + "\n")
            self._files[path].flush()

        writing(path, write)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def read_jsonl(path: str | Path) -> list[dict[str, float]]:
    """Lines of a metrics file, values as floats; a torn last line is left out.

    Raises:
        DataError: if the file is missing or another line is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no metrics file {path}.")
    try:
        return [{name: float(value) for name, value in line.items()} for _, line in _sound_lines(path)]
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}.") from error


def _plain(value: float) -> float | int | str:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _sound_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Text and content of each complete line; the rest of the file after the last newline was cut off."""
    *lines, _ = path.read_bytes().split(b"\n")
    for raw in lines:
        text = raw.decode("utf-8", errors="replace")
        yield text, json.loads(text)


def _keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Replace a file by its complete lines that are wanted; untouched if nothing changes."""
    before = path.read_bytes()
    kept = []
    *lines, _ = before.split(b"\n")
    for raw in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # a damaged line says nothing and is dropped
            if wanted(json.loads(raw)):
                kept.append(raw)
    after = b"".join(raw + b"\n" for raw in kept)
    if after != before:
        replace_file(path, after)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writing(path: Path, action: Callable[[], object]) -> None:
    """Do something that writes a file.

    Raises:
        UserError: in place of an `OSError`.
    """
    try:
        action()
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Free some space or fix the permissions, then "
            "start the same command again."
        ) from error
