"""Named random streams, one `torch.Generator` per purpose; and draws for a batch that several processes share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from robustflat.errors import UserError, require_range


def derived_seed(seed: int, *names: str | int) -> int:
    """Seed in [0, 2**63) that depends on `seed` and all `names`, the same everywhere."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Fresh generator on `device`, seeded with `derived_seed(seed, *names)`."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, *names))


class Streams:
    """Random generators by name, created at first use and saved together.

    >>> a, b = Streams(0), Streams(0)
    >>> bool((torch.rand(3, generator=a["attack"]) == torch.rand(3, generator=b["attack"])).all())
    True

    Args:
        seed: the run's seed, >= 0; every stream's own seed is derived from it and the stream's name.
        device: where the generators live (images of that device can be drawn for directly).

    Raises:
        UserError: if seed is negative.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        require_range("seed", seed, low=0)
        self.seed = seed
        self.device = torch.device(device)
        self._generators: dict[str, torch.Generator] = {}

    def __getitem__(self, name: str) -> torch.Generator:
        """The generator called `name`; its draws depend only on seed, name and its earlier draws."""
        if name not in self._generators:
            self._generators[name] = generator_for(self.seed, name, device=self.device)
        return self._generators[name]

    def state_dict(self) -> dict[str, object]:
        """Seed and the state of every stream used so far (uint8 tensors), for a checkpoint."""
        return {"seed": self.seed, "states": {name: g.get_state() for name, g in self._generators.items()}}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Bring every stream back to where `state_dict` saw it; streams not in `state` start afresh."""
        self.seed = int(str(state["seed"]))
        self._generators.clear()
        states = state["states"]
        assert isinstance(states, dict)
        for name, value in states.items():
            assert isinstance(value, Tensor)
            self[str(name)].set_state(value.cpu())


class Rows(NamedTuple):
    """Which rows of a batch a process holds, of a batch that several processes share.

    Attributes:
        numbers: rising, each in [0, total).
        total: rows of the whole batch.
    """

    numbers: tuple[int, ...]
    total: int

    @classmethod
    def all(cls, count: int) -> Rows:
        """All rows of a batch of `count`."""
        return cls(tuple(range(count)), count)

    def after(self, start: int) -> Rows:
        """The held ones among the rows from `start` on, as rows of the batch that these make up."""
        return Rows(tuple(n - start for n in self.numbers if n >= start), self.total - start)

    def every_second(self, first: int) -> Rows:
        """The held ones among every second row, beginning with row `first`, 0 or 1, as rows of that half batch."""
        kept = tuple(n // 2 for n in self.numbers if n % 2 == first)
        return Rows(kept, (self.total + 1 - first) // 2)

    def of(self, whole: Tensor, dim: int = 0) -> Tensor:
        """The held rows of a tensor of all rows, which lie along dimension `dim`."""
        return whole.index_select(dim, _index(self.numbers, whole.device))


_HELD: ContextVar[Rows | None] = ContextVar("held", default=None)


@contextmanager
def holding(rows: Rows | None) -> Iterator[None]:
    """Inside, batches are the given rows of a larger batch, and `drawn_for_batch` draws for all of that.

    Args:
        rows: what is held; all rows of a batch, or `None`, is the ordinary state.
    """
    token = _HELD.set(None if rows is None or len(rows.numbers) == rows.total else rows)
    try:
        yield
    finally:
        _HELD.reset(token)


def held(count: int) -> Rows:
    """The rows that a batch of `count` has in the larger batch of the enclosing `holding`; all where there is none."""
    return _HELD.get() or Rows.all(count)


def of_the_whole(count: int) -> int:
    """How many examples all processes together have where this one has `count`, if the shares are equal."""
    rows = _HELD.get()
    return count if rows is None else count * rows.total // max(len(rows.numbers), 1)


def drawn_for_batch(draw: Callable[[tuple[int, ...]], Tensor], shape: Sequence[int]) -> Tensor:
    """Random numbers of which every example of a batch has its own: equal however many processes share the batch.

    Args:
        draw: shape -> random numbers of that shape.
        shape: (B, ...), or (k * B, ...) for k copies of a batch, one after the other.

    Returns:
        `draw(shape)`; within `holding`, the held rows of a draw for the whole batch.

    Raises:
        UserError: if the shape is not that of the held batch, so that nobody knows whose the numbers are.
    """
    rows = _HELD.get()
    if rows is None:
        return draw(tuple(shape))
    copies, rest = divmod(shape[0], len(rows.numbers)) if shape else (0, 1)
    if rest:
        raise UserError(
            f"Random numbers for {shape[0] if shape else 1} of the {len(rows.numbers)} images that this process has of "
            "a shared batch: an attack, loss or layer that draws for some images only cannot be used with several "
            "processes. Use one process, or attack=pgd_linf and layers that draw for every image."
        )
    drawn = draw((copies * rows.total, *shape[1:])).view(copies, rows.total, *shape[1:])
    return rows.of(drawn, dim=1).flatten(0, 1)


@lru_cache(maxsize=32)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)  # kept, because bringing it to a GPU would wait for that
