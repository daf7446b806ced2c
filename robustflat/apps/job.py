"""One job of a study, in whatever process a launcher starts it: train one run, and evaluate it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from robustflat.apps.build import choose_device
from robustflat.apps.check import require_valid
from robustflat.apps.config import identity, register, resolved
from robustflat.apps.evaluate import evaluate
from robustflat.apps.records import NOTE
from robustflat.apps.rules import check_together
from robustflat.apps.run_folder import RunFolder, write_text
from robustflat.apps.study_file import Experiment
from robustflat.apps.study_runs import EVALUATED, Pass, completed, completed_pass, pass_key, seed_of
from robustflat.apps.train import STOPPED, draw_curves, remove_if_empty, trained
from robustflat.errors import UserError
from robustflat.training.trainer import TrainingStopped

LOG = "log.txt"
"""What a job prints: the terminal belongs to the study."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        folder: the run folder.
        problem: in one sentence; "" if all went well.
    """

    folder: Path
    problem: str


@dataclass(frozen=True)
class StudyJob:
    """Hydra's task function for the runs of a study: it can be pickled and sent to another process or machine.

    Attributes:
        study: name of the study.
        passes: evaluations of every run.
        experiments: run folder name (its id) -> experiment.
        parent: process of the study; a job that it started itself ends with it.
    """

    study: str
    passes: Sequence[Pass]
    experiments: Mapping[str, Experiment]
    parent: int

    def __call__(self, config: DictConfig) -> Outcome:
        """Train and evaluate the run of a configuration; errors become part of the outcome.

        Args:
            config: composed configuration of `train.py`.

        Raises:
            SystemExit: if a run in the study's own process is told to stop: the machine is wanted back.
        """
        register()
        context = HydraConfig.get()
        folder = Path(context.runtime.output_dir)
        command = list(context.overrides.task)
        _end_with(self.parent)
        with _logging_to(folder) as console:
            try:
                self._run(config, folder, command, console)
            except TrainingStopped as error:
                console.print(f"error: {error}", markup=False)
                if os.getpid() == self.parent:
                    print(f"error: {error}", file=sys.__stderr__)
                    raise SystemExit(STOPPED) from error
                return self._failed(folder, str(error))
            except UserError as error:
                console.print(f"error: {error}", markup=False)
                return self._failed(folder, str(error))
            except Exception as error:  # of whatever library: the other runs go on, and the log has all of it
                console.print(traceback.format_exc(), markup=False)
                return self._failed(folder, f"{type(error).__name__}: {error}")
        return Outcome(folder, "")

    def _run(self, config: DictConfig, folder: Path, command: list[str], console: Console) -> None:
        require_valid(config)
        config.device = choose_device(config.device)
        check_together(config)
        _train(config, folder, command, console)
        experiment = self.experiments[folder.name]
        note(folder, self.study, experiment, "")
        done = completed(folder)
        plain = OmegaConf.create(resolved(config))
        for one in self.passes:
            key = pass_key(completed_pass(one, plain, experiment.part), seed=seed_of(one, config.seed))
            if key in done:
                continue
            asked = one.config.copy()
            OmegaConf.set_struct(asked, False)
            asked.update({"run": str(folder), "part": experiment.part, "threads": config.threads})
            asked.update({"device": config.device, "data_root": config.data_root, "outputs": config.outputs})
            evaluate(asked, dict(one.choices), command=command, console=console)
            done.add(key)
            with closing(RunFolder(folder, identity(config))) as opened:
                opened.write_json(EVALUATED, {key: True for key in sorted(done)})

    def _failed(self, folder: Path, problem: str) -> Outcome:
        """Leave a note where there is something else; take back a folder that nothing but the log is in."""
        if (folder / "identity.yaml").exists():
            with suppress(UserError):
                note(folder, self.study, self.experiments[folder.name], problem)
        else:
            (folder / LOG).unlink(missing_ok=True)
            remove_if_empty(folder)
        return Outcome(folder, problem)


def note(folder: Path, study: str, experiment: Experiment, problem: str) -> None:
    """Write down in a run folder what a study calls the run, and what went wrong."""
    values = {"study": study, "experiment": experiment.name, "label": experiment.label}
    values |= {"family": experiment.family, "part": experiment.part, "problem": problem}
    write_text(folder / NOTE, json.dumps(values, indent=1) + "\n")


def _train(config: DictConfig, path: Path, command: list[str], console: Console) -> None:
    """Train to the end, without the measurements that `train.py` makes: the evaluations of the study follow."""
    folder = RunFolder(path, identity(config))
    with closing(folder):
        if folder.done:
            return
        session = trained(config, folder, name=path.parent.name, command=command, console=console)
        session.logger.finish("done")
        draw_curves(session)


@contextmanager
def _logging_to(folder: Path) -> Iterator[Console]:
    """A console that writes to the log of a run; whatever else is printed goes there too."""
    with open(folder / LOG, "a", encoding="utf-8") as file:
        console = Console(file=file, highlight=False, soft_wrap=True, width=120)
        console.print(f"--- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, process {os.getpid()}", markup=False)
        with redirect_stdout(file), redirect_stderr(file):
            yield console


_WATCHED: set[int] = set()
"""Process of the study that this process has a watch on, if it has."""


def _end_with(parent: int) -> None:
    """End this process when the study that started it has been killed, at work or idle: nobody would see what it does.

    Only a child of the study is concerned; jobs of a cluster outlive it. What a job has written stays whole.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    if os.getppid() == parent and parent not in _WATCHED:
        _WATCHED.add(parent)
        threading.Thread(target=watch, daemon=True).start()
