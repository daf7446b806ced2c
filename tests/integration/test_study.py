"""`python scripts/study.py` on a study of seconds: done once, killed, resumed, with an experiment that fails."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra

from robustflat.apps.cards import card_schema
from robustflat.apps.main import run_application
from robustflat.apps.records import read_record, read_records
from tests.integration.conftest import Answer

ROOT = Path(__file__).resolve().parents[2]
CHEAP = [
    "evaluation.test='test[:16]'", "evaluation.train='train[:16]'", "evaluation.flatness='test[:16]'",
    "evaluation.attacks.pgd20.steps=2", "evaluation.restarts.pgd20=2",
]  # fmt: skip
FLAT = [
    "evaluation.measures.average.trials=2", "evaluation.measures.average.attack.steps=1",
    "evaluation.measures.worst.restarts=1", "evaluation.measures.worst.steps=1",
]  # fmt: skip
STUDY = {
    "title": "Tiny",
    "question": "Does it run?",
    "seeds": [0],
    "common": [
        "trainer.search=plain",  # passes that build a copy are counted too
        "device=cpu", "dataset.train='train[:128]'", "trainer.epochs=1", "trainer.callbacks.snapshots.every=1",
        "trainer.callbacks.evaluation=null", "attack.steps=1", "model.channels=4", "threads=1",
    ],
    "experiments": {
        "mean": {"label": "averaging", "family": "means", "overrides": ["trainer=weight_averaging"], "part": "average"},
        "broken": {"label": "far too fast", "family": "AT", "overrides": ["trainer=at", "optimizer.lr=1e30"]},
        "at": {"label": "AT", "family": "AT", "overrides": ["trainer=at"]},
    },
    "evaluations": {
        "last": ["evaluation=study", *CHEAP, *FLAT],
        "early": [
            "evaluation=study_early_stopped", *CHEAP, *FLAT, "evaluation.selection.split='train[-16:]'", "only=[pgd20]",
        ],
    },
}  # fmt: skip
Study = Callable[..., Answer]


def configured(folder: Path) -> list[str]:
    """Write the study file into a folder; the arguments that find it."""
    (folder / "conf" / "study").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "study" / "tiny.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return ["--config-dir", str(folder / "conf"), "study=tiny"]


def called(application: str, *arguments: str) -> int:
    GlobalHydra.instance().clear()
    before = sys.argv
    sys.argv = [f"{application}.py", *arguments]
    state = torch.get_rng_state()
    try:
        run_application(application)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
        torch.set_rng_state(state)
    return 0


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Study:
    """cli(application, *arguments) runs a command in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(application: str, *arguments: str) -> Answer:
        capfd.readouterr()
        code = called(application, *arguments)
        return Answer(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """Folder in which the study has run once, and what it said."""
    folder, out, err = tmp_path_factory.mktemp("study"), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        code = called("study", *configured(folder), "jobs=1")
    return folder, Answer(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def finished(first: tuple[Path, Answer]) -> Path:
    """That folder; tests work on copies."""
    return first[0]


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, in which the test works."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def runs(folder: Path) -> dict[str, Path]:
    """Run folders by label."""
    return {read_record(path.parent).label: path.parent for path in folder.glob("outputs/*/*/identity.yaml")}


def stamps(*folders: Path) -> dict[Path, int]:
    kept = (path for folder in folders for path in folder.rglob("*") if path.suffix in (".pt", ".h5", ".jsonl"))
    return {path: path.stat().st_mtime_ns for path in kept}


def test_a_study_trains_and_evaluates_what_can_be_and_lists_what_failed(first):
    tmp_path, answer = first
    assert answer.code == 1
    for text in (
        "Tiny",
        "Does it run?",
        "3 experiments x 1 seeds",
        "3 to train",
        "RErr early stopped",
        "flatness worst",
    ):
        assert text in answer.out
    assert "1 runs failed" in answer.err
    assert "broken, seed 0: Training diverged" in answer.err
    assert "Traceback" not in answer.err
    assert set(runs(tmp_path)) == {"averaging", "far too fast", "AT"}
    folder = tmp_path / "outputs" / "studies" / "tiny"
    table = pd.read_csv(folder / "runs.csv")
    assert list(table["status"]) == ["done", "failed", "done"]
    assert set(pd.read_parquet(folder / "metrics.parquet")["run_id"]) == {
        runs(tmp_path)[k].name for k in ("averaging", "AT")
    }
    assert list(folder.glob("figures/*.svg"))
    log = (runs(tmp_path)["AT"] / "log.txt").read_text()
    assert "RErr (pgd20)" in log
    assert "RErr (pgd20)" not in answer.out


@pytest.mark.usefixtures("without_pictures")
def test_started_again_it_does_nothing_twice_and_tries_the_failed_run(cli, done):
    good = [folder for label, folder in runs(done).items() if label != "far too fast"]
    before = stamps(*good)
    answer = cli("study", *configured(done), "jobs=1")
    assert answer.code == 1
    assert "1 to train, 1 to evaluate, 2 left as they are" in answer.out
    assert stamps(*good) == before
    without = cli("study", *configured(done), "jobs=1", "study.experiments.broken=null")
    assert without.code == 0
    assert "0 to train, 0 to evaluate, 2 left as they are" in without.out


@pytest.mark.usefixtures("without_pictures")
def test_another_measure_is_measured_without_training(cli, done):
    weights = {path: path.stat().st_mtime_ns for path in done.rglob("*.pt")}
    more = ["study.experiments.broken=null", "study.attacks=[fgsm_linf]"]
    answer = cli("study", *configured(done), "jobs=1", *more)
    assert answer.code == 0, answer.err
    assert "0 to train, 2 to evaluate" in answer.out
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*.pt")} == weights
    assert "fgsm_linf" in set(read_record(runs(done)["AT"]).table["measure"])


def test_train_finds_the_run_of_the_study(cli, done):
    answer = cli(
        "train", *STUDY["common"], "trainer=at", "evaluation=smoke", "flatness.trials=1", "flatness.attack.steps=1"
    )
    assert answer.code == 0, answer.err
    assert str(runs(done)["AT"].relative_to(done)) in answer.out
    assert "trained in" not in answer.out


def test_records_tell_what_there_is(done):
    found = {record.label: record for record in read_records(sorted(done.glob("outputs/digits-*/*")))}
    assert {label: record.status for label, record in found.items()} == {
        "averaging": "done",
        "AT": "done",
        "far too fast": "failed",
    }
    assert "diverged" in found["far too fast"].problem
    averaged = found["averaging"]
    assert averaged.family == "means"
    assert averaged.early_stopped == "early_stopped"
    assert set(averaged.table["checkpoint"]) == {"last", "early_stopped"}
    assert set(averaged.table["metric"]) >= {"error", "robust_error", "robust_loss", "robust_loss_gap", "flatness"}
    ledger = found["AT"].ledger.set_index("phase")
    # one epoch of two batches of 64; one step of the attack and one of the training go back through the network
    assert ledger.loc["training", "images"] == ledger.loc["training", "forwards"] * 64
    assert ledger.loc["training", "backwards"] == 4
    assert ledger.loc["last/test[:16]/clean", ["forwards", "backwards", "images"]].tolist() == [1, 0, 16]
    assert (ledger["seconds"] > 0).all()
    assert (ledger["peak_memory_mib"] > 1).all()
    assert list(found["AT"].history["epoch"]) == [1]


def test_cards_fit_their_published_schema(done):
    jsonschema = pytest.importorskip("jsonschema")
    schema = card_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    cards = [json.loads(path.read_text()) for path in done.glob("outputs/*/*/card.json")]
    assert len(cards) == 3
    for card in cards:
        jsonschema.validate(card, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cards[0], "status": "perhaps"}, schema)


def test_a_report_of_any_runs(cli, done):
    answer = cli("report", "runs=outputs/*/*", "output=outputs/mine")
    assert answer.code == 0, answer.err
    assert "3 runs, 1 of them failed or not complete" in answer.out
    assert (done / "outputs" / "mine" / "metrics.parquet").exists()
    assert "AT" in (done / "outputs" / "mine" / "runs.md").read_text()
    none = cli("report", "runs=nowhere/*")
    assert none.code == 1
    assert "There is no folder nowhere/*" in none.err


@pytest.mark.usefixtures("without_pictures")
def test_the_table_goes_to_wandb_when_it_is_the_logger(cli, done, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    answer = cli("study", *configured(done), "jobs=1", "study.experiments.broken=null", "logger=wandb")
    assert answer.code == 0, answer.err
    (table,) = (done / "outputs" / "studies" / "tiny").glob("wandb/offline-run-*/files/media/table/runs_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:4] == ["label", "family", "seed", "status"]
    assert sorted(row[0] for row in content["data"]) == ["AT", "averaging"]


@pytest.mark.parametrize("given", ["overrides=['outputs=elsewhere']", "evaluation_overrides=['+run=other']"])
def test_what_a_study_sets_itself_is_refused_before_anything_is_trained(cli_of, tmp_path, given):
    answer = cli_of("study", *configured(tmp_path), given)
    assert answer.code == 1 and "the study sets" in answer.err, answer.err
    assert not list(tmp_path.glob("outputs/*/*"))


def test_wrong_experiments_are_named_before_anything_starts(cli, tmp_path):
    arguments = [*configured(tmp_path), "+study.experiments.typo.overrides=['trainer=tades']"]
    answer = cli("study", *arguments)
    assert answer.code == 1
    assert "1 of 4 experiments cannot be run" in answer.err
    assert "experiment 'typo'" in answer.err
    assert not (tmp_path / "outputs").exists()


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), *configured(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(tmp_path, finished, jobs):
    if jobs == "2":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = start(tmp_path, f"jobs={jobs}")
    wait_for(lambda: bool(list(tmp_path.glob("outputs/digits-*/*/DONE"))), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # workers hold the other end until they notice that the study is gone
    trained = [path.parent / "checkpoints" / "last.pt" for path in tmp_path.glob("outputs/digits-*/*/DONE")]
    before = {path: path.stat().st_mtime_ns for path in trained}
    again = start(tmp_path, f"jobs={jobs}")
    _, errors = again.communicate(timeout=600)
    assert again.returncode == 1
    assert b"1 runs failed" in errors, errors
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for label, folder in runs(finished).items():
        if label != "far too fast":
            one, other = read_record(folder).table, read_record(runs(tmp_path)[label]).table
            pd.testing.assert_frame_equal(one.drop(columns=["version"]), other.drop(columns=["version"]))


@pytest.mark.slow
def test_interrupted_from_the_keyboard_it_says_so(tmp_path):
    process = start(tmp_path, "jobs=1")
    wait_for(lambda: bool(list(tmp_path.glob("outputs/digits-*/*/log.txt"))), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Interrupted" in errors
    assert b"Traceback" not in errors
