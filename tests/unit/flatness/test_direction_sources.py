"""Directions: shared by networks, uphill, eigenvectors of a known matrix, and through a file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustflat.errors import DataError, UserError
from robustflat.flatness.direction_sources import (
    AdversarialDirections,
    HessianDirections,
    RandomDirections,
    StoredDirections,
    save_directions,
)
from robustflat.flatness.lanczos import Lanczos
from robustflat.flatness.landscape import Landscape
from robustflat.geometry.weight_ball import WeightBall
from tests.unit.flatness.networks import Quadratic, convnet, examples, spectrum

MATRIX = spectrum(3.0, 1.0, 0.2, -0.5)


def one_image() -> tuple[Tensor, Tensor]:
    return torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)


def test_hessian_directions_are_the_eigenvectors_and_curve_by_their_eigenvalues() -> None:
    values, vectors = torch.linalg.eigh(MATRIX)
    for end, order in (("top", [3, 2]), ("bottom", [0, 1])):
        source = HessianDirections(end, precision="fp64", lanczos=Lanczos(tolerance=1e-8))
        landscape = Landscape(loss="clean", directions=source, normalisation="global", length=0.4, points=5, trials=2)
        for found, index in zip(landscape.find_directions(Quadratic(MATRIX), *one_image()), order, strict=True):
            assert abs(float(found["weight"] @ vectors[:, index])) == pytest.approx(1, abs=1e-6)
        lines = landscape(Quadratic(MATRIX), *one_image())
        for row, index in zip(lines.losses, order, strict=True):
            assert torch.allclose(row, 1 + lines.steps.square() * values[index] / 2, atol=1e-6)


def test_a_hessian_direction_points_uphill() -> None:
    model = Quadratic(MATRIX)
    with torch.no_grad():
        model.weight += 0.1 * torch.linalg.eigh(MATRIX)[1][:, 3]  # away from the minimum: the slope decides the sign
    (found,) = Landscape(loss="clean", directions=HessianDirections(precision="fp64"), trials=1).find_directions(
        model, *one_image()
    )
    assert float(found["weight"] @ MATRIX @ (model.weight - model.start).detach()) > 0


def test_unconverged_eigenvectors_are_refused() -> None:
    source = HessianDirections(lanczos=Lanczos(tolerance=1e-9, max_products=2))
    with pytest.raises(UserError, match="have not converged after"):
        Landscape(loss="clean", directions=source, trials=2).find_directions(convnet(), *examples(3))


def test_adversarial_directions_rise_more_than_random_ones_and_reach_the_known_maximum() -> None:
    ball = WeightBall(0.3, grouping="global", relative=False)
    source = AdversarialDirections(ball, steps=40, step=0.1)
    common = {"loss": "clean", "normalisation": "global", "length": 0.3, "points": 3, "trials": 3}
    model = Quadratic(spectrum(3.0, 0.4, 0.2, 0.1))
    worst = Landscape(directions=source, reduction="max", **common)(model, *one_image())
    assert float(worst.curve[-1]) == pytest.approx(1 + 3 * 0.3**2 / 2, rel=1e-4)
    assert float(Landscape(**common)(model, *one_image()).losses.max()) < float(worst.curve[-1])


def test_directions_of_one_network_serve_another_through_a_file(tmp_path) -> None:
    images = examples(4)
    first = Landscape(loss="clean", directions=AdversarialDirections(steps=2), points=3, trials=2)
    made = first.find_directions(convnet(0), *images)
    path = save_directions(made, tmp_path / "d.h5", "adversarial")
    stored = Landscape(loss="clean", directions=StoredDirections(path), points=3, trials=2)
    expected = Landscape(loss="clean", points=3)(convnet(1), *images, directions=made)
    assert torch.equal(stored(convnet(1), *images).losses, expected.losses)
    assert torch.equal(stored(convnet(0), *images).losses, first(convnet(0), *images).losses)
    assert StoredDirections(path).digest() == StoredDirections(save_directions(made, tmp_path / "e.h5", "")).digest()
    with pytest.raises(DataError, match="holds 2 directions, 3 are wanted"):
        Landscape(loss="clean", directions=StoredDirections(path), trials=3)(convnet(), *images)
    with pytest.raises(DataError, match="no results file"):
        Landscape(loss="clean", directions=StoredDirections(tmp_path / "no.h5"))(convnet(), *images)


def test_directions_of_another_architecture_are_refused_with_both_shapes(tmp_path) -> None:
    path = save_directions([{"weight": torch.ones(3)}], tmp_path / "d.h5", "mine")
    with pytest.raises(UserError, match=r"weight has shape \(3,\) instead of \(4,\)"):
        Landscape(loss="clean", directions=StoredDirections(path), trials=1)(Quadratic(MATRIX), *one_image())


def test_random_directions_do_not_depend_on_their_number() -> None:
    two, three = (
        Landscape(loss="clean", directions=RandomDirections(), trials=k).find_directions(convnet(), *examples(2))
        for k in (2, 3)
    )
    assert all(torch.equal(two[i][n], three[i][n]) for i in range(2) for n in two[i])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HessianDirections("left"), "end must be one of"),
        (lambda: HessianDirections(precision="fp8"), "precision must be one of"),
        (lambda: AdversarialDirections(steps=0), "steps must lie in"),
        (lambda: AdversarialDirections(step=0.0), "step must lie in"),
        (lambda: AdversarialDirections(WeightBall(0.0)), "has no direction"),
    ],
)
def test_wrong_options_are_refused(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()
