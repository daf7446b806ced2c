"""Measures of curves, entropy, bounds, paths and pairs of networks against closed forms and enumeration."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.errors import UserError
from robustflat.flatness.measures.average import AdaptiveAverage, LocalEntropy, PacBayesSigma
from robustflat.flatness.measures.between import InterpolationBarrier
from robustflat.flatness.measures.catalogue import STANDARD, measures
from robustflat.flatness.measures.controls import PathNorm
from robustflat.flatness.measures.curves import AverageRise, CurveArea, InverseNoiseRadius, WorstRise
from robustflat.flatness.measures.local import HessianTrace, LargestEigenvalue, ScaledTrace
from robustflat.flatness.measures.measure import Reading, SharpnessMeasure, take
from robustflat.flatness.measures.normalized import LogitNormalized
from robustflat.flatness.measures.surface import LossSurface, NormalizedLogits
from robustflat.flatness.measures.worst import FirstOrderFlatness, PacBayesWorstCase, SamSharpness
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.models.transformations import batch_norm_folded
from robustflat.rng import generator_for
from tests.unit.flatness.networks import Quadratic, convnet, examples

DIAGONAL = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
START = torch.linspace(1, 2, 3, dtype=torch.float64)
SQUARE = float(START.square().sum())


def data(count: int = 4) -> tuple[Tensor, Tensor]:
    return torch.full((count, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)


def bowl(**options: object) -> LossSurface:
    """L(w + nu) = 1 + nu^T diag nu / 2 at w = (1, 1.5, 2)."""
    return LossSurface(Quadratic(torch.diag(DIAGONAL)), *data(), **options)  # type: ignore[arg-type]


def read(measure: SharpnessMeasure, surface: LossSurface) -> Reading:
    return take({"it": measure}, surface)["it"]


def assert_near(found: Reading, exact: float) -> None:
    assert 0 < found.standard_error < 0.2 * exact
    assert abs(found.value - exact) < 4 * found.standard_error


def test_first_order_flatness_of_a_bowl_is_rho_squared_lambda_max() -> None:
    assert read(FirstOrderFlatness(0.3, steps=40), bowl()).value == pytest.approx(0.3**2 * 4, rel=1e-3)


def test_local_entropy_of_a_bowl_is_a_gaussian_integral() -> None:
    exact = sum(math.log(1 + float(a) / 2.0) for a in DIAGONAL) / 2
    assert_near(read(LocalEntropy(2.0, draws=700), bowl()), exact)
    exact = sum(math.log(1 + 3 * float(a) / 20.0) for a in DIAGONAL) / 2 / 3
    assert_near(read(LocalEntropy(20.0, draws=700, beta=3.0), bowl()), exact)


def test_flatness_measures_of_the_paper_on_a_bowl() -> None:
    # nu uniform in the ball of radius r: E nu_i^2 = r^2 / (n + 2).
    exact = 0.3**2 * SQUARE * float(DIAGONAL.sum()) / 2 / 5
    assert_near(read(AverageRise(WeightBall(0.3), draws=600), bowl()), exact)
    worst = read(WorstRise(WeightBall(0.1), restarts=2, steps=60), bowl())
    assert worst.value == pytest.approx(0.1**2 * SQUARE * 4 / 2, rel=1e-2)


def test_noise_radius_and_area_of_a_bowl_follow_from_its_parabola() -> None:
    factor = SQUARE * float(DIAGONAL.sum()) / 2 / 5  # mean rise is factor * xi^2
    assert_near(read(InverseNoiseRadius(0.2, draws=80, bisections=12), bowl()), math.sqrt(factor / 0.2))
    area = read(CurveArea(0.1, 1.0, points=31, draws=60), bowl())
    assert_near(area, factor * (1.0 - 0.01) / 2)
    assert area.details["mean_height"] == pytest.approx(area.value / math.log(10))


def test_curvature_of_a_bowl() -> None:
    assert read(LargestEigenvalue(), bowl()).value == pytest.approx(4.0, rel=1e-6)
    trace = read(HessianTrace(9), bowl())
    assert trace.value == pytest.approx(5.25, rel=1e-6)
    assert trace.details["frobenius"] == pytest.approx(float(DIAGONAL.norm()), rel=1e-6)


class Shift(nn.Module):
    """Two classes; class 0 wins where the pixel plus the bias is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)[:, 0] + self.bias
        return torch.stack([z, torch.zeros_like(z)], dim=1)


def test_pac_bayes_worst_case_finds_the_shift_that_flips_too_many() -> None:
    x = torch.linspace(0.1, 1.0, 10, dtype=torch.float64).view(10, 1, 1, 1)
    surface = LossSurface(Shift(), x, torch.zeros(10, dtype=torch.int64))
    found = read(PacBayesWorstCase(0.2, bisections=20), surface)  # two of ten may flip: the third at 0.3
    assert found.details["alpha"] == pytest.approx(0.3, rel=1e-3)
    assert found.value == pytest.approx(1 / 0.09, rel=1e-2)
    aware = read(PacBayesWorstCase(0.2, bisections=20, magnitude_aware=True, floor=0.25), surface)
    assert aware.details["at_end"] == 1.0  # the weight is 0, so the floor alone moves it, and that is too little


def test_the_error_of_the_pac_bayes_sigma_follows_from_the_spread_of_its_draws() -> None:
    count = 2000
    x = (torch.arange(count, dtype=torch.float64) + 0.5).div(count).view(count, 1, 1, 1)
    surface = LossSurface(Shift(), x, torch.zeros(count, dtype=torch.int64), seed=1, batch_size=count)
    found = read(PacBayesSigma(0.1, draws=20), surface)
    draws = [torch.randn(1, generator=generator_for(1, "noise", i), dtype=torch.float64) for i in range(20)]
    per_sigma = torch.cat(draws).neg().clamp_min(0)  # a shift of -a gives an error of a, up to 1
    sigma = 0.1 / float(per_sigma.mean())
    assert found.details["sigma"] == pytest.approx(sigma, rel=5e-3)
    relative = float(per_sigma.std()) / math.sqrt(20) / float(per_sigma.mean())
    assert found.standard_error == pytest.approx(2 * relative / sigma**2, rel=0.05)


def test_the_barrier_on_the_way_to_another_network_is_that_of_a_parabola() -> None:
    model = Quadratic(torch.diag(torch.tensor([-0.4, 0.0, 0.0], dtype=torch.float64)))
    other = {name: t.clone() for name, t in model.state_dict().items()}
    other["weight"][0] += 1.0  # L falls by 0.2: 1 - 0.2 t^2 against 1 - 0.2 t
    found = read(InterpolationBarrier(points=11), LossSurface(model, *data(), anchors={"other": other}))
    assert found.value == pytest.approx(0.2 / 4, rel=1e-9)
    assert found.details == pytest.approx({"at": 0.5, "loss": 1.0, "other_loss": 0.8})


def test_the_barrier_interpolates_statistics_or_takes_new_ones_and_leaves_the_network() -> None:
    model, (x, y) = convnet(), examples(8)
    other = convnet(seed=1).state_dict()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    surface = LossSurface(model, x, y, anchors={"other": other})
    ends = read(InterpolationBarrier(points=3), surface).details
    assert ends["loss"] == pytest.approx(surface.value())
    assert ends["other_loss"] == pytest.approx(LossSurface(convnet(seed=1), x, y).value(), rel=1e-5)
    again = read(InterpolationBarrier(points=3, batch_norm="recalibrate"), surface).details
    assert again["loss"] != pytest.approx(ends["loss"], rel=1e-3)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(UserError, match="interpolation needs equal networks"):
        read(InterpolationBarrier(), LossSurface(model, x, y, anchors={"other": {}}))


def test_the_path_norm_is_the_sum_over_all_paths() -> None:
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    with torch.no_grad():
        for t in (*model.parameters(), model[2].running_mean, model[2].running_var):
            t.copy_(torch.rand(t.shape, generator=draws, dtype=torch.float64) + 0.1)
    scale = model[2].weight / (model[2].running_var + model[2].eps).sqrt()
    first, second = (model[1].weight * scale[:, None]).detach(), model[4].weight.detach()
    paths = itertools.product(range(4), range(3), range(2))
    exact = math.sqrt(sum(float(first[j, i] * second[k, j]) ** 2 for i, j, k in paths))
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    y = torch.tensor([0, 1, 0])
    assert read(PathNorm(), LossSurface(model, x, y)).value == pytest.approx(exact, rel=1e-9)
    folded = batch_norm_folded(model, x).model
    assert read(PathNorm(), LossSurface(folded, x, y)).value == pytest.approx(exact, rel=1e-9)
    tanh = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with pytest.raises(UserError, match="positively homogeneous"):
        read(PathNorm(), LossSurface(tanh, x, y))


def test_the_filter_scaled_trace_weighs_each_filter_by_its_squared_norm() -> None:
    model, (x, y) = convnet(dtype=torch.float64), examples(6, torch.float64)
    model[2], model[5] = nn.Tanh(), nn.Tanh()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "0.weight")
    weight = model[0].weight.detach()

    def loss(w: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {"0.weight": w}, (x,))
        return nn.functional.cross_entropy(logits, y)

    hessian = torch.autograd.functional.hessian(loss, weight).view(weight.numel(), weight.numel())
    blocks = hessian.diagonal().view(len(weight), -1).sum(dim=1)
    exact = float((weight.flatten(1).square().sum(dim=1) * blocks).sum())
    found = read(ScaledTrace(300, grouping="filter"), LossSurface(model, x, y))
    assert abs(found.value - exact) < 4 * found.standard_error


def test_logit_normalised_measures_are_those_of_the_wrapped_network() -> None:
    model, (x, y) = convnet(dtype=torch.float64), examples(6, torch.float64)
    for measure in (SamSharpness(0.05), AdaptiveAverage(0.1, 3)):
        wrapped = read(measure, LossSurface(NormalizedLogits(model), x, y))
        found = read(LogitNormalized(measure), LossSurface(model, x, y))
        assert found.value == pytest.approx(wrapped.value, rel=1e-12)
        assert found.passes == wrapped.passes and "ICML 2023" in found.source


@pytest.mark.parametrize("measure", [LogitNormalized(AdaptiveAverage(1e-9, 2)), SamSharpness(1e-9, m=4)])
def test_a_rise_of_the_attacked_loss_is_one_above_the_same_attack_at_the_weights_themselves(
    measure: SharpnessMeasure,
) -> None:
    model, (x, y) = convnet(dtype=torch.float64), examples(12, torch.float64)
    attack = Pgd(LinfBall(0.1), steps=2, step_size=0.03)  # random starts, and not yet at the strongest images
    surface = LossSurface(model, x, y, loss="robust", attack=attack, batch_size=5)
    assert read(measure, surface).value == pytest.approx(0, abs=1e-7)  # the displacement is next to nothing


def test_a_measure_that_needs_another_network_is_not_taken_on_normalised_logits() -> None:
    with pytest.raises(UserError, match="InterpolationBarrier compares with another network"):
        LogitNormalized(InterpolationBarrier())


def test_the_error_over_examples_is_that_of_their_mean_rises() -> None:
    model, (x, y) = convnet(dtype=torch.float64), examples(30, torch.float64)
    surface = LossSurface(model, x, y)
    found = read(AdaptiveAverage(0.2, 4), surface)
    parts = [read(AdaptiveAverage(0.2, 4), LossSurface(model, x[i : i + 1], y[i : i + 1])).value for i in range(30)]
    values = torch.tensor(parts, dtype=torch.float64)
    assert found.example_error == pytest.approx(float(values.std()) / math.sqrt(30), rel=1e-9)
    assert found.value == pytest.approx(float(values.mean()), rel=1e-9)


def test_the_error_of_a_search_is_the_deviation_of_what_its_starts_found() -> None:
    model, (x, y) = convnet(dtype=torch.float64), examples(6, torch.float64)
    surface = LossSurface(model, x, y, seed=3)
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator_for(3, "worst")))
    singles = WorstFlatness(WeightBall(0.1), restarts=4, steps=3, loss="clean", seed=seed)(model, x, y).trials
    found = read(WorstRise(WeightBall(0.1), restarts=4, steps=3), surface)
    assert found.value == pytest.approx(float(singles.max()), rel=1e-12)
    assert found.standard_error == pytest.approx(float(singles.std()), rel=1e-9)


def test_worst_case_flatness_moves_images_and_weights_on_the_attacked_loss() -> None:
    model, (x, y) = convnet(), examples(6)
    attack = Pgd(LinfBall(0.1), steps=3, step_size=0.05, random_start=False)
    surface = LossSurface(model, x, y, loss="robust", attack=attack)
    frozen = LossSurface(model, x, y, loss="frozen", attack=attack)
    joint, still = (read(WorstRise(WeightBall(0.05), restarts=1, steps=8), s) for s in (surface, frozen))
    assert joint.value > still.value > 0
    assert read(AverageRise(draws=2), surface).details["reference_loss"] == pytest.approx(frozen.value(), rel=1e-5)


def test_every_standard_measure_states_its_source_and_is_taken_in_one_call() -> None:
    assert all(measure.source for measure in STANDARD.values())
    model, (x, y) = convnet(), examples(6)
    found = measures(model, x, y, only=["sam", "gradient_norm", "weight_norm"])
    assert list(found) == ["sam", "gradient_norm", "weight_norm"]
    assert "Foret et al., ICLR 2021" in str(found) and "5 passes" in str(found)
    with pytest.raises(UserError, match="Did you mean"):
        measures(model, x, y, only=["samm"])
    assert measures(model, x, y, only="sam")["sam"].value == found["sam"].value
    with pytest.raises(UserError, match="defined on the clean, frozen loss"):
        robust = Pgd(LinfBall(0.1), steps=1, step_size=0.05)
        measures(model, x, y, only=["lambda_max"], loss="robust", attack=robust)
    with pytest.raises(UserError, match="needs anchors\\['other'\\]"):
        measures(model, x, y, only=["interpolation_barrier"])


def test_measuring_leaves_the_network_as_it_was() -> None:
    model, (x, y) = convnet(), examples(4)
    model[0].train()  # a convolution: its mode changes nothing, and must come back
    before = copy.deepcopy(model.state_dict())
    surface = LossSurface(model, x, y, anchors={"other": convnet(1).state_dict()})
    small = [
        FirstOrderFlatness(steps=2),
        LocalEntropy(draws=2),
        WorstRise(restarts=1, steps=2),
        InverseNoiseRadius(draws=2, bisections=2),
        CurveArea(points=2, draws=2),
        PacBayesWorstCase(steps=2, bisections=2),
        InterpolationBarrier(points=3),
        PathNorm(),
        LargestEigenvalue(),
        LogitNormalized(SamSharpness()),
    ]
    take({str(index): measure for index, measure in enumerate(small)}, surface)
    assert model[0].training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
