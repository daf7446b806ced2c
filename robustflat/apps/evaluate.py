"""Evaluate and measure trained networks, piece by piece into a store: the job behind `python evaluate.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from robustflat.apps.bench import Bench, measure_network, select_snapshot
from robustflat.apps.build import build, choose_device
from robustflat.apps.check import check, refuse
from robustflat.apps.config import NetworkRoot, Root, _safe_name, differences, digest, resolved
from robustflat.apps.data_source import deciding_source, moved, same_data
from robustflat.apps.evaluation_summary import print_evaluation
from robustflat.apps.messages import complain
from robustflat.apps.networks import (
    NetworkFile,
    choose,
    described,
    digest_of,
    find_run,
    snapshots,
    stored_config,
    weights_of,
)
from robustflat.apps.profiling import Parts, profile_settings
from robustflat.apps.rules import check_together
from robustflat.apps.run_folder import RunFolder, provenance, write_text
from robustflat.apps.sharing import SharedStore, joined_to_share, shared_folder
from robustflat.apps.surrogates import give_surrogates, name_surrogates
from robustflat.apps.together import own_device
from robustflat.apps.train import sensible_threads
from robustflat.data.dataset import Dataset
from robustflat.errors import CheckpointError, UserError, require_one_of
from robustflat.evaluation.plan import EvaluationPlan
from robustflat.evaluation.rows import Row
from robustflat.ranks import workers
from robustflat.training.checkpoint import load_into

RESULTS = "results.h5"
FACTS = ("commit", "command", "platform", "gpu", "processes")
"""Of the provenance, what is stored with every result."""


@dataclass
class EvaluateRoot(NetworkRoot):
    """The top level of the configuration of `evaluate.py`."""

    only: list[str] = field(default_factory=list)
    flatness: Any = None
    profile: Any = False


ConfigStore.instance().store(name="evaluate_root", node=EvaluateRoot)


def job(config: DictConfig) -> float:
    """Hydra's task function: evaluate, store, print.

    Args:
        config: the composed configuration.

    Returns:
        Robust error by the first attack on the test examples of the last network evaluated: what a sweeper may
        minimise; NaN without attack.

    Raises:
        UserError: in a sweep, so that Hydra goes on with the other jobs; otherwise the message is printed.
    """
    context = HydraConfig.get()
    command, sweeping = list(context.overrides.task), context.mode is not None and context.mode.name == "MULTIRUN"
    try:
        with joined_to_share(sweeping=sweeping) as console:
            rows = evaluate(config, dict(context.runtime.choices), command=command, console=console)
    except UserError as error:
        complain(str(error))
        if sweeping:
            raise
        sys.exit(1)
    return headline_error(rows)


def headline_error(rows: Sequence[Row]) -> float:
    """Robust error by the first attack on the test examples of the last network; NaN without attack."""
    found = [row for row in rows if row["metric"] == "robust_error" and row["role"] == "test"]
    return next((float(row["value"]) for row in found if row["checkpoint"] == found[-1]["checkpoint"]), float("nan"))


def evaluate(config: DictConfig, choices: dict[str, Any], *, command: list[str], console: Console) -> list[Row]:
    """Everything that one command asks for; what is stored already is not measured again.

    Within `sharing_work` every rank makes this call; the first one owns the folder and writes.

    Args:
        config: composed configuration.
        choices: group -> chosen file, as Hydra knows them; they name single attacks and measures.
        command: the overrides that the user gave, for the record.
        console: where progress and summary go.

    Returns:
        The rows of all networks evaluated.

    Raises:
        UserError: for whatever is wrong with configuration, run, checkpoint or data.
    """
    config = config.copy()
    OmegaConf.set_struct(config, False)
    run = run_folder(config)
    stored = None if run is None else stored_config(run)
    origin = describe_network(config) if run is None else {}
    complete(config, stored, choices)
    require_sound(config)
    config.device = config.dataset.device = own_device(choose_device(config.device))
    surrogates = name_surrogates(config.evaluation, Path(config.outputs))
    plan: EvaluationPlan = build(config.evaluation)
    give_surrogates([*plan.attacks.values(), *plan.measures.values(), plan.selection], config, surrogates)
    dataset: Dataset = build(config.dataset)
    workers().on_first(lambda: require_examples(plan, dataset))  # one process fetches what is not on disk yet
    require_examples(plan, dataset)
    torch.set_num_threads(config.threads or sensible_threads(dataset))
    files = _files(config, run, plan)
    with shared_folder(lambda: open_folder(config, run, files)) as (path, folder):
        facts = provenance(command)
        parts = Parts(profile_settings(config.profile), path, console)
        if run is None and folder is not None:
            write_text(path / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
            folder.write_json("provenance.json", facts | {"data": dataset.describe()} | origin)
        bench = Bench(
            plan=plan,
            dataset=dataset,
            store=SharedStore(path / RESULTS),
            settings=resolved(config),
            console=console,
            facts={name: facts[name] for name in FACTS},
            prefix=data_prefix(config, stored, dataset.name),
            parts=parts,
        )
        console.print("\n".join([dataset.describe(), *plan.notes(dataset)]), markup=False)
        if plan.selection is not None and run is not None:
            files = [_early_stopped(config, bench, run)]
        names = [name for file in files for name in measure_network(bench, file, *network(config, file))]
        parts.write()
        rows = bench.rows(names)
        print_evaluation(console, rows, bench, files, names)
    return rows


def complete(config: DictConfig, stored: DictConfig | None, choices: dict[str, Any]) -> None:
    """Fill in what the command leaves to the run, in place.

    A single `attack=` or `flatness=` replaces the evaluation's own attacks and measures. Data, network and seed are
    the run's unless given. An evaluation that names examples for flatness but no measure takes the run's.
    """
    singles = {group: config[group] for group in ("attack", "flatness") if config[group] is not None}
    evaluation = config.evaluation
    evaluation.setdefault("measures", {})
    for group, node in singles.items():  # said of the keys that the command has, before the nodes are moved
        missing = [f"{group}.{key}" for key in _missing(OmegaConf.to_container(node, resolve=False))]
        if missing:
            raise UserError(f"{', '.join(missing)}: needs a value; write {missing[0]}=... on the command line.")
    if singles:
        evaluation.attacks, evaluation.measures, evaluation.restarts = {}, {}, {}
        for group, node in singles.items():
            place = evaluation.attacks if group == "attack" else evaluation.measures
            place[str(choices.get(group, group)).replace("/", "_")] = node
    config.flatness = None
    take_from_run(config, stored)
    wants = not singles and not evaluation.measures and evaluation.get("flatness")
    if wants and stored is not None and stored.get("flatness"):
        evaluation.measures = {_measure_name(stored.flatness): stored.flatness}
    config.seed = config.seed if config.seed is not None else (0 if stored is None else stored.seed)


def take_from_run(config: DictConfig, stored: DictConfig | None) -> None:
    """Data and network of the run where the command gives none, its attack (for the norm only), and where data lie.

    Args:
        config: changed in place.
        stored: configuration of the run; `None`: only the place of the data is filled in.
    """
    config.attack = None
    if stored is not None:
        own = config.dataset is None or "_target_" not in config.dataset
        for group in ("dataset", "model"):
            config[group] = _given_or_stored(config[group], stored[group])
        config.attack = stored.get("attack")
        find_data(config, stored, own=own)
        require_network_of_run(config, stored)
    config.data_root = config.data_root or os.environ.get("ROBUSTFLAT_DATA", "data")


def find_data(config: DictConfig, stored: DictConfig, *, own: bool) -> None:
    """Where the data of a run lie now: below `data_root` of the command, else where they lay when it was trained.

    Args:
        config: changed in place; its data set is complete.
        stored: configuration of the run.
        own: whether the data are those of the run.
    """
    there = stored.get("data_root")
    if config.data_root is not None:
        _move_data(config.dataset, str(there), config.data_root)
    elif own:
        config.data_root = there


def require_network_of_run(config: DictConfig, stored: DictConfig) -> None:
    """Refuse to put the weights of a run into another network: results are stored by the weights alone.

    Raises:
        UserError: naming what differs.
    """
    if not isinstance(config.model, DictConfig) or not isinstance(stored.model, DictConfig):
        return  # refused where the configuration is checked
    there, here = ({"model": OmegaConf.to_container(node.model, resolve=True)} for node in (stored, config))
    changed = list(differences(there, here))
    if changed:
        raise UserError(
            f"run= takes the network that was trained ({'; '.join(changed[:4])}). For another one with its weights: "
            "checkpoint=<run folder>/checkpoints/last.pt model=... dataset=..."
        )


def _missing(values: Any, path: str = "") -> Iterator[str]:
    """Keys of nested plain values that have no value yet."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif values == "???":
        yield path


def _measure_name(node: DictConfig) -> str:
    """What a run's flatness measure is called: "average", "worst_clean", ..."""
    case = "worst" if str(node.get("_target_")).endswith("WorstFlatness") else "average"
    loss = node.get("loss", "robust")
    return case if loss == "robust" else f"{case}_{loss}"


def _given_or_stored(given: Any, stored: Any) -> Any:
    if given is None:
        return stored
    return given if "_target_" in given else OmegaConf.merge(stored, given)


def data_prefix(config: DictConfig, stored: DictConfig | None, name: str) -> str:
    """What the names of splits begin with in the store: "" for the run's own data, else which other data they are.

    Args:
        config: of the evaluation, completed.
        stored: of the run; `None`: a network from elsewhere, whose folder is for these data only.
        name: of the data set; a digest is added where one name stands for many (folders and files of one's own).
    """
    values = resolved(config)
    if stored is None or same_data(values, resolved(stored)):
        return ""
    source = deciding_source(values)
    return f"{name}~{digest(source)} " if len(source) > 1 else f"{name} "


def _move_data(dataset: DictConfig, old: str, new: str) -> None:
    for node in (dataset.get("source"), dataset.get("extra")):
        for key in ("root", "images"):
            if node is not None and node.get(key) is not None:
                node[key] = moved(str(node[key]), old, new)


def require_sound(config: DictConfig) -> None:
    """Check the completed configuration like that of a training run.

    Raises:
        UserError: listing every problem.
    """
    problems = []
    known = {f.name for f in fields(EvaluateRoot)}
    problems += [f"{key!s}: nothing reads this key at the top level." for key in config if str(key) not in known]
    for group in ("dataset", "model"):
        if config[group] is None:
            problems.append(f"{group}: a checkpoint from elsewhere needs {group}=<choice> to say what it is.")
    refuse(problems)  # what is missing would only be named again wherever something refers to it
    shared = [f.name for f in fields(Root) if f.name in known]
    refuse(check(OmegaConf.masked_copy(config, shared)))
    groups = OmegaConf.create(resolved(config))
    groups.evaluation.flatness = None  # a rule of training: there the measure is a group of its own
    check_together(groups)


def require_examples(plan: EvaluationPlan, dataset: Dataset) -> None:
    """Ask for every split before anything is measured.

    Raises:
        UserError: for a split that does not exist or asks for more examples than there are, naming its key.
    """
    texts = {**plan.splits, "flatness": plan.flatness_split, "flatness_train": plan.flatness_splits["train"]}
    for key, text in texts.items():
        try:
            if text is not None:
                dataset.split(text)
        except UserError as error:
            raise UserError(f"evaluation.{key}: {error}") from error


def network(config: DictConfig, file: NetworkFile) -> tuple[nn.Module, str]:
    """The configured network with the weights of a file, in eval mode on the device, and their digest.

    Raises:
        CheckpointError: if they do not fit.
    """
    weights = weights_of(file)
    model: nn.Module = build(config.model)
    try:
        load_into(model, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    return model.to(config.device).eval(), digest_of(weights)


def run_folder(config: DictConfig, task: str = "evaluate") -> Path | None:
    """Folder of the run that a command is about; `None` for a checkpoint from elsewhere.

    Raises:
        UserError: for neither or both, a run that is not there, or a name for the folder that a run has already.
    """
    if (config.run is None) == (config.checkpoint is None):
        raise UserError(
            f"Say what to {task}: run=<folder or id> for a run of train.py, or checkpoint=<file> with model=... and "
            "dataset=... for a network trained elsewhere."
        )
    if config.run is not None and config.name is not None:
        raise UserError("name= is for the folder of a checkpoint from elsewhere; a run's results go into its own.")
    return None if config.run is None else find_run(str(config.run), Path(config.outputs))


def _files(config: DictConfig, run: Path | None, plan: EvaluationPlan) -> list[NetworkFile]:
    require_one_of("part", config.part, ("model", "average"))
    require_pieces(config.only, plan)
    if run is None:
        if plan.selection is not None or config.checkpoints is not None:
            raise UserError("A single checkpoint has no snapshots to choose from: early stopping needs run=<folder>.")
        return [
            NetworkFile("last" if config.part == "model" else config.part, Path(config.checkpoint), config.part, None)
        ]
    if plan.selection is not None:
        if not snapshots(run):
            raise UserError(f"{run} has no snapshots to choose from. Train with trainer.callbacks.snapshots.every=5.")
        return []
    which = config.checkpoints if config.checkpoints is not None else plan.checkpoints
    return choose(run, str(which if which is not None else "last"), config.part)


def describe_network(config: DictConfig) -> dict[str, Any]:
    """Take the network from a checkpoint that says which one it holds, unless the command does; what else it says."""
    if config.model is not None and "_target_" in config.model:
        return {}
    node, record = described(Path(config.checkpoint))
    if node is not None:
        config.model = _given_or_stored(config.model, node)
    return {"converted": record} if record else {}


def require_pieces(only: Sequence[str], plan: EvaluationPlan) -> None:
    """Refuse a name in `only` that is neither an attack nor a measure of the plan."""
    names = {*plan.attacks, *plan.measures}
    for name in only:
        require_one_of("A name in only=", name, names, hint="only=[] measures everything.")


def _early_stopped(config: DictConfig, bench: Bench, run: Path) -> NetworkFile:
    chosen = select_snapshot(bench, run, config.part, lambda file: network(config, file))
    name = "early_stopped" if config.part == "model" else f"{config.part}_early_stopped"
    return chosen._replace(name=name)


def open_folder(config: DictConfig, run: Path | None, files: list[NetworkFile]) -> RunFolder:
    """The run's own folder, or one for a foreign checkpoint that depends on its content, data and network."""
    if run is not None:
        try:
            identity = yaml.safe_load((run / "identity.yaml").read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{run / 'identity.yaml'} cannot be read: is {run} a run folder?") from error
        return RunFolder(run, identity or {})
    values = resolved(config)
    identity = {
        "weights": digest_of(weights_of(files[0])),
        "model": values["model"],
        "source": values["dataset"]["source"],
    }
    name = _safe_name(str(config.name or Path(config.checkpoint).stem))
    return RunFolder(Path(config.outputs) / name / digest(identity), identity)
