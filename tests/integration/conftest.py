"""The command line inside the test process, on runs of a second or two."""

from __future__ import annotations

import functools
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from robustflat.apps.main import run_application

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "dataset.train='train[:128]'",
    "trainer.epochs=2",
    "trainer.callbacks.evaluation.test='test[:32]'",
    "trainer.callbacks.evaluation.train='train[:32]'",
    "trainer.callbacks.snapshots.every=1",
    "attack.steps=2",
    "evaluation=smoke",
    "flatness.trials=2",
    "flatness.attack.steps=2",
    "model.channels=4",
    "device=cpu",
)

SMALL = (
    "device=cpu",
    "evaluation.test='test[:24]'",
    "evaluation.train='train[:24]'",
    "evaluation.flatness='test[:24]'",
    "evaluation.flatness_train=null",
    "evaluation.batch_size=16",
)
PAPER = (
    *SMALL,
    "evaluation=paper",
    "evaluation.attacks.pgd20.steps=2",
    "evaluation.restarts.pgd20=3",
    "evaluation.measures.average.trials=2",
    "evaluation.measures.average.attack.steps=2",
    "evaluation.measures.average_small=null",
    "evaluation.measures.worst.restarts=2",
    "evaluation.measures.worst.steps=2",
    "evaluation.measures.worst_small=null",
    "evaluation.attacks.autoattack=null",
)


@pytest.fixture(autouse=True)
def log_handlers_of_the_test_end_with_it():
    """Hydra's handlers write to the output of the test that set them up, which is closed afterwards."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)


@pytest.fixture
def curves():
    """For tests that look at curves.png."""


@pytest.fixture(autouse=True)
def learning_curves_are_drawn_for_tests_that_ask(request, monkeypatch):
    """Drawing curves.png takes 0.2 s, longer than the training of many a test; who looks at it asks for `curves`."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr("robustflat.apps.train.draw_curves", lambda session: None)


class Answer(NamedTuple):
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


Cli = Callable[..., Answer]


@pytest.fixture
def cli_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """cli_of(application, *arguments) runs `robustflat application ...` in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def call(application: str, *arguments: str) -> Answer:
        capfd.readouterr()
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        state = torch.get_rng_state()
        try:
            run_application(application)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        torch.set_rng_state(state)
        captured = capfd.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def cli(cli_of: Cli) -> Cli:
    """cli(*arguments) runs `python train.py ...` in an empty folder, in this process."""
    return functools.partial(cli_of, "train")


def only_run(folder: Path) -> Path:
    """The one run folder below `folder`/outputs."""
    (found,) = [p.parent for p in folder.glob("outputs/*/*/identity.yaml")]
    return found


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """Run folder of a tiny training; tests work on copies."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *TINY, "trainer=weight_averaging"])
        GlobalHydra.instance().clear()
        run_application("train")
    (run,) = (p.parent for p in folder.glob("outputs/*/*/identity.yaml"))
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run in the working folder of the test."""
    target = tmp_path / "outputs" / trained.parent.name / trained.name
    shutil.copytree(trained, target)
    return target


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capfd):
    """evaluate(*arguments) runs `python evaluate.py ...` in this process."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Answer:
        capfd.readouterr()
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        try:
            run_application("evaluate")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Answer(code, *capfd.readouterr())

    return call


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, thing: found.update({name: thing[()]} if isinstance(thing, h5py.Dataset) else {}))
    return found


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f") for name in one)
