"""What a user can get wrong: one clear message, exit code 1, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from robustflat.training.checkpoint import load
from tests.integration.conftest import TINY, only_run

MISTAKES = {
    "a misspelt key": (["attack.step=5"], ["attack.steps"]),
    "a misspelt option": (["attack=pgd_lifn"], ["pgd_linf"]),
    "a string for a number": (["attack.steps=seven"], ["attack.steps: expected int", "'seven'"]),
    "epsilon in 0..255": (["attack.ball.epsilon=8"], ["epsilon must lie in (0, 1]", "0.03137", "attack.ball"]),
    "epochs at the root": (["epochs=3"], ["trainer.epochs"]),
    "epochs added at the root": (["+epochs=3"], ["epochs"]),
    "an unknown class": (["trainer.loss._target_=robustflat.losses.trades.Trade"], ["Did you mean 'Trades'"]),
    "a class outside the allow-list": (["trainer.loss._target_=os.system"], ["trusted_packages=[os]"]),
    "a missing data folder": (["dataset=cifar10", "model=resnet_tiny"], ["cifar10", "prepare_data"]),
    "a device that is not there": (["device=cuda:9"], ["cuda:9", "device=auto"]),
    "a slice without quotes": (["dataset.test=test[:5]"], ["quotes"]),
    "more examples than there are": (["evaluation.test='test[:9999]'"], ["9999", "500"]),
    "an unknown split": (["evaluation.test=tset"], ["tset", "test"]),
    "a negative learning rate": (["optimizer.lr=-1"], ["lr must lie in"]),
    "flatness at radius 0": (["flatness.ball.radius=0"], ["flatness: radius must lie in"]),
    "a surrogate of the evaluation": (
        ["+attack@evaluation.attacks.moved=transfer", "evaluation.attacks.moved.surrogate=nothere"],
        ["There is no run 'nothere'"],
    ),
    "no epochs": (["trainer.epochs=0"], ["trainer.epochs=0"]),
    "classes that do not fit": (["model.classes=7"], ["model.classes=7", "dataset.classes=10"]),
    "an unknown precision": (["trainer.precision=fp8"], ["precision must be one of", "bf16"]),
    "a key of the chosen method": (
        ["trainer=trades", "trainer.loss.bta=6"],
        ["'trainer.loss.bta'.\nDid you mean trainer.loss.beta"],
    ),
    "a misspelt file of a group's folder": (
        ["+experiment=iccv21/trades6"],
        ["Did you mean experiment/iccv21/trades_6"],
    ),
    "pixel values": (["attack.ball.epsilon=8/255"], ["attack.ball.epsilon: expected float", "written '${px:8}'"]),
    "a fraction": (["attack.ball.epsilon=1/4"], ["attack.ball.epsilon: expected float", "Write 0.25"]),
    "a letter for the seed": (["seed=a"], ["'a' of type 'str' could not be converted to Integer"]),
    "no trials of flatness": (["flatness.trials=0"], ["flatness: trials must lie in [1, inf), got 0"]),
    "a group that is not there": (["optimiser=sgd"], ["optimizer"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_sentence(cli, tmp_path, name):
    arguments, expected = MISTAKES[name]
    kept = [a for a in TINY if a.split("=")[0] not in {b.split("=")[0] for b in arguments}]
    if "dataset=cifar10" in arguments:
        kept = [a for a in kept if "train[" not in a and "test[" not in a]
    answer = cli(*kept, *arguments)
    assert answer.code == 1
    assert answer.err.startswith("error: ")
    for text in expected:
        assert text in answer.err, answer.err
    assert "Traceback" not in answer.err + answer.out
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob(".*.tmp"))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def write_cifar(root: Path, images: np.ndarray, labels: np.ndarray) -> None:
    folder = root / "cifar10"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        for kind, array in (("images", images), ("labels", labels)):
            with h5py.File(folder / f"{split}_{kind}.h5", "w") as file:
                file["tensor"] = array


CIFAR = [
    "dataset=cifar10",
    "data_root=data",
    *(a for a in TINY if "dataset.train" not in a and "callbacks.evaluation" not in a),
    "trainer.epochs=1",
]


def bad_range(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return images.astype(np.float32), labels  # 0..255 as floating point


def bad_labels(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return images, labels + 7


@pytest.mark.parametrize(("spoil", "expected"), [(bad_range, "0, 1"), (bad_labels, "label")], ids=["range", "labels"])
def test_bad_values_in_a_data_file_are_named(cli, tmp_path, spoil, expected):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    write_cifar(tmp_path / "data", *spoil(images, np.arange(64)[:, None] % 10))
    answer = cli(*CIFAR)
    assert answer.code == 1
    assert expected in answer.err
    assert "Traceback" not in answer.err


def test_a_corrupted_data_file_is_named(cli, tmp_path):
    write_cifar(tmp_path / "data", np.zeros((8, 32, 32, 3), dtype=np.uint8), np.zeros((8, 1), dtype=np.int64))
    file = tmp_path / "data" / "cifar10" / "train_images.h5"
    file.write_bytes(file.read_bytes()[:1000])
    answer = cli(*CIFAR)
    assert answer.code == 1
    assert "train_images.h5" in answer.err
    assert "Traceback" not in answer.err


def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on_later(cli, tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def fails_at_the_second_epoch(source, target, **rest):
        if str(target).endswith("last.pt"):
            calls.append(target)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return replace(source, target, **rest)

    monkeypatch.setattr(os, "replace", fails_at_the_second_epoch)
    answer = cli(*TINY)
    assert answer.code == 1
    assert "No space left" in answer.err
    assert "Traceback" not in answer.err
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(os, "replace", replace)
    again = cli(*TINY)
    assert again.code == 0, again.err
    assert "going on after epoch 1 of 2" in again.out


def test_a_truncated_checkpoint_falls_back_to_the_previous_one(cli, tmp_path):
    assert cli(*TINY).code == 0
    run = only_run(tmp_path)
    whole = (run / "checkpoints" / "last.pt").read_bytes()
    (run / "checkpoints" / "last.pt").write_bytes(whole[: len(whole) // 2])
    (run / "DONE").unlink()
    answer = cli(*TINY)
    assert answer.code == 0, answer.err
    assert "last.pt" in answer.out
    assert "previous.pt" in answer.out
    assert "going on after epoch 1 of 2" in answer.out


def test_a_finished_run_whose_last_checkpoint_is_damaged_trains_the_missing_epochs_again(cli, tmp_path):
    assert cli(*TINY).code == 0
    run = only_run(tmp_path)
    before, metrics = load(run / "checkpoints" / "last.pt"), (run / "metrics.jsonl").read_bytes()
    (run / "checkpoints" / "last.pt").write_bytes(b"PK")
    answer = cli(*TINY, "force=true")
    assert answer.code == 0, answer.err
    assert "2 epochs" in answer.out  # not the figures of the first epoch under the name of the run
    after = load(run / "checkpoints" / "last.pt")
    assert all(torch.equal(value, after.parts["model"][name]) for name, value in before.parts["model"].items())
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_finished_run_without_checkpoints_is_not_measured_untrained(cli, tmp_path):
    assert cli(*TINY).code == 0
    run = only_run(tmp_path)
    kept = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "results.json")}
    shutil.rmtree(run / "checkpoints")
    answer = cli(*TINY, "force=true")
    assert answer.code == 1
    assert "holds no checkpoint" in answer.err
    assert {name: (run / name).read_bytes() for name in kept} == kept
    assert cli(*TINY).code == 0  # its figures are there


def test_a_folder_of_another_configuration_is_left_alone(cli, tmp_path):
    assert cli(*TINY, "hydra.run.dir=here/now").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    answer = cli(*TINY, "hydra.run.dir=here/now", "seed=5")
    assert answer.code == 1
    assert "another configuration" in answer.err
    assert "seed: 0 there, 5 here" in answer.err
    assert {p: p.read_bytes() for p in before} == before


def test_a_second_process_in_the_same_folder_leaves(cli, tmp_path):
    assert cli(*TINY).code == 0
    fcntl = pytest.importorskip("fcntl")
    with open(only_run(tmp_path) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = cli(*TINY)
    assert answer.code == 1
    assert "Another process is working" in answer.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_named(cli, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    answer = cli(*TINY, "outputs=closed/runs")
    assert answer.code == 1
    assert "closed" in answer.err
