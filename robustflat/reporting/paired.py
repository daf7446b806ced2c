"""Two columns of the same models, made fit for statistics, or the reason why they are not."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from robustflat.errors import UserError
from robustflat.reporting.bootstrap import Units
from robustflat.reporting.correlation_result import FEW, plural
from robustflat.reporting.kernels import Array

Values: TypeAlias = "ArrayLike | pd.Series[Any]"
Labels: TypeAlias = "Sequence[Hashable] | NDArray[Any] | pd.Series[Any]"

LEAST = 3
"""Models below which no correlation is given: two points always lie on a line."""


class Paired(NamedTuple):
    """What is left of two columns.

    `why` is "" if a correlation can be taken; `kept` (n_before,) tells which models are left.
    """

    x: Array
    y: Array
    kept: NDArray[np.bool_]
    units: Units
    why: str
    cautions: tuple[str, ...]


def paired(
    x: Values,
    y: Values,
    names: tuple[str, str],
    *,
    others: Sequence[Array] = (),
    clusters: Labels | None = None,
    unit: str = "model",
) -> Paired:
    """Drop models without both values, and see whether enough is left that varies.

    Args:
        x, y: (n,) values; missing or infinite ones are dropped with their model.
        names: of x and y.
        others: further columns (n,) that must be there too.
        clusters: (n,) label of the independent unit that each model belongs to; None: each model is one.
        unit: what such a unit is called.

    Raises:
        UserError: if the columns differ in length or are no columns.
    """
    first, second = column(x, names[0]), column(y, names[1])
    labels = np.arange(len(first)) if clusters is None else codes(clusters)
    for name, other in [(names[1], second), ("clusters", labels), *(("a control", other) for other in others)]:
        if len(other) != len(first):
            raise UserError(f"{names[0]} has {len(first)} values, {name} has {len(other)}: give one for each model.")
    kept = np.isfinite(first) & np.isfinite(second)
    for other in others:
        kept &= np.isfinite(other)
    cautions = left_out(kept)
    first, second = first[kept], second[kept]
    present, member = np.unique(labels[kept], return_inverse=True)
    units = Units(member.astype(np.intp), len(present))
    why = _why_not(first, second, names, units.count, unit)
    if not why and units.count < FEW:
        cautions.append(f"Fewer than {FEW} {plural(2, unit)[2:]}: the interval is rough, one can change it.")
    return Paired(first, second, kept, units, why, tuple(cautions))


def left_out(kept: NDArray[np.bool_]) -> list[str]:
    """The caution about models (n,) that are not kept, if there are any."""
    lost = int((~kept).sum())
    return [f"{lost} of {plural(len(kept), 'model')} left out: a value is missing or not finite."] if lost else []


def _why_not(x: Array, y: Array, names: tuple[str, str], units: int, unit: str) -> str:
    if len(x) == 0:
        return "No model has both values."
    if units < LEAST:
        return f"Only {plural(units, unit)} with both values; a correlation needs at least {LEAST}."
    for values, name in ((x, names[0]), (y, names[1])):
        if np.ptp(values) <= 1e-12 * np.abs(values).max():
            return f"All {plural(len(values), 'model')} have the same {name}."
    return ""


def column(values: Values, name: str) -> Array:
    """Values as float64 (n,); what is missing is NaN.

    Raises:
        UserError: if they are not numbers in one dimension.
    """
    try:
        if isinstance(values, pd.Series):
            found = values.to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be numbers, one for each model ({error}).") from error
    if found.ndim != 1:
        raise UserError(f"{name} must be one number for each model, got an array of shape {found.shape}.")
    return found


def codes(labels: Labels) -> NDArray[np.intp]:
    """Labels (n,) as numbers from 0 in order of appearance; a missing label is a unit of its own."""
    found, _ = pd.factorize(np.asarray(pd.Series(list(labels), dtype=object)), use_na_sentinel=True)
    missing = found < 0
    found = found.astype(np.intp)
    found[missing] = found.max(initial=-1) + 1 + np.arange(int(missing.sum()))
    return found
