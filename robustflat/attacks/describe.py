"""Attacks, balls and other settings in words, for results that say how they were made."""

from __future__ import annotations

from types import FunctionType


def describe(thing: object) -> str:
    """`Class(name=value, ...)` of an object's public attributes, with the objects they hold described likewise.

    Attributes that are `None` or `False` are options not taken and are left out. A class with a `__repr__` of
    its own speaks for itself.

    >>> describe(None), describe([1.0])
    ('None', '[1.0]')
    """
    if isinstance(thing, FunctionType):
        return thing.__name__
    if isinstance(thing, float):
        return f"{thing:.6g}"
    if type(thing).__repr__ is not object.__repr__:
        return repr(thing)
    settings = [
        f"{name}={describe(value)}"
        for name, value in vars(thing).items()
        if not name.startswith("_") and value is not None and value is not False
    ]
    return f"{type(thing).__name__}({', '.join(settings)})"
