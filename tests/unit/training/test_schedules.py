"""Learning-rate schedules against closed forms and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robustflat.errors import CheckpointError, UserError
from robustflat.training.schedules import constant, cosine, cyclic, late, multistep


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (0.05,)]
    return torch.optim.SGD(groups, lr=1.0)


def rates(schedule, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_constant_stays():
    assert rates(constant(optimizer(), 5), 5) == [0.05] * 5


def test_multistep_drops_after_each_fraction_like_torch():
    ours = rates(multistep(optimizer(), 150), 150)
    theirs_of = optimizer()
    theirs = torch.optim.lr_scheduler.MultiStepLR(theirs_of, [60, 90, 120], gamma=0.1)
    expected = []
    for _ in range(150):
        expected.append(theirs.get_last_lr()[0])
        theirs_of.step()
        theirs.step()
    assert ours == pytest.approx(expected)
    assert ours[59] == 0.05
    assert ours[60] == pytest.approx(0.005)


def test_late_drops_at_140_and_145_of_150_epochs():
    found = rates(late(optimizer(), 150 * 7), 150 * 7)
    changes = [i / 7 for i in range(1, len(found)) if found[i] != found[i - 1]]
    assert changes == [140, 145]
    assert found[-1] == pytest.approx(0.0005)


@pytest.mark.parametrize("cycles", [1, 2, 3, 4])
def test_cyclic_is_a_row_of_triangles(cycles):
    steps = 30 * cycles
    found = rates(cyclic(optimizer(), steps, peak=0.2, cycles=cycles), steps)
    expected = [0.2 * (1 - abs(2 * (t % 30) / 30 - 1)) for t in range(steps)]
    assert found == pytest.approx(expected)
    assert max(found) == pytest.approx(0.2)
    assert found.count(max(found)) == cycles


def test_cyclic_rises_from_its_start_and_falls_to_its_end():
    found = rates(cyclic(optimizer(), 100, peak=1.0, start=0.5, end=0.2, rise=0.2), 100)
    assert found[0] == 0.5
    assert found[10] == pytest.approx(0.75)
    assert found[20] == pytest.approx(1.0)
    assert found[60] == pytest.approx(0.6)
    assert found[99] == pytest.approx(0.21)


def test_cosine_after_warm_up():
    found = rates(cosine(optimizer(), 100, warmup=0.1, final=0.1), 100)
    assert found[:10] == pytest.approx([0.005 * (t + 1) for t in range(10)])
    for t in range(10, 100):
        wave = 0.5 * (1 + math.cos(math.pi * (t - 10) / 90))
        assert found[t] == pytest.approx(0.05 * (0.1 + 0.9 * wave))


def test_groups_keep_their_own_initial_rates():
    schedule = multistep(optimizer(0.1, 0.02), 10, fractions=[0.5], factor=0.5)
    for _ in range(5):
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.01])


def test_shape_scales_with_the_length_of_training():
    short, long = (rates(multistep(optimizer(), n, fractions=[0.3]), n) for n in (10, 1000))
    assert [short.index(min(short)), long.index(min(long))] == [3, 300]


def test_steps_after_the_end_keep_the_last_rate():
    schedule = cosine(optimizer(), 10)
    found = rates(schedule, 15)
    assert found[10:] == [found[9]] * 5


def test_restored_schedule_goes_on_where_it_was():
    whole = rates(cosine(optimizer(), 20), 20)
    first = cosine(optimizer(), 20)
    rates(first, 8)
    second = cosine(optimizer(), 20)
    second.load_state_dict(first.state_dict())
    assert rates(second, 12) == whole[8:]


def test_state_of_another_length_is_refused():
    with pytest.raises(CheckpointError, match="schedule has 20 steps, ours 30"):
        cosine(optimizer(), 30).load_state_dict(cosine(optimizer(), 20).state_dict())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (multistep, {"fractions": [0.5, 1.0]}, r"fractions must lie in \(0, 1\), got 1.0. Milestones are fractions"),
        (multistep, {"fractions": [60, 90]}, "60 of 150 epochs is 0.4"),
        (multistep, {"fractions": [0.6, 0.4]}, r"fractions must increase, got \[0.6, 0.4\]"),
        (multistep, {"factor": 0.0}, "factor must lie in"),
        (cyclic, {"cycles": 0}, "cycles must lie in"),
        (cyclic, {"cycles": 80}, "at least two steps each, got 80 cycles in 100 steps"),
        (cyclic, {"peak": 0.0}, "peak must lie in"),
        (cyclic, {"start": 0.3}, "start must lie in"),
        (cyclic, {"rise": 1.0}, "rise must lie in"),
        (cosine, {"warmup": 5}, "warmup must lie in .* It is a fraction of training"),
        (cosine, {"warmup": 1}, r"warmup must lie in \[0, 1\)"),
        (cosine, {"final": 2}, "final must lie in"),
    ],
)
def test_impossible_shapes_are_refused(make, options, message):
    with pytest.raises(UserError, match=message):
        make(optimizer(), 100, **options)


def test_empty_training_is_refused():
    with pytest.raises(UserError, match="total_steps must lie in"):
        constant(optimizer(), 0)
