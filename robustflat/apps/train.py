"""Train one network as configured, measure it, and say what came out: the job behind `python train.py`."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

import robustflat
from robustflat.apps.build import build, choose_device, named_nodes
from robustflat.apps.check import require_valid
from robustflat.apps.config import digest, identity, resolved
from robustflat.apps.explain import print_method
from robustflat.apps.isolated import run_isolated
from robustflat.apps.measurements import instruments, measure
from robustflat.apps.messages import complain, explained
from robustflat.apps.profiling import profiled
from robustflat.apps.rules import check_together
from robustflat.apps.run_folder import RunFolder, provenance, write_text
from robustflat.apps.summary import print_summary
from robustflat.apps.surrogates import give_surrogates
from robustflat.apps.together import NO_SWEEP, described, one_after_the_other, open_folder, own_device, sharing
from robustflat.data.dataset import Dataset
from robustflat.data.images import SAMPLED, sample_digest
from robustflat.errors import UserError
from robustflat.evaluation.periodic import PeriodicEvaluation
from robustflat.evaluation.plan import EvaluationPlan
from robustflat.loggers.base import Many
from robustflat.loggers.console import ConsoleLogger
from robustflat.loggers.jsonl import JsonlLogger
from robustflat.loggers.ledger import LEDGER, LedgerLogger
from robustflat.memory import peak_memory_mib
from robustflat.models.inference import keep_freed_memory
from robustflat.models.passes import PassCounter
from robustflat.ranks import current, joined, sharing_work, speaks, started
from robustflat.rng import Streams, derived_seed
from robustflat.training.checkpoint import load_newest
from robustflat.training.trainer import Trainer, TrainingStopped

DEFAULT_THREADS = torch.get_num_threads()  # before any job of a sweep changes it
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
STOPPED = 75
"""Exit code of a run that was stopped and saved, EX_TEMPFAIL of sysexits.h: put it back into the queue."""
SMALL_BATCH = 2**15
"""Numbers in a batch of images below which one thread is faster than two (8x8 digits: 4,096)."""


@dataclass(frozen=True)
class Session:
    """Everything that one run needs, built and checked."""

    config: DictConfig
    folder: RunFolder
    name: str
    console: Console
    dataset: Dataset
    trainer: Trainer
    logger: Many


def job(config: DictConfig) -> float:
    """Hydra's task function: train (or resume, or find done), measure, print.

    Args:
        config: the composed configuration.

    Returns:
        Robust error on the test split by the evaluation's first attack: what a sweeper may minimise. With
        `explain=true` nothing is trained or written; NaN then.

    Raises:
        UserError: for whatever is wrong with configuration, data, checkpoint or folder.
    """
    context = HydraConfig.get()
    path = Path(context.runtime.output_dir)
    sweeping = context.mode is not None and context.mode.name == "MULTIRUN"
    console = Console(highlight=False, soft_wrap=True, quiet=not speaks())
    try:
        if config.explain:
            print_method(config, console)
            remove_if_empty(path)
            return float("nan")
        command = list(context.overrides.task)
        isolated = sweeping and str(context.launcher.get("_target_")).endswith(".JoblibLauncher")
        if sweeping and started() > 1:
            if isolated:
                raise UserError(NO_SWEEP)  # in a worker, which has to live on
            complain(NO_SWEEP)
            sys.exit(1)
        if isolated:
            results = run_isolated(config, path, command)
        else:
            with joined():
                results = run(config, path, command=command, console=console)
    except Exception as error:
        remove_if_empty(path)
        message = explained(error)
        if message is None:
            raise
        complain(message)
        if isinstance(error, TrainingStopped):
            sys.exit(STOPPED)  # of a sweep too: the machine is wanted back
        if sweeping:
            raise UserError(message) from error  # Hydra goes on with the others and reports this one at the end
        sys.exit(1)
    return first_robust_error(results)


def run(config: DictConfig, path: Path, *, command: list[str], console: Console) -> dict[str, Any]:
    """One run in its folder: nothing is trained or measured twice.

    Args:
        config: composed configuration.
        path: the run folder.
        command: the overrides that the user gave, for the record.
        console: where progress and summary go.

    Returns:
        The measured values, as in results.json.
    """
    require_valid(config)
    make_deterministic(config.deterministic)
    config.device = own_device(choose_device(config.device))
    check_together(config)
    name = path.parent.name
    folder = open_folder(path, identity(config))
    with closing(folder):
        key = evaluation_key(config)
        results: dict[str, Any] = current().agreed(folder.read_json("results.json").get(key) or {})
        if folder.done and results and results["complete"] and not config.force:
            what = ", so that there is nothing to profile" if config.profile else ""
            console.print(f"This run is done (nothing was trained{what}): {path}")
        else:
            session = trained(config, folder, name=name, command=command, console=console)
            try:
                with sharing_work():
                    results = measure(session, key)
            finally:
                session.logger.finish("done")
            draw_curves(session)
        facts = results["facts"] + described(folder.read_json("provenance.json"))
        print_summary(console, results, path, facts=facts)
    return results


def trained(config: DictConfig, folder: RunFolder, *, name: str, command: list[str], console: Console) -> Session:
    """A session whose network is trained to the end, now or earlier; its logger is open.

    Args:
        config: checked configuration, with a device.
        folder: of the run, open.
        name: of the experiment.
        command: the overrides that the user gave, for the record.
        console: where progress goes.

    Raises:
        UserError: if the run is done and its checkpoints are gone, among others.
    """
    try:
        session = prepare(config, folder, name=name, command=command, console=console)
    except BaseException:
        folder.abandon()
        raise
    if not folder.done or session.trainer.epoch < session.trainer.epochs:
        train(session)  # a finished run too, if only an earlier checkpoint of it can be read
    return session


def evaluation_key(config: DictConfig) -> str:
    """Name of the evaluation that a configuration asks for: the same values are not measured twice."""
    values = resolved(config)
    return digest({key: values.get(key) for key in ("evaluation", "flatness", "seed")})


def prepare(config: DictConfig, folder: RunFolder, *, name: str, command: list[str], console: Console) -> Session:
    """Build everything, cheapest first and data last, and load the newest checkpoint if there is one."""
    torch.manual_seed(derived_seed(config.seed, "global"))  # dropout and the like; saved in the checkpoint
    make_optimizer, make_schedule = build(config.optimizer), build(config.schedule)
    attack, make_trainer = build(config.attack), build(_without_callbacks(config), _partial_=True)
    callbacks = {name: build(node) for name, node in named_nodes(config, "callbacks").items()}
    model = seeded_model(config).to(config.device)
    give_surrogates([attack, *callbacks.values()], config)
    plan, _ = instruments(config)  # a mistake in what will measure shows before training, not after
    dataset: Dataset = build(config.dataset)
    one_after_the_other(lambda: require_splits(plan, dataset))
    torch.set_num_threads(config.threads or sensible_threads(dataset))
    keep_freed_memory()
    console.print("\n".join([dataset.describe(), *plan.notes(dataset)]), markup=False)
    streams = Streams(config.seed, config.device)
    steps = len(stream := dataset.train_stream(streams)) * config.trainer.epochs
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps:,} steps, device {config.device}, "
        f"{torch.get_num_threads()} threads, {_processes(config)}seed {config.seed}\nrun folder {folder.path}",
        markup=False,
        soft_wrap=True,
    )
    logger = _logger(config, folder, name, console, ledger=_ledger(config, folder, model))  # W&B has it from here on
    trainer: Trainer = make_trainer(
        model=model,
        data=stream,
        attack=attack,
        make_optimizer=make_optimizer,
        make_schedule=make_schedule,
        logger=logger,
        streams=streams,
        folder=folder.checkpoints,
        callbacks={name: c(dataset) if isinstance(c, functools.partial) else c for name, c in callbacks.items()},
    )
    trainer.meta = {"config": OmegaConf.to_yaml(config, resolve=True), "robustflat": robustflat.__version__}
    session = Session(config, folder, name, console, dataset, trainer, logger)
    if current().first:
        write_text(folder.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        folder.write_json("provenance.json", _origin(folder, dataset, command, sharing(config)))
    _resume(session)
    return session


def _origin(folder: RunFolder, dataset: Dataset, command: list[str], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance of the run; what another version or machine has trained or measured of it before is kept."""
    hashes = {"train": dataset.train.digest(), "test": dataset.test.digest()}
    if dataset.extra_pool is not None:
        hashes[f"extra, of {SAMPLED} images"] = sample_digest(dataset.extra_pool)
    now = provenance(command) | {"data": dataset.describe(), "data_hash": hashes, **shared}
    before = folder.read_json("provenance.json")
    earlier = before.pop("earlier", [])
    different = before and any(before.get(key) != now[key] for key in ("commit", "dirty", "packages", "cpu", "gpu"))
    different = different or (before and before.get("processes", 1) != now["processes"])
    return now | ({"earlier": [*earlier, before]} if different else {"earlier": earlier} if earlier else {})


def make_deterministic(wanted: bool) -> None:
    """Let torch use deterministic algorithms only (True), or whatever is fastest; before a GPU is first used."""
    if wanted:  # cuBLAS reads it when it starts; NVIDIA's documentation of reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if wanted != torch.are_deterministic_algorithms_enabled():  # importing half of the compiler takes a second
        torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    if wanted:
        torch.backends.cudnn.benchmark = False


def sensible_threads(dataset: Dataset) -> int:
    """Threads for `threads=0`: one where a batch is too small to be shared between cores, else torch's choice.

    On digits two threads of a busy two-core machine took several times as long as one, waiting for each other.
    """
    return 1 if dataset.batch_size * dataset.train.images[0].numel() < SMALL_BATCH else DEFAULT_THREADS


def require_splits(plan: EvaluationPlan, dataset: Dataset) -> None:
    """Ask for every split that the evaluation will need, so that a mistake shows before training, not after."""
    dataset.sets  # noqa: B018  # what is wrong with the data itself is said before any split is
    for key, text in {**plan.splits, "flatness": plan.flatness_split}.items():
        try:
            if text is not None:
                dataset.split(text)
        except UserError as error:
            raise UserError(f"evaluation.{key}: {error}") from error


def _without_callbacks(config: DictConfig) -> DictConfig:
    """The trainer's node with interpolations resolved, as it loses its place in the whole configuration."""
    return OmegaConf.create({key: value for key, value in resolved(config)["trainer"].items() if key != "callbacks"})


def seeded_model(config: DictConfig) -> nn.Module:
    """The configured network with initial weights that depend on the run's seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "model"))
        model: nn.Module = build(config.model)
    return model


def _processes(config: DictConfig) -> str:
    shared = sharing(config)
    count = shared["processes"]
    return f"{count} processes (batch norm over the {shared['batch_norm']}), " if count > 1 else ""


def _ledger(config: DictConfig, folder: RunFolder, model: nn.Module) -> LedgerLogger:
    """Keeps ledger.json by the passes of a network."""
    counter = PassCounter()
    counter.attach(model)

    def read() -> dict[str, float]:
        return {**counter.passes._asdict(), "peak_memory_mib": peak_memory_mib(config.device)}

    return LedgerLogger(folder.path / LEDGER, read)


def _logger(config: DictConfig, folder: RunFolder, name: str, console: Console, *, ledger: LedgerLogger) -> Many:
    """metrics.jsonl, ledger.json and the terminal always, and the configured one besides."""
    if not current().first:
        return Many([])
    made = build(config.logger)
    if isinstance(made, functools.partial):
        known = {"run_id": folder.path.name, "group": name, "config": resolved(config), "folder": folder.path}
        takes = inspect.signature(made.func).parameters
        made = made(**{key: value for key, value in known.items() if key in takes})
    progress = ConsoleLogger(epochs=config.trainer.epochs, console=console)
    return Many([ledger, JsonlLogger(folder.path / "metrics.jsonl"), made, progress])


def _resume(session: Session) -> None:
    ranks = current()
    newest = ranks.agreed(load_newest(session.folder.checkpoints) if ranks.first else None)
    if newest is None:
        session.folder.refuse_to_begin_again()
        session.logger.rewind(0)
        return
    if newest.message:
        session.console.print(newest.message, style="yellow", markup=False)
    session.trainer.load_state_dict(newest.parts)
    session.logger.rewind(session.trainer.step)
    if session.trainer.epoch < session.trainer.epochs:
        session.console.print(f"going on after epoch {session.trainer.epoch} of {session.config.trainer.epochs}")


def train(session: Session) -> None:
    """Train to the end, saving after each epoch, then mark the run as done."""
    status, start = "failed", time.perf_counter()
    try:
        with _stopping_politely(session.trainer), profiled(session):
            session.trainer.fit()
        status = "done"
    except (KeyboardInterrupt, TrainingStopped) as error:
        status = "stopped" if isinstance(error, TrainingStopped) else "interrupted"
        raise
    finally:
        if status != "done":
            session.trainer.logger.finish(status)
    session.folder.mark_done()
    session.console.print(f"trained in {time.perf_counter() - start:.0f} s")


@contextmanager
def _stopping_politely(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 (a scheduler that takes the machine back) end training before its next step.

    SIGUSR2 is left to submitit, which puts a job back into SLURM's queue when it comes.
    """

    def stop(*_: object) -> None:
        trainer.stop_requested = True

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw_curves(session: Session) -> None:
    """Save the learning curves of a run that was evaluated while it trained, as curves.png."""
    rows = [
        {name.removeprefix("evaluation/"): value for name, value in row.items()}
        for callback in session.trainer.callbacks.values()
        if isinstance(callback, PeriodicEvaluation)
        for row in callback.history
    ]
    if rows and current().first:
        from robustflat.reporting.plots import training_curves  # not for a run that is only repeated: Matplotlib

        title = f"{session.name}, seed {session.config.seed}"
        training_curves([rows], session.folder.path / "curves.png", title=title)


def first_robust_error(results: Mapping[str, Any]) -> float:
    """Robust error on the test split by the first attack of the first weights; NaN if none was measured."""
    for measured in results["weights"].values():
        for values in measured.get("test", {}).values():
            if isinstance(values, Mapping) and "robust_error" in values:
                return float(values["robust_error"])
    return float("nan")


def remove_if_empty(path: Path) -> None:
    """Take back the folders that Hydra made for a run that never began."""
    for folder in (path, path.parent):
        try:
            folder.rmdir()
        except OSError:
            return
