"""Measures of a network on a card mix none of its tensors with those of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.hessian import hessian_spectrum
from robustflat.flatness.landscape import Landscape
from robustflat.flatness.measures.catalogue import STANDARD, measures
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.models.modes import perturbable
from tests.card import DEVICE, Card, plug_in

ATTACK = Pgd(LinfBall(0.1), steps=2, step_size=0.05)


def small() -> nn.Module:
    layers = nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)
    return nn.Sequential(*layers).eval()


def data() -> tuple[Tensor, Tensor]:
    return torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 0])


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    plug_in(monkeypatch)
    with Card():
        yield small().to(DEVICE)


LONG = {"average_flatness_filter", "noise_radius", "pac_bayes_worst", "pac_bayes_worst_magnitude", "worst_flatness"}
"""Hundreds of passes, whose shapes torch derives in Python."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in STANDARD])
def test_measures(name: str, network: nn.Module) -> None:
    other = small().state_dict()
    measures(network, *data(), only=[name], anchors={"start": other, "other": other})


WAYS: dict[str, Callable[[nn.Module, Any], object]] = {
    "average": lambda m, xy: AverageFlatness(trials=2, attack=ATTACK)(m, *xy),
    "average, recalibrated": lambda m, xy: AverageFlatness(
        trials=2, attack=ATTACK, protocol="released", batch_norm="recalibrate"
    )(m, *xy),
    "worst": lambda m, xy: WorstFlatness(WeightBall(0.1), restarts=2, steps=2, reference_attack=ATTACK)(m, *xy),
    "worst, folded": lambda m, xy: WorstFlatness(
        WeightBall(0.1), restarts=2, steps=2, reference_attack=ATTACK, search="fp32"
    )(m, *xy),
    "lines": lambda m, xy: Landscape(loss="robust", attack=ATTACK, points=3, trials=2)(m, *xy),
    "plane": lambda m, xy: Landscape(loss="clean", points=3).plane(m, *xy),
    "path": lambda m, xy: Landscape(loss="clean", points=3).path(m, small().state_dict(), *xy),
    "given": lambda m, xy: Landscape(loss="clean", points=3)(
        m, *xy, directions=[{n: torch.ones_like(t) for n, t in perturbable(small()).items()}]
    ),
    "spectrum": lambda m, xy: hessian_spectrum(m, *xy, top=1, bottom=1, trace_products=6),
}


@pytest.mark.parametrize("way", WAYS)
def test_flatness_and_landscapes(way: str, network: nn.Module) -> None:
    WAYS[way](network, data())
