"""Result cards: all that is known of a run in one JSON file that other programs can read and check."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import robustflat.store
from robustflat.apps.run_folder import write_text
from robustflat.reporting.records import RunRecord

CARD = "card.json"
FORMAT = 1
"""Version of the cards; robustflat/store/card_schema.json describes it."""

_METRIC_KEYS = (
    "checkpoint", "epoch", "split", "kind", "measure", "metric", "radius", "value", "stderr", "low", "high", "count",
    "norm", "epsilon", "loss", "protocol", "precision", "version", "key",
)  # fmt: skip


def card_of(record: RunRecord) -> dict[str, Any]:
    """A run as plain values that fit card_schema.json; what is missing or not finite is null."""
    return {
        "format": FORMAT,
        "run_id": record.run_id,
        "experiment": record.experiment,
        "label": record.label,
        "family": record.family,
        "seed": record.seed,
        "status": record.status,
        "problem": record.problem,
        "warnings": list(record.warnings),
        "early_stopped": record.early_stopped,
        "metrics": [{key: line[key] for key in _METRIC_KEYS} for line in _lines(record.table)],
        "ledger": _lines(record.ledger),
        "provenance": _plain(dict(record.provenance)),
    }


def write_card(record: RunRecord) -> Path | None:
    """Write the card of a run into its folder; None for a record without one.

    Raises:
        UserError: if it cannot be written.
    """
    if record.folder is None or not record.folder.is_dir():
        return None
    path = record.folder / CARD
    text = json.dumps(card_of(record), indent=1, allow_nan=False) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return path


def card_schema() -> dict[str, Any]:
    """The published schema of cards."""
    text = (Path(robustflat.store.__file__).parent / "card_schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _lines(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): _plain(value) for key, value in line.items()} for line in table.to_dict("records")]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or value is pd.NA:
        return None
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
