"""Figures over the models of a study: how flatness, robust loss, robust error and early stopping go together."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from robustflat.reporting.correlation import regression_line, within_family
from robustflat.reporting.correlation_result import plural
from robustflat.reporting.drawing import Arrows, Drawing, Item, Line, Missing, Points, Rule, Style, style_of
from robustflat.reporting.numbers import with_error
from robustflat.reporting.quantities import (
    GROUPS,
    Pool,
    Quantity,
    class_count,
    group_edges,
    model_frame,
    quantities,
    run_frame,
)
from robustflat.reporting.records import Study

GROUP_STYLES = dict(zip(GROUPS, (Style(0, 0), Style(4, 1), Style(1, 3), Style(3, 6)), strict=True))

_TITLES = {"gap_robust_loss": "test minus train RLoss (nats)", "gap_robust_error": "test minus train RErr (%)"}
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")


class Material:
    """The numbers of a study, read once for all figures, tables and statistics.

    Attributes:
        study: what is shown.
        quantities: key -> quantity.
        pool: their rows.
        all: `quantities.run_frame` of all runs.
        runs: of those that did not fail.
        models: `quantities.model_frame`: means over seeds.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.pool = Pool(study)
        self.quantities: Mapping[str, Quantity] = quantities(self.pool)
        self.all = run_frame(self.pool, list(self.quantities.values()))
        self.runs = self.all[self.all["status"] != "failed"]
        self.models = model_frame(study, self.runs)

    def title(self, key: str) -> str:
        """Axis label of a quantity."""
        return self.quantities[key].title if key in self.quantities else _TITLES[key]

    def have(self, *keys: str, models: bool = False) -> pd.DataFrame:
        """Runs (or means over seeds) that have all of these numbers."""
        frame = self.models if models else self.runs
        return frame.dropna(subset=list(keys)) if set(keys) <= set(frame) else frame[:0]

    def texts(self, part: pd.DataFrame, *keys: str) -> tuple[str, ...]:
        """For each line its label, family, seed or seeds, and some numbers with their standard errors."""
        titles = [(key, self.title(key)) for key in keys]
        return tuple(_text(line, titles) for line in part.to_dict("records"))


def _text(line: Mapping[Hashable, Any], keys: Sequence[tuple[str, str]]) -> str:
    about = [str(line["family"])]
    if "seeds" in line:
        counts = sorted({line[f"{key}_seeds"] for key, _ in keys})
        told = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        about.append("1 seed" if counts == [1] else f"mean of {told} seeds")
    elif line["seed"] is not pd.NA:
        about.append(f"seed {line['seed']}")
    about += [str(line["group"])] if line["group"] else []
    numbers = []
    for key, title in keys:
        short, _, unit = title.partition(" (")
        numbers.append(f"{short} {with_error(line[key], line[f'{key}_stderr'])} {unit.removesuffix(')')}".rstrip())
    return "\n".join([str(line["label"]), ", ".join(about), *numbers])


def scatter(material: Material, key: str, x: str, y: str, *, title: str) -> Drawing | Missing:
    """Runs by two quantities, coloured by group, with the regression line over means of seeds and its 95 % band."""
    part = material.have(x, y)
    if part.empty:
        return Missing(key, title, absent(material, x, y))
    line, reading = fitted(material.have(x, y, models=True), material, x, y)
    caption = "A mark is one run; bars are one standard error of its numbers, where known."
    if (part["group"] != "").any():
        caption += f" Groups by {_plain_title(material, 'robust_error')}: {_edges_in_words(material)}."
    if line:
        caption += " The line is least squares over models (means over seeds), with its 95 % band."
    items = (*line, *_by_group(material, part, x, y))
    return Drawing(key, title, caption, reading, material.title(x), material.title(y), items)


def fitted(part: pd.DataFrame, material: Material, x: str, y: str, *, name: str = "least squares", dash: int = 0,
           ) -> tuple[tuple[Line, ...], str]:  # fmt: skip
    """The regression line with its band, if it is defined, and the sentence about it."""
    names = (_plain_title(material, x), _plain_title(material, y))
    found = regression_line(part[x].to_numpy(), part[y].to_numpy(), names=names)
    if not found.defined:
        return (), found.sentence()
    at = np.linspace(float(part[x].min()), float(part[x].max()), 60)
    low, high = found.band(at)
    ends = (tuple(at.tolist()), tuple(found.at(at).tolist()))
    return (Line(name, *ends, Style(None, dash), tuple(low.tolist()), tuple(high.tolist())),), found.sentence()


def _plain_title(material: Material, key: str) -> str:
    return material.title(key).partition(" (")[0]


def _edges_in_words(material: Material) -> str:
    edges = group_edges(material.study, material.runs["robust_error"])
    return ", ".join(f"{group} below {edge:.3g} %" for group, edge in zip(GROUPS, edges, strict=False)) + (
        f", {GROUPS[len(edges)]} from there on"
    )


def absent(material: Material, x: str, y: str) -> str:
    """Why there is nothing to draw, in a sentence."""
    if not material.study.runs:
        return "There are no runs."
    lacking = [name for name in (x, y) if name not in material.runs or material.runs[name].isna().all()]
    words = {"average": "average-case flatness", "worst": "worst-case flatness", "robust_loss": "robust loss",
             "robust_error": "robust error", "gap_robust_loss": "train and test robust loss",
             "average_clean": "average-case flatness of the clean loss"}  # fmt: skip
    if lacking:
        return f"No run has {' and '.join(words.get(name, name) for name in lacking)}."
    return f"No run has both {words.get(x, x)} and {words.get(y, y)}."


def _by_group(material: Material, part: pd.DataFrame, x: str, y: str) -> list[Item]:
    made: list[Item] = []
    for group in (*GROUPS, ""):
        some = part[part["group"] == group]
        if len(some):
            name = group or ("not grouped" if made else "models")
            made.append(_marks(material, name, some, x, y, GROUP_STYLES.get(group, Style(6, 2))))
    return made


def _marks(material: Material, name: str, part: pd.DataFrame, x: str, y: str, style: Style, *, joined: bool = False,
           ) -> Points:  # fmt: skip
    return Points(name, tuple(part[x]), tuple(part[y]), style, material.texts(part, x, y), tuple(part[f"{x}_stderr"]),
                  tuple(part[f"{y}_stderr"]), joined, tuple(part["family"]))  # fmt: skip


def error_against_loss(material: Material) -> Drawing | Missing:
    """RErr against RLoss, with the loss ln K of a network that knows nothing and a line on either side of it."""
    title, key = "RErr against RLoss", "rerr_rloss"
    part = material.have("robust_loss", "robust_error")
    if part.empty:
        return Missing(key, title, absent(material, "robust_loss", "robust_error"))
    classes = class_count(material.study)
    items: list[Item] = []
    reading = f"{plural(len(part), 'run')}."
    if classes:
        kink = math.log(classes)
        items.append(Rule("x", kink, f"ln {classes} = {kink:.2f}"))
        means = material.have("robust_loss", "robust_error", models=True)
        below, above = means[means["robust_loss"] <= kink], means[means["robust_loss"] > kink]
        for number, (name, side) in enumerate((("fit up to ln K", below), ("fit beyond ln K", above))):
            line, words = fitted(side, material, "robust_loss", "robust_error", name=name, dash=number)
            items += line
            reading += f" {'Up to' if number == 0 else 'Beyond'} ln {classes}: {words}"
    items += _by_group(material, part, "robust_loss", "robust_error")
    caption = "Beyond ln K, the loss of a uniform guess over K classes, a higher loss no longer means a higher error."
    return Drawing(key, title, caption, reading, material.title("robust_loss"), material.title("robust_error"),
                   tuple(items))  # fmt: skip


def trajectories(material: Material) -> Drawing | Missing:
    """RLoss against average-case flatness within families: a path in the order of the number in the label."""
    key, title = "trajectories", "Hyper-parameters within a family"
    part = material.have("average", "robust_loss", models=True)
    families = [(str(name), some) for name, some in part.groupby("family", sort=False) if len(some) > 1]
    if not families:
        return Missing(key, title, "No family has two models with RLoss and average-case flatness.")
    items: list[Item] = []
    for index, (name, some) in enumerate(families):
        ordered = some.iloc[sorted(range(len(some)), key=lambda i: _hyper_parameter(some["label"].iloc[i]))]
        items.append(_marks(material, name, ordered, "average", "robust_loss", style_of(index), joined=True))
    within = within_family(
        part["average"], part["robust_loss"], part["family"], names=("average-case flatness", "RLoss")
    )
    reading = f"{plural(len(families), 'family')} with two models or more. {within.sentence()}"
    caption = "Each path joins the models of one family in the order of its hyper-parameter (the number in the label)."
    return Drawing(key, title, caption, reading, material.title("average"), material.title("robust_loss"), tuple(items))


def _hyper_parameter(label: str) -> tuple[float, str]:
    numbers = _NUMBER.findall(label)
    return (float(numbers[-1]) if numbers else -math.inf, label)


def early_stopping(material: Material) -> Drawing | Missing:
    """Arrows from the last to the early-stopped network, in the plane of flatness and RLoss, means over seeds."""
    key, title = "early_stopping", "What early stopping changes"
    needed = ("average", "robust_loss", "stopped_robust_loss")
    part = material.have(*needed, "stopped_average", models=True)
    moved = len(part) > 0
    known = material.have(*needed, models=True)
    lost = len(known) - len(part) if moved else 0
    part = part if moved else known
    if part.empty:
        return Missing(key, title, "No run has an early-stopped snapshot with RLoss beside its last one.")
    to_x = part["stopped_average"] if moved else part["average"]
    shown = ("robust_loss", "stopped_robust_loss", *(("average", "stopped_average") if moved else ()))
    items: list[Item] = []
    for group in (*GROUPS, ""):
        some = part[part["group"] == group]
        if len(some):
            ends = (tuple(some["average"]), tuple(some["robust_loss"]), tuple(to_x.loc[some.index]),
                    tuple(some["stopped_robust_loss"]))  # fmt: skip
            style = GROUP_STYLES.get(group, Style(6))
            items.append(Arrows(group or "models", *ends, material.texts(some, *shown), style))
    lower = int((part["stopped_robust_loss"] < part["robust_loss"]).sum())
    reading = f"{plural(len(part), 'model')}; RLoss is lower at the early-stopped snapshot for {lower} of them."
    if moved:
        flatter = int((part["stopped_average"] < part["average"]).sum())
        reading += f" Average-case flatness is lower, that is, the minimum flatter, for {flatter}."
    if lost:
        reading += f" {plural(lost, 'model')} whose early-stopped flatness is not known left out."
    caption = "Arrows point from the last network to the early-stopped one."
    caption += "" if moved else " Flatness of early-stopped networks is not known, so arrows are vertical."
    return Drawing(key, title, caption, reading, material.title("average"), material.title("robust_loss"), tuple(items))


def main_drawings(material: Material) -> tuple[Drawing | Missing, Drawing | Missing]:
    """The two figures that answer the question: RLoss against average- and against worst-case flatness."""
    return (
        scatter(material, "rloss_average", "average", "robust_loss", title="RLoss against average-case flatness"),
        scatter(material, "rloss_worst", "worst", "robust_loss", title="RLoss against worst-case flatness"),
    )
