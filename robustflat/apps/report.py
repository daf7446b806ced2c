"""A report of any run folders: page, tables, cards; the job behind `robustflat report`."""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from robustflat.apps.cards import write_card
from robustflat.apps.messages import complain
from robustflat.apps.records import headline, read_records
from robustflat.errors import UserError, require_one_of
from robustflat.reporting.figures import save
from robustflat.reporting.models_table import models_table
from robustflat.reporting.page import write_report
from robustflat.reporting.records import RunRecord, Study
from robustflat.reporting.study_figure import study_figure
from robustflat.store.tables import write_table


@dataclass
class ReportRoot:
    """The top level of the configuration of `report`."""

    runs: Any = None
    output: str = "outputs/report"
    title: str = "Robust generalisation and flatness"
    question: str = "Do networks with flatter robust loss have lower robust loss on test examples?"
    report: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(name="report_root", node=ReportRoot)


def job(config: DictConfig) -> None:
    """Hydra's task function: read the run folders, write the report, say where it is.

    Args:
        config: the composed configuration.
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        records = read_records(folders_of(config.runs))
        more = OmegaConf.to_container(config.report, resolve=True)
        assert isinstance(more, dict)
        study = study_page(config.title, config.question, records, {str(k): v for k, v in more.items()})
        written = write_pages(study, Path(config.output))
    except UserError as error:
        complain(str(error))
        sys.exit(1)
    unfinished = [record for record in records if record.status != "done"]
    for record in unfinished:
        console.print(f"{record.label} ({record.folder}): {record.status}: {record.problem}", markup=False)
    console.print(f"{len(records)} runs, {len(unfinished)} of them failed or not complete")
    for label, path in written.items():
        console.print(f"{label:<13}{path}", markup=False)


def folders_of(runs: Any) -> list[Path]:
    """Folders that `runs=` names: a folder, a pattern such as outputs/*/*, or a list of these.

    Raises:
        UserError: if there is none.
    """
    several = isinstance(runs, Sequence) and not isinstance(runs, str)
    listed = [str(run) for run in (runs if several else [runs]) if run is not None]
    if not listed:
        raise UserError("Say which runs: runs=outputs/*/*, or runs=[outputs/digits-at/3f2a9c1d,...].")
    found = [Path(path) for pattern in listed for path in sorted(glob.glob(str(Path(pattern).expanduser())))]
    folders = list(dict.fromkeys(path for path in found if path.is_dir()))
    if not folders:
        raise UserError(f"There is no folder {' or '.join(map(str, listed))}.")
    return folders


def study_page(title: str, question: str, records: Sequence[RunRecord], more: dict[str, Any]) -> Study:
    """What the page is made from.

    Args:
        title, question: of the page.
        records: the runs.
        more: other fields of `Study`, plain values.

    Raises:
        UserError: for a field that it does not have.
    """
    allowed = [f.name for f in fields(Study) if f.name not in ("title", "question", "runs")]
    for key in more:
        require_one_of("A field of report", key, allowed)
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in more.items()}
    return Study(title=title, question=question, runs=list(records), **plain)


def write_pages(study: Study, folder: Path) -> dict[str, Path]:
    """Write page, tables and cards of a set of runs.

    Args:
        study: question and runs.
        folder: where to; made if needed.

    Returns:
        What -> where: "report" (the page), "numbers" (all, tidy), "table" (a line a run), "models" (means over seeds).

    Raises:
        UserError: if a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make {folder}: {error.strerror}. Choose another with output=<folder>.") from error
    for record in study.runs:
        write_card(record)
    written: dict[str, Path] = {}
    written["report"] = write_report(study, folder / "report.html")
    save(study_figure(study), folder / "figures", "study")
    tables = [record.table for record in study.runs if len(record.table)]
    if tables:
        write_table(pd.concat(tables, ignore_index=True), folder / "metrics.parquet")
        written["numbers"] = folder / "metrics.parquet"
    table, models = summary_table(study.runs), models_table(study)
    for ending in ("csv", "md"):
        write_table(table, folder / f"runs.{ending}")
        write_table(models, folder / f"models.{ending}")
    return {**written, "table": folder / "runs.md", "models": folder / "models.md"}


def summary_table(records: Sequence[RunRecord]) -> pd.DataFrame:
    """A line a run: label, family, seed, status, headline figures as text, folder."""
    lines = [
        {"label": r.label, "family": r.family, "seed": r.seed, "status": r.status, **headline(r)}
        | {"problem": r.problem, "folder": "" if r.folder is None else str(r.folder)}
        for r in records
    ]
    table = pd.DataFrame(lines)
    middle = [name for name in table.columns if name not in ("problem", "folder")]
    return table[[*middle, "problem", "folder"]] if lines else table
