"""Two processes train as one: the same losses and weights, checkpoints, errors and stops."""

from __future__ import annotations

import pytest
import torch

from robustflat.attacks.autopgd import AutoPgd
from robustflat.attacks.square import Square
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall
from robustflat.gradients.plain import Plain
from tests.unit.training import shared_runs
from tests.unit.training.shared_runs import METHODS, fitted, resumed


def answers(found):
    for answer in found:
        if isinstance(answer, Exception):
            raise answer
    return found


def assert_close(one, other, where="", tolerance=1e-9):
    if isinstance(one, torch.Tensor):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m: f"{where}: {m}")
        else:
            assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_close(one[key], other[key], f"{where}/{key}", tolerance)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_close(a, b, f"{where}/{i}", tolerance)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=max(tolerance, 1e-6), abs=1e-9), where
    else:
        assert one == other, where


@pytest.mark.parametrize("method", METHODS)
def test_weights_and_losses_equal_those_of_one_process(pair, method):
    alone = fitted(method)
    for shared in answers(pair(fitted, method)):
        assert_close(alone, shared)


def test_a_resumed_training_does_not_know_on_how_many_processes_it_ran(pair):
    whole = fitted("label_noise", {"epochs": 3})["state"]
    first = answers(pair(fitted, "label_noise", {"epochs": 1}))[0]["state"]
    second = resumed("label_noise", first, 2)
    third = answers(pair(resumed, "label_noise", second, 3))[1]
    del whole["schedule"], third["schedule"]  # these know the length of the training
    assert_close(whole, third)


def test_without_synchronisation_shares_are_normalised_alone_and_all_keep_the_mean_of_their_statistics(pair):
    one, other = answers(pair(fitted, "at", {"sync_batch_norm": False}))
    assert_close(one, other, tolerance=0)
    synchronised = answers(pair(fitted, "at"))[0]["networks"]["model"]
    mine = one["networks"]["model"]
    assert not torch.allclose(mine["body.0.weight"], synchronised["body.0.weight"], rtol=1e-6)
    # Equal shares: the mean of the shares' means is the mean of the batch; the first layer's input knows no batch norm.
    first, share = answers(pair(shared_runs.first_statistics, False)), answers(pair(shared_runs.first_statistics, True))
    torch.testing.assert_close(first[0][0], share[0][0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(first[0][1], share[0][1], rtol=1e-6)


@pytest.mark.parametrize("with_user_error", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all(pair, rank, with_user_error):
    found = pair(shared_runs.fails, rank, 2, with_user_error)
    assert isinstance(found[rank], UserError if with_user_error else ValueError)
    assert "Another process of this job has gone" in str(found[1 - rank])
    assert [found[rank].speaks, found[1 - rank].speaks] == [True, False]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_stop_before_the_same_step(pair, rank):
    assert answers(pair(shared_runs.stops, rank)) == [(3, "TrainingStopped")] * 2


def test_a_rule_that_forgets_the_other_processes_is_found_out(pair):
    for answer in pair(shared_runs.lonely_gradient):
        assert isinstance(answer, UserError)
        assert "come to different weights" in str(answer)


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("at", {"batch_size": 7}, "take 6 or 8"),
        ("at", {"batch_size": 1}, "take 2"),
        ("rotation", {"batch_size": 6}, "even number of images per process"),
        ("micro_batches", {"batch_size": 12, "gradient": Plain(micro_batches=2)}, "parts must be even"),
        ("half", {"batch_size": 2}, "without clean or without attacked"),
        ("at", {"attack": Square(LinfBall(0.1), queries=3)}, "Square draws"),
        ("at", {"attack": AutoPgd(LinfBall(0.1), steps=3, stop_when_fooled=True)}, "stop_when_fooled"),
    ],
)
def test_what_cannot_be_shared_is_refused(pair, method, options, text):
    found = pair(fitted, method, options)
    assert all(isinstance(answer, UserError) for answer in found)
    assert any(text in str(answer) for answer in found), found


def test_a_batch_norm_or_dropout_of_its_own_kind_is_refused_unless_each_share_is_normalised_alone(pair):
    assert "cannot be synchronised" in str(pair(shared_runs.odd_layer, "OddNorm", True)[0])
    assert answers(pair(shared_runs.odd_layer, "OddNorm", False)) == ["trained"] * 2
    assert "cannot draw" in str(pair(shared_runs.odd_layer, "Dropout2d", True)[0])


def test_ranks_talk(pair):
    for rank, found in enumerate(answers(pair(shared_runs.talk))):
        assert found["sum"] == [3.0, 30.0]
        assert found["means"] == [[0.5, 0.5], [5.0]]
        assert found["twice"] == [0.5, 0.5], "tensors that share memory"
        assert found["broadcast"] == [0.0, 0.0]
        assert found["any"] == [True, False]
        assert found["same"] == [True, False]
        assert found["rank"] == rank
