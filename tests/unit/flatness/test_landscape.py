"""Landscapes of a quadratic loss against its formula, and every normalisation against a slow definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.errors import DataError, UserError
from robustflat.flatness.directions import (
    ascent_direction,
    loss_and_gradient,
    normalisation_names,
    normalised,
    random_direction,
)
from robustflat.flatness.landscape import Landscape
from robustflat.flatness.landscape_result import LandscapeResult
from robustflat.flatness.measures.surface import LossSurface
from robustflat.flatness.subject import subject
from robustflat.geometry.input_ball import LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.models.modes import displaced, perturbable
from robustflat.rng import generator_for
from robustflat.types import Batch
from tests.unit.flatness.networks import Quadratic, convnet, examples, spectrum

MATRIX = spectrum(3.0, 1.0, 0.2, -0.5)


def one_image(value: float = 0.5) -> tuple[Tensor, Tensor]:
    return torch.full((2, 1, 2, 2), value, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)


def test_lines_of_a_quadratic_are_parabolas_with_the_curvature_along_the_direction() -> None:
    directions = [{"weight": row} for row in torch.eye(4, dtype=torch.float64)[:2]]
    options = {"loss": "clean", "normalisation": "global", "length": 0.6, "points": 7}
    result = Landscape(**options)(Quadratic(MATRIX), *one_image(), directions=directions)
    for row, index in zip(result.losses, range(2), strict=True):
        assert torch.allclose(row, 1 + result.steps.square() * MATRIX[index, index] / 2, atol=1e-12)
    assert result.steps.tolist() == pytest.approx([-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6])
    assert result.factors.tolist() == pytest.approx([1, 1])
    assert torch.allclose(result.mean, result.losses.mean(0)) and torch.allclose(result.max, result.losses.amax(0))
    assert torch.allclose(result.spread, (result.losses[0] - result.losses[1]).abs() / math.sqrt(2))


def test_a_plane_of_a_quadratic_is_its_form_in_both_steps() -> None:
    e = torch.eye(4, dtype=torch.float64)
    landscape = Landscape(loss="clean", normalisation="global", length=0.3, points=3)
    result = landscape.plane(Quadratic(MATRIX), *one_image(), directions=({"weight": e[0]}, {"weight": e[2]}))
    for i, a in enumerate(result.steps):
        for j, b in enumerate(result.steps):
            nu = a * e[0] + b * e[2]
            assert float(result.losses[i, j]) == pytest.approx(float(1 + nu @ MATRIX @ nu / 2), rel=1e-10)


def test_the_robust_loss_is_attacked_again_at_every_point_and_frozen_is_not() -> None:
    model, (x, y) = convnet(), examples(6)
    attack = Pgd(LinfBall(0.1), steps=3, step_size=0.05, random_start=False)
    curves = {
        loss: Landscape(loss=loss, attack=None if loss == "clean" else attack, points=3, trials=1)(model, x, y)
        for loss in ("robust", "clean", "frozen")
    }
    assert float(curves["robust"].losses[0, 1]) == pytest.approx(float(curves["frozen"].losses[0, 1]), rel=1e-6)
    assert bool((curves["robust"].losses > curves["clean"].losses).all())
    nu = normalised(
        random_direction(perturbable(model), generator_for(0, "direction", 0)), perturbable(model), "layer", 0.5
    )
    with displaced(model, nu):
        by_hand = torch.nn.functional.cross_entropy(model(attack(model, x, y).x_adv), y)
    assert float(curves["robust"].losses[0, 2]) == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_robust_loss_of_a_tilted_quadratic_adds_slope_times_epsilon() -> None:
    attack = Pgd(LinfBall(0.1), steps=5, step_size=0.05, random_start=False)
    model = Quadratic(MATRIX, slope=0.2)
    result = Landscape(attack=attack, normalisation="global", points=3, trials=2)(model, *one_image())
    clean = Landscape(loss="clean", normalisation="global", points=3, trials=2)(model, *one_image())
    assert torch.allclose(result.losses, clean.losses + 4 * 0.1 * 0.2, atol=1e-9)


@pytest.mark.parametrize("normalisation", normalisation_names())
def test_every_normalisation_gives_the_norm_it_promises(normalisation: str) -> None:
    weights = perturbable(convnet())
    direction = random_direction(weights, torch.Generator().manual_seed(0))
    scaled = normalised(direction, weights, normalisation, 0.25)

    def flat(w: dict[str, Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in w.values()])

    for name, d in scaled.items():
        assert torch.nn.functional.cosine_similarity(d.flatten(), direction[name].flatten(), dim=0) > 0.3
        if normalisation == "layer":
            assert float(d.norm()) == pytest.approx(0.25 * float(weights[name].norm()), rel=1e-5)
        if normalisation == "layer_max_abs":
            expected = direction[name] * 0.25 * weights[name].abs().max() / direction[name].abs().max()
            assert torch.allclose(d, expected)
        if normalisation.startswith("filter") and d.ndim == 4:
            for ours, theirs in zip(d, weights[name], strict=True):
                order = 2 if normalisation == "filter" else math.inf
                assert float(ours.flatten().norm(order)) == pytest.approx(
                    0.25 * float(theirs.flatten().norm(order)), rel=1e-5
                )
    if normalisation == "relative":
        assert float(flat(scaled).norm()) == pytest.approx(0.25 * float(flat(weights).norm()), rel=1e-5)
    if normalisation == "global":
        assert float(flat(scaled).norm()) == pytest.approx(0.25, rel=1e-5)
    if normalisation == "none":
        assert torch.equal(flat(scaled), 0.25 * flat(direction))


def test_a_zero_tensor_stays_zero() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2)}
    scaled = normalised({"a": torch.ones(3), "b": torch.zeros(2)}, weights, "layer", 1.0)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in scaled.values())


def test_random_directions_are_shared_by_networks_of_one_layout() -> None:
    one, two = (random_direction(perturbable(convnet(s)), torch.Generator().manual_seed(3)) for s in (0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_the_path_to_another_network_ends_there_with_its_statistics() -> None:
    one, two, (x, y) = convnet(0), convnet(1), examples(6)
    before = {n: t.clone() for n, t in one.state_dict().items()}
    result = Landscape(loss="clean", points=5).path(one, two.state_dict(), x, y)
    for index, model in ((0, one), (-1, two)):
        expected = torch.nn.functional.cross_entropy(model(x), y)
        assert float(result.losses[0, index]) == pytest.approx(expected.item(), rel=1e-6)
    chord = torch.linspace(float(result.losses[0, 0]), float(result.losses[0, -1]), 5).double()
    assert result.barrier == pytest.approx(float((result.losses[0] - chord).max()), abs=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in one.state_dict().items())
    plain = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(UserError, match="needs batch-norm layers"):
        Landscape(loss="clean", points=3).path(plain, plain.state_dict(), x, y, batch_norm="recalibrate")
    again = Landscape(loss="clean", points=5).path(one, two.state_dict(), x, y, batch_norm="recalibrate")
    assert not torch.equal(again.losses, result.losses)
    assert all(torch.equal(t, before[n]) for n, t in one.state_dict().items())


def test_a_weight_with_two_names_goes_along_the_path_once() -> None:
    class Shared(nn.Module):
        """p(class 0) is sigmoid(w^2 * pixel), w standing for both factors."""

        def __init__(self, w: float) -> None:
            super().__init__()
            self.one = self.two = nn.Parameter(torch.tensor([w], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            z = self.one * self.two * x[:, 0, 0, 0]
            return torch.stack([z, torch.zeros_like(z)], dim=1)

    first = Shared(1.0)
    result = Landscape(loss="clean", points=5).path(first, Shared(3.0).state_dict(), *one_image())
    w = torch.linspace(1, 3, 5, dtype=torch.float64)
    assert torch.allclose(result.losses[0], torch.log1p(torch.exp(-0.5 * w.square())), atol=1e-12)
    assert first.one.item() == 1.0


def test_a_path_between_different_architectures_names_both_shapes() -> None:
    other = torch.nn.Sequential(torch.nn.Conv2d(2, 6, 3)).state_dict()
    with pytest.raises(UserError, match=r"0.weight \(4, 2, 3, 3\) here, \(6, 2, 3, 3\) there") as found:
        Landscape(loss="clean", points=3).path(convnet(), other, *examples(2))
    assert "1.weight (4,) is missing there" in str(found.value)


def test_an_example_whose_logits_overflow_is_wrong_whatever_its_label() -> None:
    model, (x, _) = convnet(), examples(3)
    for label in range(3):
        y = torch.full((3,), label)
        line = Landscape(loss="clean", points=3, length=1e30, normalisation="none")(
            model, x, y, directions=[{name: w * 1e8 for name, w in perturbable(model).items()}]
        )
        assert line.not_finite == 2 and line.errors[0, [0, 2]].tolist() == [1.0, 1.0]
        far = {name: torch.full_like(w, torch.inf) for name, w in perturbable(model).items()}
        assert LossSurface(model, x, y).error(far) == 1.0


def test_networks_with_values_that_are_not_numbers_are_refused() -> None:
    sick = convnet(1)
    with torch.no_grad():
        sick[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"0\.weight has 1 of"):
        Landscape(loss="clean", points=3)(sick, *examples(2))
    with pytest.raises(UserError, match="at the end of the path has values that are NaN"):
        Landscape(loss="clean", points=3).path(convnet(), sick.state_dict(), *examples(2))


@pytest.mark.parametrize("kind", ["lines", "plane", "path"])
def test_a_grid_that_was_stopped_goes_on_without_measuring_a_point_twice(kind: str, monkeypatch) -> None:
    x, y = examples(4)
    attack = Pgd(LinfBall(0.1), steps=2, step_size=0.05)

    def measure(done: dict) -> LandscapeResult:
        landscape = Landscape(attack=attack, points=5, trials=2)
        if kind == "path":
            return landscape.path(convnet(0), convnet(1).state_dict(), x, y, done=done)
        return (landscape.plane if kind == "plane" else landscape)(convnet(0), x, y, done=done)

    class Killed(dict):
        def __setitem__(self, place, values) -> None:
            if len(self) == 3:
                raise KeyboardInterrupt
            assert place not in self
            super().__setitem__(place, values)

    whole, cut = {}, Killed()
    expected = measure(whole)
    with pytest.raises(KeyboardInterrupt):
        measure(cut)
    calls = []
    count = Landscape._logits
    monkeypatch.setattr(Landscape, "_logits", lambda self, *a: (calls.append(1), count(self, *a))[1])
    resumed = measure(dict(cut))
    assert torch.equal(resumed.losses, expected.losses) and torch.equal(resumed.errors, expected.errors)
    assert len(calls) == len(whole) - 3
    assert len(whole) == {"lines": 2 * 4 + 1, "plane": 25, "path": 5}[kind]


def test_a_rewritten_copy_for_the_search_gives_the_same_curve() -> None:
    x, y = examples(6)
    attack = Pgd(LinfBall(0.1), steps=3, step_size=0.05)
    plain, fast = (Landscape(attack=attack, points=3, trials=2, search=s)(convnet(), x, y) for s in ("plain", "fp32"))
    assert torch.allclose(plain.losses, fast.losses, rtol=1e-3)


def test_three_lines_show_any_network(tmp_path) -> None:
    lines = Landscape(loss="frozen", trials=2, points=3)(convnet(), *examples(4))
    files = lines.picture(tmp_path / "landscape.png", "mine", data="toy test")
    assert [f.suffix for f in files] == [".png", ".svg", ".html"] and all(f.stat().st_size for f in files)
    caption = lines.caption("toy test")
    for part in ("toy test (4 examples)", "PGD-10, linf epsilon 0.03137", "attacked once, at s = 0, and frozen",
                 "2 random directions", "length 0.5 (layer normalisation)", "3 steps", "seed 0"):  # fmt: skip
        assert part in caption
    assert lines.loss_label == "frozen adversarial cross-entropy (nats)" and "%" in lines.error_label
    assert torch.allclose(lines.standard_error, lines.spread / math.sqrt(2))
    assert torch.equal(lines.curve, lines.mean)


def test_the_gradient_is_that_of_the_mean_loss_and_leaves_no_trace() -> None:
    model, (x, y) = convnet(dtype=torch.float64), examples(5, torch.float64)
    names = list(perturbable(model))
    value, slope = loss_and_gradient(model, [Batch(x[:2], y[:2]), Batch(x[2:], y[2:])], names)
    loss = torch.nn.functional.cross_entropy(model(x), y)
    exact = torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names])
    assert value == pytest.approx(loss.item())
    assert all(torch.allclose(slope[n], g, atol=1e-12) for n, g in zip(names, exact, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_ascent_direction_finds_the_steepest_eigenvector() -> None:
    model, (x, y) = Quadratic(spectrum(3.0, 0.4, 0.2, 0.1)), one_image()
    found = subject(model, [Batch(x, y)], norm_layers=False, biases=True)
    ball = WeightBall(0.3, grouping="global", relative=False)
    draws = torch.Generator().manual_seed(0)
    nu = ascent_direction(found, found.batches, ball=ball, steps=30, step=0.1, generator=draws)
    with displaced(model, nu):
        value, _ = loss_and_gradient(model, found.batches, ["weight"])
    assert value == pytest.approx(1 + 3 * 0.3**2 / 2, rel=1e-4)


def test_a_landscape_comes_back_from_its_file(tmp_path) -> None:
    result = Landscape(loss="clean", points=3, trials=2)(convnet(), *examples(3))
    again = LandscapeResult.load(result.save(tmp_path / "deep" / "lines.npz"))
    assert torch.equal(again.losses, result.losses) and again.settings == result.settings and again.kind == "lines"
    assert "loss clean" in str(again)
    whole, broken = (tmp_path / "deep" / "lines.npz").read_bytes(), tmp_path / "broken.npz"
    at = whole.index(b"losses.npy") + 60  # within the compressed array
    flipped = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
    for content in (b"nothing", b"", whole[:50], whole[:-30], flipped):
        broken.write_bytes(content)
        with pytest.raises(DataError, match="is not a stored landscape"):
            LandscapeResult.load(broken)
    with broken.open("wb") as file:
        np.save(file, result.losses.numpy())  # one array, not several
    with pytest.raises(DataError, match="is not a stored landscape"):
        LandscapeResult.load(broken)
    with pytest.raises(UserError, match="is stored as"):
        result.save(tmp_path / "lines.h5")


def test_wrong_options_and_directions_are_refused() -> None:
    with pytest.raises(UserError, match="normalisation must be one of"):
        Landscape(normalisation="layer_l2")
    with pytest.raises(UserError, match="uses no attack"):
        Landscape(loss="clean", attack=Pgd(LinfBall(0.1), steps=1, step_size=0.1))
    with pytest.raises(UserError, match="directions is empty"):
        Landscape(loss="clean")(convnet(), *examples(2), directions=[])
    with pytest.raises(UserError, match="A plane has two directions, got 1"):
        Landscape(loss="clean", points=3).plane(convnet(), *examples(2), directions=({},))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="names and shapes of the weights"):
        Landscape(loss="clean")(convnet(), *examples(2), directions=[{"0.weight": torch.zeros(1)}])
    with pytest.raises(UserError, match="points must be odd"):
        Landscape(loss="clean", points=50)(convnet(), *examples(2))
    with pytest.raises(UserError, match="got 2: write 3"):
        Landscape(loss="clean", points=2).plane(convnet(), *examples(2))
    with pytest.raises(UserError, match="points must lie in"):
        Landscape(points=1)
    with pytest.raises(UserError, match="reduction must be one of"):
        Landscape(reduction="median")
    with pytest.raises(UserError, match="search must be one of"):
        Landscape(search="fp16")
    plane = Landscape(loss="clean", points=3).plane(convnet(), *examples(2))
    with pytest.raises(UserError, match="no mean over lines"):
        _ = plane.mean
    with pytest.raises(UserError, match="Only a path"):
        _ = plane.barrier
