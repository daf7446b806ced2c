"""An attack whose runs give a measure its reference loss, told by the words of the measures themselves."""

from __future__ import annotations

import pytest
import torch

from robustflat.attacks.pgd import Pgd
from robustflat.attacks.strongest import strongest
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.reference import settings_of_runs
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall
from robustflat.rng import generator_for
from tests.reference.models import cnn_cifar10

BALL = LinfBall(0.03)


def pgd(**changed) -> Pgd:
    return Pgd(**{"ball": BALL, "steps": 20, "step_size": 0.007, **changed})


@pytest.mark.parametrize("search", ["plain", "fp32"])
def test_both_measures_take_ten_runs_of_their_own_attack(search):
    expected = settings_of_runs(pgd(), 10, search=search)
    assert AverageFlatness(attack=pgd(), search=search).reference_settings == expected
    assert WorstFlatness(input_ball=BALL, input_step=0.007, search=search).reference_settings == expected


@pytest.mark.parametrize(
    "measure",
    [
        AverageFlatness(attack=pgd(steps=19)),
        AverageFlatness(attack=pgd(step_size=0.008)),
        AverageFlatness(attack=pgd(restarts=2)),
        AverageFlatness(attack=pgd(), search="fp32"),
        AverageFlatness(attack=pgd(), reference_attack=pgd()),
        AverageFlatness(attack=pgd(), protocol="released"),
        AverageFlatness(attack=pgd(), batch_norm="recalibrate"),
        AverageFlatness(loss="clean"),
        AverageFlatness(attack=pgd(), loss="frozen"),
        WorstFlatness(input_ball=LinfBall(0.04), input_step=0.007),
    ],
)
def test_whatever_changes_the_reference_loss_does_not_fit(measure):
    assert measure.reference_settings != settings_of_runs(pgd(), 10, search="plain")


def test_another_number_of_runs_does_not_fit():
    assert settings_of_runs(pgd(), 9, search="plain") is None


def test_highest_loss_of_single_runs_is_the_reference_loss():
    model, x, y = cnn_cifar10()
    x, y = x[:8], y[:8]
    attack, seed = pgd(steps=2), 3
    found = AverageFlatness(attack=attack, trials=1, seed=seed)(model, x, y)
    generator = generator_for(seed, "reference", 0, device=torch.device("cpu"))
    logits = torch.stack([strongest(model, x, y, attack, generator=generator).logits for _ in range(10)]).double()
    losses = logits.logsumexp(dim=2) - logits[:, torch.arange(8), y]
    torch.testing.assert_close(found.reference.double(), losses.amax(dim=0), rtol=1e-5, atol=1e-6)
