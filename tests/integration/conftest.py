"""The command line inside the test process, on runs of a second or two."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from robustflat.apps.main import run_application

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
