"""Evaluation during training: right numbers, at the right time, and no trace in the training itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from robustflat.attacks.pgd import Pgd
from robustflat.data.images import ImageSet
from robustflat.errors import UserError
from robustflat.evaluation import metrics
from robustflat.evaluation.periodic import PeriodicEvaluation
from robustflat.evaluation.predict import predict
from robustflat.geometry.input_ball import LinfBall
from robustflat.gradients.plain import Plain
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.rng import Streams
from robustflat.training.callbacks import Callback, WeightAverage
from robustflat.training.optimizers import sgd
from robustflat.training.schedules import constant
from robustflat.training.trainer import Trainer
from robustflat.types import Batch


class Recording:
    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, float]]] = []

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.calls.append((step, dict(values)))

    def finish(self, status: str) -> None:
        pass


def images(count: int, seed: int) -> ImageSet:
    draws = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 4, 4), generator=draws, dtype=torch.uint8)
    return ImageSet(pixels, torch.randint(3, (count,), generator=draws), name="noise", classes=3)


def attack() -> Pgd:
    return Pgd(LinfBall(0.1), steps=2, step_size=0.05)


def trained(epochs: int = 2, **callbacks: Callback) -> tuple[Trainer, Recording]:
    """A trainer after `fit`: 3 steps an epoch, with dropout, which draws from torch's global generator."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 3)
    )
    streams, logger = Streams(0), Recording()
    trainer = Trainer(
        model=model,
        data=images(24, 1).stream(8, {}, streams),
        loss=CrossEntropy(),
        attack=attack(),
        gradient=Plain(),
        make_optimizer=partial(sgd, lr=0.05),
        make_schedule=constant,
        epochs=epochs,
        logger=logger,
        streams=streams,
        callbacks=callbacks,
    )
    trainer.fit()
    return trainer, logger


def evaluation(**changes) -> PeriodicEvaluation:
    settings = {"test": images(10, 2).batches(4), "train": images(6, 1).batches(4), "attack": attack(), "every": 1}
    return PeriodicEvaluation(**(settings | changes))


def test_training_is_the_same_with_and_without_it() -> None:
    plain, _ = trained()
    watched, _ = trained(watch=evaluation())
    for one, other in zip(plain.model.state_dict().values(), watched.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_logged_values_are_those_of_the_network_at_that_time() -> None:
    watch = evaluation(seed=3)
    trainer, logger = trained(watch=watch)
    step, values = logger.calls[-1]
    assert step == 6
    model = trainer.model.eval()
    clean = predict(model, images(10, 2).batches(4))
    assert values["evaluation/test_error"] == metrics.error(*clean)
    assert values["evaluation/test_loss"] == pytest.approx(metrics.loss(*clean))
    assert values["evaluation/test_robust_loss"] > values["evaluation/test_loss"]
    assert values["evaluation/test_robust_error"] >= values["evaluation/test_error"]
    gap = values["evaluation/test_robust_loss"] - values["evaluation/train_robust_loss"]
    assert values["evaluation/robust_loss_gap"] == pytest.approx(gap)
    assert watch.history[-1] == {"epoch": 2.0, "step": 6.0, **values}
    assert trainer.history[-1]["evaluation/test_error"] == values["evaluation/test_error"]


def test_measuring_twice_gives_the_same_and_another_seed_something_else() -> None:
    model = trained()[0].model.train()
    values = [evaluation(seed=seed).measure(model)["test_robust_loss"] for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    assert model.training


def test_a_weight_average_is_evaluated_too() -> None:
    average = WeightAverage(decay=0.5)
    trainer, logger = trained(average=average, watch=evaluation())
    values = logger.calls[-1][1]
    expected = metrics.loss(*predict(average.averaged_model(trainer), images(10, 2).batches(4)))
    assert values["evaluation_average/test_loss"] == pytest.approx(expected)
    assert values["evaluation_average/test_loss"] != values["evaluation/test_loss"]


def test_it_runs_every_n_epochs_and_after_the_last() -> None:
    watch = evaluation(every=2, train=(), attack=None)
    trained(epochs=5, watch=watch)
    assert [entry["epoch"] for entry in watch.history] == [2.0, 4.0, 5.0]
    assert set(watch.history[0]) == {"epoch", "step", "evaluation/test_error", "evaluation/test_loss"}


def test_without_attack_the_gaps_are_the_clean_ones() -> None:
    values = evaluation(attack=None).measure(trained()[0].model)
    assert values["loss_gap"] == pytest.approx(values["test_loss"] - values["train_loss"])
    assert "robust_loss_gap" not in values


def test_history_survives_a_checkpoint() -> None:
    watch = evaluation()
    trained(watch=watch)
    other = evaluation()
    other.load_state_dict(watch.state_dict())
    assert other.history == watch.history
    other.history[0]["epoch"] = 99.0
    assert watch.history[0]["epoch"] == 1.0


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="needs test examples"):
        evaluation(test=[])
    with pytest.raises(UserError, match="every must lie in"):
        evaluation(every=0)
    with pytest.raises(UserError, match="seed must lie in"):
        evaluation(seed=-1)
    with pytest.raises(UserError, match="a label is 7"):
        evaluation(test=[Batch(torch.rand(1, 1, 4, 4), torch.tensor([7]))]).measure(trained()[0].model)
