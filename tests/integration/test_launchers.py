"""Launcher files: they exist for every launcher, fit its plugin, and SLURM's submission script says what it should."""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace

import pytest
import yaml

from robustflat.apps.config import config_folder
from tests.integration.conftest import TINY

PLUGINS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher.config", "JobLibLauncherConf"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher.config", "LocalQueueConf"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher.config", "SlurmQueueConf"),
    "ray": ("hydra_plugins.hydra_ray_launcher._config", "RayLauncherConf"),
}


def launcher(name: str) -> dict[str, object]:
    return yaml.safe_load((config_folder() / "hydra" / "launcher" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", PLUGINS)
def test_a_file_has_the_keys_of_its_plugin(name):
    module, kind = PLUGINS[name]
    pytest.importorskip(module.rsplit(".", 1)[0])
    schema = getattr(importlib.import_module(module), kind)
    ours = launcher(name)
    assert ours["_target_"] == schema._target_
    assert ours.keys() <= set(schema.__dataclass_fields__)
    if name != "ray":
        assert ours.keys() == set(schema.__dataclass_fields__)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_launcher_composes(cli, name):
    answer = cli(f"hydra/launcher={name}", "--cfg", "hydra")
    assert answer.code == 0, answer.err
    assert str(launcher(name)["_target_"]) in answer.out


def test_a_launcher_that_is_not_installed_is_named(cli, tmp_path):
    (tmp_path / "conf" / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "conf" / "hydra" / "launcher" / "mine.yaml").write_text("_target_: hydra_plugins.not_there.Launcher\n")
    answer = cli("--config-dir", "conf", "-m", "hydra/launcher=mine", "seed=0,1")
    assert answer.code == 1
    assert "not_there" in answer.err
    assert "Traceback" not in answer.err


def test_slurm_gets_what_the_file_says(cli, tmp_path, monkeypatch):
    """The submission folder of a sweep, written without a cluster: `sbatch` here only prints a job's number."""
    submitit = pytest.importorskip("submitit")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "bin").mkdir()
    for name in ("srun", "sbatch", "squeue", "sacct", "scancel"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho Submitted batch job 12\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(submitit.Job, "results", lambda self: [SimpleNamespace(return_value=0.0)])
    answer = cli("-m", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "seed=0,1,2", *TINY)
    assert answer.code == 0, answer.err
    folder = tmp_path / "outputs" / ".submitit"
    assert len(list(folder.rglob("*_submitted.pkl"))) == 3
    script = min(folder.rglob("*.sh"))
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    wanted = {
        "--array=0-2%3", "--cpus-per-task=8", "--gpus-per-node=1", "--job-name=robustflat", "--mem=32GB", "--nodes=1",
        "--ntasks-per-node=1", "--partition=gpu", "--requeue", "--time=1440", "--signal=USR2@120", "--open-mode=append",
    }  # fmt: skip
    assert {f"#SBATCH {option}" for option in wanted} <= set(lines), script.read_text()
    assert any(line.startswith("srun") and "submitit.core._submit" in line for line in lines)
