"""Auto-PGD runs side by side in one batch, with the results of one after another."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from robustflat.attacks.apgd_steps import Ascent
from robustflat.attacks.hunt import Record


class Turns:
    """Which of several runs count, and what they found, before it is written down.

    A run attacks the examples that the runs before it left, and their number decides what it draws. Side by side,
    all start with the same examples; so only the runs up to the first with a success are what they would have been
    one after another, and the others are void.

    Args:
        record: what became of each example.
        count: runs side by side, >= 1.
    """

    def __init__(self, record: Record, count: int) -> None:
        self.record = record
        self.count = count
        self._last = count - 1
        self._successes: list[tuple[Tensor, Tensor]] = []  # rows and images of run `_last`

    def settle(self, run: Ascent) -> Ascent:
        """What goes on once those fooled and all void runs have been dropped."""
        claimed, caught = self.record.claims(run)
        if len(claimed) == 0:
            return run
        turn = run.turn[claimed]
        last = int(turn.min())
        if last < self._last:
            self._successes = []
        self._last = last
        winners = turn == last
        self._successes.append((run.rows[claimed[winners]], caught[winners]))
        stays = run.turn <= last
        stays[claimed] = False
        return run.take(stays.nonzero().flatten())

    def close(self, run: Ascent, offer: Callable[[Ascent], None]) -> int:
        """Write down successes and offer what is left of each run that counts; returns their number."""
        for turn in range(self._last):
            before = self.record.found.fooled.clone()
            self._offer(run, turn, offer)
            if not before.equal(self.record.found.fooled):
                return turn + 1
        for rows, caught in self._successes:
            self.record.write(rows, caught)
        self._offer(run, self._last, offer)
        return self._last + 1

    def _offer(self, run: Ascent, turn: int, offer: Callable[[Ascent], None]) -> None:
        # One run alone is all there is: looking would wait for the device.
        part = run if self.count == 1 else run.take((run.turn == turn).nonzero().flatten())
        if len(part.rows):
            offer(part)
