"""Every benchmark runs, with sizes of seconds, and finds the same with all its ways."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
import yaml

from benchmarks.run import FULL, QUICK
from tests.integration.test_study import ROOT, STUDY

SMALL = {
    "training": "--channels 2 --images 4 --pgd 1",
    "flatness": "--channels 2 --images 4 --trials 1 --steps 1",
    "landscape": "--channels 2 --images 4 --points 3 --steps 1",
    "curvature": "--channels 2 --images 4",
    "attacks": "--channels 2 --images 4 --epochs 1 --norms",
    "data": "--channels 2 --images 400 --batches 1",
}


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """benchmark(name, *arguments) runs it in this process; what it has stored."""
    monkeypatch.setattr("benchmarks.harness.keep_freed_memory", lambda: True)
    limits = {"convolution_fp32_gflops": 1.0, "convolution_bf16_gflops": 1.0}
    monkeypatch.setattr("benchmarks.harness.limits", lambda device: limits)
    threads, path = torch.get_num_threads(), tmp_path / "results.json"

    def run(name: str, *arguments: str) -> dict[str, dict[str, dict[str, object]]]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--rounds", "1", "--results", str(path), *arguments])
        importlib.import_module(f"benchmarks.{name}").main()
        return {title: entry["ways"] for title, entry in json.loads(path.read_text()).items()}

    yield run
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.filterwarnings("ignore")
def test_a_benchmark_runs_and_says_what_was_found(benchmark, name):
    tables = benchmark(name, "--no-memory", *SMALL[name].split())
    assert tables
    for ways in tables.values():
        assert len(ways) > 1
        timed = {way: row for way, row in ways.items() if "processor" in row and way != "gradient"}
        assert all(row["found"] for row in timed.values())


@pytest.mark.slow
def test_the_benchmark_of_a_card_runs_on_a_processor(benchmark, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.card.limits", lambda device: {f"convolution_{p}_gflops": 1.0 for p in ("fp32", "bf16")}
    )
    small = "--channels 2 --train 256 --images 8 --epochs 1 --trials 2 --steps 1 --budget preview"
    tables = benchmark("card", "--no-memory", *small.split())
    assert len(tables) == 4
    assert all(row["found"] and row["wall"] > 0 for ways in tables.values() for row in ways.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), [("training", "loss found"), ("flatness", "flatness found")])
def test_ways_in_the_same_precision_find_the_same(benchmark, name, key):
    tables = benchmark(name, "--no-memory", *SMALL[name].split())
    compared = [ways for ways in tables.values() if key in ways["literal"]["found"]]
    assert compared
    for ways in compared:
        values = [float(row["found"][key]) for way, row in ways.items() if "bf16" not in way]
        assert max(values) - min(values) <= 2e-4


def test_all_that_make_bench_runs_exist_and_take_their_arguments():
    assert FULL.keys() == QUICK.keys() == SMALL.keys()
    for arguments in (FULL, QUICK):
        for name, text in arguments.items():
            importlib.import_module(f"benchmarks.{name}").options().parse_args(text.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_autoattack_runs_beside_the_authors(benchmark):
    arguments = "--no-memory --networks residual --channels 2 --images 8 --epochs 1 --norms linf --searches fp32"
    tables = benchmark("attacks", *arguments.split())
    (ways,) = [ways for title, ways in tables.items() if title.startswith("AutoAttack")]
    assert ways["ours, fp32"]["gflop"] > 0


@pytest.mark.slow
def test_a_study_is_timed_with_all_its_processes(benchmark, tmp_path):
    study = {key: value for key, value in STUDY.items() if key != "evaluations"}
    study |= {"experiments": {"at": STUDY["experiments"]["at"]}, "evaluations": {"last": STUDY["evaluations"]["last"]}}
    (tmp_path / "conf" / "study").mkdir(parents=True)
    (tmp_path / "conf" / "study" / "one.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    where = ("--config-dir", str(tmp_path / "conf"), "--study", "one")
    tables = benchmark("studies", *where, "--against", str(ROOT), "--jobs", "1", "attack.steps=2")
    (ways,) = tables.values()
    assert list(ways) == ["before", "this checkout"]
    for row in ways.values():
        assert row["processor"] > 0.5  # that of the study, which is another process
        assert row["found"] == {"runs done": "1/1", "cells that differ": "0"}
