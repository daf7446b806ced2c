"""`torchrun --nproc-per-node 2 evaluate.py ...`: what one process stores, stored by two."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from robustflat.apps.collect import rows_of_run
from robustflat.apps.main import run_application
from robustflat.ranks import current
from robustflat.store.results import ResultStore
from tests.forked_ranks import on_ranks
from tests.integration.conftest import PAPER, arrays_of, assert_same

ROOT = Path(__file__).resolve().parents[2]
CHEAP = [a for a in PAPER if "autoattack" not in a]
AUTOATTACK = (
    "evaluation.attacks.autoattack.version=custom",
    "+evaluation.attacks.autoattack.attacks=[apgd-ce,apgd-dlr]",
    "evaluation.attack_batch=4",
    "evaluation.batch_size=8",
)


def copied(run: Path, name: str) -> Path:
    """The same run in another folder, so that two evaluations of it can be compared."""
    return shutil.copytree(run, run.parent.parent / name / run.name, dirs_exist_ok=True)


def torchrun(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "evaluate.py")]
    return subprocess.Popen(
        [*command, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def application(name: str, *arguments: str) -> int:
    """Exit code of a command in this process."""
    GlobalHydra.instance().clear()
    sys.argv = [f"{name}.py", *arguments]
    try:
        run_application(name)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def same_rows(one: Path, other: Path) -> None:
    assert_same(arrays_of(one / "results.h5"), arrays_of(other / "results.h5"))
    rows = [
        [{k: str(v) for k, v in row.items() if k != "experiment"} for row in rows_of_run(run)] for run in (one, other)
    ]
    assert rows[0]
    assert rows[0] == rows[1]


def test_two_ranks_store_the_rows_of_one(evaluate, run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    other = copied(run, "other")
    monkeypatch.setattr("robustflat.evaluation.plan.check_network", lambda *_: [])  # takes seconds
    options = [*CHEAP, "evaluation.attacks.autoattack=null", "evaluation.flatness_train='train[:16]'"]
    alone = evaluate(f"run={run}", *options)
    assert alone.code == 0, alone.err
    assert on_ranks(2, lambda: application("evaluate", f"run={other}", *options), tmp_path) == [0, 0]
    printed = capfd.readouterr().out
    assert printed.count("RErr (pgd20)") == 1
    same_rows(run, other)
    attrs = [ResultStore(r / "results.h5").attributes("last/test[:24]/attacks/pgd20") for r in (run, other)]
    assert [a["processes"] for a in attrs] == [1, 2]
    for key in ("forwards", "backwards", "images"):  # counted over both
        assert attrs[0][key] == attrs[1][key]


@pytest.mark.slow
def test_more_ranks_than_batches_and_a_second_time_nothing(evaluate, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    other = copied(run, "other")
    options = [*PAPER, "evaluation.test='test[:8]'", "evaluation.train=null", "evaluation.flatness='test[:8]'"]
    assert evaluate(f"run={run}", *options).code == 0
    assert on_ranks(3, lambda: application("evaluate", f"run={other}", *options), tmp_path) == [0, 0, 0]
    same_rows(run, other)
    before = (other / "results.h5").read_bytes()
    assert on_ranks(2, lambda: application("evaluate", f"run={other}", *options), tmp_path) == [0, 0]
    assert (other / "results.h5").read_bytes() == before


@pytest.mark.slow
def test_early_stopping_chooses_alike_on_all_ranks(evaluate, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    other = copied(run, "other")
    options = [
        "evaluation=early_stopping",
        "evaluation.selection.split='train[-24:]'",
        "evaluation.selection.attack.steps=2",
        "evaluation.selection.restarts=2",
        *CHEAP[: CHEAP.index("evaluation=paper")],
        "evaluation.attacks.autoattack=null",
        "only=[pgd20]",
        "evaluation.attacks.pgd20.steps=2",
    ]
    alone = evaluate(f"run={run}", *options)
    assert alone.code == 0, alone.err
    assert on_ranks(2, lambda: application("evaluate", f"run={other}", *options), tmp_path) == [0, 0]
    same_rows(run, other)


@pytest.mark.slow
def test_a_folder_in_use_is_said_to_all_ranks(evaluate, run, tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(sys, "argv", list(sys.argv))
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert on_ranks(2, lambda: application("evaluate", f"run={run}", *PAPER), tmp_path) == [1, 1]


def test_a_full_disk_of_the_first_rank_ends_all(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.chdir(tmp_path)

    def full(*_):
        assert current().rank == 0
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("robustflat.store.results.os.replace", full)
    assert on_ranks(2, lambda: application("evaluate", f"run={run}", *PAPER), tmp_path) == [1, 1]
    assert "No space left on device" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["hessian", "audit", "study", "report"])
def test_commands_that_do_not_share_say_so(command, cli_of, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = cli_of(command)
    assert answer.code == 1
    assert answer.err.startswith(f"error: robustflat {command} works in one process, but torchrun started 2")


@pytest.mark.slow
def test_a_landscape_by_two_ranks(cli_of, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    other = copied(run, "other")
    options = ["device=cpu", "examples='test[:8]'", "landscape.trials=2", "landscape.points=5", "landscape.loss=clean"]
    options += ["landscape.attack=null", "batch_size=4"]
    alone = cli_of("landscape", f"run={run}", *options)
    assert alone.code == 0, alone.err
    assert on_ranks(2, lambda: application("landscape", f"run={other}", *options), tmp_path) == [0, 0]
    assert_same(arrays_of(run / "results.h5"), arrays_of(other / "results.h5"))
    assert not list((other / "landscapes").glob(".*"))


@pytest.mark.slow
def test_killed_under_torchrun_and_finished_by_one_process(evaluate, run, tmp_path):
    other = copied(run, "other")
    options = [*CHEAP, *AUTOATTACK, "evaluation.train=null", "evaluation.flatness=null"]
    options = [a for a in options if "autoattack=null" not in a]
    job = torchrun(f"run={other}", *options, folder=tmp_path)
    deadline = time.monotonic() + 120
    while not list(other.glob("unfinished/*/autoattack/apgd*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (child, *_) = children(job.pid)
    subprocess.run(["kill", "-9", str(child)], check=True)
    _, err = job.communicate(timeout=120)
    assert job.returncode != 0
    assert list(other.glob("unfinished/*/autoattack/apgd*")), err
    for network in (run, other):
        answer = evaluate(f"run={network}", *options)
        assert answer.code == 0, answer.err
    same_rows(run, other)
    assert not (other / "unfinished").exists()


@pytest.mark.slow
def test_an_error_is_said_once_and_ends_torchrun(run, tmp_path):
    for wrong in ("evaluation.test='test[:99999]'", "evaluation.no_such_key=1"):
        job = torchrun(f"run={run}", *PAPER, wrong, folder=tmp_path)
        _, err = job.communicate(timeout=120)
        assert job.returncode == 1
        assert err.count("error: ") == 1


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return sorted(found)
