"""Every sharpness measure against a closed form, brute force, or a slow definition written here."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.errors import UserError
from robustflat.flatness.directions import random_direction
from robustflat.flatness.measures.average import AdaptiveAverage, LowPassFilter, PacBayesSigma
from robustflat.flatness.measures.between import DistanceFromStart
from robustflat.flatness.measures.controls import InverseMargin, SpectralNorms, WeightNorm
from robustflat.flatness.measures.local import FisherRao, GradientNorm, RelativeFlatness, ScaledTrace
from robustflat.flatness.measures.measure import Reading, SharpnessMeasure, take
from robustflat.flatness.measures.surface import LossSurface, NormalizedLogits
from robustflat.flatness.measures.worst import AdaptiveSharpness, KeskarSharpness, SamSharpness
from robustflat.geometry.input_ball import LinfBall
from robustflat.models.rescale import rescaled
from robustflat.rng import generator_for
from tests.unit.flatness.networks import Quadratic, convnet, examples, spectrum

DIAGONAL = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
START = torch.linspace(1, 2, 3, dtype=torch.float64)


def bowl(diagonal: Tensor = DIAGONAL) -> LossSurface:
    """L(w + nu) = 1 + nu^T diag nu / 2 at w = (1, 1.5, 2)."""
    x, y = torch.full((4, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    return LossSurface(Quadratic(torch.diag(diagonal)), x, y)


def linear(rows: int = 6) -> tuple[nn.Sequential, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws, dtype=torch.float64))
    x = torch.rand(rows, 1, 2, 2, generator=draws, dtype=torch.float64)
    return model, x, torch.arange(rows) % 3


def reading(measure: SharpnessMeasure, surface: LossSurface) -> float:
    return take({"it": measure}, surface)["it"].value


def test_keskar_sharpness_of_a_bowl_is_at_the_corner_of_its_box() -> None:
    corner = 0.05 * (START + 1)
    rise = float((DIAGONAL * corner.square()).sum() / 2)
    assert reading(KeskarSharpness(0.05, steps=30), bowl()) == pytest.approx(100 * rise / 2, rel=1e-6)


def test_adaptive_worst_case_sharpness_of_a_bowl_for_both_norms() -> None:
    corner = 0.1 * START
    exact = float((DIAGONAL * corner.square()).sum() / 2)
    assert reading(AdaptiveSharpness(0.1, steps=30), bowl()) == pytest.approx(exact, rel=1e-6)
    exact = 0.1**2 * float((DIAGONAL * START.square()).max()) / 2  # largest eigenvalue in units of w
    assert reading(AdaptiveSharpness(0.1, norm=2, steps=60), bowl()) == pytest.approx(exact, rel=1e-4)


def test_sam_sharpness_of_a_bowl_is_half_rho_squared_lambda_max() -> None:
    assert reading(SamSharpness(0.3, steps=60), bowl()) == pytest.approx(0.3**2 * 4 / 2, rel=1e-4)


def test_first_order_sam_sharpness_is_the_loss_one_step_up_the_gradient() -> None:
    model, x, y = linear()
    loss = F.cross_entropy(model(x), y)
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    length = torch.cat([g.flatten() for g in slopes]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, g in zip(moved.parameters(), slopes, strict=True):
            p.add_(0.1 * g / length)
    exact = (F.cross_entropy(moved(x), y) - loss).item()
    assert reading(SamSharpness(0.1), LossSurface(model, x, y)) == pytest.approx(exact, rel=1e-9)


def test_m_sharpness_is_the_mean_over_groups_each_with_its_own_maximum() -> None:
    model, x, y = linear(6)
    whole = take({"m": SamSharpness(0.1, m=4)}, LossSurface(model, x, y))["m"]
    parts = [reading(SamSharpness(0.1), LossSurface(model, x[s], y[s])) for s in (slice(0, 4), slice(4, 6))]
    assert whole.value == pytest.approx((4 * parts[0] + 2 * parts[1]) / 6, rel=1e-9)
    assert whole.details["groups"] == 2
    assert whole.standard_error == pytest.approx(abs(parts[0] - parts[1]) / 2)  # deviation over the root of two


def test_an_ascent_on_a_three_parameter_network_beats_brute_force() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 0.7], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = self.weight
            z = torch.tanh(a * x.flatten(1).sum(dim=1) + b) * c * 3
            return torch.stack([z, -z], dim=1)

    model = Three()
    x = torch.linspace(0, 1, 12, dtype=torch.float64).view(6, 1, 1, 2)
    surface = LossSurface(model, x, torch.tensor([0, 1, 0, 1, 1, 0]))
    grid = (
        torch.cartesian_prod(*[torch.linspace(-1, 1, 9, dtype=torch.float64)] * 3) * 0.3 * model.weight.detach().abs()
    )
    brute = max(surface.value({"weight": nu}) for nu in grid) - surface.value()
    assert reading(AdaptiveSharpness(0.3, steps=30), surface) >= brute - 1e-9


def test_adaptive_average_and_low_pass_filter_of_a_bowl_are_traces() -> None:
    found = take({"a": AdaptiveAverage(0.05, 400), "l": LowPassFilter(0.05, 400)}, bowl())
    exact = {"a": 0.05**2 * float((DIAGONAL * START.square()).sum()) / 2, "l": 1 + 0.05**2 * float(DIAGONAL.sum()) / 2}
    for name, value in exact.items():
        assert abs(found[name].value - value) < 4 * found[name].standard_error
    assert found["l"].details["rise"] == pytest.approx(found["l"].value - 1)
    assert found["a"].passes == 401


@pytest.mark.parametrize("aware", [False, True])
def test_the_pac_bayes_sigma_is_where_the_error_under_noise_crosses(aware: bool) -> None:
    model, x, _ = linear(40)
    y = model(x).argmax(dim=1)
    surface = LossSurface(model, x, y, seed=2)
    measure = PacBayesSigma(0.2, draws=5, magnitude_aware=aware)
    found = take({"s": measure}, surface)["s"]
    assert found.value == pytest.approx(1 / found.details["sigma"] ** 2)
    assert found.details["at_end"] == 0.0

    def error(sigma: float) -> float:  # sigma is the standard deviation of the noise
        wrong = []
        for number in range(5):
            drawn = random_direction(surface.weights, generator_for(2, "noise", number))
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    spread = torch.sqrt(sigma**2 * p**2 + 1e-6) if aware else sigma
                    p.add_(spread * drawn[name])
            wrong.append((moved(x).argmax(dim=1) != y).double().mean().item())
        return sum(wrong) / 5

    assert error(found.details["sigma"]) <= 0.2 < error(found.details["sigma_above"])


def test_gradient_norm_is_that_of_autograd() -> None:
    model, x, y = linear()
    slopes = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    exact = torch.cat([g.flatten() for g in slopes]).norm().item()
    assert reading(GradientNorm(), LossSurface(model, x, y)) == pytest.approx(exact, rel=1e-9)


def test_the_gradient_is_taken_in_full_precision_whatever_the_callers_autocast() -> None:
    model, (x, y) = convnet(), examples(6)
    plain = reading(GradientNorm(), LossSurface(model, x, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reading(GradientNorm(), LossSurface(model, x, y)) == plain


@pytest.mark.parametrize("labels", ["model", "true"])
def test_fisher_rao_norm_of_a_homogeneous_network_is_its_closed_form(labels: str) -> None:
    model, x, y = linear()
    with torch.no_grad():
        model[1].bias.zero_()
    z = model(x).detach()
    p = z.softmax(dim=1)
    # <w, d loss / d w> = <z, p - one-hot> for logits linear in w (depth 1).
    inner = torch.stack([(z * (p - F.one_hot(torch.full_like(y, k), 3))).sum(dim=1) for k in range(3)], dim=1)
    exact = (p * inner.square()).sum(1).mean() if labels == "model" else inner.gather(1, y[:, None]).square().mean()
    assert reading(FisherRao(labels), LossSurface(model, x, y)) == pytest.approx(float(exact), rel=1e-9)


def hessian_of_linear(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """Second derivatives (out, in, out, in) by the weight matrix."""
    bias = model[1].bias.detach()
    start = model[1].weight.detach()
    return torch.autograd.functional.hessian(lambda w: F.cross_entropy(x.flatten(1) @ w.T + bias, y), start)


def test_relative_flatness_is_the_sum_over_pairs_of_rows() -> None:
    model, x, y = linear()
    hessian, w = hessian_of_linear(model, x, y), model[1].weight.detach()
    exact = sum(float(w[s] @ w[t]) * float(torch.trace(hessian[s, :, t, :])) for s in range(3) for t in range(3))
    found = take({"r": RelativeFlatness(draws=600)}, LossSurface(model, x, y))["r"]
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.2 * abs(exact)


def test_the_scaled_trace_weighs_each_layer_by_its_squared_norm() -> None:
    matrix = spectrum(3.0, 1.0, 0.5)
    found = take({"s": ScaledTrace(300)}, LossSurface(Quadratic(matrix), *quadratic_data()))["s"]
    exact = float(START.square().sum() * matrix.trace())
    assert abs(found.value - exact) < 4 * found.standard_error + 1e-9


def quadratic_data() -> tuple[Tensor, Tensor]:
    return torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)


def test_controls_are_what_they_are_called() -> None:
    model, x, y = linear()
    surface = LossSurface(model, x, y)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert reading(WeightNorm(), surface) == pytest.approx(float(flat.norm()))
    zeros = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
    anchored = LossSurface(model, x, y, anchors={"start": zeros})
    assert reading(DistanceFromStart(), anchored) == pytest.approx(float(flat.norm()))
    exact = math.log(float(torch.linalg.svdvals(model[1].weight.detach())[0]))
    assert reading(SpectralNorms(), surface) == pytest.approx(exact)
    z = model(x).detach()
    margins = [float(row[k] - torch.cat([row[:k], row[k + 1 :]]).max()) for row, k in zip(z, y.tolist(), strict=True)]
    found = take({"m": InverseMargin(0.0)}, surface)["m"]
    assert found.details["margin"] == pytest.approx(min(margins))
    assert found.value == math.inf  # the smallest margin is negative: these labels are wrong
    plain = json.loads(json.dumps(Reading(math.inf, details={"a": math.nan, "b": 2.0}).to_dict(), allow_nan=False))
    assert (plain["value"], plain["details"]) == (None, {"a": None, "b": 2.0})


def test_robust_frozen_and_clean_loss_differ_as_they_must() -> None:
    model, (x, y) = convnet(), examples(6)
    attack = Pgd(LinfBall(0.1), steps=3, step_size=0.05, random_start=False)
    surfaces = {
        loss: LossSurface(model, x, y, loss=loss, attack=None if loss == "clean" else attack)
        for loss in ("clean", "frozen", "robust")
    }
    values = {loss: s.value() for loss, s in surfaces.items()}
    assert values["frozen"] == pytest.approx(values["robust"]) and values["frozen"] > values["clean"]
    nu = {
        n: 0.3 * w.norm() * e / e.norm()
        for (n, w), e in zip(surfaces["clean"].weights.items(), noise(surfaces), strict=True)
    }
    assert surfaces["robust"].value(nu) != pytest.approx(surfaces["frozen"].value(nu), rel=1e-4)
    assert "frozen loss, attack Pgd" in str(take({"g": GradientNorm()}, surfaces["frozen"])["g"])


def noise(surfaces: dict[str, LossSurface]) -> list[Tensor]:
    return list(random_direction(surfaces["clean"].weights, torch.Generator().manual_seed(0)).values())


def test_the_inverse_margin_is_that_of_a_low_quantile() -> None:
    model, x, _ = linear(7)
    z = model(x).detach().numpy()
    margins = [row.max() - sorted(row)[-2] for row in z]
    found = take({"m": InverseMargin(0.3)}, LossSurface(model, x, torch.from_numpy(z.argmax(axis=1))))["m"]
    low = float(np.quantile(margins, 0.3))
    assert found.value == pytest.approx(1 / low**2)
    assert found.details == pytest.approx({"margin": low, "mean": float(np.mean(margins))})


class _Hot(nn.Module):
    """Logits times 3."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.network(x)


# Which measures stay when weights before batch norm are scaled by 1/2 (methods: norm-relative ones only).
SCALE = [
    (AdaptiveSharpness(0.01, steps=5), True),
    (AdaptiveAverage(0.1, 3), True),
    (FisherRao(), True),
    (ScaledTrace(3), True),
    (RelativeFlatness(draws=3), True),
    (InverseMargin(0.5), True),
    (SamSharpness(0.05), False),
    (LowPassFilter(0.05, 3), False),
    (GradientNorm(), False),
    (WeightNorm(), False),
    (SpectralNorms(), False),
]


@pytest.mark.parametrize(("measure", "invariant"), SCALE, ids=lambda v: type(v).__name__)
def test_scaling_before_batch_norm_moves_exactly_the_measures_it_should(
    measure: SharpnessMeasure, invariant: bool
) -> None:
    model, (x, y) = convnet(dtype=torch.float64), examples(6, torch.float64)
    scaled = rescaled(model, 0.5, x).model
    one, two = (reading(measure, LossSurface(m, x, y)) for m in (model, scaled))
    if invariant:
        assert two == pytest.approx(one, rel=1e-6)
    else:
        assert two != pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("measure", [AdaptiveAverage(0.1, 2), SamSharpness(0.05), GradientNorm()])
def test_normalised_logits_take_away_the_temperature(measure: SharpnessMeasure) -> None:
    model, (x, y) = convnet(dtype=torch.float64), examples(6, torch.float64)
    plain = [reading(measure, LossSurface(m, x, y)) for m in (model, _Hot(model))]
    normal = [reading(measure, LossSurface(NormalizedLogits(m), x, y)) for m in (model, _Hot(model))]
    assert plain[1] != pytest.approx(plain[0], rel=1e-2)
    assert normal[1] == pytest.approx(normal[0], rel=1e-8)


def test_measuring_leaves_the_network_as_it_was() -> None:
    model, (x, y) = convnet(), examples(4)
    model[0].train()  # a convolution: its mode changes nothing, and must come back
    before = {n: t.clone() for n, t in model.state_dict().items()}
    take({str(i): m for i, (m, _) in enumerate(SCALE)}, LossSurface(model, x, y))
    assert model[0].training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_wrong_options_are_refused() -> None:
    model, x, y = linear()
    with pytest.raises(UserError, match="loss='robust' needs an attack"):
        LossSurface(model, x, y, loss="robust")
    with pytest.raises(UserError, match="norm must be 2 or infinity"):
        AdaptiveSharpness(norm=1)
    with pytest.raises(UserError, match="is no weight with two dimensions"):
        RelativeFlatness("1.bias")(LossSurface(model, x, y))
    with pytest.raises(UserError, match="labels must be one of"):
        FisherRao("drawn")
    with pytest.raises(UserError, match="high must lie in"):
        PacBayesSigma(low=1.0, high=0.5)
