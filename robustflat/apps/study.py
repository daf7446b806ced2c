"""A whole study by one command: train what is missing, evaluate what is missing, report."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from robustflat.apps.build import build
from robustflat.apps.config import _safe_name
from robustflat.apps.job import Outcome, StudyJob
from robustflat.apps.launch import launch, launcher_overrides, parallel
from robustflat.apps.messages import complain, wide_console
from robustflat.apps.records import failed_record, read_record
from robustflat.apps.report import study_page, summary_table, write_pages
from robustflat.apps.runs import listing
from robustflat.apps.study_file import StudyFile, read_study, refuse_special
from robustflat.apps.study_progress import watched
from robustflat.apps.study_runs import StudyRun, compose_passes, expand
from robustflat.errors import UserError, require_range
from robustflat.loggers.wandb import WandbLogger
from robustflat.reporting.records import RunRecord

FOLDER = "studies"
"""Below outputs: reports of studies."""


@dataclass
class StudyRoot:
    """The top level of the configuration of `study.py`."""

    study: Any = None
    overrides: list[str] = field(default_factory=list)
    evaluation_overrides: list[str] = field(default_factory=list)
    jobs: int | None = None
    train: bool = True
    logger: Any = None
    outputs: str = "outputs"
    trusted_packages: list[str] = field(default_factory=list)


ConfigStore.instance().store(name="study_root", node=StudyRoot)


def job(config: DictConfig) -> None:
    """Hydra's task function: run a study, print its table, write its report.

    Ends with exit code 1 if a run failed; the report is written all the same.

    Args:
        config: the composed configuration.
    """
    context = HydraConfig.get()
    console = wide_console()
    try:
        name = _safe_name(str(context.runtime.choices.get("study") or "study"))
        command, own = list(context.overrides.task), list(context.overrides.hydra)
        failed = run_study(config, name, command=command, hydra_overrides=own, console=console)
    except UserError as error:
        complain(str(error))
        sys.exit(1)
    if failed:
        complain(failures(failed))
        sys.exit(1)


def run_study(
    config: DictConfig, name: str, *, command: Sequence[str], hydra_overrides: Sequence[str], console: Console
) -> list[tuple[StudyRun, str]]:
    """Everything that one command asks for.

    Args:
        config: composed configuration.
        name: of the study.
        command: what the user gave; what is about the logger holds for all runs.
        hydra_overrides: what the user gave for Hydra itself, the launcher above all.
        console: where progress and the table go.

    Returns:
        Runs that failed, and why.

    Raises:
        UserError: for whatever is wrong with the study, before anything is started.
    """
    if config.jobs is not None:
        require_range("jobs", config.jobs, low=1)
    study = study_of(config, name)
    study_page(study.title, study.question, [], dict(study.report))  # refuses what is wrong before hours of training
    refuse_special(config.overrides, "overrides")
    refuse_special(config.evaluation_overrides, "evaluation_overrides", evaluation=True)
    trusted = [f"trusted_packages=[{','.join(config.trusted_packages)}]"] if config.trusted_packages else []
    outputs = str(config.outputs)
    logger_overrides = [text for text in command if text.lstrip("+~").startswith("logger")]
    console.print(f"[bold]{study.title}[/bold]" + (f"\n{study.question}" if study.question else ""))
    extra = [*config.overrides, *trusted, *logger_overrides]
    extra += [f"outputs={outputs}"] if outputs != StudyRoot.outputs else []
    with console.status(f"checking {len(study.experiments)} experiments"):
        passes = compose_passes(study, [*config.evaluation_overrides, *trusted])
        runs = expand(study, passes, extra)
    waiting = [run for run in runs if not run.complete()] if config.train else []
    _announce(study, runs, waiting, console)
    outcomes: dict[Path, Outcome] = {}
    if waiting:
        launcher = launcher_overrides(hydra_overrides, jobs=config.jobs, waiting=len(waiting))
        task = StudyJob(name, passes, {run.folder.name: run.experiment for run in runs}, os.getpid())
        own = ["threads=1"] if parallel(launcher) and not _sets_threads(runs) else []
        with watched(runs, console):
            outcomes = launch(waiting, task, launcher, outputs, own)
    records = [record_of(run, outcomes.get(run.folder)) for run in runs]
    console.print(listing(records))
    page = study_page(study.title, study.question, records, dict(study.report))
    written = write_pages(page, Path(outputs) / FOLDER / name)
    log_table(config, name, summary_table(records))
    for label, path in written.items():
        console.print(f"{label:<13}{path}", markup=False)
    return [(run, outcome.problem) for run in runs if (outcome := outcomes.get(run.folder)) and outcome.problem]


def _sets_threads(runs: Sequence[StudyRun]) -> bool:
    return any(text.startswith("threads=") for run in runs for text in run.overrides)


def log_table(config: DictConfig, name: str, table: pd.DataFrame) -> None:
    """Give the study's table to loggers that take tables, such as Weights & Biases."""
    made = build(config.logger)
    if isinstance(made, functools.partial) and made.func is WandbLogger:
        folder = Path(str(config.outputs)) / FOLDER / name
        logger = made(name=f"study {name}", group=name, folder=folder)
        logger.table("runs", table)
        logger.finish("done")


def study_of(config: DictConfig, name: str) -> StudyFile:
    """The study that a composed configuration holds.

    Raises:
        UserError: if there is none, or it is not right.
    """
    node = None if config.study is None else OmegaConf.to_container(config.study, resolve=True)
    if not isinstance(node, Mapping):
        raise UserError("Say which study: study=<name of a file in conf/study>.")
    return read_study({str(key): value for key, value in node.items()}, name)


def record_of(run: StudyRun, outcome: Outcome | None) -> RunRecord:
    """What is known of a run of a study, under the names that the study gives it."""
    experiment = run.experiment
    problem = "" if outcome is None else outcome.problem
    if not run.folder.is_dir():
        problem = problem or "it was not started"
        return failed_record(run.folder, experiment.label, experiment.family, run.seed, problem)
    return read_record(
        run.folder, label=experiment.label, family=experiment.family, part=experiment.part, problem=problem
    )


def failures(failed: Sequence[tuple[StudyRun, str]]) -> str:
    """What went wrong, run by run."""
    lines = [f"  - {run.name}: {problem}\n    log: {run.folder / 'log.txt'}" for run, problem in failed]
    return f"{len(failed)} runs failed; the same command tries them again.\n" + "\n".join(lines)


def _announce(study: StudyFile, runs: Sequence[StudyRun], waiting: Sequence[StudyRun], console: Console) -> None:
    trained = sum(run.trained() for run in runs)
    console.print(
        f"{len(study.experiments)} experiments x {len(study.seeds)} seeds = {len(runs)} runs: {len(runs) - trained} to "
        f"train, {len(waiting)} to evaluate, {len(runs) - len(waiting)} left as they are"
    )
