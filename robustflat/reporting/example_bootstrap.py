"""How much a correlation over models depends on the evaluation examples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from robustflat.errors import UserError, require_one_of
from robustflat.reporting.bootstrap import Resampling, bootstrap_interval, counts
from robustflat.reporting.correlation_result import Correlation
from robustflat.reporting.estimate import METHODS, NO_SPREAD, TITLES, WORDS, Asked, undefined, value_of
from robustflat.reporting.paired import Labels, paired

SOURCES = ("examples", "models", "both")


def correlation_over_examples(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    *,
    over: str = "both",
    method: str = "pearson",
    names: tuple[str, str] = ("x", "y"),
    clusters: Labels | None = None,
    settings: Resampling | None = None,
) -> Correlation:
    """Correlation of two quantities that are means over the same evaluation examples, which count in the interval.

    Examples are drawn jointly: all models, and both quantities, see the same drawn examples, so what makes an example
    hard for all models does not count as noise.

    Args:
        x, y: (n, N) values of n models on N examples (losses, rises of the loss by weight perturbations, errors); a
            model's quantity is the mean over its examples. A model with a missing value is left out.
        over: "examples" (these models, other examples), "models" (these examples, other models) or "both" (nested).
        method: "pearson", "spearman" or "kendall".
        names: of x and y in sentences.
        clusters: (n,) independent unit (configuration) of each model.
        settings: "auto" and "bca" correct for bias, which noise of examples brings (it pulls coefficients to 0);
            "percentile" does not. The default 95 %, 2000 resamples.

    Raises:
        UserError: if the arrays do not have one (n, N) shape, or for an unknown method, source or an analytic interval.
    """
    require_one_of("method", method, METHODS)
    require_one_of("over", over, SOURCES)
    settings = settings or Resampling()
    if settings.interval == "analytic":
        raise UserError("There is no analytic interval over examples; ask for interval='bca' or 'percentile'.")
    first, second = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if first.ndim != 2 or first.shape != second.shape:
        raise UserError(
            f"correlation_over_examples takes two arrays (models, examples), got {first.shape} and {second.shape}."
        )
    unit = "model" if clusters is None else "configuration"
    means = [values.mean(axis=1) if values.shape[1] else np.full(len(values), np.nan) for values in (first, second)]
    data = paired(means[0], means[1], names, clusters=clusters, unit=unit)
    asked = Asked(METHODS[method], method, TITLES[method], names, settings, unit=unit)
    if data.why:
        return undefined(asked, data, data.why)
    value = value_of(asked.kernel, data.x, data.y)
    found = Correlation(asked.title, *names, value=value, n=len(data.x), units=data.units.count, unit=unit,
                        cautions=data.cautions)  # fmt: skip
    if abs(value) >= 1 - 1e-12:
        return replace(found, cautions=(*data.cautions, NO_SPREAD))
    draws, weights = settings.draws(), np.ones((settings.resamples, len(data.x)))
    if over != "examples":
        weights = data.units.weights(settings, draws)
    drawn = [data.x, data.y]
    if over != "models":
        share = counts(first.shape[1], settings.resamples, draws) / first.shape[1]
        drawn = [share @ values[data.kept].T for values in (first, second)]
    jackknife = np.zeros(1)
    if over != "examples":
        jackknife = asked.kernel(data.x, data.y, data.units.without_one())
    ends = bootstrap_interval(
        asked.kernel(drawn[0], drawn[1], weights),
        value,
        units=data.units.count if over != "examples" else first.shape[1],
        settings=settings,
        jackknife=None if settings.interval == "percentile" else jackknife,
        stretched=over != "examples" and (method == "pearson" or clusters is not None),
    )
    how = WORDS["percentile" if settings.interval == "percentile" else "bca"]
    where = {"examples": "evaluation examples", "models": f"{unit}s", "both": f"{unit}s and evaluation examples"}[over]
    return replace(found, low=ends.low, high=ends.high, interval=f"{100 * settings.confidence:g} % {how} over {where}")
