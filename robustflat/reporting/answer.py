"""The top of a report: the question answered in words and numbers, and what to keep in mind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from robustflat.reporting.correlation import Correlation, p_text
from robustflat.reporting.correlation_result import plural
from robustflat.reporting.findings import Findings
from robustflat.reporting.quantities import Quantity
from robustflat.reporting.study_plots import Material

RISE = (
    "Flatness is measured as the rise of the loss when the weights are displaced: the smaller the number, the flatter "
    "the minimum."
)


@dataclass(frozen=True)
class Number:
    """A number to be seen at once."""

    what: str
    value: str
    range: str


@dataclass(frozen=True)
class Answer:
    """What stands on top of the page; the first paragraph is the verdict."""

    paragraphs: tuple[str, ...]
    numbers: tuple[Number, ...]
    facts: tuple[tuple[str, str], ...]
    cautions: tuple[str, ...]


def answer_of(material: Material, found: Findings) -> Answer:
    """The answer of a study; with too little to answer, it says what is missing."""
    study = material.study
    if not study.runs:
        return Answer(("There are no runs, so there is no answer yet.",), (), (), tuple(study.notes))
    average, worst = found.average[0], found.worst[0]
    paragraphs = [_verdict(average, worst)]
    if average.defined or worst.defined:
        paragraphs.append(RISE)
    numbers = tuple(_number(result) for result in (*found.average, *found.worst) if result.defined)
    return Answer(tuple(paragraphs), numbers, _facts(material), (*_cautions(material, found), *study.notes))


def _verdict(average: Correlation, worst: Correlation) -> str:
    main = average if average.defined else worst
    if not main.defined:
        return f"This cannot be said yet. {average.why}"
    among = (
        f"among these {plural(main.n, 'network')}"
        if main.n == main.units
        else (f"among these {plural(main.n, 'network')} of {plural(main.units, main.unit)}")
    )
    kind = "average" if main is average else "worst"
    if math.isnan(main.low):
        return f"Not sure: {among}, {main.y} and {main.x} have a correlation of {main.value:.2f}, without an interval."
    if main.low > 0:
        said = f"Yes, {among}: the flatter the minimum ({kind} case), the lower the robust loss."
    elif main.high < 0:
        said = (
            f"No, {among} it is the other way round: the flatter the minimum ({kind} case), the higher the robust loss."
        )
    else:
        said = f"Not clear {among}: the interval of the correlation between {main.y} and {main.x} includes 0."
    if kind == "average" and worst.defined and not math.isnan(worst.low):
        said += f" For worst-case flatness, {_worst_words(average, worst)}."
    return said


def _worst_words(average: Correlation, worst: Correlation) -> str:
    if worst.low <= 0 <= worst.high:
        return "no relation is clear"
    if worst.low > 0 and average.low > 0:
        return f"the relation is there, {'but weaker' if worst.high < average.low else 'too'}"
    if worst.high < 0 and average.high < 0:
        return "it is the other way round, too"
    return f"the flatter the minimum, the {'lower' if worst.low > 0 else 'higher'} the robust loss"


def _number(result: Correlation) -> Number:
    parts = []
    if not math.isnan(result.low):
        parts.append(f"[{result.low:.2f}, {result.high:.2f}], {result.interval}")
    if not math.isnan(result.p):
        parts.append(p_text(result.p))
    return Number(f"{result.method}, {result.y} and {result.x}", f"{result.value:.2f}", "; ".join(parts))


def _facts(material: Material) -> tuple[tuple[str, str], ...]:
    study, quantities = material.study, material.quantities
    facts = [("Data set", study.dataset or ", ".join(_datasets(material))), ("Networks", _networks(material))]
    rows = {key: _rows(material, quantities[key]) for key in ("robust_loss", "robust_error", "average", "worst")
            if key in quantities}  # fmt: skip
    examples = {key: _examples(rows[key]) for key in rows}
    same = set(examples.values())
    each = "; ".join(f"{_title(quantities[key])}: {text}" for key, text in examples.items())
    facts.append(("Examples", each if len(same) > 1 else "".join(same)))
    attacked = [key for key in ("robust_loss", "robust_error") if key in rows]
    named = "; ".join(f"{_title(quantities[key])} by {_several(rows[key], 'measure')}" for key in attacked)
    facts.append(("Attack", ". ".join(part for part in (study.attack, named) if part)))
    if attacked:
        facts.append(("Threat model", _threat(rows[attacked[0]])))
    flat = [key for key in ("average", "worst") if key in rows]
    balls = [f"{_title(quantities[key])}: radius {_several(rows[key], 'radius')}, protocol "
             f"{_several(rows[key], 'protocol')}" for key in flat]  # fmt: skip
    facts.append(("Weights displaced", ". ".join(part for part in (study.parameters, "; ".join(balls)) if part)))
    facts.append(("Checkpoint", study.checkpoint))
    return tuple((name, value) for name, value in facts if value)


def _datasets(material: Material) -> list[str]:
    """Names of the data sets that the runs were trained on, as far as their provenance says it."""
    runs = [material.study.runs[int(str(position))] for position in material.runs.index]
    return sorted({run.dataset for run in runs} - {""})


def _threat(rows: pd.DataFrame) -> str:
    """Norm and radius, in 255ths where that is a whole number."""
    radii = [float(value) for value in rows["epsilon"].dropna().unique()]
    levels = [round(255 * radius) for radius in radii]
    whole = all(level and abs(255 * radius - level) < 1e-3 for radius, level in zip(radii, levels, strict=True))
    told = [f"{level}/255" if whole else f"{radius:.4g}" for radius, level in zip(radii, levels, strict=True)]
    norms = {"linf": "L-infinity", "l2": "L2", "l1": "L1"}
    named = [norms.get(str(norm).lower(), str(norm)) for norm in rows["norm"].dropna().unique()]
    return f"{', '.join(named) or 'unknown norm'}, radius {', '.join(told) or 'unknown'}"


def _networks(material: Material) -> str:
    runs = material.study.runs
    seeds = {run.seed for run in runs if run.seed is not None}
    kept = f"{plural(len(material.runs), 'run')} of {plural(len(material.models), 'model')} in "
    kept += plural(material.runs["family"].nunique(), "family")
    told = f", {plural(len(seeds), 'seed')}" if seeds else ", seeds unknown"
    lost = len(runs) - len(material.runs)
    return kept + told + (f"; {plural(lost, 'failed run')} left out" if lost else "")


def _rows(material: Material, quantity: Quantity) -> pd.DataFrame:
    rows = material.pool.find(quantity)
    return rows[rows.index.isin(material.runs.index)]


def _title(quantity: Quantity) -> str:
    return quantity.title.partition(" (")[0]


def _examples(rows: pd.DataFrame) -> str:
    counts = sorted(int(count) for count in rows["count"].dropna().unique())
    number = "unknown number" if not counts else f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{number} ({_several(rows, 'split')})"


def _several(rows: pd.DataFrame, column: str) -> str:
    values = [value for value in rows[column].dropna().unique() if value != ""]
    return ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values[:4]) or "unknown"


def _cautions(material: Material, found: Findings) -> list[str]:
    study = material.study
    said: Sequence[str] = [caution for result in (*found.average, *found.worst) for caution in result.cautions]
    said = [*said, *(result.why for result in (*found.average, *found.worst) if not result.defined)]
    if found.average[0].defined or found.worst[0].defined:
        said.append("A correlation over trained networks: they differ in much besides flatness, so it shows no cause.")
        if material.models["seeds"].max() == 1:
            said.append("Every model was trained once, so the spread between seeds is not in these numbers.")
        said.append("Flatness is a rise of the same robust loss that it is compared with, often on the same examples.")
    if len(_datasets(material)) > 1:
        said.append(f"The networks are of several data sets ({', '.join(_datasets(material))}), put together here.")
    if "robust_loss" in material.quantities:
        threats = _rows(material, material.quantities["robust_loss"])[["norm", "epsilon"]].round(6).dropna()
        if len(threats.drop_duplicates()) > 1:
            said.append("RLoss is under several threat models, put together here.")
    for key in [name for name in ("average", "worst") if name in material.quantities]:
        flat = _rows(material, material.quantities[key])[["radius", "protocol"]].dropna()
        if len(flat.drop_duplicates()) > 1:
            said.append(f"The {_title(material.quantities[key])} is of several radii or protocols, put together here.")
    bad = sum(run.status != "done" for run in study.runs)
    if bad:
        said.append(f"{bad} of {plural(len(study.runs), 'run')} failed or lack numbers, see “Failed and partial runs”.")
    warned = sum(bool(run.warnings) for run in study.runs)
    if warned:
        said.append(f"Sanity checks warn about {plural(warned, 'run')}, see “Warnings of the sanity checks”.")
    return list(dict.fromkeys(text for text in said if text))
