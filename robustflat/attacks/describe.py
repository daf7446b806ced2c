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


def brief(attack: object) -> str:
    """An attack in a few words for captions, such as "PGD-10, linf epsilon 0.03137"; see `describe` for all settings.

    >>> brief(None)
    'no attack'
    """
    if attack is None:
        return "no attack"
    name, steps, restarts = type(attack).__name__, getattr(attack, "steps", None), getattr(attack, "restarts", 1)
    words = (name.upper() if name == "Pgd" else name) + (f"-{steps}" if isinstance(steps, int) else "")
    if isinstance(restarts, int) and restarts > 1:
        words += f" with {restarts} restarts"
    ball = getattr(attack, "ball", None)
    norm, epsilon = getattr(ball, "norm", None), getattr(ball, "epsilon", None)
    return words if epsilon is None else f"{words}, {norm or type(ball).__name__} epsilon {epsilon:.4g}"
