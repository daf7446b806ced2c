"""What the command line says when something goes wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from rich.console import Console

from robustflat.errors import UserError

WIDTH = 1000
"""Columns that tables may have where they do not go to a terminal: none is cut."""


def wide_console() -> Console:
    """Standard output as it is now, wide enough for tables also where it is a file or a pipe."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def complain(message: str) -> None:
    """Print an error to the standard error stream: plain text in one piece, nothing in it is markup.

    Of processes that share a job only one prints.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        from robustflat.ranks import speaks  # not before: torch may be what is broken

        if not speaks():
            return
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", style="bold red", markup=False)


def explained(error: BaseException) -> str | None:
    """Sentence for what a user or a full machine can cause; `None` for anything else, a bug of ours."""
    cause = user_error_in(error)
    if cause is not None:
        return str(cause)
    for seen in _chain(error):
        if isinstance(seen, MemoryError) or _is_torch_memory_error(seen):
            return (
                f"Out of memory ({_first_line(seen)}). Training: lower dataset.batch_size; attacks of an evaluation: "
                "evaluation.attack_batch; flatness: evaluation.batch_size, which is part of its definition. "
                "Or take a smaller model, or, on a GPU, trainer.precision=bf16. "
                "What was saved is intact; the same command goes on from the last checkpoint."
            )
        if isinstance(seen, RuntimeError) and "does not have a deterministic implementation" in str(seen):
            return f"deterministic=true: {_first_line(seen).split('.')[0]}. Use deterministic=false, or device=cpu."
        if isinstance(seen, RuntimeError) and "Unknown plugin class" in str(seen):
            return (
                f"{_first_line(seen)}. Is the launcher or sweeper installed? pip install robustflat[joblib], "
                "robustflat[slurm], robustflat[ray], or hydra-optuna-sweeper; robustflat doctor lists what is there."
            )
        if isinstance(seen, ValueError) and "Config group override must be a string" in str(seen):
            return (
                "A group cannot be set to null here: leave it out with ~GROUP, for example ~flatness "
                "(then also evaluation.flatness=null)."
            )
    return None


def _is_torch_memory_error(error: BaseException) -> bool:
    """By name and text, as this module must not import torch, which may be what is broken."""
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes, outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def user_error_in(error: BaseException) -> UserError | None:
    """The first `UserError` among an exception and its causes."""
    return next((seen for seen in _chain(error) if isinstance(seen, UserError)), None)
