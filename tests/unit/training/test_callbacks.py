"""Weight averaging, clipping, snapshots and resumable checkpoints around the loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from robustflat.attacks.pgd import NoAttack
from robustflat.data.images import to_unit_range
from robustflat.errors import CheckpointError, UserError
from robustflat.rng import Streams
from robustflat.training.callbacks import Callback, ClipWeights, SaveLast, Snapshots, WeightAverage
from robustflat.training.checkpoint import load
from robustflat.training.optimizers import sgd


class Remember(Callback):
    """Keeps a copy of the whole model state after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_fit_start(self, trainer):
        self.after_step(trainer)

    def after_step(self, trainer):
        self.states.append({name: w.clone() for name, w in trainer.model.state_dict().items()})


def averages(states, decays):
    """The average written out: fold all states into the first, counters copied."""
    average = {name: w.clone() for name, w in states[0].items()}
    for state, decay in zip(states[1:], decays, strict=True):
        for name, w in state.items():
            average[name] = decay * average[name] + (1 - decay) * w if w.is_floating_point() else w
    return average


@pytest.mark.parametrize("warmup", [False, True])
def test_average_follows_its_recursion(make_trainer, warmup):
    remember, average = Remember(), WeightAverage(decay=0.5, warmup=warmup)
    trainer = make_trainer(callbacks={"remember": remember, "average": average}, epochs=2)
    trainer.fit()
    decays = [min(0.5, (1 + t) / (10 + t)) if warmup else 0.5 for t in range(6)]
    expected = averages(remember.states, decays)
    found = average.averaged_model(trainer).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert found["1.num_batches_tracked"].item() == 6
    assert found["1.num_batches_tracked"].dtype == torch.int64


def test_without_decay_the_average_is_the_model_bit_for_bit(make_trainer, same_state):
    average = WeightAverage(decay=0.0)
    trainer = make_trainer(callbacks={"average": average})
    trainer.fit()
    assert same_state(dict(average.averaged_model(trainer).state_dict()), dict(trainer.model.state_dict()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_averaging_does_not_change_the_training(make_trainer, make_network, same_state, dropout):
    states = []
    for callbacks in ({}, {"average": WeightAverage()}, {"average": WeightAverage(batch_norm="recalibrate")}):
        torch.manual_seed(0)
        trainer = make_trainer(model=make_network(dropout), callbacks=callbacks, epochs=2)
        if callbacks:
            trainer.callbacks["peek"] = Peek()
        trainer.fit()
        states.append(trainer.state_dict())
    for state in states[1:]:
        for part in ("model", "optimizer", "streams", "data", "random"):
            assert same_state(states[0][part], state[part])


class Peek(Callback):
    """Asks for all networks after each epoch, as an evaluation does."""

    def after_epoch(self, trainer):
        assert not trainer.networks()["average"].training


def test_averaged_model_is_another_module_in_eval_mode(make_trainer):
    average = WeightAverage(decay=0.9)
    trainer = make_trainer(callbacks={"average": average})
    trainer.fit()
    found = average.averaged_model(trainer)
    assert not found.training
    assert trainer.model.training
    assert set(map(id, found.parameters())).isdisjoint(map(id, trainer.model.parameters()))


def test_recalibrated_statistics_are_those_of_the_training_images(make_trainer, image_set):
    """Without an attack and with one batch that holds the whole set, they can be computed by hand."""
    average = WeightAverage(decay=0.9, batch_norm="recalibrate", calibration_batches=3)
    stream = image_set.stream(26, None, Streams(0))
    trainer = make_trainer(data=stream, attack=NoAttack(), callbacks={"average": average}, epochs=3)
    trainer.fit()
    found = average.averaged_model(trainer)
    z = found[0](to_unit_range(image_set.images)).detach()
    torch.testing.assert_close(found[1].running_mean, z.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(found[1].running_var, z.var(dim=(0, 2, 3)))
    assert found[1].momentum == 0.1
    kept = WeightAverage(decay=0.9)
    kept.load_state_dict(average.state_dict())
    kept.on_fit_start(trainer)
    assert not torch.allclose(found[1].running_mean, kept.averaged_model(trainer)[1].running_mean)


def test_recalibration_keeps_statistics_of_layers_that_see_no_batch(make_trainer, make_network):
    """Such as those of a rotation head, which the class logits do not need."""
    model = make_network()
    model.spare = nn.BatchNorm1d(2)
    model.spare.running_mean.fill_(3.0)
    model.spare.forward = lambda x: x
    average = WeightAverage(batch_norm="recalibrate", calibration_batches=2)
    trainer = make_trainer(model=model, callbacks={"average": average})
    trainer.fit()
    found = average.averaged_model(trainer)
    assert found.spare.running_mean.tolist() == [3.0, 3.0]
    assert found[1].num_batches_tracked == 2


def test_average_before_training_is_refused(make_trainer):
    with pytest.raises(UserError, match="no weight average yet"):
        WeightAverage().averaged_model(make_trainer())


def test_a_second_average_which_would_hide_the_first_is_refused(make_trainer):
    trainer = make_trainer(callbacks={"slow": WeightAverage(decay=0.99), "fast": WeightAverage(decay=0.9)})
    with pytest.raises(UserError, match=r"2 callbacks average weights \(slow, fast\)"):
        trainer.fit()
    assert trainer.step == 0


def test_average_of_another_model_is_refused(make_trainer):
    average = WeightAverage()
    average.load_state_dict({"average": {"w": torch.zeros(1)}, "updates": 3})
    with pytest.raises(CheckpointError, match="weight average does not have the names"):
        make_trainer(callbacks={"average": average}).fit()


def test_clipping_bounds_all_weights_but_those_of_norm_layers(make_trainer):
    remember = Remember()
    make_optimizer = partial(sgd, lr=0.5)
    callbacks = {"clip": ClipWeights(maximum=0.02), "remember": remember}
    trainer = make_trainer(callbacks=callbacks, make_optimizer=make_optimizer)
    trainer.fit()
    clipped = [n for n, _ in trainer.model.named_parameters() if not n.startswith("1.")]
    for state in remember.states:
        assert max(state[name].abs().max().item() for name in clipped) <= 0.02
        assert any((state[name].abs() == 0.02).any() for name in clipped)
        assert state["1.weight"].abs().min() > 0.1


def test_an_average_is_one_of_clipped_weights_wherever_it_stands(make_trainer):
    callbacks = {"average": WeightAverage(decay=0.5), "clip": ClipWeights(maximum=0.02)}
    trainer = make_trainer(callbacks=callbacks, make_optimizer=partial(sgd, lr=0.5))
    trainer.fit()
    clipped = {n: w for n, w in trainer.networks()["average"].named_parameters() if not n.startswith("1.")}
    assert max(w.abs().max().item() for w in clipped.values()) <= 0.02


def test_clipping_of_norm_layers_on_request(make_trainer):
    trainer = make_trainer(callbacks={"clip": ClipWeights(maximum=0.02, norm_layers=True)})
    trainer.fit()
    assert max(p.abs().max().item() for p in trainer.model.parameters()) <= 0.02


def test_wide_clipping_changes_nothing(make_trainer, same_state):
    states = []
    for callbacks in ({}, {"clip": ClipWeights(maximum=1e6)}):
        torch.manual_seed(0)
        trainer = make_trainer(callbacks=callbacks)
        trainer.fit()
        states.append(trainer.state_dict()["model"])
    assert same_state(*states)


def test_snapshots_hold_the_weights_of_every_nth_and_the_last_epoch(make_trainer, same_state, tmp_path):
    callbacks = {"snapshots": Snapshots(every=2), "average": WeightAverage(decay=0.5)}
    trainer = make_trainer(callbacks=callbacks, epochs=5, folder=tmp_path)
    trainer.meta = {"version": "1"}
    trainer.fit()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_0002.pt", "epoch_0004.pt", "epoch_0005.pt"]
    parts, meta = load(tmp_path / "epoch_0005.pt")
    assert meta == {"version": "1", "epoch": 5, "step": 15}
    assert same_state(dict(parts["model"]), dict(trainer.model.state_dict()))
    assert same_state(dict(parts["average"]), dict(trainer.networks()["average"].state_dict()))
    assert not same_state(dict(parts["average"]), dict(parts["model"]))


def test_last_checkpoint_and_the_one_before_are_kept(make_trainer, tmp_path):
    make_trainer(callbacks={"last": SaveLast()}, epochs=3, folder=tmp_path).fit()
    assert load(tmp_path / "last.pt").parts["epoch"] == 3
    assert load(tmp_path / "previous.pt").parts["epoch"] == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_what_killed_processes_left_half_written_is_cleared_away(make_trainer, tmp_path):
    for name in (".last.pt.123.tmp", ".epoch_0007.pt.9.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    make_trainer(callbacks={"snapshots": Snapshots(every=2), "last": SaveLast()}, epochs=2, folder=tmp_path).fit()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_0002.pt", "last.pt", "notes.tmp", "previous.pt"]


def test_own_folder_wins_and_the_last_epoch_is_always_saved(make_trainer, tmp_path):
    last = SaveLast(tmp_path / "own", every=2, keep_previous=False)
    make_trainer(callbacks={"last": last}, epochs=3, folder=tmp_path / "trainer").fit()
    assert [p.name for p in (tmp_path / "own").iterdir()] == ["last.pt"]
    assert load(tmp_path / "own" / "last.pt").parts["epoch"] == 3


@pytest.mark.parametrize("callback", [SaveLast, Snapshots])
def test_saving_without_a_folder_is_refused_before_training(make_trainer, callback):
    trainer = make_trainer(callbacks={"save": callback()})
    with pytest.raises(UserError, match="checkpoints need a folder"):
        trainer.fit()
    assert trainer.step == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(WeightAverage, decay=1.0), r"decay must lie in \[0, 1\), got 1.0"),
        (partial(WeightAverage, batch_norm="none"), "batch_norm must be one of average, copy, recalibrate"),
        (partial(WeightAverage, calibration_batches=0), "calibration_batches must lie in"),
        (partial(ClipWeights, maximum=0), r"maximum must lie in \(0, inf\)"),
        (partial(Snapshots, every=0), "every must lie in"),
        (partial(SaveLast, every=0), "every must lie in"),
    ],
)
def test_values_out_of_range_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
