"""What commands do on several ranks: one of them owns the run folder, writes and prints; all know what is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from rich.console import Console

from robustflat.apps.run_folder import RunFolder
from robustflat.apps.together import NO_SWEEP
from robustflat.errors import UserError
from robustflat.ranks import joined, sharing_work, started, workers
from robustflat.store.results import ResultStore, Stored


@contextmanager
def joined_to_share(*, sweeping: bool) -> Iterator[Console]:
    """Join the ranks that torchrun started, if it did, and share the work of evaluations and measures among them.

    Args:
        sweeping: whether the command is one of several of a sweep, which is for one process only.

    Yields:
        Where to print: the terminal on the first rank, nowhere on the others.

    Raises:
        UserError: for a sweep in several processes; see also `joined`.
    """
    if sweeping and started() > 1:
        raise UserError(NO_SWEEP)
    with joined() as ranks, sharing_work():
        yield Console(highlight=False, soft_wrap=True, quiet=not ranks.first)


@contextmanager
def shared_folder(open_it: Callable[[], RunFolder]) -> Iterator[tuple[Path, RunFolder | None]]:
    """A run folder that the first rank opens and locks.

    Args:
        open_it: called on the first rank only.

    Yields:
        Its path, and on the first rank the folder itself.

    Raises:
        UserError: what `open_it` raised, on every rank.
    """
    mine: list[RunFolder] = []

    def opened() -> Path:
        mine.append(open_it())
        return mine[0].path

    path = workers().on_first(opened)
    try:
        yield path, mine[0] if mine else None
    finally:
        for folder in mine:
            folder.close()


class SharedStore(ResultStore):
    """A results file that the first rank alone reads and writes, and of which every rank gets what the first finds.

    So all ranks decide alike what is stored already. Every rank must make the same calls in the same order.
    """

    def names(self) -> list[str]:
        """As on one rank."""
        return workers().on_first(super().names)

    def attributes(self, name: str) -> dict[str, Any]:
        """As on one rank."""
        return workers().on_first(lambda: ResultStore.attributes(self, name))

    def read(self, name: str) -> Stored:
        """As on one rank."""
        return workers().on_first(lambda: ResultStore.read(self, name))

    def write(self, name: str, arrays: Mapping[str, NDArray[Any]], attrs: Mapping[str, object]) -> None:
        """As on one rank: what the first rank gives is written."""
        workers().on_first(lambda: ResultStore.write(self, name, arrays, attrs))

    def remove(self, name: str) -> None:
        """As on one rank."""
        workers().on_first(lambda: ResultStore.remove(self, name))
