"""What reports and statistics are made from: one record per trained network, read by `apps`, independent of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from torch import Tensor

from robustflat.errors import UserError

LEDGER_COLUMNS = ("phase", "forwards", "backwards", "images", "seconds", "images_per_second", "peak_memory_mib")
"""Columns of a compute ledger: passes are counted in batches, memory is the peak of the process or the device."""


class Lines(Protocol):
    """Steps (S,), and losses and errors (D, S) along D directions, or (S, S) on a plane."""

    @property
    def steps(self) -> Tensor:
        """Positions on the axis."""
        ...

    @property
    def losses(self) -> Tensor:
        """Mean loss, nats."""
        ...

    @property
    def errors(self) -> Tensor:
        """Fraction misclassified."""
        ...


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
        curvature: of the Hessian, with the keys of `SpectrumResult.to_dict`, such as "value" (largest eigenvalue) and
            "non_convexity"; may be empty.
        landscapes: name of the landscape, such as "random directions" -> losses along lines; may be empty.
        part: which network of the run this is about: "model", or "average" for the averaged weights.
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
    curvature: Mapping[str, Any] = field(default_factory=dict)
    landscapes: Mapping[str, Lines] = field(default_factory=dict)
    part: str = "model"

    @property
    def dataset(self) -> str:
        """Name of the data set that it was trained on, from the provenance; "" if that does not say."""
        described = str(self.provenance.get("data", "")).strip().split("\n")[0].removeprefix("data").strip()
        return described.partition(":")[0]


@dataclass(frozen=True)
class Study:
    """A question and the networks that are to answer it; what `write_report` makes a page of.

    Attributes:
        title: of the page.
        question: in one sentence.
        runs: the networks, in any order; failed and partial ones too.
        dataset: data set in words, such as "CIFAR-10"; "" to leave it out.
        attack: threat model and attack of the robust loss in words; "" for the names found in the tables.
        parameters: which weights the flatness measures displace, in words; "" to leave it out.
        classes: number of classes K; None: as many as the tables have errors by class.
        measures: overrides which attack or measure plays a part: "robust_loss", "robust_error", "average", "worst",
            "average_clean" -> name in the column measure. What is left out is chosen from the tables.
        checkpoint: whose numbers are compared.
        group_edges: robust errors in [0, 1], ascending, that separate good, average, poor (and worse) networks; ():
            30th and 70th percentile.
        notes: sentences shown under the answer.

    Raises:
        UserError: if classes, group_edges or notes are not of this form.
    """

    title: str
    question: str
    runs: Sequence[RunRecord]
    dataset: str = ""
    attack: str = ""
    parameters: str = ""
    classes: int | None = None
    measures: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = "last"
    group_edges: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.classes, self.group_edges, self.notes)


def _check(classes: object, edges: object, notes: object) -> None:
    """Refuse what a file or a command line may hold in place of numbers and lists."""
    if classes is not None and (not isinstance(classes, int) or classes < 2):
        raise UserError(f"classes must be a whole number of at least 2, got {classes!r}.")
    if isinstance(notes, str):
        raise UserError(f"notes must be a list of sentences, got one text: write notes=['{notes}'].")
    listed: list[Any] = list(edges) if isinstance(edges, Sequence) else [None]
    if len(listed) > 3 or not all(isinstance(edge, int | float) for edge in listed):
        raise UserError(f"group_edges must be a list of up to 3 numbers, got {edges!r}.")
    if not all(0 <= edge <= 1 for edge in listed) or any(a >= b for a, b in pairwise(listed)):
        raise UserError(f"group_edges must be rising robust errors between 0 and 1, such as [0.57, 0.6], got {listed}.")
