"""Metrics as TensorBoard event files (optional extra)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustflat.errors import UserError
from robustflat.loggers.base import Null
from robustflat.types import Scalars


class TensorboardLogger(Null):
    """Writes scalars to event files that `tensorboard --logdir` shows.

    Args:
        folder: events go to its sub-folder "tensorboard", made if needed.
        run_id: id of the run; shown with the configuration.
        group: runs that belong together, such as the experiment; shown with the configuration.
        config: the run's configuration, plain values; shown as text.

    Raises:
        UserError: if TensorBoard is not installed, with the command that installs it.
    """

    def __init__(
        self,
        *,
        folder: str | Path,
        run_id: str | None = None,
        group: str | None = None,
        config: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = Path(folder) / "tensorboard"
        self._writer_class = _writer_class()
        self._writer: Any = self._writer_class(log_dir=str(self.folder))
        about = {"run": run_id, "group": group, "config": dict(config or {})}
        text = json.dumps(about, indent=2, default=str)
        self._writer.add_text("configuration", f"```\n{text}\n```")

    def log(self, metrics: Scalars, *, step: int) -> None:
        """Write each number as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def summary(self, metrics: Scalars) -> None:
        """Write the final numbers as "summary/<name>" at step 0."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"summary/{name}", value, global_step=0)

    def rewind(self, step: int) -> None:
        """Tell TensorBoard to hide what was logged after `step`."""
        self._writer.close()
        self._writer = self._writer_class(log_dir=str(self.folder), purge_step=step + 1)

    def finish(self, status: str) -> None:
        """Close the files."""
        self._writer.close()


def _writer_class() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise UserError(
            'TensorBoard is not installed. Run: pip install "robustflat[tensorboard]" (or leave '
            "logger=tensorboard out; metrics.jsonl is written anyway)."
        ) from error
