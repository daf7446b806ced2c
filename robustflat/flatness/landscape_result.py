"""What a landscape holds: losses and errors along lines or on a plane, kept as arrays in one file."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

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
    def standard_error(self) -> Tensor:
        """Of the mean over lines, (S,): their standard deviation over the root of their number; NaN with one line."""
        return self.spread / math.sqrt(len(self.losses))

    @property
    def curve(self) -> Tensor:
        """Mean or maximum over lines, whichever the settings say, (S,)."""
        return self.max if self.settings.get("reduction") == "max" else self.mean

    @property
    def step_label(self) -> str:
        """What a step of 1 is: the label of the axis."""
        return _STEPS[self.kind] if self.kind == "path" else _STEPS[str(self.settings.get("normalisation", "none"))]

    @property
    def loss_label(self) -> str:
        """Which loss in which unit: the label of the axis."""
        return f"{_LOSSES[str(self.settings.get('loss', 'robust'))]}cross-entropy (nats)"

    @property
    def error_label(self) -> str:
        """Which error in which unit: the label of the axis."""
        return f"{_LOSSES[str(self.settings.get('loss', 'robust'))]}error (%)"

    @property
    def not_finite(self) -> int:
        """How many losses are infinite or not a number, as they may be far from the network."""
        return int((~self.losses.isfinite()).sum())

    def caption(self, data: str = "") -> str:
        """How the picture was made: examples, attack, radius, directions, protocol.

        Args:
            data: name of the data set and split.
        """
        s = self.settings
        attack = s.get("images") if s.get("loss") == "clean" else f"{s.get('attack_name')}, {s.get('images')}"
        where = f"{data} ({s.get('examples')} examples)" if data else f"{s.get('examples')} examples"
        if self.kind == "path":
            return f"{where}; {attack}; {len(self.steps)} steps on the straight line {s.get('directions')}."
        lines = 2 if self.kind == "plane" else len(self.losses)
        count = f"{lines} {s.get('directions')}" if lines > 1 else f"1 of {s.get('directions')}"
        text = f"{where}; {attack}; {count}, length {s.get('length'):g} ({s.get('normalisation')} normalisation)"
        steps = f"{len(self.steps)} steps"
        if self.kind == "plane":
            steps = f"cosine between them {s.get('cosine'):.3f}; {len(self.steps)} x {len(self.steps)} steps"
        return f"{text}; {steps}; seed {s.get('seed')}."

    def picture(self, path: Path | str, name: str = "network", *, title: str = "", data: str = "") -> list[Path]:
        """Draw it; several networks in one picture: `reporting.landscape_plots`.

        Args:
            path: PNG, SVG and HTML are written, whatever its suffix.
            name: of the network, for the legend.
            title: above the picture.
            data: see `caption`.

        Returns:
            The files written.
        """
        from robustflat.reporting.landscape_pictures import draw  # matplotlib and plotly take seconds to import

        return draw({name: self}, path, title=title, caption=self.caption(data))

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
        arrays = {name: getattr(self, name).numpy() for name in ARRAYS}
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
            # Opened here, because np.load would leave a damaged file open.
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in ARRAYS}
                return LandscapeResult(**arrays, kind=str(stored["kind"]), settings=json.loads(str(stored["settings"])))
        except (OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile, zlib.error) as error:
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


_STEPS = {
    "layer": "relative step s (1: the L2 norm of each weight tensor)",
    "filter": "relative step s (1: the L2 norm of each filter)",
    "relative": "relative step s (1: the L2 norm of all weights)",
    "global": "step s (L2 norm over all weights)",
    "layer_max_abs": "relative step s (1: the largest weight of each tensor)",
    "filter_max_abs": "relative step s (1: the largest weight of each filter)",
    "none": "step s (1: the direction as given)",
    "path": "position s (0: first network, 1: second network)",
}

_LOSSES = {"robust": "robust ", "clean": "clean ", "frozen": "frozen adversarial "}

ARRAYS = ("steps", "losses", "errors", "factors")
