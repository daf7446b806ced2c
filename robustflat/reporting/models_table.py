"""A line for each model of a study: means over its seeds with their standard errors, as one would print them."""

from __future__ import annotations

import math

import pandas as pd

from robustflat.reporting.quantities import Pool, model_frame, quantities, run_frame
from robustflat.reporting.records import Study

_COLUMNS = {
    "error": ("Err (%)", 1),
    "robust_error": ("RErr (%)", 1),
    "robust_loss": ("RLoss", 3),
    "gap_robust_loss": ("RLoss gap", 3),
    "average": ("flatness average", 2),
    "worst": ("flatness worst", 3),
    "stopped_robust_error": ("RErr early stopped (%)", 1),
}
"""Column of `quantities.model_frame` -> heading and decimals."""


def models_table(study: Study) -> pd.DataFrame:
    """Labels, numbers of seeds, and figures as text "mean ± standard error", on test examples; lowest RErr first.

    The error is over seeds, or, with one seed, that of the evaluation. A cell is empty unless all seeds have the
    number; a column that no run has is left out.

    Args:
        study: question and runs.
    """
    pool = Pool(study)
    frame = model_frame(study, run_frame(pool, list(quantities(pool).values())))
    for key in [key for key in _COLUMNS if key in frame]:
        frame.loc[frame[f"{key}_seeds"] < frame["seeds"], key] = math.nan
    if "robust_error" in frame:
        frame = frame.sort_values("robust_error", kind="stable", ignore_index=True)
    made: dict[str, list[object]] = {"model": list(frame["label"]), "seeds": list(frame["seeds"])}
    for key, (heading, decimals) in _COLUMNS.items():
        if key in frame:
            pairs = zip(frame[key], frame[f"{key}_stderr"], strict=True)
            made[heading] = [_text(float(value), float(error), decimals) for value, error in pairs]
    return pd.DataFrame(made)


def _text(value: float, error: float, decimals: int) -> str:
    if not math.isfinite(value):
        return ""
    spread = f" ± {error:.{decimals}f}" if math.isfinite(error) else ""
    return f"{value:.{decimals}f}{spread}"
