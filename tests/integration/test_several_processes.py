"""`torchrun ... train.py`: two processes do the run of one, in its folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from robustflat.apps.config import register
from robustflat.apps.main import run_application
from robustflat.apps.together import own_device
from robustflat.training.checkpoint import load
from tests.integration.conftest import ROOT, TINY, only_run

SHARED = (*TINY, "trainer=label_noise", "dataset.batch_size=32", "evaluation.attacks.pgd20.steps=2")


def command(folder: str, arguments: tuple[str, ...]) -> tuple[int, str, str]:
    """Exit code and output of `python train.py` in a folder, in this process."""
    GlobalHydra.instance().clear()
    register()
    os.chdir(folder)
    sys.argv = ["train.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_application("train")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load(run / "checkpoints" / "last.pt").parts["model"]


def assert_same_run(one: Path, other: Path) -> None:
    assert one.name == other.name
    for name, tensor in weights_of(one).items():
        torch.testing.assert_close(tensor, weights_of(other)[name], rtol=1e-4, atol=1e-5)
    rows, others = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)
    )
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, twin in zip(rows, others, strict=True):
        assert row["step"] == twin["step"]
        if "epoch/loss" in row:
            assert row["epoch/loss"] == pytest.approx(twin["epoch/loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_do_the_run_of_one(cli, pair, curves, tmp_path):
    assert cli(*SHARED, "outputs=one").code == 0
    first, second = pair(command, str(tmp_path), (*SHARED, "outputs=two"))
    assert first[0] == second[0] == 0, (first, second)
    assert "2 processes" in first[1]
    assert second[1:] == ("", "")
    (one,), (two,) = tmp_path.glob("one/*/*"), tmp_path.glob("two/*/*")
    assert_same_run(one, two)
    assert {p.name for p in one.rglob("*")} == {p.name for p in two.rglob("*")}
    images = [json.loads((run / "ledger.json").read_text())["training"]["images"] for run in (one, two)]
    assert images[0] == images[1]
    provenance = json.loads((two / "provenance.json").read_text())
    assert (provenance["processes"], provenance["batch_norm"]) == (2, "whole batch")
    assert json.loads((one / "provenance.json").read_text())["processes"] == 1
    # The same command in one process finds it done, and can go on with it where it is not.
    again = cli(*SHARED, "outputs=two")
    assert "This run is done" in again.out
    assert "2 processes, batch norm over the whole batch" in again.out
    for name in ("DONE", "results.json"):
        (two / name).unlink()
    shutil.copy(two / "checkpoints" / "previous.pt", two / "checkpoints" / "last.pt")
    answer = cli(*SHARED, "outputs=two")
    assert "going on after epoch 1 of 2" in answer.out
    assert_same_run(one, two)
    assert [entry["processes"] for entry in json.loads((two / "provenance.json").read_text())["earlier"]] == [2]


@pytest.mark.parametrize(
    ("before", "arguments", "text"),
    [
        ((), ("dataset.batch_size=33",), "take 32 or 34"),
        ((), ("trainer.callbacks.snapshots.every=0",), "must be at least 1"),
        (("-m",), ("seed=0,1",), "torchrun starts the processes of one command"),
    ],
)
def test_what_goes_wrong_is_said_once(pair, tmp_path, before, arguments, text):
    found = pair(command, str(tmp_path), (*before, *SHARED, *arguments))
    assert [code for code, _, _ in found] == [1, 1]
    assert text in found[0][2] and found[0][2].count("error:") == 1
    assert found[1][2] == ""
    assert not list(tmp_path.glob("outputs/*/*/*"))


def torchrun(*arguments: str, folder: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*start, str(ROOT / "train.py"), *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_and_a_signal_and_one_process(cli, tmp_path):
    many = [a for a in SHARED if "epochs" not in a] + ["trainer.epochs=80", "trainer.callbacks.evaluation=null"]
    started = torchrun(*many, folder=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("outputs/*/*/checkpoints/last.pt")):
        assert time.monotonic() < deadline and started.poll() is None, started.communicate()
        time.sleep(0.2)
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=60)
    assert started.returncode != 0
    assert err.count("Training was stopped after") == 1
    run = only_run(tmp_path)
    step = load(run / "checkpoints" / "last.pt").meta["step"]
    answer = cli(*many)
    assert answer.code == 0
    assert f"going on after epoch {step // 4} of 80" in answer.out


@pytest.mark.slow
def test_a_killed_process_ends_the_job(tmp_path):
    many = [a for a in SHARED if "epochs" not in a] + ["trainer.epochs=100000"]
    started = torchrun(*many, folder=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("outputs/*/*/checkpoints/last.pt")):
        assert time.monotonic() < deadline and started.poll() is None, started.communicate()
        time.sleep(0.2)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(started.pid)], capture_output=True, text=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    _, err = started.communicate(timeout=90)
    assert started.returncode != 0
    assert "Another process of this job has gone" in err or "SIGKILL" in err or "Signal 9" in err
    assert load(only_run(tmp_path) / "checkpoints" / "last.pt").parts["epoch"] >= 1


def test_several_processes_take_one_device_each(pair):
    assert pair(own_device, "cpu") == ["cpu", "cpu"]
    for answer in pair(own_device, "cuda:0"):
        assert "one device for several processes" in str(answer)
    assert own_device("cuda:1") == "cuda:1"
