"""A training step never waits for the device: nothing on its way reads a value of a tensor on the host.

On the CPU every operation that would wait for a GPU is refused by a dispatch mode; checks of images and labels, which
the code makes on a CPU only, are left out. The second step is watched: in the first one copies are made, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall
from robustflat.models.resnet import resnet_tiny
from robustflat.rng import Streams
from robustflat.training.trainer import Trainer
from robustflat.types import Batch
from tests.unit.training.shared_runs import METHODS, Stream, make
from tests.waiting import NoWaiting, without_checks_on_cpu


def one_hot(y: Tensor, classes: int) -> Tensor:
    """Torch's own looks at the labels, but not those on a GPU."""
    return (y[:, None] == torch.arange(classes)).long()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    without_checks_on_cpu(monkeypatch)
    monkeypatch.setattr(F, "one_hot", one_hot)


def started(trainer: Trainer) -> Trainer:
    """Where a training is before its first step; batch norm with momentum: torch reads its counter without."""
    for layer in trainer.model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 0.1
    trainer.model.train()
    for callback in trainer.callbacks.values():
        callback.on_fit_start(trainer)
    return trainer


@contextmanager
def watched() -> Iterator[None]:
    with NoWaiting():
        yield


@pytest.mark.parametrize("search", ["plain", "fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_reads_nothing(method: str, search: str, as_on_a_gpu: None) -> None:
    trainer = started(make(method, search=search, log_every=1000))
    trainer._train_step()
    with watched():
        trainer._train_step()


class WithoutValues(Stream):
    """Batches on torch's device of tensors without values: whoever brings one to the host fails."""

    def __next__(self) -> Batch:
        batch = super().__next__()
        return Batch(batch.x.to("meta"), batch.y.to("meta"))


class GlobalStreams:
    """Torch has no generator for that device."""

    def __getitem__(self, name: str) -> None:
        return None


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_needs_no_values(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_autocast", lambda _: nullcontext())  # which that device does not have
    trainer = make(method, data=WithoutValues(), streams=GlobalStreams(), log_every=1000, memory_budget=None)
    trainer.model.to("meta")
    started(trainer)._train_step()


class Repeated(Stream):
    """One batch for ever, which is where it has to be."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(len(batch.x))
        self.batch = batch

    def __next__(self) -> Batch:
        return self.batch


class OnGpu(Stream):
    """The same batches on the GPU."""

    def __next__(self) -> Batch:
        batch = super().__next__()
        return Batch(batch.x.cuda(), batch.y.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("search", ["plain", "fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_the_host_never_waits_for_the_gpu(method: str, search: str) -> None:
    model = make(method).model.cuda()
    batches = OnGpu()
    trainer = make(
        method, model=model, data=batches, search=search, streams=Streams(0, "cuda"), log_every=1000, epochs=9
    )
    started(trainer)._train_step()
    ready = next(batches)
    trainer.data = Repeated(ready)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.5), L1Ball(2.0)], ids=["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.5, "backtracking": True},
        {"tau": 1},
        {"restarts": 2, "keep": "fooled", "random_start": "uniform_norm"},
        {"objective": "dlr", "targeted": True, "random_start": "gaussian"},
    ],
    ids=["plain", "backtracking", "tau", "restarts", "targeted"],
)
def test_pgd_reads_nothing(ball: InputBall, options: dict[str, Any], as_on_a_gpu: None) -> None:
    model = resnet_tiny(classes=4, in_channels=1, channels=4).eval()
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    with watched():
        Pgd(ball, steps=2, step_size=0.1, **options)(model, x, y)


def reads() -> dict[str, Any]:
    t = torch.tensor([1.0, 0.0])
    return {
        "item": lambda: t[0].item(),
        "bool": lambda: bool(t[0]),
        "nonzero": t.nonzero,
        "mask": lambda: t[t > 0],
        "set": lambda: t.clone().__setitem__(t > 0, torch.ones(1)),
        "list": lambda: float(t.sum()),
    }


@pytest.mark.parametrize("kind", list(reads()))
def test_the_watch_sees_what_waits(kind: str) -> None:
    with watched(), pytest.raises(AssertionError, match="would wait"):
        reads()[kind]()
