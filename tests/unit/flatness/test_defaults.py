"""Settings that nobody gives are those of the paper, its released code and the measures' own papers."""

from __future__ import annotations

import pytest

from robustflat.attacks.pgd import Pgd
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.landscape import Landscape
from robustflat.flatness.measures.catalogue import STANDARD
from robustflat.flatness.protocol import REFERENCE_RESTARTS
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall


def values(thing: object, *names: str) -> tuple[object, ...]:
    return tuple(getattr(thing, name) for name in names)


@pytest.mark.parametrize(
    ("protocol", "epsilon", "start"), [("paper", 8 / 255, "uniform"), ("released", 0.0314, "uniform_norm")]
)
def test_flatness_is_that_of_stutz_et_al(protocol: str, epsilon: float, start: str) -> None:
    average, worst = AverageFlatness(protocol=protocol), WorstFlatness(protocol=protocol)
    for attack in (average.attack, worst._reference_attack()):
        assert isinstance(attack, Pgd) and isinstance(attack.ball, LinfBall)
        assert values(attack, "steps", "step_size", "random_start", "restarts") == (20, 0.007, start, 1)
        assert attack.ball.epsilon == epsilon
    assert REFERENCE_RESTARTS == 10
    for ball, radius in ((average.ball, 0.5), (worst.ball, 0.003)):
        assert values(ball, "radius", "norm", "grouping", "relative") == (radius, 2, "layer", True)
    assert values(average, "trials", "norm_layers", "biases", "batch_norm") == (10, False, True, "running")
    assert values(worst, "restarts", "steps", "input_step", "norm_layers", "biases") == (10, 20, 0.007, False, True)
    assert isinstance(worst.input_ball, LinfBall) and worst.input_ball.epsilon == epsilon
    released = protocol == "released"
    assert average.draws == ("per_set" if released else "per_batch")
    assert average.sampling == ("sphere" if released else "ball")
    assert worst.weight_step == pytest.approx(0.01 if released else 0.001)


def test_a_landscape_is_that_of_the_papers_first_picture() -> None:
    landscape = Landscape()
    assert values(landscape, "loss", "normalisation", "length", "points", "trials", "reduction") == (
        *("robust", "layer", 0.5, 51, 10, "mean"),
    )
    attack = landscape.attack
    assert isinstance(attack, Pgd) and attack.ball.epsilon == 8 / 255
    assert values(attack, "steps", "step_size", "random_start") == (10, 0.007, "uniform")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("keskar", {"epsilon": 1e-3}),
        ("sam", {"rho": 0.05, "steps": 1, "m": None}),
        ("sam_m128", {"rho": 0.05, "steps": 1, "m": 128}),
        ("adaptive_worst_l2", {"rho": 0.5, "norm": 2}),
        ("adaptive_worst_linf", {"rho": 0.01, "norm": float("inf"), "steps": 20}),
        ("adaptive_average", {"rho": 0.1, "draws": 20}),
        ("first_order_flatness", {"rho": 0.1}),
        ("low_pass_filter", {"sigma": 0.01, "draws": 100}),
        ("pac_bayes_sigma", {"rise": 0.1, "draws": 10, "magnitude_aware": False}),
        ("pac_bayes_sigma_magnitude", {"rise": 0.1, "draws": 10, "magnitude_aware": True, "floor": 1e-3}),
        ("pac_bayes_worst", {"rise": 0.1, "magnitude_aware": False}),
        ("inverse_margin", {"quantile": 0.1}),
        ("fisher_rao", {"labels": "model"}),
        ("interpolation_barrier", {"points": 11}),
    ],
)
def test_measures_take_the_settings_of_their_papers(name: str, expected: dict[str, object]) -> None:
    assert dict(zip(expected, values(STANDARD[name], *expected), strict=True)) == expected
