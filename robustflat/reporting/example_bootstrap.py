"""How much a correlation over models depends on the evaluation examples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from robustflat.errors import UserError, require_one_of
from robustflat.reporting.bootstrap import Range, Resampling, bias_corrected_normal, bootstrap_interval, counts
from robustflat.reporting.correlation_result import Correlation
from robustflat.reporting.estimate import METHODS, NO_SPREAD, TITLES, WORDS, Asked, undefined, value_of
from robustflat.reporting.kernels import Array
from robustflat.reporting.paired import Labels, Paired, paired

SOURCES = ("examples", "models", "both")

RANKS = "Ranks change in jumps, so this interval over examples alone is rough and rather too narrow."
"""Of simulated ones, 68 to 88 % instead of 95 % held the coefficient of noise-free ranks (Pearson: 89 to 98 %)."""


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
    """Correlation of two quantities that are means over the same evaluation examples, these in the interval.

    Examples are drawn jointly: all models, and both quantities, see the same drawn examples, so what makes an example
    hard for all models does not count as noise.

    Args:
        x, y: (n, N) values of n models on N examples (losses, rises of the loss by weight perturbations, errors); a
            model's quantity is the mean over its examples. A model with a missing value is left out.
        over: "examples" (these models, other examples), "models" (these examples, other models) or "both" (nested).
        method: "pearson", "spearman" or "kendall".
        names: of x and y in sentences.
        clusters: (n,) independent unit (configuration) of each model.
        settings: of the interval. Noise of examples pulls coefficients to 0, so a percentile interval lies too low;
            "auto" and "bca" correct for it: BCa where models are drawn, a normal interval of arctanh moved by the bias
            where only examples are. That one is rough for ranks.

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
    samples = _samples(first[data.kept], second[data.kept], data, asked, over)
    ends, how = _ends(samples, value, data, asked, over)
    if over == "examples" and method != "pearson":
        found = replace(found, cautions=(*found.cautions, RANKS))
    where = {"examples": "evaluation examples", "models": f"{unit}s", "both": f"{unit}s and evaluation examples"}[over]
    return replace(found, low=ends.low, high=ends.high, interval=f"{100 * settings.confidence:g} % {how} over {where}")


def _samples(first: Array, second: Array, data: Paired, asked: Asked, over: str) -> Array:
    """Bootstrap values (B,): models, examples or both drawn anew."""
    settings, draws = asked.settings, asked.settings.draws()
    weights = np.ones((settings.resamples, len(data.x)))
    if over != "examples":
        weights = data.units.weights(settings, draws)
    if over == "models":
        return asked.kernel(data.x, data.y, weights)
    share = counts(first.shape[1], settings.resamples, draws) / first.shape[1]
    return asked.kernel(share @ first.T, share @ second.T, weights)


def _ends(samples: Array, value: float, data: Paired, asked: Asked, over: str) -> tuple[Range, str]:
    """The interval and what it is called."""
    settings, percentile = asked.settings, asked.settings.interval == "percentile"
    if over == "examples" and not percentile:
        return bias_corrected_normal(samples, value, settings.confidence), "bias-corrected bootstrap"
    ends = bootstrap_interval(
        samples,
        value,
        units=data.units.count,
        settings=settings,
        jackknife=None if percentile else asked.kernel(data.x, data.y, data.units.without_one()),
        stretched=over != "examples" and (asked.method == "pearson" or data.units.count < len(data.x)),
    )
    return ends, WORDS["percentile" if percentile else "bca"]
