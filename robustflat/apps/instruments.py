"""What the commands hessian, measure, rescale and audit share: whose networks, on which examples, and the store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn

import robustflat
from robustflat.apps.build import build, choose_device
from robustflat.apps.check import check
from robustflat.apps.config import NetworkRoot, Root, _training_norm, digest, resolved
from robustflat.apps.data_source import deciding_source
from robustflat.apps.evaluate import (
    FACTS,
    RESULTS,
    _given_or_stored,
    data_prefix,
    describe_network,
    find_data,
    network,
    open_folder,
    require_network_of_run,
    run_folder,
)
from robustflat.apps.messages import complain
from robustflat.apps.networks import NetworkFile, choose, find_run, stored_config
from robustflat.apps.rules import check_together
from robustflat.apps.run_folder import provenance, write_text
from robustflat.apps.train import sensible_threads
from robustflat.data.dataset import Dataset
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.subject import require_deterministic, require_finite_weights, require_own_statistics
from robustflat.models.inference import keep_freed_memory
from robustflat.models.precision import precision_of
from robustflat.store.results import KEY, ResultStore, group_name
from robustflat.types import Attack, Batch

Arrays = dict[str, NDArray[Any]]
Made = tuple[Arrays, dict[str, object]]
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass
class InstrumentRoot(NetworkRoot):
    """Keys that these commands have in common."""

    examples: str = "test"
    batch_size: int = 128


@dataclass(frozen=True)
class Workplace:
    """Everything a command needs, opened.

    Attributes:
        config: complete and checked.
        stored: the run's own configuration; None for a checkpoint from elsewhere.
        dataset: where the examples come from.
        files: the networks, in order.
        folder: the run folder.
        store: results.h5 in it.
        console: for progress and the summary.
        facts: provenance that is stored with every result.
        prefix: put before the split in the store where the data are not the run's own.
    """

    config: DictConfig
    stored: DictConfig | None
    dataset: Dataset
    files: list[NetworkFile]
    folder: Path
    store: ResultStore
    console: Console
    facts: Mapping[str, object]
    prefix: str

    @property
    def split(self) -> str:
        """Name of the examples in the store."""
        return f"{self.prefix}{self.config.examples}"

    @property
    def seed(self) -> int:
        """Of all draws."""
        return int(self.config.seed)

    def batches(self) -> list[Batch]:
        """The examples, un-augmented, in a fixed order."""
        return list(self.dataset.split(str(self.config.examples)).batches(int(self.config.batch_size)))

    def examples(self) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and labels (N,)."""
        batches = self.batches()
        return torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])

    def network(self, file: NetworkFile) -> tuple[nn.Module, str]:
        """A network, checked, and the digest of its weights.

        Raises:
            UserError: if it does not fit, or is not finite or not deterministic.
        """
        model, weights = network(self.config, file)
        try:
            require_finite_weights(model)
            require_own_statistics(model)
            require_deterministic(model, self.batches()[0].x[:8])
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from error
        return model, weights

    def once(
        self,
        file: NetworkFile,
        kind: str,
        name: str,
        decisive: Mapping[str, Any],
        make: Callable[[], Made],
        *,
        weights: str,
        model: nn.Module,
    ) -> str:
        """Store what `make` returns, unless a result of the same network, examples and settings is there already.

        Args:
            file: the network.
            kind: kind of result: "hessian", "measure", ...; a group of the store.
            name: of the result within its kind; slashes make groups.
            decisive: all settings that decide the values, as plain values; seed and batch size are added.
            make: measures; gives arrays and attributes.
            weights: digest of the network's weights.
            model: the network, for its precision.

        Returns:
            The name of the result in the store.
        """
        source = deciding_source(resolved(self.config))
        settings = {**decisive, "seed": self.seed, "batch_size": int(self.config.batch_size)}
        split = str(self.config.examples)
        key = digest({"weights": weights, "split": split, "source": source, "kind": kind, "settings": settings})
        place = group_name(file.name, self.split, kind, *name.split("/"))
        if self.store.attributes(place).get(KEY) not in (None, key):
            same_network = self.store.attributes(place).get("weights") == weights
            place = f"{place}~{digest(settings)}" if same_network else place
        if self.store.has(place, key) and not self.config.force:
            return place
        start = time.perf_counter()
        with self.console.status(f"{file.name}: {name} ({kind})"):
            arrays, details = make()
        seconds = time.perf_counter() - start
        self.store.write(
            place,
            arrays,
            {
                **details,
                **self._attributes(file, kind, name, settings),
                KEY: key,
                "weights": weights,
                "seconds": seconds,
                "precision": details.get("precision", precision_of(model)),
            },
        )
        return place

    def _attributes(self, file: NetworkFile, kind: str, name: str, settings: Mapping[str, Any]) -> dict[str, object]:
        train = str(self.config.examples).startswith("train")
        return {
            "kind": kind,
            "name": name,
            "role": "train" if train else "test",
            "split": self.split,
            "checkpoint": file.name,
            "file": file.path.name,
            "epoch": file.epoch,
            "device": str(self.dataset.device),
            "seed": self.seed,
            "config": json.dumps(settings, sort_keys=True, default=str),
            "version": robustflat.__version__,
            "torch": torch.__version__,
            **self.facts,
        }

    def attack_of(self, loss: str) -> Attack | None:
        """The configured attack; `None` for the clean loss."""
        return None if loss == "clean" else build(self.config.attack)

    def summary(self) -> None:
        """Say on what, how, and where it is stored."""
        self.console.print(
            f"\nData {self.dataset.name}, examples {self.split}, batches of {self.config.batch_size}, seed "
            f"{self.seed}, {self.dataset.device}, robustflat {robustflat.__version__}, torch {torch.__version__}.",
            markup=False,
        )
        self.console.print(f"results      {self.store.path}", markup=False)


Work = Callable[[Workplace], float]


def start(config: DictConfig, work: Work, root: type[Any], *, check_own: Callable[[DictConfig], None]) -> float:
    """Hydra's task function of these commands: open, work, and print what is wrong instead of a traceback.

    Args:
        config: the composed configuration.
        work: the command itself; returns the number that a sweeper may minimise.
        root: dataclass of the command's keys.
        check_own: refuses values of the command's own keys, before anything is loaded.

    Raises:
        UserError: in a sweep, so that Hydra goes on with the other jobs; otherwise the message is printed.
    """
    context = HydraConfig.get()
    console = Console(highlight=False, soft_wrap=True)
    try:
        with opened(config, root, command=list(context.overrides.task), console=console, check_own=check_own) as place:
            return work(place)
    except UserError as error:
        complain(str(error))
        if context.mode is not None and context.mode.name == "MULTIRUN":
            raise
        raise SystemExit(1) from error


@contextmanager
def opened(
    config: DictConfig,
    root: type[Any],
    *,
    command: list[str],
    console: Console,
    check_own: Callable[[DictConfig], None],
) -> Iterator[Workplace]:
    """The configuration completed and checked, data and run folder opened; the folder is locked meanwhile.

    Raises:
        UserError: for whatever is wrong with configuration, run, checkpoint or data.
    """
    config = config.copy()
    OmegaConf.set_struct(config, False)
    run = run_folder(config, "measure")
    stored = None if run is None else stored_config(run)
    origin = describe_network(config) if run is None else {}
    complete(config, stored)
    check_own(config)
    require_sound(config, root)
    config.device = config.dataset.device = choose_device(config.device)
    dataset: Dataset = build(config.dataset)
    _require_examples(config, dataset)
    torch.set_num_threads(config.threads or sensible_threads(dataset))
    keep_freed_memory()
    files = _files(config, run)
    folder = open_folder(config, run, files)
    facts = provenance(command)
    with closing(folder):
        if run is None:
            write_text(folder.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
            folder.write_json("provenance.json", facts | {"data": dataset.describe()} | origin)
        yield Workplace(
            config=config,
            stored=stored,
            dataset=dataset,
            files=files,
            folder=folder.path,
            store=ResultStore(folder.path / RESULTS),
            console=console,
            facts={name: facts[name] for name in FACTS},
            prefix=data_prefix(config, stored, dataset.name),
        )


def complete(config: DictConfig, stored: DictConfig | None) -> None:
    """Fill in what the command leaves to the run, in place: data, network, seed, and the norm of its threat model."""
    if stored is not None:
        own = config.dataset is None or "_target_" not in config.dataset
        for group in ("dataset", "model"):
            config[group] = _given_or_stored(config[group], stored[group])
        find_data(config, stored, own=own)
        require_network_of_run(config, stored)
    threat = config.evaluation
    if threat is not None and OmegaConf.to_container(threat, resolve=False)["norm"] == "${training_norm:}":  # type: ignore[call-overload,index]
        threat.norm = "linf" if stored is None else _training_norm(stored)
    config.seed = config.seed if config.seed is not None else (0 if stored is None else stored.seed)
    config.data_root = config.data_root or os.environ.get("ROBUSTFLAT_DATA", "data")


def require_sound(config: DictConfig, root: type[Any]) -> None:
    """Check the completed configuration like that of a training run.

    Raises:
        UserError: listing every problem.
    """
    known = {f.name for f in fields(root)}
    problems = [f"{key!s}: nothing reads this key at the top level." for key in config if str(key) not in known]
    for group in ("dataset", "model"):
        if config[group] is None:
            problems.append(f"{group}: a checkpoint from elsewhere needs {group}=<choice> to say what it is.")
    shared = {f.name for f in fields(Root)}
    own = [name for name in known - shared if OmegaConf.is_dict(config.get(name))]
    problems += check(OmegaConf.masked_copy(config, [n for n in known & shared if n in config]))
    for name in own:  # nodes that only this command has; the schema of the root does not know their keys
        inside = check(OmegaConf.create({"trusted_packages": config.trusted_packages, "evaluation": config[name]}))
        problems += [problem.replace("evaluation", name, 1) for problem in inside]
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise UserError(f"The configuration has {len(problems)} problem{'s'[: len(problems) > 1]}:\n{lines}")
    groups = OmegaConf.create(resolved(config))
    groups.evaluation.flatness = None  # a rule of training: there the measure is a group of its own
    check_together(groups)


def losses_of(config: DictConfig, allowed: Sequence[str]) -> list[str]:
    """`loss=` as a list: one name, or several.

    Raises:
        UserError: for an unknown one, or none.
    """
    given = [config.loss] if isinstance(config.loss, str) else list(config.loss or ())
    for loss in given:
        require_one_of("loss", loss, allowed)
    if not given:
        raise UserError(f"loss needs one or several of {', '.join(allowed)}.")
    return [str(loss) for loss in given]


def with_precision(model: nn.Module, precision: str) -> nn.Module:
    """The network in "fp32" or "fp64", in place."""
    require_one_of("precision", precision, PRECISIONS)
    return model.to(PRECISIONS[precision])


def column(values: Sequence[float]) -> NDArray[Any]:
    """Numbers as a float64 array."""
    return np.array(values, dtype=np.float64)


def other_weights(text: str, outputs: Path, part: str) -> NetworkFile:
    """The last network of a run, or a checkpoint file, that another command-line value names.

    Raises:
        UserError: if there is neither.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return NetworkFile(path.stem, path, part, None)
    return choose(find_run(text, outputs), "last", part)[0]


def _files(config: DictConfig, run: Path | None) -> list[NetworkFile]:
    require_one_of("part", config.part, ("model", "average"))
    if run is not None:
        return choose(run, str(config.checkpoints if config.checkpoints is not None else "last"), config.part)
    if config.checkpoints is not None:
        raise UserError("A single checkpoint has no snapshots: checkpoints= needs run=<folder>.")
    return [NetworkFile("last" if config.part == "model" else config.part, Path(config.checkpoint), config.part, None)]


def _require_examples(config: DictConfig, dataset: Dataset) -> None:
    require_range("batch_size", config.batch_size, low=1)
    try:
        dataset.split(str(config.examples))
    except UserError as error:
        raise UserError(f"examples: {error}") from error
