"""Which measures move when a trained network's function does not: the job behind `robustflat audit`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from torch import nn

from robustflat.apps.build import build
from robustflat.apps.config import resolved
from robustflat.apps.instruments import InstrumentRoot, Made, Workplace, column, start
from robustflat.apps.measure import _complete
from robustflat.apps.networks import NetworkFile
from robustflat.apps.run_folder import write_text
from robustflat.errors import require_one_of
from robustflat.flatness.audit import TRANSFORMATIONS, AuditResult, AuditRow, audit
from robustflat.flatness.measures.measure import Reading, SharpnessMeasure
from robustflat.store.results import Stored

LOSSES = ("clean", "frozen")
NUMBERS = ("before", "before_error", "after", "after_error")
"""Arrays of a stored audit, an entry for each row of its table."""


@dataclass
class AuditRoot(InstrumentRoot):
    """The top level of the configuration of `robustflat audit`."""

    measure: Any = None
    measures: Any = None
    only: list[str] = field(default_factory=list)
    loss: str = "clean"
    transformations: list[str] = field(default_factory=lambda: list(TRANSFORMATIONS))
    factor: float = 2.0
    temperature: float = 0.5
    biases: bool = True
    tolerance: float = 1e-3
    search_tolerance: float = 0.05


ConfigStore.instance().store(name="audit_root", node=AuditRoot)


def job(config: DictConfig) -> float:
    """Hydra's task function: audit, store, print.

    Returns:
        Number of measures that moved against their definition.
    """
    return start(config, audits, AuditRoot, check_own=_check)


def audits(place: Workplace) -> float:
    """Audit every network, unless that is stored already; print the tables and write them as CSV.

    Returns:
        Number of measures that moved against their definition.
    """
    unexpected = 0
    for file in place.files:
        model, weights = place.network(file)
        name = _audited(place, file, model, weights)
        stored = place.store.read(name)
        place.console.print(f"\n[bold]{file.name}[/bold], {place.config.loss} loss")
        place.console.print(stored.attrs["table"], markup=False)
        unexpected += int(stored.attrs["unexpected"])
        write_text(place.folder / _file(file, place), _frame(place, stored).to_csv(index=False))
        verdicts = "; ".join(f"{stored.attrs[k]} {k}" for k in ("as expected", "unexpected", "did not move", "open"))
        place.console.print(f"{verdicts} (* may move by its definition, but did not beyond its error)", markup=False)
        place.console.print(f"table        {place.folder / _file(file, place)}", markup=False)
    place.summary()
    return float(unexpected)


def _check(config: DictConfig) -> None:
    require_one_of("loss", config.loss, LOSSES)
    _complete(config)


def _audited(place: Workplace, file: NetworkFile, model: nn.Module, weights: str) -> str:
    values = resolved(place.config)
    keys = ("measures", "transformations", "factor", "temperature", "loss", "biases", "tolerance", "search_tolerance")
    decisive = {key: values[key] for key in keys}
    decisive["attack"] = None if place.config.loss == "clean" else values["attack"]

    def made() -> Made:
        wanted: dict[str, SharpnessMeasure] = {name: build(node) for name, node in place.config.measures.items()}
        config = place.config
        result = audit(
            model,
            *place.examples(),
            measures=wanted,
            transformations=list(config.transformations),
            factor=config.factor,
            temperature=config.temperature,
            loss=config.loss,
            attack=place.attack_of(config.loss),
            biases=config.biases,
            tolerance=config.tolerance,
            search_tolerance=config.search_tolerance,
            batch_size=int(config.batch_size),
            seed=place.seed,
        )
        return _arrays(result), _details(result)

    return place.once(file, "audit", place.config.loss, decisive, made, weights=weights, model=model)


def _file(file: NetworkFile, place: Workplace) -> str:
    return f"audit_{file.name}_{place.config.loss}.csv"


def _arrays(result: AuditResult) -> dict[str, Any]:
    rows = [row.to_dict() for row in result.rows]
    return {k: column([float(row[k]) for row in rows]) for k in NUMBERS}


def _frame(place: Workplace, stored: Stored) -> pd.DataFrame:
    """The table of a stored audit, which may be an earlier one than the file holds."""
    sources = {name: build(node).source for name, node in place.config.measures.items()}
    numbers = zip(*(stored.arrays[k].tolist() for k in NUMBERS), strict=True)
    rows = [
        AuditRow(name, transformation, Reading(before, error, source=sources[name]), Reading(after, spread), *verdict)
        for (name, transformation, *verdict), (before, error, after, spread) in zip(
            json.loads(stored.attrs["rows"]), numbers, strict=True
        )
    ]
    return AuditResult(tuple(rows), {}, {}, {}, "").to_frame()


def _details(result: AuditResult) -> dict[str, object]:
    count = Counter(row.verdict for row in result.rows)
    return {
        "table": str(result),
        "rows": [[row.measure, row.transformation, row.found, row.expected] for row in result.rows],
        "as expected": count["as expected"],
        "unexpected": count["UNEXPECTED"],
        "did not move": count["did not move"],
        "open": count["open"],
        "precision": "fp64",
    }
