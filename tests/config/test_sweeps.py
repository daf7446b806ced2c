"""Each sweep names a value that exists, and values that are valid."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from robustflat.apps.check import check
from robustflat.apps.config import config_folder, run_id
from robustflat.apps.rules import check_together

SWEEPS = sorted(path.stem for path in (config_folder() / "sweep").glob("*.yaml") if path.stem != "optuna")
ASKED = {
    "label_smoothing", "label_noise", "weight_decay", "trades_beta", "mart_beta", "awp_radius", "averaging", "clipping",
    "batch_size", "learning_rate", "schedules", "self_supervision", "seeds",
}  # fmt: skip


def test_every_sweep_of_the_paper_is_there():
    assert set(SWEEPS) == ASKED


@pytest.mark.parametrize("name", SWEEPS)
def test_first_and_last_job_of_a_sweep_are_valid_runs_of_their_own(compose, name):
    composed = compose(f"+sweep={name}", hydra_node=True)
    params = OmegaConf.to_container(composed.hydra.sweeper.params)
    assert composed.hydra.mode.name == "MULTIRUN"
    ids = set()
    for position in (0, -1):
        job = [f"{key}={str(values).split(',')[position]}" for key, values in params.items()]
        config = compose(f"+sweep={name}", *job)
        assert check(config) == []
        check_together(config)
        ids.add(run_id(config))
    assert len(ids) == 2


def optuna_sweep(compose, *overrides: str, hydra_node: bool = False):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra robustflat[optuna]")
    return compose("+sweep=optuna", *overrides, hydra_node=hydra_node)


def test_the_optuna_search_selects_on_held_out_training_examples(compose):
    composed = optuna_sweep(compose, hydra_node=True)
    sweeper = composed.hydra.sweeper
    assert sweeper._target_.endswith("OptunaSweeper")
    assert (str(sweeper.direction), sweeper.sampler.seed, composed.hydra.mode.name) == ("minimize", 0, "MULTIRUN")
    config = optuna_sweep(compose, "optimizer.lr=0.01", "optimizer.weight_decay=0.001")
    assert check(config) == []
    check_together(config)
    assert config.dataset.train == "train[:-500]"
    assert config.evaluation.test == config.trainer.callbacks.evaluation.test == "train[-500:]"
    used = str(OmegaConf.to_container(config.evaluation, resolve=True)) + str(config.trainer)
    assert "'test[" not in used


@pytest.mark.parametrize("trainer", ["trades", "awp"])
def test_the_optuna_search_takes_any_method(compose, trainer):
    config = optuna_sweep(compose, f"trainer={trainer}", "dataset=cifar10", "evaluation=quick")
    assert check(config) == []
    assert config.evaluation.test == "train[-500:]"
