"""Errors that a user can cause, and the checks that raise them.

A `UserError` carries a message for people: what was wrong, what is allowed, what to do. The command line
prints only that message; every other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches


class UserError(ValueError):
    """Something that the user asked for cannot be done; the message says what to do instead."""


class DataError(UserError):
    """A data file is missing, damaged or not what its name promises."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, unsafe to load, or does not fit the model."""


def require_range(
    name: str,
    value: float,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
    hint: str = "",
) -> None:
    """Refuse a number outside [low, high] (an end that is `None` is free; `*_open` excludes the end itself).

    Args:
        name: the argument as the user wrote it, for the message.
        value: the number received; not-a-number is always refused.
        low, high: ends of the allowed interval.
        low_open, high_open: whether the end itself is forbidden.
        hint: one sentence that says what to write instead.

    Raises:
        UserError: with name, allowed range, value received and hint.
    """
    below = low is not None and (value < low or (low_open and value == low))
    above = high is not None and (value > high or (high_open and value == high))
    if not (below or above or value != value):
        return
    left = "(-inf" if low is None else f"{'(' if low_open else '['}{low:g}"
    right = "inf)" if high is None else f"{high:g}{')' if high_open else ']'}"
    raise UserError(f"{name} must lie in {left}, {right}, got {value}.{' ' + hint if hint else ''}")


def require_one_of(name: str, value: object, allowed: Collection[str], *, hint: str = "") -> None:
    """Refuse a value that is not among `allowed`; the message lists them and suggests the closest.

    Raises:
        UserError: with name, value received and the allowed values.
    """
    if value in allowed:
        return
    close = get_close_matches(str(value), list(allowed), n=1)
    suggestion = f" Did you mean '{close[0]}'?" if close else ""
    raise UserError(
        f"{name} must be one of {', '.join(sorted(allowed))}, got {value!r}.{suggestion}{' ' + hint if hint else ''}"
    )
