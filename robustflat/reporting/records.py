"""What reports and statistics are made from: one record per trained network, read by `apps`, independent of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

LEDGER_COLUMNS = ("phase", "forwards", "backwards", "images", "seconds", "images_per_second", "peak_memory_mib")
"""Columns of a compute ledger: passes are counted in batches, memory is the peak of the process or the device."""


@dataclass(frozen=True)
class RunRecord:
    """One trained network and all that is known of it.

    Attributes:
        run_id: eight hexadecimal digits that name the configuration.
        experiment: name of the experiment, as in the outputs folder.
        label: what people call it, such as "TRADES 6"; equal for the seeds of one configuration.
        family: the method it belongs to, such as "TRADES"; equal for all hyper-parameters of a method.
        seed: of training; None if unknown.
        status: "done", "partial" (something that was asked for is not measured) or "failed".
        problem: what went wrong, in one sentence; "" if nothing.
        folder: run folder; None for figures that come from a publication.
        table: tidy rows of this run, with the columns of `store.tables.COLUMNS`.
        history: a line per epoch with the column "epoch" and values such as "loss" or "test/robust_loss"; may be
            empty.
        ledger: compute by phase, columns `LEDGER_COLUMNS`; may be empty.
        provenance: commit, versions, command, hardware, as in provenance.json.
        warnings: sentences of the sanity checks.
        early_stopped: tidy rows of the early-stopped snapshot are in `table` under this checkpoint name; "" if none.
    """

    run_id: str
    experiment: str
    label: str
    family: str
    seed: int | None
    status: str
    table: pd.DataFrame
    problem: str = ""
    folder: Path | None = None
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    ledger: pd.DataFrame = field(default_factory=pd.DataFrame)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    early_stopped: str = ""
