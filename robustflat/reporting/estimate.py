"""One coefficient with interval: what all correlations of this room share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from robustflat.errors import UserError
from robustflat.reporting.bootstrap import Range, Resampling, analytic_interval, bootstrap_interval, over_units
from robustflat.reporting.correlation_result import Correlation, plural
from robustflat.reporting.kernels import Array, Kernel, kendall, pearson, spearman
from robustflat.reporting.paired import Paired
from robustflat.reporting.significance import p_of_clusters, p_of_kendall, p_of_t

METHODS: Mapping[str, Kernel] = MappingProxyType({"pearson": pearson, "spearman": spearman, "kendall": kendall})
"""Pearson's r (linear relation), Spearman's rho and Kendall's tau-b (monotone relation)."""

TITLES = MappingProxyType({"pearson": "Pearson", "spearman": "Spearman", "kendall": "Kendall"})
WORDS = MappingProxyType(
    {"analytic": "analytic interval", "percentile": "percentile bootstrap", "bca": "BCa bootstrap"}
)

NO_SPREAD = "It is at the end of its scale, where an interval from so few models would mean nothing."


@dataclass(frozen=True)
class Asked:
    """What is to be estimated.

    Attributes:
        kernel: the coefficient.
        method: "pearson", "spearman" or "kendall", or "other" if no formula holds for its interval and p.
        title: its name for people.
        names: of x and y.
        settings: of the interval.
        unit: what is resampled, in the singular.
        controls: degrees of freedom that controls take.
        given: names of the controls.
    """

    kernel: Kernel
    method: str
    title: str
    names: tuple[str, str]
    settings: Resampling
    unit: str = "model"
    controls: int = 0
    given: tuple[str, ...] = ()


def value_of(kernel: Kernel, x: Array, y: Array) -> float:
    """The coefficient of the sample itself."""
    return float(kernel(x, y, np.ones((1, len(x))))[0])


def estimated(data: Paired, asked: Asked) -> Correlation:
    """The coefficient of two columns with interval and p-value, or the reason why there is none.

    Raises:
        UserError: if an analytic interval is asked for where no formula holds.
    """
    clustered = data.units.count < len(data.x)
    chosen = "bca" if asked.settings.interval == "auto" else asked.settings.interval
    if chosen == "analytic" and (clustered or asked.method == "other"):
        raise UserError(
            f"There is no analytic interval for {asked.title} {'with clusters' if clustered else ''}; "
            "ask for interval='bca' or 'percentile'."
        )
    if data.why:
        return undefined(asked, data, data.why)
    if data.units.count - asked.controls < 3:
        taken = f"{plural(asked.controls, 'control')} and {plural(data.units.count, asked.unit)}"
        return undefined(asked, data, f"{taken}: too few are left for a correlation.")
    value = value_of(asked.kernel, data.x, data.y)
    if math.isnan(value):
        held = " once the controls are held fixed" if asked.given else ""
        return undefined(asked, data, f"One of the two does not vary{held}.")
    return _with_interval(value, data, asked, chosen)


def _with_interval(value: float, data: Paired, asked: Asked, chosen: str) -> Correlation:
    cautions, count = list(data.cautions), data.units.count
    clustered, settings = count < len(data.x), asked.settings
    samples = np.empty(0)
    if abs(value) >= 1 - 1e-12:
        ends = Range(math.nan, math.nan)
        cautions.append(NO_SPREAD)
    elif chosen == "analytic":
        ends = analytic_interval(value, method=asked.method, n=len(data.x), controls=asked.controls,
                                 confidence=settings.confidence)  # fmt: skip
    else:
        samples, jackknife = over_units(asked.kernel, data.x, data.y, data.units, settings)
        ends = bootstrap_interval(
            samples,
            value,
            units=count - asked.controls,
            settings=settings,
            jackknife=jackknife if chosen == "bca" else None,
            stretched=(asked.method == "pearson" and not asked.given) or clustered,
        )
        if math.isnan(ends.low):
            cautions.append("Too many bootstrap samples have no variation, so there is no interval.")
    p = p_of_clusters(value, samples, count) if clustered else _p(value, data, asked)
    unit = f"{plural(2, asked.unit)[2:]}"
    return Correlation(
        asked.title, *asked.names, value=value, low=ends.low, high=ends.high, p=p, n=len(data.x), units=count,
        unit=asked.unit, interval=f"{100 * settings.confidence:g} % {WORDS[chosen]} over {unit}", given=asked.given,
        cautions=tuple(cautions),
    )  # fmt: skip


def _p(value: float, data: Paired, asked: Asked) -> float:
    perfect = asked.method == "spearman" and not asked.given and abs(value) >= 1 - 1e-12
    if asked.method == "kendall" or perfect:
        # Orders that agree wholly are as rare for rho as for tau; Student's t would call them impossible.
        return p_of_kendall(data.x, data.y)
    return math.nan if asked.method == "other" else p_of_t(value, len(data.x) - 2 - asked.controls)


def undefined(asked: Asked, data: Paired, why: str) -> Correlation:
    """The result that has no value, for a reason."""
    return Correlation(
        asked.title, *asked.names, n=len(data.x), units=data.units.count, unit=asked.unit, given=asked.given, why=why,
        cautions=data.cautions,
    )  # fmt: skip
