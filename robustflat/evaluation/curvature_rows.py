"""Tidy rows of stored curvature and of sharpness measures; see `robustflat.evaluation.rows`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robustflat.evaluation.rows import Row


def spectrum_rows(
    name: str,
    top: Sequence[float],
    bottom: Sequence[float],
    attrs: Mapping[str, Any],
    *,
    residuals: tuple[float, float],
) -> list[Row]:
    """Ends of a spectrum (stderr: the residual, within which an exact eigenvalue lies), their ratio, trace and norm.

    Args:
        name: of the result. Another matrix than the Hessian of the mean loss is another measure: its name is added,
            as in "clean_gauss_newton" and "clean_sum_over_batches".
        top, bottom: eigenvalues from the outermost inward.
        attrs: of the stored result.
        residuals: of the outermost ones at both ends.
    """
    count = int(attrs["examples"])
    for setting, usual in (("curvature", "hessian"), ("reduction", "mean")):
        name += f"_{attrs[setting]}" if attrs.get(setting, usual) != usual else ""
    rows = []
    if len(top):
        rows.append(_row("hessian", name, "lambda_max", count, float(top[0]), residuals[0]))
    if len(bottom):
        rows.append(_row("hessian", name, "lambda_min", count, float(bottom[0]), residuals[1]))
    if len(top) and len(bottom) and top[0]:
        rows.append(_row("hessian", name, "non_convexity", count, abs(float(bottom[0]) / float(top[0])), math.nan))
    for metric in ("trace", "frobenius"):
        if metric in attrs:
            error = attrs.get(f"{metric}_standard_error", math.nan)
            rows.append(_row("hessian", name, metric, count, float(attrs[metric]), float(error)))
    return rows


def sharpness_rows(name: str, attrs: Mapping[str, Any]) -> list[Row]:
    """The value of a sharpness measure, with its standard error over draws, and over examples where it is known.

    On another loss than the clean one it is another measure: "sam_frozen", "sam_robust".
    """
    loss = str(attrs.get("loss", "clean")).split()[0]
    name = name if loss == "clean" else f"{name}_{loss}"
    count, value = int(attrs["examples"]), float(attrs["value"])
    rows = [_row("sharpness", name, "sharpness", count, value, float(attrs.get("standard_error", math.nan)))]
    if "example_error" in attrs:
        rows.append(_row("sharpness", name, "sharpness_over_examples", count, value, float(attrs["example_error"])))
    return rows


def _row(kind: str, measure: str, metric: str, count: int, value: float, stderr: float) -> Row:
    missing = {"radius": None, "low": math.nan, "high": math.nan}
    return {
        "kind": kind,
        "measure": measure,
        "metric": metric,
        "count": count,
        "value": value,
        "stderr": stderr,
        **missing,
    }
