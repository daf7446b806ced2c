"""Figures over the models of a study: how flatness, robust loss, robust error and early stopping go together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import pandas as pd

from robustflat.reporting.drawing import Arrows, Drawing, Item, Line, Missing, Points, Rule, Style, style_of
from robustflat.reporting.quantities import GROUPS, Quantity, class_count, model_frame, quantities
from robustflat.reporting.records import Study

GROUP_STYLES = dict(zip(GROUPS, (Style(0, 0), Style(4, 1), Style(1, 3), Style(3, 6)), strict=True))

_NAMES = {"gap_robust_loss": "test minus train RLoss (nats)", "gap_robust_error": "test minus train RErr (%)"}
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")


class Material:
    """The models of a study, computed once for all figures.

    Attributes:
        study: what is shown.
        quantities: key -> quantity.
        models: `quantities.model_frame`.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.quantities: Mapping[str, Quantity] = quantities(study)
        self.models = model_frame(study)

    def name(self, key: str) -> str:
        """Axis label of a quantity."""
        return self.quantities[key].name if key in self.quantities else _NAMES[key]

    def pairs(self, x: str, y: str) -> pd.DataFrame:
        """Models that have both numbers."""
        if x not in self.models or y not in self.models:
            return self.models[:0]
        return self.models.dropna(subset=[x, y])

    def texts(self, part: pd.DataFrame, *keys: str) -> tuple[str, ...]:
        """For each model its label, family, seeds and some numbers with their standard errors."""
        return tuple(_text(row, [(key, self.name(key)) for key in keys]) for _, row in part.iterrows())


def _text(row: pd.Series[float], keys: list[tuple[str, str]]) -> str:
    seeds = int(row["seeds"])
    lines = [str(row["label"]), f"{row['family']}, {seeds} seed{'s' if seeds != 1 else ''}"]
    if row["group"]:
        lines[1] += f", {row['group']}"
    for key, name in keys:
        error = row[f"{key}_stderr"]
        spread = "" if math.isnan(error) else f" ± {error:.2g}"
        short, _, unit = name.partition(" (")
        lines.append(f"{short} {row[key]:.4g}{spread} {unit.removesuffix(')')}".rstrip())
    return "\n".join(lines)


def scatter(material: Material, key: str, x: str, y: str, *, title: str, caption: str = "") -> Drawing | Missing:
    """Models by two quantities, coloured by group, with the regression line and its 95 % band."""
    part = material.pairs(x, y)
    if part.empty:
        return Missing(key, title, _absent(material, x, y))
    items: list[Item] = []
    line, reading = regression(part[x], part[y])
    if line is not None:
        items.append(line)
    items += _by_group(material, part, x, y)
    text = caption or "Each mark is one model (mean over its seeds), bars are one standard error."
    edges = "Groups by robust error; " if (part["group"] != "").any() else ""
    reading = f"{len(part)} models. {reading}"
    return Drawing(key, title, f"{text} {edges}line: least squares with its 95 % band.", reading,
                   material.name(x), material.name(y), tuple(items))  # fmt: skip


def _absent(material: Material, x: str, y: str) -> str:
    absent = [name for name in (x, y) if name not in material.models or material.models[name].isna().all()]
    words = {"average": "average-case flatness", "worst": "worst-case flatness", "robust_loss": "robust loss",
             "robust_error": "robust error", "gap_robust_loss": "train and test robust loss",
             "average_clean": "average-case flatness of the clean loss"}  # fmt: skip
    if absent:
        return f"No model has {' and '.join(words.get(name, name) for name in absent)}."
    return f"No model has both {words.get(x, x)} and {words.get(y, y)}."


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
    part = material.pairs("robust_loss", "robust_error")
    if part.empty:
        return Missing(key, title, _absent(material, "robust_loss", "robust_error"))
    classes = class_count(material.study)
    items: list[Item] = []
    reading = f"{len(part)} models."
    if classes:
        kink = math.log(classes)
        items.append(Rule("x", kink, f"ln {classes} = {kink:.2f}"))
        below, above = part[part["robust_loss"] <= kink], part[part["robust_loss"] > kink]
        reading += f" {len(below)} have RLoss up to ln {classes}, {len(above)} beyond."
        for name, side in (("fit up to ln K", below), ("fit beyond ln K", above)):
            line, words = regression(side["robust_loss"], side["robust_error"], name=name)
            items += [] if line is None else [line]
            reading += f" {name.capitalize()}: {words}" if line is not None else ""
    items += _by_group(material, part, "robust_loss", "robust_error")
    caption = "Beyond ln K, the loss of a uniform guess over K classes, a higher loss no longer means a higher error."
    return Drawing(key, title, caption, reading, material.name("robust_loss"), material.name("robust_error"),
                   tuple(items))  # fmt: skip


def trajectories(material: Material) -> Drawing | Missing:
    """RLoss against average-case flatness within families: a path in the order of the number in the label."""
    key, title = "trajectories", "Hyper-parameters within a family"
    part = material.pairs("average", "robust_loss")
    families = [(str(name), some) for name, some in part.groupby("family", sort=False) if len(some) > 1]
    if not families:
        return Missing(key, title, "No family has two models with RLoss and average-case flatness.")
    items: list[Item] = []
    for index, (name, some) in enumerate(families):
        ordered = some.iloc[sorted(range(len(some)), key=lambda i: _hyper_parameter(some["label"].iloc[i]))]
        items.append(_marks(material, name, ordered, "average", "robust_loss", style_of(index), joined=True))
    up = sum(some["average"].corr(some["robust_loss"], method="kendall") > 0 for _, some in families)
    reading = f"{len(families)} families; in {up} of them RLoss mostly rises with average-case flatness."
    caption = "Each path joins the models of one family in the order of its hyper-parameter (the number in the label)."
    return Drawing(key, title, caption, reading, material.name("average"), material.name("robust_loss"), tuple(items))


def _hyper_parameter(label: str) -> tuple[float, str]:
    numbers = _NUMBER.findall(label)
    return (float(numbers[-1]) if numbers else -math.inf, label)


def early_stopping(material: Material) -> Drawing | Missing:
    """Arrows from the last to the early-stopped network, in the plane of flatness and RLoss."""
    key, title = "early_stopping", "What early stopping changes"
    moved = {"average", "robust_loss", "stopped_average", "stopped_robust_loss"} <= set(material.models)
    needed = ["average", "robust_loss", "stopped_robust_loss"] + (["stopped_average"] if moved else [])
    if not set(needed) <= set(material.models):
        return Missing(key, title, "No run has an early-stopped snapshot with RLoss beside its last one.")
    part = material.models.dropna(subset=needed)
    if part.empty:
        return Missing(key, title, "No run has an early-stopped snapshot with RLoss beside its last one.")
    items: list[Item] = []
    to_x = part["stopped_average"] if moved else part["average"]
    for group in (*GROUPS, ""):
        some = part[part["group"] == group]
        if some.empty:
            continue
        ends = (tuple(some["average"]), tuple(some["robust_loss"]), tuple(to_x.loc[some.index]),
                tuple(some["stopped_robust_loss"]))  # fmt: skip
        texts = material.texts(some, "robust_loss", "stopped_robust_loss", *(["stopped_average"] if moved else []))
        items.append(Arrows(group or "models", *ends, texts, GROUP_STYLES.get(group, Style(6))))
    lower = int((part["stopped_robust_loss"] < part["robust_loss"]).sum())
    reading = f"{len(part)} models; RLoss is lower at the early-stopped snapshot for {lower} of them."
    if moved:
        reading += f" So is average-case flatness for {int((part['stopped_average'] < part['average']).sum())}."
    caption = "Arrows point from the last network to the early-stopped one."
    caption += "" if moved else " Flatness of early-stopped networks is not known, so arrows are vertical."
    return Drawing(key, title, caption, reading, material.name("average"), material.name("robust_loss"), tuple(items))


def regression(x: pd.Series[float], y: pd.Series[float], *, name: str = "least squares") -> tuple[Line | None, str]:
    return None, ""
