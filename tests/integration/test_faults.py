"""What breaks around a run: a clear message, an intact folder, a state to go on from, an exit code that says so.

docs/faults.md lists all faults and the tests that show them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from robustflat.apps.compare import compare_runs
from robustflat.loggers.ledger import read_ledger
from robustflat.training.callbacks import Callback
from robustflat.training.checkpoint import load
from robustflat.training.trainer import Trainer
from tests.integration.conftest import TINY, only_run

REWIND = "+trainer/callback@trainer.callbacks.rewind=rewind"


def require_clean_failure(answer, folder: Path, code: int = 1) -> None:
    assert answer.code == code
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.err + answer.out
    assert not list(folder.rglob("*.tmp"))


def fail_once_at(monkeypatch, step: int, error: BaseException) -> None:
    """The training step raises, as it does where memory runs out, once."""
    train_step, left = Trainer._train_step, [1]

    def fails(self: Trainer) -> None:
        if self.step == step and left:
            left.pop()
            raise error
        train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", fails)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to..."),
    ],
    ids=["python", "gpu", "cpu"],
)
def test_out_of_memory_names_the_batch_size_and_the_run_goes_on_later(cli, tmp_path, monkeypatch, error):
    fail_once_at(monkeypatch, 1, error)
    answer = cli(*TINY)
    require_clean_failure(answer, tmp_path)
    assert "dataset.batch_size" in answer.err
    assert cli(*TINY).code == 0
    config = yaml.safe_load((only_run(tmp_path) / "config.yaml").read_text())
    advised = re.findall(r"\b(dataset|evaluation|trainer)\.(\w+)", answer.err)
    assert len(advised) >= 3
    assert all(key in config[group] for group, key in advised)


def test_real_memory_that_runs_out_gets_the_same_sentence(cli, tmp_path):
    answer = cli(
        *(a for a in TINY if "channels" not in a), "model=mlp", "model.units=[10000000000000]"
    )  # 2.6 PB: refused at once
    require_clean_failure(answer, tmp_path)
    assert "Out of memory" in answer.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.fixture
def small_files_only():
    """The system refuses files beyond a size, as a full disk refuses to grow them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "file"), [(300, "yaml"), (15_000, "last.pt")])
def test_a_write_that_the_system_refuses_half_way_leaves_no_part_of_a_file(cli, tmp_path, small_files_only, size, file):
    small_files_only(size)
    answer = cli(*TINY)
    small_files_only(resource.RLIM_INFINITY)
    require_clean_failure(answer, tmp_path)
    assert file in answer.err
    assert "File too large" in answer.err
    assert not list(tmp_path.rglob("*.pt"))
    assert cli(*TINY).code == 0


def test_a_place_that_is_no_folder_is_named(cli, tmp_path):
    (tmp_path / "file").write_text("")
    answer = cli(*TINY, "outputs=file/runs")
    require_clean_failure(answer, tmp_path)
    assert "file" in answer.err


def diverge_at(monkeypatch, step: int, times: int = 1) -> None:
    train_step, left = Trainer._train_step, [1] * times

    def spoils(self: Trainer) -> None:
        train_step(self)
        if self.step == step and left:
            left.pop()
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_train_step", spoils)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(cli, tmp_path, monkeypatch):
    diverge_at(monkeypatch, 3)
    answer = cli(*TINY)
    require_clean_failure(answer, tmp_path)
    assert "diverged in epoch 2" in answer.err
    assert "trainer.callbacks.rewind" in answer.err
    kept = load(only_run(tmp_path) / "checkpoints" / "last.pt")
    assert kept.meta["epoch"] == 1
    assert all(w.isfinite().all() for w in kept.parts["model"].values())
    assert not (only_run(tmp_path) / "DONE").exists()


def test_a_run_that_diverges_goes_back_and_lowers_its_rate_if_asked(cli, tmp_path, monkeypatch):
    diverge_at(monkeypatch, 3)
    answer = cli(*TINY, REWIND, "trainer.callbacks.rewind.factor=0.5")
    assert answer.code == 0, answer.err
    assert "back to epoch 1 with 0.5 times the learning rate" in answer.out
    lines = [json.loads(line) for line in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch/rewinds"] for line in lines if "epoch/rewinds" in line] == [0, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_machine_that_is_taken_back_costs_no_step(cli, tmp_path, monkeypatch, number):
    longer = [*(a for a in TINY if "train[:128]" not in a), "dataset.train='train[:512]'"]
    assert cli(*longer, "outputs=whole").code == 0
    train_step = Trainer._train_step

    def signals(self: Trainer) -> None:
        train_step(self)
        if self.step == 6:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_train_step", signals)
    answer = cli(*longer)
    require_clean_failure(answer, tmp_path, code=75)
    monkeypatch.setattr(Trainer, "_train_step", train_step)
    assert load(only_run(tmp_path) / "checkpoints" / "last.pt").meta["step"] == 6
    assert cli(*longer).code == 0
    (whole,) = tmp_path.glob("whole/*/*")
    assert compare_runs(whole, only_run(tmp_path)) == []
    spent, stopped = (read_ledger(run / "ledger.json")["training"] for run in (whole, only_run(tmp_path)))
    assert all(spent[key] <= stopped[key] for key in ("backwards", "images"))  # each start checks its search copy


def test_a_sweep_that_is_told_to_stop_stops(cli, tmp_path, monkeypatch):
    train_step = Trainer._train_step

    def signals(self: Trainer) -> None:
        train_step(self)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_train_step", signals)
    answer = cli("-m", *TINY, "seed=0,1")
    assert answer.code == 75
    assert len(list(tmp_path.glob("outputs/*/*/identity.yaml"))) == 1


def test_a_clock_that_jumps_changes_nothing(cli, tmp_path, monkeypatch):
    assert cli(*TINY, "outputs=calm").code == 0
    jumps = itertools.cycle([0.0, 4e9, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    assert cli(*TINY).code == 0
    monkeypatch.undo()
    (calm,) = tmp_path.glob("calm/*/*")
    assert compare_runs(calm, only_run(tmp_path)) == []


def test_damaged_small_files_of_a_run_are_written_anew_or_named(cli, tmp_path):
    assert cli(*TINY).code == 0
    run = only_run(tmp_path)
    for name in ("results.json", "provenance.json"):
        (run / name).write_bytes(b"\x00\xff{")
    assert cli(*TINY).code == 0
    (run / "identity.yaml").write_bytes(b"\x00\xff{")
    answer = cli(*TINY)
    require_clean_failure(answer, tmp_path)
    assert "identity.yaml is damaged" in answer.err


def test_both_checkpoints_damaged_is_said_and_nothing_is_lost(cli, tmp_path):
    assert cli(*TINY).code == 0
    run = only_run(tmp_path)
    (run / "DONE").unlink()
    for name in ("last.pt", "previous.pt"):
        (run / "checkpoints" / name).write_bytes(b"PK damaged")
    answer = cli(*TINY)
    require_clean_failure(answer, tmp_path)
    assert "neither checkpoint can be read" in answer.err
    assert (run / "checkpoints" / "epoch_0001.pt").exists()


def test_hooks_that_do_nothing_do_nothing():
    assert Callback().on_stop(None) is None  # type: ignore[arg-type]
    assert not Callback().on_divergence(None)  # type: ignore[arg-type]
