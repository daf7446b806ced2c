"""The training loop: single steps against literal references, resuming, stopping, diverging, logging."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.data.images import ImageSet
from robustflat.errors import CheckpointError, UserError
from robustflat.geometry.input_ball import LinfBall
from robustflat.loggers.base import Null
from robustflat.loggers.jsonl import JsonlLogger
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.losses.trades import Trades
from robustflat.rng import Streams
from robustflat.training.callbacks import Callback, SaveLast, WeightAverage
from robustflat.training.checkpoint import load_newest
from robustflat.training.optimizers import sgd
from robustflat.training.schedules import multistep
from robustflat.training.trainer import DivergenceError, TrainingStopped
from robustflat.types import Batch

EPSILON, STEP_SIZE, LR, MOMENTUM, DECAY = 0.1, 0.04, 0.05, 0.9, 5e-4


class OneBatch:
    """The same batch for ever, one step an epoch."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.batch = Batch(x, y)

    def __len__(self) -> int:
        return 1

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state) -> None:
        pass


class Recording(Null):
    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics, *, step):
        self.calls.append((step, dict(metrics)))


def reference_forward(w, images, statistics, train):
    """The small network written out, one example and one channel at a time where it matters."""
    z = nn.functional.conv2d(images, w["0.weight"], w["0.bias"])
    if train:
        mean = z.mean(dim=(0, 2, 3))
        var = ((z - mean[None, :, None, None]) ** 2).mean(dim=(0, 2, 3))
        count = z.numel() / z.shape[1]
        statistics["mean"] = 0.9 * statistics["mean"] + 0.1 * mean.detach()
        statistics["var"] = 0.9 * statistics["var"] + 0.1 * var.detach() * count / (count - 1)
    else:
        mean, var = statistics["mean"], statistics["var"]
    z = (z - mean[None, :, None, None]) / (var[None, :, None, None] + 1e-5).sqrt()
    z = z * w["1.weight"][None, :, None, None] + w["1.bias"][None, :, None, None]
    z = z.clamp(min=0).flatten(1)
    return z @ w["5.weight"].T + w["5.bias"]


def per_example(kind, logits, y, clean):
    log_q = logits - logits.logsumexp(dim=1, keepdim=True)
    if kind == "ce":
        return torch.stack([-log_q[i, y[i]] for i in range(len(y))])
    return torch.stack([(clean[i] * (clean[i].log() - log_q[i])).sum() for i in range(len(y))])


def reference_pgd(w, x, y, statistics, start, kind):
    """PGD one image at a time; the best of start, intermediate and last iterate counts."""
    clean = reference_forward(w, x, statistics, train=False).softmax(dim=1).detach()
    found = []
    for i in range(len(x)):
        image, label, p = x[i : i + 1], y[i : i + 1], clean[i : i + 1]
        current, best, best_value = start[i : i + 1], None, -float("inf")
        for step in range(4):
            current = current.detach().requires_grad_(True)
            value = per_example(kind, reference_forward(w, current, statistics, train=False), label, p).sum()
            if value.item() > best_value:
                best, best_value = current.detach(), value.item()
            if step < 3:
                (gradient,) = torch.autograd.grad(value, current)
                moved = current.detach() + STEP_SIZE * gradient.sign()
                current = torch.max(torch.min(moved, image + EPSILON), image - EPSILON).clamp(0, 1)
        found.append(best)
    return torch.cat(found)


def reference_step(model, x, y, start, kind):
    """Weights and statistics after one Nesterov step on cross-entropy of PGD examples, or on TRADES (beta 6)."""
    w = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    statistics = {"mean": model[1].running_mean.clone(), "var": model[1].running_var.clone()}
    x_adv = reference_pgd(w, x, y, statistics, start, kind)
    if kind == "ce":
        logits = reference_forward(w, x_adv, statistics, train=True)
        loss = per_example("ce", logits, y, None).mean()
    else:
        clean = reference_forward(w, x, statistics, train=True)
        robust = reference_forward(w, x_adv, statistics, train=True)
        loss = per_example("ce", clean, y, None).mean()
        loss = loss + 6 * per_example("kl", robust, y, clean.softmax(dim=1)).mean()
    gradients = torch.autograd.grad(loss, list(w.values()))
    after = {}
    for (name, value), gradient in zip(w.items(), gradients, strict=True):
        decayed = gradient + DECAY * value
        after[name] = value - LR * (decayed + MOMENTUM * decayed)
    return after, statistics, loss.item()


@pytest.mark.parametrize(("kind", "loss"), [("ce", CrossEntropy()), ("kl", Trades(beta=6.0))])
def test_one_step_equals_the_literal_reference(make_trainer, make_network, kind, loss):
    model = make_network().double()
    x, y = torch.rand(8, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    ball = LinfBall(EPSILON)
    start = ball.sample(x, Streams(3)["attack"])
    expected, statistics, value = reference_step(model, x, y, start, kind)
    trainer = make_trainer(
        model=model,
        data=OneBatch(x, y),
        loss=loss,
        attack=Pgd(ball, steps=3, step_size=STEP_SIZE, random_start="uniform"),
        make_optimizer=partial(sgd, lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
        epochs=1,
        streams=Streams(3),
    )
    trainer.fit()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name].detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(model[1].running_mean, statistics["mean"], rtol=0, atol=1e-10)
    torch.testing.assert_close(model[1].running_var, statistics["var"], rtol=0, atol=1e-10)
    assert trainer.history[0]["loss"] == pytest.approx(value, abs=1e-10)


def full_trainer(make_trainer, make_network, folder, epochs=4, **options):
    return make_trainer(
        model=make_network(dropout=0.3),
        loss=CrossEntropy(label_noise=0.3),
        make_schedule=partial(multistep, fractions=[0.5]),
        callbacks={"average": WeightAverage(decay=0.9, warmup=True), "last": SaveLast(), "none": None}
        | options.pop("extra", {}),
        epochs=epochs,
        folder=folder,
        log_every=2,
        logger=JsonlLogger(folder / "metrics.jsonl"),
        **options,
    )


class StopAt(Callback):
    """Asks to stop at a step of the third epoch."""

    def after_step(self, trainer):
        trainer.stop_requested = trainer.step == 8


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(make_trainer, make_network, same_state, tmp_path):
    torch.manual_seed(1)
    whole = full_trainer(make_trainer, make_network, tmp_path / "whole")
    whole.fit()

    torch.manual_seed(1)
    first = full_trainer(make_trainer, make_network, tmp_path / "parts", extra={"stop": StopAt()})
    with pytest.raises(TrainingStopped, match=r"stopped after 2 of 4 epochs \(step 8\)"):
        first.fit()
    first.logger.finish("interrupted")

    torch.manual_seed(99)
    second = full_trainer(make_trainer, make_network, tmp_path / "parts", extra={"stop": Callback()}, seed=7)
    newest = load_newest(tmp_path / "parts")
    assert newest is not None
    assert newest.message is None
    second.load_state_dict(newest.parts)
    assert (second.epoch, second.step) == (2, 8)
    second.logger.rewind(second.step)
    second.fit()
    whole.logger.finish("done")
    second.logger.finish("done")

    a, b = whole.state_dict(), second.state_dict()
    assert b["callbacks"].pop("stop") == {}
    assert same_state(a, b)
    assert same_state(
        whole.networks()["average"].state_dict(),
        second.networks()["average"].state_dict(),
    )
    metrics = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    assert len(whole.history) == 4


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(make_trainer, make_network, same_state):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        trainer = make_trainer(seed=seed)
        trainer.fit()
        states.append(trainer.state_dict()["model"])
    assert same_state(states[0], states[1])
    assert not same_state(states[0], states[2])


def test_logging_interval_does_not_change_the_weights(make_trainer, same_state):
    states = []
    for log_every in (1, 100):
        torch.manual_seed(0)
        trainer = make_trainer(log_every=log_every)
        trainer.fit()
        states.append(trainer.state_dict()["model"])
    assert same_state(*states)


def test_logged_means_are_the_means_of_the_steps(make_trainer):
    every_step, every_epoch = Recording(), Recording()
    for logger, log_every in ((every_step, 1), (every_epoch, 50)):
        torch.manual_seed(0)
        trainer = make_trainer(logger=logger, log_every=log_every, epochs=1)
        trainer.fit()
    steps = [m for _, m in every_step.calls if "train/loss" in m]
    assert [step for step, _ in every_step.calls] == [1, 2, 3, 3]
    (step, epoch) = every_epoch.calls[0]
    assert step == 3
    assert epoch["epoch"] == 1
    assert epoch["epoch/loss"] == pytest.approx(sum(m["train/loss"] for m in steps) / 3, abs=1e-6)
    assert epoch["epoch/error"] == pytest.approx(sum(m["train/error"] for m in steps) / 3, abs=1e-6)
    assert steps[0]["train/learning_rate"] == 0.05
    assert epoch["time/progress"] == 1
    assert epoch["time/seconds_left"] == 0


def test_logged_learning_rate_is_the_one_the_step_used(make_trainer):
    logger = Recording()
    schedule = partial(multistep, fractions=[0.5])
    make_trainer(logger=logger, log_every=1, make_schedule=schedule, epochs=2).fit()
    rates = [m["train/learning_rate"] for _, m in logger.calls if "train/learning_rate" in m]
    assert rates == pytest.approx([0.05] * 3 + [0.005] * 3)


def test_callbacks_see_all_hooks_in_order_and_history_is_there(make_trainer):
    seen: list[str] = []

    class Noting(Callback):
        def on_fit_start(self, trainer):
            seen.append("start")

        def after_step(self, trainer):
            seen.append(f"step {trainer.step}")

        def after_epoch(self, trainer):
            trainer.history[-1]["seen"] = 1.0
            seen.append(f"epoch {trainer.epoch}")

        def on_epoch_end(self, trainer):
            seen.append("save")

    trainer = make_trainer(callbacks={"noting": Noting()}, epochs=2)
    trainer.fit()
    steps = [[f"step {i}" for i in three] for three in ((1, 2, 3), (4, 5, 6))]
    assert seen == ["start", *steps[0], "epoch 1", "save", *steps[1], "epoch 2", "save"]
    assert [entry["seen"] for entry in trainer.history] == [1.0, 1.0]


def test_fitting_again_after_the_end_does_nothing(make_trainer, same_state):
    trainer = make_trainer()
    trainer.fit()
    before = {name: w.clone() for name, w in trainer.model.state_dict().items()}
    trainer.fit()
    assert same_state(before, dict(trainer.model.state_dict()))


def test_stopped_training_goes_on_in_the_same_process(make_trainer, same_state):
    states = []
    for callback in (Callback(), StopAt()):
        torch.manual_seed(0)
        trainer = make_trainer(epochs=3, callbacks={"stop": callback})
        if isinstance(callback, StopAt):
            with pytest.raises(TrainingStopped):
                trainer.fit()
            trainer.callbacks = {}
        trainer.fit()
        states.append(trainer.state_dict()["model"])
    assert same_state(*states)


def test_infinite_learning_rate_is_reported_and_leaves_the_checkpoint(make_trainer, tmp_path):
    class Explode(Callback):
        def after_step(self, trainer):
            if trainer.step == 4:
                with torch.no_grad():
                    trainer.model[0].weight.mul_(float("inf"))

    callbacks = {"explode": Explode(), "last": SaveLast()}
    trainer = make_trainer(callbacks=callbacks, folder=tmp_path, epochs=3, log_every=5)
    with pytest.raises(DivergenceError, match=r"diverged in epoch 2, at or before step 5: the loss is nan"):
        trainer.fit()
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest.parts["epoch"] == 1
    assert all(torch.isfinite(w).all() for w in newest.parts["model"].values())


def test_weights_that_stop_being_finite_in_the_last_step_are_not_saved(make_trainer, tmp_path):
    class ExplodeLast(Callback):
        def after_step(self, trainer):
            if trainer.step == 3:
                with torch.no_grad():
                    trainer.model[5].bias[0] = float("nan")

    callbacks = {"explode": ExplodeLast(), "last": SaveLast()}
    with pytest.raises(DivergenceError, match="a weight is infinite or not a number"):
        make_trainer(callbacks=callbacks, folder=tmp_path).fit()
    assert load_newest(tmp_path) is None


def test_bf16_trains_close_to_fp32_with_float32_weights(make_trainer):
    histories = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        trainer = make_trainer(precision=precision, epochs=2)
        trainer.fit()
        histories.append(trainer.history[1])
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert histories[0]["loss"] != histories[1]["loss"]
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=0.02)


def test_standard_training_learns_a_separable_problem(make_trainer, make_network):
    y = torch.arange(12) % 3
    x = torch.zeros(12, 1, 4, 4)
    x[torch.arange(12), 0, y, :] = 1.0
    trainer = make_trainer(data=OneBatch(x, y), attack=NoAttack(), epochs=30)
    trainer.fit()
    assert trainer.history[-1]["error"] == 0
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"] / 4


def test_checkpoint_of_another_model_names_what_does_not_fit(make_trainer):
    state = make_trainer().state_dict()
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False), nn.PReLU())
    with pytest.raises(
        CheckpointError,
        match=r"does not fit the model.*1 missing: 2.weight. 8 unexpected.*1 of another shape: 1.weight",
    ):
        make_trainer(model=other).load_state_dict(state)


def test_checkpoint_with_other_callbacks_names_them(make_trainer):
    state = make_trainer(callbacks={"average": WeightAverage()}).state_dict()
    with pytest.raises(CheckpointError, match=r"callbacks do not fit.*missing clip; unexpected average"):
        make_trainer(callbacks={"clip": Callback()}).load_state_dict(state)


def of_another_device(state):
    """The state with random streams as a GPU writes them: seed and offset, 16 bytes each."""
    streams = {name: torch.zeros(16, dtype=torch.uint8) for name in state["streams"]["states"]}
    return {**state, "streams": {**state["streams"], "states": streams}}


def test_a_run_begun_on_another_device_says_where_it_can_go_on(make_trainer):
    begun = make_trainer(epochs=2)
    begun.epochs = 1
    begun.fit()
    with pytest.raises(CheckpointError, match="random streams of another kind of device than cpu"):
        make_trainer(epochs=2).load_state_dict(of_another_device(begun.state_dict()))


def test_a_run_that_ended_on_another_device_can_be_evaluated_on_this_one(make_trainer, same_state):
    ended, here = make_trainer(), make_trainer()
    ended.fit()
    here.load_state_dict(of_another_device(ended.state_dict()))
    here.fit()
    assert here.epoch == 2
    assert same_state(dict(here.model.state_dict()), dict(ended.model.state_dict()))


def test_checkpoint_of_another_length_is_refused(make_trainer):
    state = make_trainer(epochs=2).state_dict()
    with pytest.raises(CheckpointError, match="schedule has 6 steps, ours 9"):
        make_trainer(epochs=3).load_state_dict(state)


def test_checkpoint_without_a_part_names_it(make_trainer):
    state = make_trainer().state_dict()
    del state["data"]
    with pytest.raises(CheckpointError, match="parts do not fit this run: missing data; unexpected none"):
        make_trainer().load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must lie in"),
        ({"log_every": 0}, "log_every must lie in"),
        ({"precision": "fp16"}, "precision must be one of bf16, fp32, got 'fp16'"),
    ],
)
def test_bad_options_are_refused(make_trainer, options, message):
    with pytest.raises(UserError, match=message):
        make_trainer(**options)


def test_searching_on_a_copy_trains_the_same_network(make_trainer, make_network, image_set):
    """In float64, folding is exact to rounding, so the paths of the weights agree."""
    weights = {}
    for search in ("plain", "fp32"):
        torch.manual_seed(3)
        streams = Streams(0)
        data = ImageSet(image_set.images, image_set.labels, name="noise", classes=3).stream(8, {}, streams)
        trainer = make_trainer(model=make_network().double(), data=_InDouble(data), streams=streams, search=search)
        trainer.fit()
        weights[search] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    torch.testing.assert_close(weights["fp32"], weights["plain"], rtol=1e-9, atol=1e-10)


class _InDouble:
    """A stream whose images are float64."""

    def __init__(self, stream):
        self.stream = stream

    def __len__(self):
        return len(self.stream)

    def __next__(self):
        batch = next(self.stream)
        return Batch(batch.x.double(), batch.y)

    def state_dict(self):
        return self.stream.state_dict()
