"""A correlation with its uncertainty, and the sentence that says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

FEW = 10
"""Models (or configurations) below which a correlation carries a warning."""


@dataclass(frozen=True)
class Correlation:
    """A coefficient between two quantities of the same models.

    Attributes:
        method: name of the coefficient, such as "Pearson".
        x, y: names of the quantities.
        value: the coefficient; NaN if it is not defined, and then `why` says why.
        low, high: ends of the interval; NaN if there is none.
        p: probability of a coefficient at least this far from 0 if the two had nothing to do with each other
            (two-sided); NaN if not known.
        n: models that count.
        units: independent units among them (configurations, families); `n` where each model is one.
        unit: what a unit is called, in the singular.
        interval: how the interval was made, such as "95 % BCa bootstrap over models".
        given: what is held fixed (partial correlations).
        why: why there is no value, in one sentence; "" if there is one.
        cautions: what to keep in mind, in sentences.
    """

    method: str
    x: str
    y: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    n: int = 0
    units: int = 0
    unit: str = "model"
    interval: str = ""
    given: tuple[str, ...] = ()
    why: str = ""
    cautions: tuple[str, ...] = ()

    @property
    def defined(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    def sentence(self) -> str:
        """The result in words, with what to be careful about."""
        if not self.defined:
            return f"{self.method} correlation of {self.y} with {self.x}: not defined. {self.why}"
        given = f", given {_listed(self.given)}" if self.given else ""
        parts = f"{self.method} {self.value:.2f}"
        if not math.isnan(self.low):
            parts += f" [{self.low:.2f}, {self.high:.2f}] ({self.interval})"
        if not math.isnan(self.p):
            parts += f", {p_text(self.p)}"
        told = f"Over {self._counted()}{given}, {self.y} {self._verb()} {self.x}: {parts}."
        return " ".join([told, *self.cautions])

    def __str__(self) -> str:
        return self.sentence()

    def _counted(self) -> str:
        many = plural(self.n, "model")
        return many if self.unit == "model" else f"{many} of {plural(self.units, self.unit)}"

    def _verb(self) -> str:
        if math.isnan(self.low):
            return "tends to rise with" if self.value > 0 else "tends to fall with rising"
        if self.low > 0:
            return "rises with"
        return "falls with rising" if self.high < 0 else "shows no clear relation to"


def p_text(p: float) -> str:
    """A p-value for people: "p = 2e-21", "p = 0.03", "p < 1e-300"."""
    if p < 1e-300:
        return "p < 1e-300"
    return f"p = {p:.0e}" if p < 0.001 else f"p = {p:.2g}"


def plural(count: int, noun: str) -> str:
    """Count and noun: 1 model, 3 models, 2 families."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def results_table(results: Sequence[Correlation]) -> pd.DataFrame:
    """A line per correlation: y, x, given, method, value, low, high, p, n, units, interval, note, sentence."""
    columns = ["y", "x", "given", "method", "value", "low", "high", "p", "n", "units", "interval", "note", "sentence"]
    lines = [
        (r.y, r.x, ", ".join(r.given), r.method, r.value, r.low, r.high, r.p, r.n, r.units, r.interval, note, str(r))
        for r, note in ((result, result.why or " ".join(result.cautions)) for result in results)
    ]
    return pd.DataFrame(lines, columns=columns)
