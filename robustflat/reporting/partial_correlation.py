"""Correlation of two quantities when a third one, or the method that models belong to, is held fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from robustflat.errors import UserError, require_one_of
from robustflat.reporting.bootstrap import Resampling
from robustflat.reporting.correlation_result import Correlation
from robustflat.reporting.estimate import METHODS, TITLES, Asked, estimated
from robustflat.reporting.kernels import Array, granulated, partial
from robustflat.reporting.paired import Labels, Paired, Values, codes, column, left_out, paired
from robustflat.reporting.significance import p_by_permutation

PARTIAL = ("pearson", "spearman")


def partial_correlation(
    x: Values,
    y: Values,
    controls: Mapping[str, Values] | None = None,
    *,
    group: Labels | None = None,
    method: str = "pearson",
    names: tuple[str, str] = ("x", "y"),
    clusters: Labels | None = None,
    settings: Resampling | None = None,
) -> Correlation:
    """Correlation of what is left of x and y after a linear regression on the controls.

    Args:
        x, y: (n,) values of n models.
        controls: name -> (n,) values to hold fixed, such as the train RLoss or the clean error.
        group: (n,) categories to hold fixed (each gets a mean of its own).
        method: "pearson", or "spearman" (all quantities ranked first).
        names: of x and y in sentences.
        clusters: (n,) independent unit (configuration) of each model; seeds of one configuration are not independent.
        settings: of the interval, by default BCa over models at 95 %.

    Raises:
        UserError: if nothing is held fixed, columns differ in length, or for an unknown method.
    """
    require_one_of("method", method, PARTIAL)
    if not controls and group is None:
        raise UserError("partial_correlation needs something to hold fixed: give controls or group.")
    quantities = {name: column(values, name) for name, values in (controls or {}).items()}
    unit = "model" if clusters is None else "configuration"
    data = paired(x, y, names, others=list(quantities.values()), clusters=clusters, unit=unit)
    numeric = [values[data.kept] for values in quantities.values()]
    indicators: list[Array] = []
    if group is not None:
        indicators = _indicators(_same_length(codes(group), data))
    held = np.array([*numeric, *indicators], dtype=np.float64).reshape(len(numeric) + len(indicators), len(data.x))
    asked = Asked(
        partial(held, ranks=method == "spearman", ranked=len(numeric)),
        method,
        f"partial {TITLES[method]}",
        names,
        settings or Resampling(),
        unit=unit,
        controls=len(held),
        given=(*quantities, *(["the group"] if group is not None else [])),
    )
    return estimated(data, asked)


def within_family(
    x: Values,
    y: Values,
    family: Labels,
    *,
    method: str = "pearson",
    names: tuple[str, str] = ("x", "y"),
    clusters: Labels | None = None,
    settings: Resampling | None = None,
) -> Correlation:
    """Correlation inside the families: does the relation hold when only the hyper-parameter of a method changes?

    Values are taken relative to the mean of their family (partial correlation given the family). Families with one
    model say nothing about this and are left out.

    Args: as in `partial_correlation`; `family` (n,) names the method.

    Raises:
        UserError: as there.
    """
    data = paired(x, y, names, clusters=clusters)
    member = _same_length(codes(family), data)
    sizes = np.bincount(member, minlength=1)[member] if len(member) else member
    kept = np.flatnonzero(data.kept)[sizes > 1]
    chosen = [codes(labels)[kept] if labels is not None else None for labels in (family, clusters)]
    first, second = column(x, names[0])[kept], column(y, names[1])[kept]
    found = partial_correlation(first, second, group=chosen[0], method=method, names=names, clusters=chosen[1],
                                settings=settings)  # fmt: skip
    alone, cautions = len(data.x) - len(kept), [*left_out(data.kept), *found.cautions]
    if alone:
        cautions.append(f"{alone} of {len(data.x)} models are the only ones of their family and are left out.")
    why = "No family has two models or more." if len(data.x) and not len(kept) else found.why
    return replace(found, method=f"{TITLES[method]} within families", given=("the family",), why=why,
                   cautions=tuple(cautions))  # fmt: skip


def across_families(
    x: Values,
    y: Values,
    family: Labels,
    *,
    method: str = "pearson",
    names: tuple[str, str] = ("x", "y"),
    settings: Resampling | None = None,
) -> Correlation:
    """Correlation of the family means: one point for each method, however many hyper-parameters were tried.

    Args: as in `within_family`.

    Raises:
        UserError: as there.
    """
    require_one_of("method", method, METHODS)
    data = paired(x, y, names)
    member = _same_length(codes(family), data)
    _, index = np.unique(member, return_inverse=True)
    sizes = np.maximum(np.bincount(index), 1)
    means = [np.bincount(index, weights=values) / sizes for values in (data.x, data.y)]
    asked = Asked(METHODS[method], method, f"{TITLES[method]} across families", names, settings or Resampling(),
                  unit="family")  # fmt: skip
    found = estimated(paired(means[0], means[1], names, unit="family"), asked)
    return replace(found, n=len(data.x), cautions=(*left_out(data.kept), *found.cautions))


def granulated_kendall(
    x: Values,
    y: Values,
    axes: Mapping[str, Labels],
    *,
    names: tuple[str, str] = ("x", "y"),
    settings: Resampling | None = None,
) -> Correlation:
    """Granulated Kendall coefficient (Jiang et al., ICLR 2020): does the order hold along every hyper-parameter?

    Along an axis, models that agree in all other axes form a set; tau-b is taken in each set, averaged over the sets of
    the axis, then over the axes. So a hyper-parameter that moves both quantities at once cannot make the whole result.
    (Jiang et al. use tau-a; it is the same where nothing is tied.) The interval is a percentile bootstrap over models
    (BCa and analytic ones are not known to hold here), the p-value by permuting the models.

    Args:
        x, y: (n,) values of n models.
        axes: name of a hyper-parameter -> (n,) its values; at least one.
        names: of x and y in sentences.
        settings: of interval and permutations.

    Raises:
        UserError: if there is no axis, or columns differ in length.
    """
    if not axes:
        raise UserError("granulated_kendall needs at least one axis: hyper-parameter name -> its value for each model.")
    settings = replace(settings or Resampling(), interval="percentile")
    data = paired(x, y, names)
    settings = replace(settings, generator=settings.draws())
    kernel = granulated(_sets([_same_length(codes(values), data) for values in axes.values()]))
    found = estimated(data, Asked(kernel, "other", "granulated Kendall", names, settings))
    if not found.defined:
        return replace(
            found, why=data.why or f"No two models differ in only one of {', '.join(axes)} and in both values."
        )
    draws = settings.draws()
    orders = [torch.randperm(len(data.x), generator=draws).numpy() for _ in range(settings.resamples)]
    return replace(found, p=p_by_permutation(kernel, data.x, data.y, np.array(orders)))


def _sets(axes: Sequence[NDArray[np.intp]]) -> list[list[NDArray[np.intp]]]:
    """For each axis, index sets of models that agree in all the other axes and not in this one."""
    found = []
    for index in range(len(axes)):
        others = [axis for i, axis in enumerate(axes) if i != index]
        keys: dict[tuple[int, ...], list[int]] = {}
        for model in range(len(axes[index])):
            keys.setdefault(tuple(int(axis[model]) for axis in others), []).append(model)
        sets = [np.array(members, dtype=np.intp) for members in keys.values()]
        found.append([members for members in sets if len(np.unique(axes[index][members])) > 1])
    return found


def _indicators(member: NDArray[np.intp]) -> list[Array]:
    """A column of zeros and ones for each category but the last, which follows from the others."""
    return [(member == label).astype(np.float64) for label in np.unique(member)[:-1]]


def _same_length(labels: NDArray[np.intp], data: Paired) -> NDArray[np.intp]:
    """Labels of the models that are kept."""
    if len(labels) != len(data.kept):
        raise UserError(f"There are {len(data.kept)} models but {len(labels)} labels; give one for each model.")
    return labels[data.kept]
