"""Hand the runs of a study to a Hydra launcher: this process, worker processes, or a cluster."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra._internal.callbacks import Callbacks  # part of a HydraContext; Hydra has no public name for it
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig

from robustflat.apps.job import Outcome
from robustflat.apps.study_runs import StudyRun
from robustflat.errors import UserError

Task = Callable[[DictConfig], Outcome]
GROUP = "hydra/launcher="


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launcher_overrides(given: Sequence[str], *, jobs: int | None, waiting: int) -> list[str]:
    """Hydra overrides that choose and set the launcher.

    Without a choice by the user: joblib with a worker for each core, if it is installed and there is more than one
    core and no GPU, which workers would have to share; else one run after the other in this process.

    Args:
        given: the user's own Hydra overrides.
        jobs: worker processes wanted; None: as many as cores.
        waiting: number of runs.

    Raises:
        UserError: if `jobs` asks for workers and joblib's launcher is not installed.
    """
    own = [text for text in given if text.lstrip("+").startswith(("hydra/launcher", "hydra.launcher"))]
    chosen = [text.lstrip("+").removeprefix(GROUP) for text in own if text.lstrip("+").startswith(GROUP)]
    workers = min(jobs or (1 if torch.cuda.is_available() else cores()), waiting)
    if not chosen:
        there = _installed("hydra_plugins") and _installed("hydra_plugins.hydra_joblib_launcher")
        if workers > 1 and not there and jobs is not None:
            raise UserError(
                f"jobs={jobs} needs joblib's launcher: pip install hydra-joblib-launcher. Or leave jobs out."
            )
        chosen = ["joblib"] if workers > 1 and there else ["basic"]
        own = [f"{GROUP}{chosen[0]}", *own]
    if chosen[0] == "joblib":
        own = [f"hydra.launcher.n_jobs={workers}", "hydra.launcher.batch_size=1", *own]  # the user's come last and win
    return own


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def parallel(overrides: Sequence[str]) -> bool:
    """Whether a launcher lets runs share the processors of this machine."""
    return f"{GROUP}joblib" in overrides


def launch(
    runs: Sequence[StudyRun], task: Task, overrides: Sequence[str], outputs: str, job_overrides: Sequence[str]
) -> dict[Path, Outcome]:
    """Run all jobs and wait for them.

    A worker that dies (memory) takes the others' queue with it: what has no outcome then is started once more, one
    run after the other.

    Args:
        runs: what to train.
        task: called with the configuration of each.
        overrides: see `launcher_overrides`.
        outputs: folder of all runs.
        job_overrides: arguments of `train.py` for all runs that do not change their identity.

    Returns:
        Folder -> outcome; every run has one.

    Raises:
        UserError: if there is no such launcher.
    """
    outcomes = _launched(runs, task, overrides, outputs, job_overrides)
    left = [run for run in runs if run.folder not in outcomes]
    if left and parallel(overrides):
        outcomes |= _launched(left, task, [f"{GROUP}basic"], outputs, job_overrides)
    lost = "the process that worked on it ended without an answer; the same command goes on from its last checkpoint"
    return {run.folder: outcomes.get(run.folder, Outcome(run.folder, lost)) for run in runs}


def _launched(
    runs: Sequence[StudyRun], task: Task, overrides: Sequence[str], outputs: str, job_overrides: Sequence[str]
) -> dict[Path, Outcome]:
    try:
        config = hydra.compose(
            "train", [*overrides, "hydra/hydra_logging=none", f"hydra.sweep.dir={outputs}"], return_hydra_config=True
        )
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
    except (HydraException, ImportError) as error:
        text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise UserError(f"The launcher cannot be used: {text}") from error
    commands = [[*run.overrides, *job_overrides] for run in runs]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs")  # joblib replaces it
            returned = launcher.launch(commands, initial_job_idx=0)
    except Exception as error:  # whatever the launcher's library raises when a worker or the cluster fails
        logging.getLogger(__name__).warning("the launcher stopped: %s", error)
        return {run.folder: Outcome(run.folder, "") for run in runs if run.complete()}
    return {run.folder: _outcome(run, job) for run, job in zip(runs, returned, strict=True)}


def _outcome(run: StudyRun, job: Any) -> Outcome:
    if job.status is JobStatus.COMPLETED and isinstance(job.return_value, Outcome):
        return Outcome(run.folder, job.return_value.problem)
    try:
        error: object = job.return_value
    except Exception as raised:
        error = raised
    return Outcome(run.folder, f"{type(error).__name__}: {error}")
