"""One run of a study: how it ends when it is told to stop."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from robustflat.apps import job as jobs
from robustflat.apps.study_file import Experiment
from robustflat.training.trainer import TrainingStopped


@pytest.mark.parametrize("own_process", [True, False])
def test_a_study_that_is_told_to_stop_starts_no_other_run(tmp_path, monkeypatch, own_process):
    folder = tmp_path / "digits-at" / "abcd"
    folder.mkdir(parents=True)
    context = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(folder)), overrides=SimpleNamespace(task=[]))
    monkeypatch.setattr(jobs.HydraConfig, "get", lambda: context)

    def stopped(*_: object) -> None:
        raise TrainingStopped("stopped after step 6")

    monkeypatch.setattr(jobs.StudyJob, "_run", stopped)
    experiments = {"abcd": Experiment(name="one", label="one", family="AT", overrides=(), part="model")}
    one = jobs.StudyJob("study", [], experiments, os.getpid() if own_process else os.getpid() + 1)
    if own_process:
        with pytest.raises(SystemExit) as ended:
            one(OmegaConf.create({}))
        assert ended.value.code == 75
    else:  # a worker lives on, and says what happened
        assert one(OmegaConf.create({})).problem == "stopped after step 6"
