"""What a landscape holds: losses and errors along lines or on a plane, kept as arrays in one file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustflat.errors import DataError, UserError


@dataclass(frozen=True, eq=False)
class LandscapeResult:
    """Mean loss and error at w + s * direction.

    Attributes:
        steps: (S,) positions s on each axis, in units of the normalisation (see `settings`).
        losses: (D, S) mean loss over the examples on each of D lines; (S, S) on a plane, first axis first.
        errors: likewise, the fraction of examples misclassified.
        factors: (D,) or (2,) L2 norm of the directions at s = 1.
        kind: "lines", "plane" or "path" (from one network, s = 0, to another, s = 1).
        settings: all options in words or numbers; they travel with the file.
    """

    steps: Tensor
    losses: Tensor
    errors: Tensor
    factors: Tensor
    kind: str
    settings: dict[str, Any]

    @property
    def mean(self) -> Tensor:
        """Mean loss over lines, (S,)."""
        return self._lines().mean(dim=0)

    @property
    def max(self) -> Tensor:
        """Largest loss of any line, (S,)."""
        return self._lines().amax(dim=0)

    @property
    def spread(self) -> Tensor:
        """Standard deviation of the loss over lines, (S,); NaN with one line."""
        lines = self._lines()
        return lines.std(dim=0, correction=1) if len(lines) > 1 else torch.full_like(lines[0], torch.nan)

    @property
    def barrier(self) -> float:
        """Path: max over s of L(s) - ((1 - s) L(0) + s L(1)), height above the chord (Frankle et al., ICML 2020)."""
        if self.kind != "path":
            raise UserError(f"Only a path between two networks has a barrier, this landscape holds {self.kind}.")
        curve = self.losses[0]
        return float((curve - (1 - self.steps) * curve[0] - self.steps * curve[-1]).amax())

    def save(self, path: Path | str) -> Path:
        """Write all arrays and settings to one .npz file, replacing an old one only when complete.

        Raises:
            UserError: if the name does not end in .npz.
        """
        target = Path(path)
        if target.suffix != ".npz":
            raise UserError(f"A landscape is stored as .npz, got '{target.name}'.")
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.stem}.unfinished.npz")
        arrays = {name: getattr(self, name).numpy() for name in _ARRAYS}
        np.savez_compressed(unfinished, kind=self.kind, settings=json.dumps(self.settings), **arrays)
        unfinished.replace(target)
        return target

    @staticmethod
    def load(path: Path | str) -> LandscapeResult:
        """Read what `save` wrote.

        Raises:
            DataError: if the file is missing or is no landscape.
        """
        try:
            with np.load(Path(path), allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in _ARRAYS}
                return LandscapeResult(**arrays, kind=str(stored["kind"]), settings=json.loads(str(stored["settings"])))
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"'{path}' is not a stored landscape ({error}). Measure it again.") from error

    def __str__(self) -> str:
        """One line: range of the losses and all settings."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        low, high = float(self.losses.amin()), float(self.losses.amax())
        return f"loss {low:.4g} to {high:.4g} on {self.kind} of {tuple(self.losses.shape)} points ({settings})"

    def _lines(self) -> Tensor:
        if self.kind == "plane":
            raise UserError("A plane has no mean over lines: use its losses (S, S).")
        return self.losses


_ARRAYS = ("steps", "losses", "errors", "factors")
