"""Killed at random moments and started again: the same bits as without the kills."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

from tests.integration.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_killed_runs_end_with_the_bits_of_an_uninterrupted_one(tmp_path):
    overrides = [a for a in TINY if "epochs" not in a] + [
        "trainer=weight_averaging",
        "trainer.epochs=12",
        "trainer.loss.label_noise=0.1",
        "threads=1",
    ]
    assert script("kill_and_resume").kill_and_resume(tmp_path, 2, 0, overrides) == []


def test_a_difference_would_be_seen(trained, tmp_path):
    module = script("kill_and_resume")
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    assert module.compare_runs(trained, other) == []
    metrics = other / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("1", "2", 1))
    assert any("metrics.jsonl" in line for line in module.compare_runs(trained, other))
