"""Means of training scalars, summed on the device and read in one transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RunningMeans:
    """Sums named 0-dim tensors where they are, so that adding never waits for the device.

    `read` gives the means since the last read and adds them to a second sum, whose means `read_all` gives.
    """

    def __init__(self) -> None:
        self._window: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add one step's values, 0-dim tensors; a name may be missing in some steps."""
        for name, value in parts.items():
            value = value.detach()
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            self._window[name] = self._window[name] + value if name in self._window else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Mean of each name over the steps since the last read; waits for the device once."""
        if not self._window:
            return {}
        totals = torch.stack(
            [v.double().cpu() if v.device.type == "mps" else v.double() for v in self._window.values()]
        )
        means = {}
        for name, total in zip(self._window, totals.tolist(), strict=True):
            count = self._counts[name]
            means[name] = total / count
            before, steps = self._sums.get(name, (0.0, 0))
            self._sums[name] = (before + total, steps + count)
        self._window, self._counts = {}, {}
        return means

    def finite(self) -> bool:
        """Whether no value since the last read is infinite or not a number; waits for the device once."""
        return not self._window or bool(torch.stack([v.isfinite().all().cpu() for v in self._window.values()]).all())

    def state_dict(self) -> dict[str, Any]:
        """Both sums, so that an epoch can go on where it was interrupted with the same means."""
        return {"window": dict(self._window), "counts": dict(self._counts), "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue saved sums; an empty mapping starts anew."""
        self._window = {name: value.to(device) for name, value in state.get("window", {}).items()}
        self._counts, self._sums = dict(state.get("counts", {})), dict(state.get("sums", {}))

    def read_all(self) -> dict[str, float]:
        """Mean of each name over all steps that `read` has seen since the last `read_all`."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means
