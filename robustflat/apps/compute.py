"""The compute ledger of a run: passes, seconds and memory of training and of every result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from robustflat.apps.collect import RESULTS
from robustflat.errors import UserError
from robustflat.loggers.ledger import LEDGER, read_ledger
from robustflat.reporting.records import LEDGER_COLUMNS
from robustflat.store.results import ResultStore


def ledger_of(folder: Path) -> pd.DataFrame:
    """Compute of a run by phase, columns `LEDGER_COLUMNS`: training, watching, then each stored result.

    Results that were copied from another checkpoint with the same weights cost nothing and are left out.
    """
    lines = [_line(phase, entry) for phase, entry in read_ledger(folder / LEDGER).items()]
    store = ResultStore(folder / RESULTS)
    try:
        found = {name: store.attributes(name) for name in store.names()}
    except UserError:  # the record says what is wrong with the file
        found = {}
    lines += [_line(name, attrs) for name, attrs in found.items() if "seconds" in attrs and "copied_from" not in attrs]
    return pd.DataFrame(lines, columns=list(LEDGER_COLUMNS))


def _line(phase: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    # A landscape's "images" says in words what its images are.
    numbers = {name: _number(entry.get(name)) for name in LEDGER_COLUMNS if name != "phase"}
    seconds, images = numbers["seconds"], numbers["images"]
    return {**numbers, "phase": phase, "images_per_second": images / seconds if seconds > 0 else float("nan")}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
