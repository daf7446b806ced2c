"""A sweep of 20 runs on joblib: one is killed, one diverges, 18 finish; the same command completes the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]


def sweep(folder: Path) -> subprocess.CompletedProcess[str]:
    seeds = f"seed={','.join(map(str, range(20)))}"
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=joblib", *TINY, "trainer.epochs=1"]
    command += [seeds, "threads=1", f"outputs={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(folder.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)


FAULTS = """
import os, signal
import torch
from robustflat.training.trainer import Trainer
train_step = Trainer._train_step
def spoilt(self):
    train_step(self)
    fault = os.environ.get("FAULT_" + str(self.streams.seed))
    if fault and not os.path.exists(fault):
        open(fault, "w").close()
        if os.path.basename(fault) == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        with torch.no_grad():
            next(self.model.parameters()).fill_(float("nan"))
Trainer._train_step = spoilt
"""


@pytest.mark.slow
def test_a_sweep_outlives_a_killed_and_a_diverging_run(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif any('isolated' in a for a in sys.orig_argv): import faults\n"
    )
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.setenv("FAULT_3", str(tmp_path / "killed"))  # each fault happens once
    monkeypatch.setenv("FAULT_6", str(tmp_path / "diverged"))
    first = sweep(tmp_path / "runs")
    assert first.returncode == 1
    assert "killed by SIGKILL" in first.stderr
    assert "diverged" in first.stderr
    assert "Traceback" not in first.stderr
    assert len(list((tmp_path / "runs").glob("*/*/DONE"))) == 18
    second = sweep(tmp_path / "runs")
    assert second.returncode == 0, second.stderr
    assert len(list((tmp_path / "runs").glob("*/*/DONE"))) == 20
    assert second.stdout.count("This run is done") == 18
