"""The runs of a study: each experiment with each seed, composed, checked, and compared with what is on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustflat.apps.build import choose_device
from robustflat.apps.check import check
from robustflat.apps.collect import RESULTS
from robustflat.apps.config import digest, resolved, run_id, run_name
from robustflat.apps.data_source import deciding_source
from robustflat.apps.evaluate import complete, require_sound
from robustflat.apps.messages import user_error_in
from robustflat.apps.rules import check_together
from robustflat.apps.study_file import Experiment, StudyFile
from robustflat.errors import UserError

EVALUATED = "evaluated.json"
"""File of a run folder: digests of the evaluations that were completed, so that a study skips them unopened."""

NOT_DECISIVE = ("run", "checkpoint", "device", "threads", "outputs", "data_root", "force", "name", "trusted_packages")
"""Keys of an evaluation that do not change its values."""


@dataclass(frozen=True)
class Pass:
    """One call of `evaluate.py` for every run.

    Attributes:
        name: in the study file.
        config: composed configuration, without run.
        choices: group -> chosen file.
    """

    name: str
    config: DictConfig
    choices: Mapping[str, Any]


@dataclass(frozen=True)
class StudyRun:
    """One network of a study.

    Attributes:
        experiment: what is trained.
        seed: of training.
        folder: where, as `train.py` would choose it.
        overrides: arguments of `train.py`.
        epochs: of the training.
        keys: digest of each evaluation.
        pieces: number of results that all evaluations of the last weights store.
    """

    experiment: Experiment
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    epochs: int
    keys: tuple[str, ...]
    pieces: int

    @property
    def name(self) -> str:
        """For messages and progress."""
        return f"{self.experiment.name}, seed {self.seed}"

    def trained(self) -> bool:
        """Whether training has finished."""
        return (self.folder / "DONE").exists()

    def complete(self) -> bool:
        """Whether nothing is left to train or to evaluate."""
        return self.trained() and set(self.keys) <= completed(self.folder)


def completed(folder: Path) -> set[str]:
    """Digests of the evaluations that a run folder has, by its own record; empty without results file."""
    try:
        found = json.loads((folder / EVALUATED).read_text())
    except (OSError, ValueError, RecursionError):
        return set()
    return set(found) if isinstance(found, dict) and (folder / RESULTS).is_file() else set()


def compose_passes(study: StudyFile, extra: Sequence[str]) -> list[Pass]:
    """The evaluations of a study as configurations.

    Args:
        study: the file.
        extra: arguments for all of them.

    Raises:
        UserError: if one cannot be composed, with its name and what Hydra says.
    """
    passes = []
    for name, overrides in study.commands().items():
        with_hydra = _composed("evaluate", [*overrides, *extra], f"evaluation '{name}'")
        choices = OmegaConf.to_container(with_hydra.hydra.runtime.choices)
        assert isinstance(choices, dict)
        passes.append(Pass(name, _without_hydra(with_hydra), {str(k): v for k, v in choices.items()}))
    return passes


def expand(study: StudyFile, passes: Sequence[Pass], extra: Sequence[str]) -> list[StudyRun]:
    """All runs of a study; those with the same seed together, so that an unfinished study has all experiments.

    Args:
        study: the file.
        passes: see `compose_passes`.
        extra: arguments of `train.py` for all runs, after those of the experiments.

    Raises:
        UserError: listing every experiment that is invalid and why, or two experiments that are the same run.
    """
    problems: list[str] = []
    found: dict[Path, StudyRun] = {}
    for experiment in study.experiments:
        try:
            runs = list(_runs(study, experiment, passes, extra))
        except UserError as error:
            problems.append(str(error))
            continue
        for run in runs:
            other = found.setdefault(run.folder, run)
            if other is not run:
                problems.append(
                    f"experiments '{other.experiment.name}' and '{experiment.name}' are the same configuration: "
                    "drop one of them."
                )
                break
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise UserError(f"{len(problems)} of {len(study.experiments)} experiments cannot be run:\n{lines}")
    order = {seed: position for position, seed in enumerate(study.seeds)}
    return sorted(found.values(), key=lambda run: order[run.seed])


def _runs(study: StudyFile, experiment: Experiment, passes: Sequence[Pass], extra: Sequence[str]) -> Iterator[StudyRun]:
    overrides = (*study.common, *experiment.overrides, *extra)
    where = f"experiment '{experiment.name}'"
    config = _composed("train", [*overrides], where)
    try:
        evaluations = checked(OmegaConf.create(resolved(config)), passes, experiment.part)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for seed in study.seeds:
        config.seed = seed
        yield StudyRun(
            experiment,
            seed,
            Path(config.outputs) / run_name(config) / run_id(config),
            (*overrides, f"seed={seed}"),
            int(config.trainer.epochs),
            tuple(pass_key(made, seed=seed_of(one, seed)) for one, made in zip(passes, evaluations, strict=True)),
            sum(_pieces(one) for one in evaluations),
        )


def checked(train: DictConfig, passes: Sequence[Pass], part: str) -> list[DictConfig]:
    """The evaluations of a run, after a check of these and of the configuration of its training.

    Args:
        train: resolved configuration of the training, without Hydra's node.
        passes: evaluations.
        part: which network of the run.

    Raises:
        UserError: with all problems of the first of them that has any.
    """
    problems = check(train)
    if problems:
        raise UserError("; ".join(problems))
    train.device = choose_device(train.device)
    check_together(train)
    made = [completed_pass(one, train, part) for one in passes]
    for one, config in zip(passes, made, strict=True):
        try:
            require_sound(config)
        except UserError as error:
            raise UserError(f"evaluation '{one.name}': {error}") from error
    return made


def completed_pass(one: Pass, train: DictConfig, part: str) -> DictConfig:
    """The resolved configuration of an evaluation of one run: data, network and seed are those of its training.

    Args:
        one: the evaluation.
        train: resolved configuration of the training, without Hydra's node.
        part: which network of the run.
    """
    config = one.config.copy()
    OmegaConf.set_struct(config, False)
    complete(config, train, dict(one.choices))
    config.part = part
    config.device = train.device
    return OmegaConf.create(resolved(config))


def seed_of(one: Pass, training: int) -> int:
    """Seed of an evaluation: its own if the study file gives one, else that of the training."""
    return training if one.config.seed is None else int(one.config.seed)


def pass_key(made: DictConfig, *, seed: int) -> str:
    """Digest of everything in an evaluation that changes its values or adds to them.

    Args:
        made: from `completed_pass`, maybe for another seed.
        seed: of the evaluation, see `seed_of`.
    """
    values = {**resolved(made), "seed": seed}
    kept = {key: value for key, value in values.items() if key not in NOT_DECISIVE}
    dataset = dict(kept.get("dataset") or {})
    kept["dataset"] = {**{k: v for k, v in dataset.items() if k != "device"}, "source": deciding_source(values)}
    return digest(kept)


def _pieces(config: DictConfig) -> int:
    """How many results an evaluation stores, about; for progress only."""
    node = config.evaluation
    splits = sum(node.get(key) is not None for key in ("test", "train"))
    measured = sum(node.get(key) is not None for key in ("flatness", "flatness_train"))
    attacks = sum(value is not None for value in (node.get("attacks") or {}).values())
    measures = sum(value is not None for value in (node.get("measures") or {}).values())
    return splits + splits * attacks + measured * measures + 1  # and the sanity checks


def _composed(name: str, overrides: list[str], where: str) -> DictConfig:
    """A configuration with Hydra's node.

    Raises:
        UserError: with the place and what Hydra says.
    """
    try:
        return hydra.compose(name, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = user_error_in(error) or error
        text = " ".join(line.strip() for line in str(cause).splitlines() if line.strip())
        raise UserError(f"{where}: {text}") from error


def _without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
