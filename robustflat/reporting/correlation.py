"""Correlation between two quantities of the same models, with intervals that hold for a dozen models.

Everything of the statistics is importable from here. `correlation` is for two columns; `partial_correlation`,
`within_family`, `across_families` and `granulated_kendall` for what a third one explains; `correlation_over_examples`
for the choice of evaluation examples; `correlation_table` for many measures at once, corrected for their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from robustflat.errors import require_one_of
from robustflat.reporting.bootstrap import INTERVALS, Resampling
from robustflat.reporting.columns import columns
from robustflat.reporting.correlation_result import Correlation, p_text, results_table
from robustflat.reporting.estimate import METHODS, TITLES, Asked, estimated
from robustflat.reporting.example_bootstrap import correlation_over_examples
from robustflat.reporting.paired import Labels, Values, paired
from robustflat.reporting.partial_correlation import (
    across_families,
    granulated_kendall,
    partial_correlation,
    within_family,
)
from robustflat.reporting.regression import Line, corrected_for_noise, regression_line
from robustflat.reporting.significance import CORRECTIONS, adjusted

__all__ = [
    "CORRECTIONS",
    "INTERVALS",
    "METHODS",
    "Correlation",
    "Line",
    "Resampling",
    "across_families",
    "adjusted",
    "columns",
    "corrected_for_noise",
    "correlation",
    "correlation_over_examples",
    "correlation_table",
    "granulated_kendall",
    "p_text",
    "partial_correlation",
    "regression_line",
    "results_table",
    "within_family",
]


def correlation(
    x: Values,
    y: Values,
    *,
    method: str = "pearson",
    names: tuple[str, str] = ("x", "y"),
    clusters: Labels | None = None,
    settings: Resampling | None = None,
) -> Correlation:
    """Correlation of two columns with interval and two-sided p-value.

    The interval is by default BCa over models (percentiles taken further out for Pearson's r, see
    `bootstrap.bootstrap_interval`): on simulated normal data of 12 to 74 models all of the offered ones cover 92 to
    98 %, and BCa needs no normality. p-values: Student's t (Pearson; Spearman approximately, but as for Kendall where
    the orders agree wholly), exact or normal (Kendall).

    Args:
        x, y: (n,) values of n models. Models where one is missing or infinite are left out, and the result says so.
        method: "pearson", "spearman" or "kendall" (tau-b).
        names: of x and y in sentences.
        clusters: (n,) label of the configuration that each model belongs to. Then configurations are drawn instead of
            models, so that seeds do not count as independent models, and p comes from the spread of the bootstrap.
        settings: of the interval.

    Returns:
        a result without value and with a reason, if there are fewer than 3 models or one side does not vary.

    Raises:
        UserError: if columns differ in length, for an unknown method, or an analytic interval with clusters.
    """
    require_one_of("method", method, METHODS)
    unit = "model" if clusters is None else "configuration"
    data = paired(x, y, names, clusters=clusters, unit=unit)
    return estimated(data, Asked(METHODS[method], method, TITLES[method], names, settings or Resampling(), unit=unit))


def correlation_table(
    frame: pd.DataFrame,
    y: str,
    measures: Sequence[str],
    *,
    methods: Sequence[str] = ("pearson", "spearman", "kendall"),
    titles: Mapping[str, str] | None = None,
    clusters: str | None = None,
    settings: Resampling | None = None,
) -> pd.DataFrame:
    """Correlation of one quantity with many measures, with p-values corrected for their number.

    Args:
        frame: a line per model, as from `columns`.
        y: column of the quantity, such as the robust loss.
        measures: columns of the measures.
        methods: coefficients.
        titles: column -> its name for people.
        clusters: column with the configuration of each model, such as "label"; None: models are independent.
        settings: of the intervals.

    Returns:
        the columns of `results_table`, then p_holm and p_bh, corrected over the measures of each method.

    Raises:
        UserError: if a column or method is unknown.
    """
    for name in (y, *measures, *([clusters] if clusters else [])):
        require_one_of("A column of the table", name, [str(column) for column in frame.columns])
    named = dict(titles or {})
    tables = []
    for method in methods:
        found = [
            correlation(frame[x], frame[y], method=method, names=(named.get(x, x), named.get(y, y)),
                        clusters=None if clusters is None else frame[clusters], settings=settings)
            for x in measures
        ]  # fmt: skip
        table = results_table(found)
        p = np.array([result.p for result in found])
        tables.append(table.assign(p_holm=adjusted(p, "holm"), p_bh=adjusted(p, "benjamini-hochberg")))
    return pd.concat(tables, ignore_index=True) if tables else results_table([])
