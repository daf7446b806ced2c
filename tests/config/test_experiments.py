"""The 74 experiments of the paper: each composes to what its row says, and each method really trains."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from robustflat.apps.check import check
from robustflat.apps.config import config_folder, register, run_name
from robustflat.apps.rules import check_together
from robustflat.training.trainer import Trainer
from tests.config.conftest import Compose
from tests.config.tiny import tiny_trainer

FOLDER = config_folder() / "experiment" / "iccv21"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
RELEASED = sorted(path.stem for path in FOLDER.with_name("iccv21_released").glob("*.yaml"))
GOLDEN = Path(__file__).parents[1] / "golden"
REGENERATE = "ROBUSTFLAT_REGENERATE"
"""Environment variable; with 1, the golden file is written instead of compared."""

ONE_OF_EACH_METHOD = [
    "at", "adam", "awp_001", "cyclic_2", "entropy_sgd_l2", "label_noise_04", "label_smoothing_03", "late", "mart_6",
    "only_correct", "pgd_tau_3", "predicted_labels", "self_supervision_4", "trades_6", "weight_averaging_09975",
    "weight_clipping_0005",
]  # fmt: skip


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix.removesuffix("."): node}
    return {key: value for name, child in node.items() for key, value in leaves(child, f"{prefix}{name}.").items()}


def resolved_leaves(config: Any) -> dict[str, Any]:
    return leaves(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def differences(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What an experiment changes in the baseline: key -> value, "(absent)" for what it removes."""
    changed = {key: value for key, value in own.items() if key not in base or base[key] != value}
    return dict(sorted((changed | {key: "(absent)" for key in base if key not in own}).items()))


@cache
def golden(folder: str) -> dict[str, dict[str, Any]]:
    path = GOLDEN / f"{folder}.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def require_golden(folder: str, name: str, changed: dict[str, Any]) -> None:
    """The differences are those of the golden file, or, on request, are written there."""
    if os.environ.get(REGENERATE) == "1":
        GOLDEN.mkdir(exist_ok=True)
        text = yaml.safe_dump({**golden(folder), name: changed}, sort_keys=True, width=120)
        how = f"To write it anew: {REGENERATE}=1 pytest -n 0 tests/config/test_experiments.py"
        comment = f"# Differences of each experiment from iccv21/at. {how}"
        (GOLDEN / f"{folder}.yaml").write_text(f"{comment}\n{text}")
        golden.cache_clear()
    assert changed == golden(folder)[name]


@pytest.fixture(scope="module")
def baseline() -> dict[str, Any]:
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose("train", ["+experiment=iccv21/at"])
    return resolved_leaves(config)


def test_there_is_one_file_for_each_of_the_74_rows():
    rows = set()
    for name in NAMES:
        text = (FOLDER / f"{name}.yaml").read_text()
        rows.add(text.split("table of all models, row ")[1].split(";")[0].split(".\n")[0])
    assert len(NAMES) == len(rows) == 74


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_valid_and_differs_from_the_baseline_as_the_golden_file_says(compose, baseline, name):
    config = compose(f"+experiment=iccv21/{name}")
    assert check(config) == []
    check_together(config)
    header = (FOLDER / f"{name}.yaml").read_text()
    assert f"python train.py +experiment=iccv21/{name}\n" in header
    assert "Expected: RErr" in header
    changed = differences(baseline, resolved_leaves(config))
    require_golden("iccv21", name, changed)


def test_no_two_experiments_are_the_same():
    changed = {name: repr(values) for name, values in golden("iccv21").items()}
    assert sorted(changed) == NAMES
    assert len(set(changed.values())) == len(NAMES)
    assert [name for name, text in changed.items() if text == "{}"] == ["at"]


def test_the_baseline_is_that_of_the_paper(compose):
    config = compose("+experiment=iccv21/at")
    optimizer, attack = config.optimizer, config.attack
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.05, 0.9, 0.0005)
    assert (config.trainer.epochs, config.dataset.batch_size) == (150, 128)
    assert [round(150 * fraction) for fraction in config.schedule.fractions] == [60, 90, 120]
    assert (attack.steps, attack.step_size, attack.ball.epsilon) == (7, 0.007, 8 / 255)
    assert config.evaluation.attacks.pgd20.steps == 20
    assert (config.model.norm, config.model.channels) == ("rebn", 64)


def test_runs_are_named_after_the_experiment(compose):
    assert run_name(compose("+experiment=iccv21/trades_6", hydra_node=True)) == "iccv21-trades_6"


def test_the_command_line_wins_over_an_experiment(compose):
    config = compose("+experiment=iccv21/trades_6", "trainer.loss.beta=2.5", "schedule=cosine", "dataset=synthetic")
    assert config.trainer.loss.beta == 2.5
    assert config.schedule._target_.endswith("cosine")
    assert config.dataset._target_.endswith("Dataset") and config.dataset.source._target_.endswith("Synthetic")


def two_steps(compose: Compose, experiment: str) -> Trainer:
    """The experiment, such as "iccv21/cyclic_2", trained for two steps with its own method (a cycle needs two)."""
    cycles = int(experiment.rpartition("_")[2]) if "/cyclic_" in experiment else 1
    trainer = tiny_trainer(compose, f"+experiment={experiment}", "attack.steps=1", f"trainer.epochs={cycles}")
    trainer.fit()
    return trainer


def require_trained(trainer: Trainer) -> None:
    assert trainer.step == 2 * trainer.epochs
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.history[0]["loss"] > 0


@pytest.mark.parametrize("name", ONE_OF_EACH_METHOD)
def test_each_method_runs_two_steps(compose, name):
    torch.manual_seed(0)
    require_trained(two_steps(compose, f"iccv21/{name}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE_OF_EACH_METHOD])
def test_every_other_experiment_runs_two_steps(compose, name):
    torch.manual_seed(0)
    require_trained(two_steps(compose, f"iccv21/{name}"))


# What the released code does otherwise.

RELEASED_OF_EACH_KIND = [
    "at", "awp", "constant_rate_01", "cyclic", "entropy_sgd_l3", "label_smoothing_02", "only_correct",
    "predicted_labels", "self_supervision_1", "trades_6", "weight_averaging", "weight_clipping_0015", "weight_decay",
]  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_experiment_is_valid_and_differs_as_the_golden_file_says(compose, baseline, name):
    config = compose(f"+experiment=iccv21_released/{name}")
    assert check(config) == []
    check_together(config)
    header = (FOLDER.with_name("iccv21_released") / f"{name}.yaml").read_text()
    assert f"# Run:  python train.py +experiment=iccv21_released/{name}\n" in header
    assert "# Old name: " in header
    changed = differences(baseline, resolved_leaves(config))
    require_golden("iccv21_released", name, changed)
    assert changed["attack.random_start"] == "uniform_norm"
    assert changed["evaluation.attacks.autoattack.attacks"] == ["fab-t", "apgd-ce", "apgd-t"]


def test_no_two_released_experiments_are_the_same():
    changed = {name: repr(values) for name, values in golden("iccv21_released").items()}
    assert sorted(changed) == RELEASED
    assert len(set(changed.values())) == len(RELEASED)


def test_what_the_released_code_does_everywhere_goes_on_top_of_any_row(compose):
    config = compose("+experiment=iccv21/mart_6", "dataset=cifar10_released", "+protocol=released")
    assert check(config) == []
    assert (config.trainer.loss.beta, config.attack.ball.epsilon, config.attack.steps) == (6.0, 0.0314, 7)
    assert config.evaluation.measures.worst.protocol == "released"


@pytest.mark.parametrize("name", RELEASED_OF_EACH_KIND)
def test_each_released_kind_runs_two_steps(compose, name):
    torch.manual_seed(0)
    require_trained(two_steps(compose, f"iccv21_released/{name}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RELEASED if name not in RELEASED_OF_EACH_KIND])
def test_every_other_released_experiment_runs_two_steps(compose, name):
    torch.manual_seed(0)
    require_trained(two_steps(compose, f"iccv21_released/{name}"))
