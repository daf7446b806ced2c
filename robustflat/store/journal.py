"""Numbers of a long grid, one line each as they are found, so that a killed process loses at most one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

from robustflat.errors import UserError

Place = tuple[int, int]
Values = tuple[float, ...]


class Journal(MutableMapping[Place, Values]):
    """Mapping (row, column) -> numbers, kept in a text file of JSON lines; assignment appends a line.

    Python writes floats so that they read back bit for bit. A last line cut off by a kill is dropped. One writer at a
    time.

    Attributes:
        path: of the file; made with the first assignment.
        changed: called with the number of places after each assignment, if set.

    Raises:
        UserError: if the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed: Callable[[int], None] | None = None
        self._values: dict[Place, Values] = {}
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(path, len(whole))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        for line in whole.decode(errors="replace").splitlines():
            place, values = _parsed(line, path)
            self._values[place] = values

    def __getitem__(self, place: Place) -> Values:
        return self._values[place]

    def __setitem__(self, place: Place, values: Values) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps([*place, *values]) + "\n")
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {error.strerror}. Earlier points are kept.") from error
        self._values[place] = tuple(values)
        if self.changed is not None:
            self.changed(len(self._values))

    def __delitem__(self, place: Place) -> None:
        raise UserError("A journal keeps what it has; remove() throws all of it away.")

    def __iter__(self) -> Iterator[Place]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def remove(self) -> None:
        """Throw everything away, once the results are stored elsewhere."""
        self.path.unlink(missing_ok=True)
        self._values.clear()


def _parsed(line: str, path: Path) -> tuple[Place, Values]:
    try:
        row, column, *values = json.loads(line)
        numbers = tuple(float(value) for value in values)
        if not isinstance(row, int) or not isinstance(column, int):
            raise ValueError("not a point")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged at the line {line[:60]!r}. Remove the file to measure anew.") from error
    return (row, column), numbers
