"""A profile watches training and changes nothing: neither weights nor what checkpoints hold."""

from __future__ import annotations

import copy

import pytest
import torch

from robustflat.training.callbacks import Callback
from robustflat.training.profiling import PHASES, REST, Profiling


class KeepFirst(Callback):
    """Keeps the state after the first epoch."""

    in_checkpoints = False

    def on_epoch_end(self, trainer):
        if trainer.epoch == 1:
            self.state = copy.deepcopy(trainer.state_dict())


@pytest.fixture
def seeded_trainer(make_trainer):
    """A trainer with the given callbacks; all have the same initial weights."""

    def made(**callbacks):
        torch.manual_seed(0)
        return make_trainer(callbacks=callbacks)

    return made


def test_weights_are_the_same_with_and_without(seeded_trainer, same_state):
    plain, watched = seeded_trainer(), seeded_trainer(profile=Profiling(steps=2, warmup=1))
    for trainer in (plain, watched):
        trainer.fit()
    assert same_state(plain.state_dict(), watched.state_dict())


@pytest.mark.parametrize("first", [True, False])
def test_runs_go_on_with_and_without_it(seeded_trainer, same_state, first):
    keep = KeepFirst()
    whole = seeded_trainer(keep=keep, **({"profile": Profiling(steps=2, warmup=1)} if first else {}))
    whole.fit()
    rest = seeded_trainer(**({} if first else {"profile": Profiling(steps=1, warmup=1)}))
    rest.load_state_dict(keep.state)
    rest.fit()
    assert same_state(rest.state_dict(), whole.state_dict())


def test_every_phase_of_a_step_is_found(make_trainer):
    profiling = Profiling(steps=5, warmup=1)  # 3 steps an epoch: an end of an epoch lies within
    make_trainer(callbacks={"profile": profiling}).fit()
    phases = profiling.recorder.phases(PHASES, REST).set_index("phase")
    assert profiling.recorder.steps == 5
    assert list(phases.loc[["data", "craft", "score", "update", REST], "calls"]) == [1.0] * 5
    assert phases.loc["epoch end", "calls"] == 1 / 5
    assert abs(phases["share"].sum() - 1) < 1e-9
    operators = profiling.recorder.operators().set_index("operator")
    assert operators.loc["aten::convolution", "calls"] == 3 + 1  # PGD-2: at each of three iterates; and scoring


def test_a_rewind_does_not_begin_the_record_again(make_trainer):
    """Whatever goes back to an earlier epoch lets all callbacks begin anew."""

    class BeginAgain(Callback):
        def after_step(self, trainer):
            if trainer.step in (2, 5):
                for callback in trainer.callbacks.values():
                    callback.on_fit_start(trainer)

    profiling = Profiling(steps=2, warmup=1)
    make_trainer(callbacks={"again": BeginAgain(), "profile": profiling}).fit()
    assert profiling.recorder.steps == 2
