"""A configured trainer made so small that a step takes milliseconds."""

from __future__ import annotations

from omegaconf import OmegaConf

from robustflat.apps.build import build
from robustflat.loggers.base import Null
from robustflat.rng import Streams
from robustflat.training.trainer import Trainer
from tests.config.conftest import Compose

TINY = [
    "device=cpu", "model.channels=2", "trainer.callbacks.evaluation=null",
    "trainer.callbacks.checkpoint=null", "trainer.callbacks.snapshots=null",
    "dataset=synthetic", "dataset.source.size=8", "dataset.source.count=8", "dataset.source.test_count=4",
    "dataset.batch_size=4", "trainer.search=plain",  # passes of a copy would not be counted
    "trainer.memory_budget=null",  # nor should those that measure be
]  # fmt: skip


def tiny_trainer(compose: Compose, *overrides: str) -> Trainer:
    """The trainer of a configuration on eight made-up images, batches of four, with a two-channel network."""
    config = compose(*overrides, *TINY)
    streams = Streams(0)
    node = OmegaConf.masked_copy(config.trainer, [k for k in config.trainer if k != "callbacks"])
    callbacks = {k: build(v) for k, v in config.trainer.callbacks.items() if v is not None}
    trainer: Trainer = build(node, _partial_=True)(
        model=build(config.model),
        data=build(config.dataset).train_stream(streams),
        attack=build(config.attack),
        make_optimizer=build(config.optimizer),
        make_schedule=build(config.schedule),
        logger=Null(),
        streams=streams,
        callbacks=callbacks,
    )
    return trainer
