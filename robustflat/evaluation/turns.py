"""Batches that draw from one generator, each going on where the one before stopped, and yet shared among ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from robustflat.ranks import Ranks, workers

R = TypeVar("R")

Rehearsal = Callable[[int, torch.Generator], bool]
"""(item, generator) -> makes the draws of that item, without the work; False where they cannot be known beforehand."""


def in_turn(
    work: Callable[[int], R], count: int, generator: torch.Generator | None, rehearsal: Rehearsal | None
) -> list[R]:
    """`[work(0), work(1), ...]`, the same on one rank and on several.

    Every rank rehearses the draws of all items, so that it knows with which state of the generator each begins. Where
    they cannot be known the first rank does all the work and the others wait.

    Args:
        work: item number -> result, whose tensors end on the CPU with several ranks; draws from `generator`.
        count: number of items.
        generator: where all items draw from, and in which state it is left; `None`: they draw from nothing of their
            own, or from torch's global generator, as `rehearsal` says.
        rehearsal: the draws alone; `None` without generator: the items draw nothing.

    Raises:
        RuntimeError: if an item draws otherwise than was rehearsed, a bug of the attack.
    """
    ranks, items = workers(), range(count)
    if ranks.size == 1:
        return [work(item) for item in items]
    if generator is None:
        return ranks.map(work, items) if rehearsal is None else ranks.on_first(lambda: [work(item) for item in items])
    states = None if rehearsal is None else _rehearsed(count, generator, rehearsal)
    if states is None:
        return _by_the_first(ranks, work, count, generator)
    known = states

    def one(item: int) -> R:
        assert generator is not None
        generator.set_state(known[item])
        result = work(item)
        if not torch.equal(generator.get_state(), known[item + 1]):
            raise RuntimeError(f"Item {item} drew other random numbers than its rehearsal.")
        return result

    results = ranks.map(one, items)
    generator.set_state(known[count])
    return results


def _rehearsed(count: int, generator: torch.Generator, rehearsal: Rehearsal) -> list[torch.Tensor] | None:
    """States of the generator before each item and after the last; `None` where they cannot be known."""
    stand_in = torch.Generator(device=generator.device)
    stand_in.set_state(generator.get_state())
    states = [stand_in.get_state()]
    for item in range(count):
        if not rehearsal(item, stand_in):
            return None
        states.append(stand_in.get_state())
    return states


def _by_the_first(ranks: Ranks, work: Callable[[int], R], count: int, generator: torch.Generator) -> list[R]:
    results, state = ranks.on_first(lambda: ([work(item) for item in range(count)], generator.get_state()))
    generator.set_state(state)
    return results
