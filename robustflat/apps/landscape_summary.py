"""What a landscape leaves behind: arrays and settings in the store, the place of its pictures, the last screen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

import robustflat
from robustflat.apps.config import _safe_name
from robustflat.apps.landscape_networks import Shown
from robustflat.errors import DataError
from robustflat.flatness.landscape_result import ARRAYS, LandscapeResult
from robustflat.store.results import ResultStore

ATTRIBUTES = ("loss", "attack", "images", "directions", "reduction", "normalisation", "length", "examples", "precision")
"""Settings that are attributes of their own; "settings" has all."""


def to_store(
    result: LandscapeResult, one: Shown, values: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], dict[str, object]]:
    """Arrays and attributes for the results file."""
    arrays = {name: getattr(result, name).numpy() for name in ARRAYS}
    attrs: dict[str, object] = {
        "kind": "landscape",
        "shape": result.kind,
        "role": "landscape",
        "checkpoint": one.file.name,
        "file": one.file.path.name,
        "epoch": one.file.epoch,
        "seed": result.settings["seed"],
        "settings": json.dumps(result.settings, sort_keys=True),
        "config": json.dumps(values["landscape"], sort_keys=True, default=str),
        "device": values["device"],
        "version": robustflat.__version__,
        "torch": torch.__version__,
    }
    return arrays, {**{key: result.settings.get(key) for key in ATTRIBUTES}, **attrs}


def stored_landscape(store: ResultStore, name: str) -> LandscapeResult:
    """What `to_store` made.

    Raises:
        DataError: if it is not complete.
    """
    stored = store.read(name)
    try:
        arrays = {part: torch.from_numpy(stored.arrays[part]) for part in ARRAYS}
        settings = json.loads(stored.attrs["settings"])
        return LandscapeResult(**arrays, kind=str(stored.attrs["shape"]), settings=settings)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{store.path}: '{name}' is no stored landscape ({error}). Measure it anew: force=true."
        ) from error


def picture_path(config: DictConfig, shown: Sequence[Shown], name: str) -> Path:
    """Where pictures go: `file=`, the run's folder, or a folder for pictures of several networks."""
    if config.file is not None:
        return Path(config.file)
    if len({one.run for one in shown}) == 1 and shown[0].run is not None:
        checkpoints = [one.file.name for one in shown if one.file.name != "last"]
        return shown[0].run / "landscapes" / f"{_safe_name('-'.join([name, *checkpoints]))}.png"
    who = [one.file.path.stem if one.run is None else one.run.resolve().name for one in shown]
    return Path(config.outputs) / "landscapes" / f"{_safe_name('-'.join([name, *who]))}.png"


def print_landscapes(
    console: Console, results: Mapping[str, LandscapeResult], caption: str, files: Sequence[Path]
) -> None:
    """A line per network, and where the pictures are."""
    for text in (_planes if _is_plane(results) else _lines)(results):
        console.print(text)
    console.print(f"\n{caption}", markup=False)
    for file in files:
        console.print(f"{file.suffix[1:]:<13}{file}", markup=False)


def _is_plane(results: Mapping[str, LandscapeResult]) -> bool:
    return next(iter(results.values())).kind == "plane"


def _lines(results: Mapping[str, LandscapeResult]) -> list[Table | str]:
    first = next(iter(results.values()))
    path, reduction = first.kind == "path", str(first.settings.get("reduction"))
    over = "" if len(first.losses) < 2 else f", {reduction} of {len(first.losses)} directions"
    over += " ± standard error" if over and reduction == "mean" else ""
    table = Table("network", title=f"{first.loss_label}{over}", title_justify="left")
    last = len(first.steps) - 1
    places = (0, last // 2, last)
    for place in places:
        table.add_column(f"s = {float(first.steps[place]):g}", justify="right")
    table.add_column("error at s = 0", justify="right")
    table.add_column("barrier" if path else "largest", justify="right")
    for name, result in results.items():
        errors = result.standard_error if reduction == "mean" else torch.zeros_like(result.steps)
        values = [_with_error(float(result.curve[i]), float(errors[i])) for i in places]
        at_zero = 100 * float(result.errors[0, 0 if path else last // 2])
        highest = result.barrier if path else float(result.losses.max())
        table.add_row(name, *values, f"{at_zero:.1f} %", f"{highest:.4g}")
    return [table, *_warnings(results)]


def _planes(results: Mapping[str, LandscapeResult]) -> list[Table | str]:
    first = next(iter(results.values()))
    table = Table("network", title=first.loss_label, title_justify="left")
    for column in ("at the network", "lowest", "largest", "error at the network"):
        table.add_column(column, justify="right")
    middle = len(first.steps) // 2
    for name, result in results.items():
        losses = (result.losses[middle, middle], result.losses.min(), result.losses.max())
        error = 100 * float(result.errors[middle, middle])
        table.add_row(name, *(f"{float(value):.4g}" for value in losses), f"{error:.1f} %")
    return [table, *_warnings(results)]


def _warnings(results: Mapping[str, LandscapeResult]) -> list[Table | str]:
    return [
        f"{name}: {result.not_finite} losses are infinite or not a number; the curves have gaps there."
        for name, result in results.items()
        if result.not_finite
    ]


def _with_error(value: float, error: float) -> str:
    return f"{value:.4g}" if math.isnan(error) or not error else f"{value:.4g} ± {error:.2g}"
