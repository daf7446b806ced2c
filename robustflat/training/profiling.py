"""A callback that records where the time of training steps goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from robustflat.explanation import Explanation
from robustflat.models.profiling import StepProfiler
from robustflat.training.callbacks import Callback

if TYPE_CHECKING:
    from robustflat.training.trainer import Trainer

PHASES = ("data", "craft", "score", "update", "epoch end")
"""Marks of the trainer: drawing a batch, attacking it, scoring it, optimizer and schedule, evaluating and saving."""

REST = "backward and rest"
"""What no mark surrounds: the backward pass first of all, gradient rules, callbacks."""


class Profiling(Callback):
    """Records a few steps from the start of training; should be the last callback.

    It has no state in checkpoints and changes no number: runs go on with and without it.

    >>> profiling = Profiling(steps=5)
    >>> # after trainer.fit(): profiling.recorder.phases(PHASES, REST), profiling.recorder.operators()

    Args:
        steps: recorded, >= 1.
        warmup: steps before them, >= 1.
        trace: file for a trace in Chrome's format, or `None`.

    Raises:
        UserError: for values out of range.
    """

    in_checkpoints = False

    def __init__(self, *, steps: int = 10, warmup: int = 3, trace: Path | None = None) -> None:
        self.recorder = StepProfiler(steps=steps, warmup=warmup, trace=trace)
        self._started = False

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begin to warm up, once: a rewind comes here again."""
        if not self._started:
            self.recorder.start()
        self._started = True

    def after_step(self, trainer: Trainer) -> None:
        """Go one step on."""
        self.recorder.step()

    def explain(self) -> Explanation:
        """Watches only."""
        return Explanation(f"records where the time of {self.recorder.wanted} steps goes")
