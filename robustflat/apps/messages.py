"""What the command line says when something goes wrong."""

from __future__ import annotations

import sys

from rich.console import Console

from robustflat.errors import UserError

WIDTH = 140
"""Columns of tables that do not go to a terminal."""


def wide_console() -> Console:
    """Standard output as it is now, wide enough for tables also where it is a file or a pipe."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def complain(message: str) -> None:
    """Print an error to the standard error stream: plain text in one piece, nothing in it is markup."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", style="bold red", markup=False)


def user_error_in(error: BaseException) -> UserError | None:
    """The first `UserError` among an exception and its causes."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
