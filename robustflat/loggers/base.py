"""What loggers share: a base that ignores everything, and one that passes everything on to several."""

from __future__ import annotations

from collections.abc import Iterable

from robustflat.types import Logger, Scalars


class Null:
    """A logger that does nothing; also the base of the others, which override what they can do."""

    def log(self, metrics: Scalars, *, step: int) -> None:
        """Record named numbers at an optimizer step; "time/..." differs between equal runs."""

    def summary(self, metrics: Scalars) -> None:
        """Record the final numbers of a run."""

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`, because training resumes there."""

    def finish(self, status: str) -> None:
        """Close; status is "done", "failed", "interrupted" (not saved since the last epoch) or "stopped" (saved)."""


class Many(Null):
    """Passes everything on to several loggers, in their order.

    Args:
        loggers: any number; `summary` and `rewind` reach those derived from `Null`.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self.loggers = list(loggers)

    def log(self, metrics: Scalars, *, step: int) -> None:
        """Log to all."""
        for logger in self.loggers:
            logger.log(metrics, step=step)

    def summary(self, metrics: Scalars) -> None:
        """Give the final numbers to all that take them."""
        for logger in self.loggers:
            if isinstance(logger, Null):
                logger.summary(metrics)

    def rewind(self, step: int) -> None:
        """Rewind all that can."""
        for logger in self.loggers:
            if isinstance(logger, Null):
                logger.rewind(step)

    def finish(self, status: str) -> None:
        """Close all, also if closing one of them fails; the first failure is raised at the end."""
        failures = []
        for logger in self.loggers:
            try:
                logger.finish(status)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]
