"""What is inside an attack: the attacks it wraps, their ball, and whether any follows gradients of the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from robustflat.attacks.foreign import Foreign
from robustflat.attacks.noise import RandomNoise
from robustflat.attacks.square import Square
from robustflat.attacks.transfer import Transfer
from robustflat.geometry.input_ball import InputBall


def nested(attack: object) -> Iterator[object]:
    """An attack and all attacks of ours that it wraps, outermost first."""
    yield attack
    for part in _wrapped(attack):
        yield from nested(part)


def ball_of(attack: object) -> InputBall | None:
    """The ball that an attack stays in; `None` if it has none, or wraps attacks with different ones."""
    balls = [ball for part in nested(attack) if isinstance(ball := getattr(part, "ball", None), InputBall)]
    return balls[0] if balls and len({(b.norm, b.epsilon, b.low, b.high) for b in balls}) == 1 else None


def is_black_box(attack: object) -> bool:
    """Whether an attack never uses gradients of the network under attack: noise, random search, transfer."""
    if isinstance(attack, Transfer | RandomNoise | Square):
        return True
    inner = _wrapped(attack)
    return bool(inner) and all(map(is_black_box, inner))


def _wrapped(attack: object) -> list[object]:
    if isinstance(attack, Foreign):
        return []
    several = getattr(attack, "attacks", None)
    inner = [getattr(attack, "attack", None), *(several.values() if isinstance(several, Mapping) else ())]
    return [part for part in inner if part is not None]
