"""Each sweep names a value that exists, and values that are valid."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from robustflat.apps.check import check
from robustflat.apps.config import config_folder, run_id
from robustflat.apps.rules import check_together

SWEEPS = sorted(path.stem for path in (config_folder() / "sweep").glob("*.yaml"))


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
