"""The Hessian's spectrum against exact figures of other codes and closed forms, and how it is printed."""

from __future__ import annotations

import math

import pytest
import torch

from robustflat.attacks.pgd import Pgd
from robustflat.errors import UserError
from robustflat.flatness.hessian import HessianSpectrum, hessian_spectrum
from robustflat.flatness.lanczos import Lanczos
from robustflat.flatness.spectrum_result import SpectrumResult, converged_digits
from robustflat.geometry.input_ball import LinfBall
from tests.reference.models import cnn_cifar10, figures, mlp_digits
from tests.unit.flatness.networks import AlwaysDropout, Quadratic, convnet, examples, spectrum


def quadratic_spectrum(**options: object) -> SpectrumResult:
    model = Quadratic(spectrum(3.0, 1.0, 0.2, -0.6))
    x, y = torch.full((5, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    return HessianSpectrum(precision="fp64", **options)(model, x, y, batch_size=2)  # type: ignore[arg-type]


def test_digits_network_agrees_with_its_exact_spectrum() -> None:
    exact = figures()["mlp_digits_hessian"]
    result = hessian_spectrum(*mlp_digits(torch.float64), precision="fp64", trace_products=60, batch_size=120)
    assert result.converged
    assert result.top.values.tolist() == pytest.approx(exact["largest_5"], rel=1e-6)
    assert result.bottom.values.tolist() == pytest.approx(exact["smallest_5"], rel=1e-6)
    assert result.trace is not None and result.frobenius is not None
    assert abs(result.trace.value - exact["trace"]) < 4 * result.trace.standard_error
    assert abs(result.frobenius.value - exact["frobenius_norm"]) < 4 * result.frobenius.standard_error
    assert result.trace.standard_error < 0.02 * exact["trace"]


@pytest.mark.slow
def test_convolutional_network_agrees_with_arpack() -> None:
    exact = figures()["cnn_cifar10_hessian"]
    result = hessian_spectrum(*cnn_cifar10(torch.float64), top=3, bottom=0, precision="fp64", norm_layers=True)
    assert sum(s.numel() for s in result.shapes) == exact["parameters_all_trainable"]
    assert result.top.values.tolist() == pytest.approx(exact["largest_3"], rel=1e-4)


def test_single_precision_gives_the_digits_it_prints() -> None:
    exact = figures()["mlp_digits_hessian"]
    result = hessian_spectrum(*mlp_digits(), top=2, bottom=1, precision="fp32")
    values, residuals = result.top.values.tolist(), result.top.residuals.tolist()
    printed = [converged_digits(*pair) for pair in zip(values, residuals, strict=True)]
    for text, value in zip(printed, exact["largest_5"], strict=False):
        unit = 10.0 ** -len(text.partition(".")[2])
        assert abs(float(text) - value) <= unit
        assert len(text) >= 5


def test_a_quadratic_gives_its_eigenvalues_vectors_and_non_convexity() -> None:
    result = quadratic_spectrum(top=2, bottom=1)
    assert result.top.values.tolist() == pytest.approx([3.0, 1.0], rel=1e-9)
    assert result.bottom.values.tolist() == pytest.approx([-0.6], rel=1e-9)
    assert result.non_convexity == pytest.approx(0.2, rel=1e-9)
    v = result.direction(0)["weight"]
    assert torch.allclose(spectrum(3.0, 1.0, 0.2, -0.6) @ v, 3 * v, atol=1e-9)
    with pytest.raises(UserError, match="end must be one of"):
        result.direction(0, "largest")
    with pytest.raises(UserError, match="There are 1 eigenvectors at the bottom end, got index 1"):
        result.direction(1, "bottom")


def test_the_sum_over_batches_is_the_mean_times_their_number() -> None:
    summed, mean = (quadratic_spectrum(top=1, bottom=1, reduction=r) for r in ("sum_over_batches", "mean"))
    assert summed.value == pytest.approx(3 * mean.value, rel=1e-9)
    assert "sum_over_batches of 5 examples in 3 batch(es)" in str(summed)


def test_density_integrates_to_one_and_its_moments_are_traces() -> None:
    result = quadratic_spectrum(top=0, bottom=0, density_probes=8)
    assert result.density is not None
    points = torch.linspace(-3, 6, 2001)
    assert float(torch.trapezoid(result.density.at(points, 0.1), points.double())) == pytest.approx(1, abs=1e-3)
    first = result.density.moment(1)
    assert abs(first.value - 3.6 / 4) <= 4 * first.standard_error + 1e-9
    assert math.isnan(result.value) and result.to_dict()["value"] is None


def test_frozen_adversarial_examples_change_the_curvature_and_are_named() -> None:
    attack = Pgd(LinfBall(0.1), steps=3, step_size=0.05, random_start=False)
    model, (x, y) = convnet(), examples(6)
    clean = HessianSpectrum(top=1, bottom=0, precision="fp64")(model, x, y)
    frozen = HessianSpectrum(top=1, bottom=0, precision="fp64", attack=attack)(model, x, y)
    by_hand = HessianSpectrum(top=1, bottom=0, precision="fp64")(model, attack(model, x, y).x_adv, y)
    assert frozen.value == pytest.approx(by_hand.value, rel=1e-6)
    assert frozen.value != pytest.approx(clean.value, rel=1e-2)
    assert (clean.loss, frozen.loss) == ("clean", "frozen")
    assert "frozen loss" in str(frozen) and "Pgd" in str(frozen)


def test_unconverged_digits_are_not_printed() -> None:
    assert converged_digits(60.1203123456789, 0.003) == "60.12"
    assert converged_digits(60.1203123456789, 0.0) == "60.120312"
    assert converged_digits(1234.5, 3.0) == "1.23e+03"
    assert converged_digits(0.5, 0.6) == "?"
    assert converged_digits(0.0, 0.0) == "0"
    rough = HessianSpectrum(top=1, bottom=1, lanczos=Lanczos(max_products=3))(*mlp_digits())
    assert not rough.converged and "NOT converged" in str(rough) and "?" in str(rough)


def test_the_same_seed_gives_the_same_result_and_json_holds_the_settings() -> None:
    one, two = (HessianSpectrum(top=1, bottom=1, trace_products=6)(*mlp_digits()) for _ in range(2))
    assert one.to_dict() | {"seconds": 0} == two.to_dict() | {"seconds": 0}
    assert one.to_dict()["precision"] == "fp32" and len(one.to_dict()["largest"]) == 1


def test_random_networks_and_wrong_options_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 3), AlwaysDropout())
    with pytest.raises(UserError, match="stays random in eval"):
        HessianSpectrum()(model, *examples(3))
    with pytest.raises(UserError, match="precision must be one of"):
        HessianSpectrum(precision="bf16")
    with pytest.raises(UserError, match="trace_products must lie in"):
        HessianSpectrum(trace_products=3)
