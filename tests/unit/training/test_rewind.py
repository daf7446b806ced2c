"""Going back with a lower rate when training diverges, and saving in the middle of an epoch."""

from __future__ import annotations

import json

import pytest
import torch

from robustflat.attacks.pgd import NoAttack
from robustflat.errors import UserError
from robustflat.loggers.jsonl import JsonlLogger
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.training.callbacks import Callback, SaveLast, WeightAverage
from robustflat.training.checkpoint import load, load_newest
from robustflat.training.rewind import Rewind
from robustflat.training.trainer import DivergenceError, TrainingStopped


class PoisonAbove(Callback):
    """Spoils a weight in every step from `step` on, as long as the learning rate is above `rate`."""

    def __init__(self, step: int, rate: float) -> None:
        self.step, self.rate, self.rates = step, rate, []

    @torch.no_grad()
    def after_step(self, trainer):
        rate = trainer.optimizer.param_groups[0]["lr"]
        self.rates.append((trainer.step, rate))
        if trainer.step >= self.step and rate > self.rate:
            next(trainer.model.parameters()).fill_(float("nan"))


def test_training_goes_back_lowers_the_rate_and_finishes(make_trainer, tmp_path, capsys):
    poison, average = PoisonAbove(5, 0.003), WeightAverage(decay=0.5)
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    callbacks = {"poison": poison, "average": average, "rewind": Rewind(factor=0.25, times=3), "last": SaveLast()}
    trainer = make_trainer(callbacks=callbacks, epochs=3, folder=tmp_path, log_every=1, logger=logger)
    trainer.fit()
    logger.finish("done")
    assert capsys.readouterr().out.count("back to epoch 1") == 3
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 4**3)
    assert trainer.step == 9
    assert [entry["rewinds"] for entry in trainer.history] == [0, 3, 3]
    assert all(w.isfinite().all() for w in trainer.networks()["average"].parameters())
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert load(tmp_path / "last.pt").parts["schedule"]["scale"] == pytest.approx(4.0**-3)


def test_after_a_rewind_it_is_the_run_with_the_lower_rate_from_there(make_trainer, same_state):
    """Oracle: the same trainer without any fault, whose rate is lowered by hand after the first epoch."""
    torch.manual_seed(3)
    plain = make_trainer(epochs=1)
    torch.manual_seed(3)
    trainer = make_trainer(callbacks={"poison": PoisonAbove(5, 0.02), "rewind": Rewind(factor=0.2, times=1)}, epochs=2)
    trainer.fit()
    plain.fit()
    plain.epochs = 2
    for group in plain.optimizer.param_groups:
        group["lr"] = 0.01
    plain.schedule.rescale(0.2)
    plain.fit()
    assert same_state(plain.model.state_dict(), trainer.model.state_dict())


def test_after_the_last_rewind_it_ends_with_the_good_checkpoint_kept(make_trainer, tmp_path):
    callbacks = {"poison": PoisonAbove(5, 0.0), "rewind": Rewind(times=2), "last": SaveLast()}
    trainer = make_trainer(callbacks=callbacks, epochs=3, folder=tmp_path)
    with pytest.raises(DivergenceError, match="diverged in epoch 2"):
        trainer.fit()
    kept = load(tmp_path / "last.pt")
    assert kept.meta["epoch"] == 1
    assert all(w.isfinite().all() for w in kept.parts["model"].values())


def test_an_exploding_loss_counts_where_asked_for(make_trainer, tmp_path):
    callbacks = {"rewind": Rewind(times=0, highest_loss=1e-6), "last": SaveLast()}
    trainer = make_trainer(callbacks=callbacks, folder=tmp_path)
    with pytest.raises(DivergenceError, match=r"diverged in epoch 1.*above highest_loss"):
        trainer.fit()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [{"factor": 1.0}, {"factor": 0.0}, {"times": -1}, {"highest_loss": 0.0}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(UserError):
        Rewind(**values)


class StopAt(Callback):
    """Asks to stop after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer):
        trainer.stop_requested = trainer.stop_requested or trainer.step == self.step


@pytest.mark.parametrize("stop", range(1, 9))
def test_stopped_at_any_step_and_resumed_equals_uninterrupted(make_trainer, same_state, tmp_path, stop):
    def trainer(folder, extra):
        torch.manual_seed(0)
        callbacks = {"average": WeightAverage(decay=0.9), "rewind": Rewind(), "stop": extra, "last": SaveLast(every=2)}
        logger = JsonlLogger(folder / "metrics.jsonl")
        options = {"loss": CrossEntropy(label_noise=0.3), "log_every": 2, "logger": logger}
        return make_trainer(callbacks=callbacks, epochs=3, folder=folder, **options)

    whole, first = trainer(tmp_path / "whole", Callback()), trainer(tmp_path / "parts", StopAt(stop))
    torch.manual_seed(1)
    whole.fit()
    torch.manual_seed(1)
    with pytest.raises(TrainingStopped, match=rf"\(step {stop}\)"):
        first.fit()
    first.logger.finish("interrupted")
    second = trainer(tmp_path / "parts", Callback())
    second.load_state_dict(load_newest(tmp_path / "parts").parts)
    assert second.step == stop
    second.logger.rewind(second.step)
    second.fit()
    for one in (whole, second):
        one.logger.finish("done")
    assert same_state(whole.state_dict(), second.state_dict())
    one, other = ((tmp_path / side / "metrics.jsonl").read_bytes() for side in ("whole", "parts"))
    assert one == other


def test_a_state_that_is_not_finite_is_not_saved_on_a_stop(make_trainer, tmp_path):
    callbacks = {"stop": StopAt(2), "poison": PoisonAbove(2, 0.0), "last": SaveLast()}
    trainer = make_trainer(callbacks=callbacks, attack=NoAttack(), folder=tmp_path)
    with pytest.raises(DivergenceError):
        trainer.fit()
    assert not (tmp_path / "last.pt").exists()
