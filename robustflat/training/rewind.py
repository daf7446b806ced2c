"""Back to the last good epoch with a lower learning rate when training diverges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from robustflat.errors import require_range
from robustflat.loggers.base import Null
from robustflat.ranks import current
from robustflat.training.callbacks import Callback

if TYPE_CHECKING:
    from robustflat.training.trainer import Trainer


class Rewind(Callback):
    """When training diverges, goes back to the end of the last good epoch and lowers the learning rate.

    After k rewinds the schedule's rates are multiplied by factor^k until the end. The good state is kept in
    the CPU's memory; batches and random draws after it are the same again, so only the rate differs. Each
    epoch's history and log say how many rewinds there have been ("rewinds"), and so does the console.

    Args:
        factor: on the learning rate, in (0, 1).
        times: rewinds in the whole training, >= 0; the next divergence ends it. 0: only watch the loss.
        highest_loss: a mean loss of an epoch above it counts as divergence, > 0; `None`: only what is not finite.

    Raises:
        UserError: for values outside these ranges.
    """

    def __init__(self, *, factor: float = 0.1, times: int = 3, highest_loss: float | None = None) -> None:
        require_range("factor", factor, low=0, high=1, low_open=True, high_open=True)
        require_range("times", times, low=0)
        if highest_loss is not None:
            require_range("highest_loss", highest_loss, low=0, low_open=True)
        self.factor, self.times, self.highest_loss = factor, times, highest_loss
        self.used = 0
        self._good: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        """Keep the state that training starts from."""
        self._good = _copied(trainer.state_dict())

    def after_epoch(self, trainer: Trainer) -> None:
        """Refuse an exploding loss, and put the number of rewinds on record.

        Raises:
            DivergenceError: if the epoch's mean loss is above `highest_loss`.
        """
        loss = trainer.history[-1].get("loss", 0.0)
        if self.highest_loss is not None and loss > self.highest_loss:
            trainer.diverged(f"the mean loss is {loss:g}, above highest_loss={self.highest_loss:g}")
        trainer.history[-1]["rewinds"] = float(self.used)
        trainer.logger.log({"epoch/rewinds": self.used}, step=trainer.step)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Keep the state after a good epoch."""
        self._good = _copied(trainer.state_dict())

    def on_divergence(self, trainer: Trainer) -> bool:
        """Go back and lower the rate, unless that has been done `times` times."""
        if self.used >= self.times:
            return False
        used = self.used + 1
        trainer.load_state_dict(_copied(self._good))
        for callback in trainer.callbacks.values():  # brings what they loaded to the device
            callback.on_fit_start(trainer)
        self.used = used
        trainer.schedule.rescale(self.factor**used)
        if isinstance(trainer.logger, Null):
            trainer.logger.rewind(trainer.step)
        if current().first:
            print(
                f"Training diverged: back to epoch {trainer.epoch} with {self.factor**used:g} times the learning rate "
                f"(rewind {used} of at most {self.times}).",
                flush=True,
            )
        return True

    def state_dict(self) -> dict[str, Any]:
        """Number of rewinds so far."""
        return {"used": self.used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting."""
        self.used = int(state["used"])


def _copied(value: Any) -> Any:
    """Nested containers of tensors and plain values, the tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(entry) for entry in value)
    return value
