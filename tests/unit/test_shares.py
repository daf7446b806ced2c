"""Draws for a share of a batch are the rows of the draw for the whole batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from robustflat.attacks.noise import NFgsm, RandomNoise
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.wrappers import Fraction, OnlyCorrect, PredictedLabels, Restarts, WorstOf
from robustflat.errors import UserError
from robustflat.geometry.input_ball import L1Ball, L2Ball, LinfBall
from robustflat.losses.labels import noisy
from robustflat.rng import Rows, drawn_for_batch, held, holding, of_the_whole
from robustflat.training.team import share_of

BALLS = [LinfBall(0.1), L2Ball(0.5), L1Ball(2.0)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 2, 3, 3, generator=torch.Generator().manual_seed(1))


def put_together(find, x, y, size):
    """Results of all shares in the order of the batch, and where each left its generator."""
    found, ends = None, []
    for rank in range(size):
        rows = share_of(len(x), rank, size)
        mine, draws = list(rows.numbers), generator()
        with holding(rows):
            part = find(x[mine], y[mine], draws)
        found = x.new_empty(len(x), *part.shape[1:], dtype=part.dtype) if found is None else found
        found[mine] = part
        ends.append(draws.get_state())
    return found, ends


def assert_as_for_the_whole(find, *, count=12, size=3):
    x, y = images(count), torch.arange(count) % 3
    draws = generator()
    whole = find(x, y, draws)
    assert not torch.equal(whole, find(x, y, torch.Generator().manual_seed(5))), "nothing is drawn at all"
    found, ends = put_together(find, x, y, size)
    assert torch.equal(found, whole)
    assert all(torch.equal(end, draws.get_state()) for end in ends)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("way", ["sample", "sample_uniform_norm"])
def test_starts_in_balls(ball, size, way):
    assert_as_for_the_whole(lambda x, y, draws: getattr(ball, way)(x, draws), size=size)


def linear(x: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(x[0].numel(), 3, generator=torch.Generator().manual_seed(2))
    return (x.flatten(1)[:, :, None] * weights).sum(dim=1)  # no matrix product, whose rounding depends on the batch


ATTACKS = {
    "gaussian": partial(Pgd, steps=1, step_size=0.05, random_start="gaussian"),
    "restarts": partial(Pgd, steps=1, step_size=0.05, restarts=3),
    "noise": RandomNoise,
    "gaussian_noise": partial(RandomNoise, kind="gaussian", trials=2),
    "n_fgsm": partial(NFgsm, step_size=0.05),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name):
    attack = ATTACKS[name](LinfBall(0.1))
    assert_as_for_the_whole(lambda x, y, draws: attack(linear, x, y, None, draws).x_adv)


PGD = Pgd(LinfBall(0.1), steps=1, step_size=0.02)
WRAPPED = {
    "half": Fraction(PGD, 0.5),
    "part": Fraction(PGD, 0.45),
    "some of some": Fraction(Fraction(PGD, 0.7), 0.8),
    "restarts": Restarts(PGD, 2),
    "worst": WorstOf({"one": PGD, "two": RandomNoise(LinfBall(0.1))}),
    "predicted": PredictedLabels(PGD),
    "correct": OnlyCorrect(PGD),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers(name):
    find = WRAPPED[name]
    assert_as_for_the_whole(lambda x, y, draws: find(linear, x, y, None, draws).x_adv, count=24, size=2)


def test_label_noise():
    assert_as_for_the_whole(lambda x, y, draws: noisy(y, 3, amount=0.6, generator=draws))


@pytest.mark.parametrize(("total", "size"), [(8, 2), (12, 3), (12, 2), (6, 2), (9, 3), (256, 8)])
def test_shares_are_a_partition_balanced_in_halves_and_in_parity(total, size):
    shares = [share_of(total, rank, size) for rank in range(size)]
    assert sorted(n for share in shares for n in share.numbers) == list(range(total))
    assert {len(share.numbers) for share in shares} == {total // size}
    if total // size % 2 == 0:
        assert all([n % 2 for n in share.numbers] == [0, 1] * (total // size // 2) for share in shares)
    if total // size % 4 == 0:
        assert all(sum(n < total // 2 for n in share.numbers) == total // size // 2 for share in shares)


def test_rows_of_parts_of_a_batch():
    rows = Rows((0, 1, 4, 5), 8)
    assert rows.after(4) == Rows((0, 1), 4)
    assert rows.every_second(0) == Rows((0, 2), 4)
    assert rows.every_second(1) == Rows((0, 2), 4)
    assert Rows.all(3).every_second(0) == Rows((0, 1), 2)
    assert Rows.all(3).every_second(1) == Rows((0,), 1)
    with holding(rows):
        assert held(4) == rows
        with holding(rows.after(8)):
            assert held(2) == Rows.all(2)
        assert of_the_whole(4) == 8
    assert held(5) == Rows.all(5)
    assert of_the_whole(5) == 5


@pytest.mark.parametrize("shape", [(3,), (5, 2), ()])
def test_draws_for_some_of_the_images_only_are_refused(shape):
    with holding(Rows((0, 1), 4)), pytest.raises(UserError, match="draws for some images only"):
        drawn_for_batch(torch.rand, shape)


def test_a_share_leaves_no_kind_out():
    with holding(share_of(4, 1, 2)), pytest.raises(UserError, match="without clean or without attacked"):
        Fraction(PGD, 0.6)(linear, images(2), torch.zeros(2, dtype=torch.int64), None, generator())
