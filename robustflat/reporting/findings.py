"""The statistics of a report: the main correlations, what they hold fixed, and all measures side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from robustflat.reporting.correlation import (
    Correlation,
    across_families,
    correlation,
    correlation_table,
    p_text,
    partial_correlation,
    results_table,
    within_family,
)
from robustflat.reporting.correlation_result import plural
from robustflat.reporting.drawing import Bars, Drawing, Missing, Rule
from robustflat.reporting.quantities import measures_of, run_frame
from robustflat.reporting.report_tables import ReportTable, table_of
from robustflat.reporting.study_plots import Material, absent

SIGNIFICANT = 0.05
"""Corrected p below which a bar is filled."""

_MAIN = (("average", "robust_loss"), ("worst", "robust_loss"))
_MORE = (("average_clean", "robust_loss"), ("worst_clean", "robust_loss"), ("average", "gap_robust_loss"),
         ("average", "robust_error"), ("worst", "gap_robust_loss"), ("worst", "robust_error"),
         ("robust_loss", "robust_error"))  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """Correlations of a study.

    Attributes:
        average, worst: Pearson and Spearman of RLoss with average- and worst-case flatness.
        more: other pairs, partial correlations, within and across families.
    """

    average: tuple[Correlation, ...]
    worst: tuple[Correlation, ...]
    more: tuple[Correlation, ...]


def findings(material: Material) -> Findings:
    """Compute the correlations of a study; those that are not defined say why."""
    average, worst = (tuple(_pair(material, *pair, method) for method in ("pearson", "spearman")) for pair in _MAIN)
    kendall = [_pair(material, *pair, "kendall") for pair in _MAIN if len(material.have(*pair))]
    others = [_pair(material, *pair, m) for pair in _MORE if len(material.have(*pair)) for m in ("pearson", "spearman")]
    return Findings(average, worst, (*kendall, *others, *_held_fixed(material)))


def _pair(material: Material, x: str, y: str, method: str) -> Correlation:
    part = material.have(x, y)
    names = (words(material, x), words(material, y))
    if part.empty:
        return Correlation(method.capitalize(), *names, why=absent(material, x, y))
    return correlation(part[x], part[y], method=method, names=names, clusters=_units(part))


def _units(part: pd.DataFrame) -> pd.Series | None:
    """What is independent: models, if they have several seeds; None if each line is a model."""
    return None if part["label"].is_unique else part["label"]


def words(material: Material, key: str) -> str:
    """Name of a quantity in sentences, without its unit."""
    known = {"average": "average-case flatness", "worst": "worst-case flatness", "robust_loss": "RLoss"}
    if key in known and key not in material.quantities:
        return known[key]
    return material.title(key).partition(" (")[0]


def _held_fixed(material: Material) -> Iterator[Correlation]:
    for x, y in _MAIN:
        part = material.have(x, y)
        if part.empty:
            continue
        names = (words(material, x), words(material, y))
        for control in ("train_robust_loss", "error"):
            some = material.have(x, y, control)
            if len(some):
                held = {words(material, control): some[control]}
                yield partial_correlation(some[x], some[y], held, names=names, clusters=_units(some))
        if part["family"].duplicated().any():
            yield within_family(part[x], part[y], part["family"], names=names, clusters=_units(part))
        yield across_families(part[x], part[y], part["family"], names=names)


def correlations_table(found: Findings) -> ReportTable | Missing:
    """All correlations of `findings`."""
    table = results_table([*found.average, *found.worst, *found.more])
    lines = [_shown(line) for line in table.to_dict("records")]
    caption = "Every coefficient with its 95 % interval over models. Notes say what to be careful about."
    title = "How sure: correlations, partial correlations, within and across families"
    return table_of(pd.DataFrame(lines), "correlations", title, caption, digits=2)


def _shown(line: Mapping[object, object]) -> dict[str, object]:
    kept = {"of": line["y"], "with": line["x"], "given": line["given"], "coefficient": line["method"]}
    numbers = {name: float(str(line[name])) for name in ("value", "low", "high", "p")}
    return {**kept, **numbers, "models": line["n"], "independent": line["units"], "note": line["note"]}


def measures(material: Material) -> tuple[Drawing | Missing, ReportTable | Missing]:
    """Correlation of RLoss with every measure that was taken, corrected for their number: bars and table."""
    title, reason = "RLoss against every flatness measure", ""
    wanted = measures_of(material.pool)
    if "robust_loss" not in material.quantities or not wanted:
        reason = "No run has both RLoss and a flatness measure."
        return Missing("measures", title, reason), Missing("all_measures", "All measures", reason)
    frame = run_frame(material.pool, [material.quantities["robust_loss"], *wanted])
    frame = frame[frame["status"] != "failed"]
    titles = {quantity.key: quantity.title for quantity in wanted} | {"robust_loss": "RLoss"}
    keys = [quantity.key for quantity in wanted]
    clusters = None if frame["label"].is_unique else "label"
    found = correlation_table(
        frame, "robust_loss", keys, methods=("pearson", "spearman"), titles=titles, clusters=clusters
    )
    columns = {"x": "measure", "method": "coefficient", "value": "value", "low": "low", "high": "high", "p": "p",
               "p_holm": "p (Holm)", "p_bh": "p (Benjamini-Hochberg)", "n": "models", "units": "independent",
               "note": "note"}  # fmt: skip
    table = table_of(
        found[list(columns)].rename(columns=columns),
        "all_measures",
        "Every flatness measure against RLoss",
        f"p-values corrected for {plural(len(wanted), 'measure')}.",
        digits=2,
        filters=True,
    )
    return _bars(found[found["method"] == "Spearman"], title), table


def _bars(found: pd.DataFrame, title: str) -> Drawing | Missing:
    known = found[found["value"].notna()].sort_values("value", ascending=False)
    if known.empty:
        reasons = " ".join(dict.fromkeys(str(note) for note in found["note"]))
        return Missing("measures", title, f"No correlation is defined. {reasons}")
    strong = tuple(bool(p < SIGNIFICANT) for p in known["p_holm"].fillna(1.0))
    labels = tuple(
        f"{line['x']}\nSpearman {line['value']:.2f} {_interval(line['low'], line['high'])}\n"
        f"{p_text(line['p_holm']) if not math.isnan(line['p_holm']) else 'p unknown'} after Holm's correction"
        for line in known.to_dict("records")
    )
    bars = Bars(tuple(known["x"]), tuple(known["value"]), tuple(known["low"]), tuple(known["high"]), strong, labels)
    best = known.iloc[0]
    reading = (
        f"{plural(len(known), 'measure')}; {sum(strong)} with a corrected p below {SIGNIFICANT}. "
        f"Highest: {best['x']}, {best['value']:.2f}."
    )
    caption = f"Spearman's rho with 95 % intervals; hatched: p after Holm's correction not below {SIGNIFICANT}."
    return Drawing("measures", title, caption, reading, "Spearman's rho with RLoss", "", (Rule("x", 0.0, ""), bars))


def _interval(low: float, high: float) -> str:
    return "without an interval" if math.isnan(low) else f"[{low:.2f}, {high:.2f}]"
