"""Convolutions and ReLUs for second derivatives: against finite differences, forward mode, and counts of arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from robustflat.flatness.curvature_products import CurvatureProducts
from robustflat.models.double_backward import DoubleBackward
from robustflat.models.modes import perturbable
from robustflat.models.resnet import resnet18
from robustflat.types import Batch


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"stride": 2, "padding": (1, 0)},
        {"stride": (1, 2), "dilation": 2, "padding": [2]},
        {"groups": 2, "padding": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives_are_those_of_finite_differences(options: dict[str, object], bias: bool) -> None:
    x, w = drawn(2, 4, 5, 5), drawn(4, 4 // int(str(options.get("groups", 1))), 3, 3, seed=1)

    def function(*inputs: Tensor) -> Tensor:
        with DoubleBackward():
            return F.conv2d(*inputs, **options)  # type: ignore[arg-type]

    assert gradgradcheck(function, (x, w, drawn(4, seed=2)) if bias else (x, w))


@pytest.mark.parametrize("function", [F.relu, torch.relu, Tensor.relu, nn.ReLU(), lambda x: F.relu(input=x)])
def test_a_relu_is_linear_on_both_sides(function: Callable[[Tensor], Tensor]) -> None:
    x, v = drawn(3, 4), drawn(3, 4, seed=1)
    with DoubleBackward():
        output = function(x)
    assert torch.equal(output, x.clamp_min(0))
    (slope,) = grad(output, x, v, create_graph=True)
    assert torch.equal(slope, v * (x > 0))
    (again,) = grad(slope, v, torch.ones_like(v))
    assert torch.equal(again, (x > 0).to(v))


@pytest.mark.parametrize("case", ["in place", "padding in words", "no batch"])
def test_what_is_not_replaced_works_as_ever(case: str) -> None:
    x, w = drawn(1, 2, 4, 4), drawn(3, 2, 3, 3, seed=1)

    def function() -> Tensor:
        if case == "in place":
            return F.relu(F.conv2d(x, w), inplace=True)
        return F.conv2d(x, w, padding="same") if case == "padding in words" else F.conv2d(x[0], w)

    plain = function()
    with DoubleBackward():
        ours = function()
    slopes = [grad(out.square().sum(), (x, w), create_graph=True) for out in (plain, ours)]
    assert torch.equal(plain, ours)
    assert all(torch.allclose(a, b) for a, b in zip(*slopes, strict=True))
    second = [grad([s.square().sum() for s in pair], (x, w)) for pair in slopes]
    assert all(torch.allclose(a, b) for a, b in zip(*second, strict=True))


def test_third_derivatives_are_right_too() -> None:
    x, w = drawn(1, 1, 4, 4), drawn(2, 1, 3, 3, seed=1)

    def third() -> Tensor:
        value = F.relu(F.conv2d(x, w)).pow(3).sum()
        for _ in range(3):
            value = grad(value, w, create_graph=True)[0].sum()
        return value

    plain = third()
    with DoubleBackward():
        ours = third()
    assert plain.item() == pytest.approx(ours.item())


def test_a_bias_may_be_all_that_moves() -> None:
    x, w, b = drawn(2, 1, 4, 4).detach(), drawn(2, 1, 3, 3, seed=1).detach(), drawn(2, seed=2)

    def hessian() -> Tensor:
        slope = grad(F.conv2d(x, w, b).pow(3).sum(), b, create_graph=True)[0]
        return torch.stack([grad(s, b, retain_graph=True)[0] for s in slope])

    plain = hessian()
    with DoubleBackward():
        assert torch.allclose(hessian(), plain)


def test_by_slopes_alone_it_gives_products_with_the_jacobian() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten()).double()
    x, weights = drawn(2, 1, 4, 4).detach(), dict(net.named_parameters())
    along = {name: torch.randn_like(w) for name, w in weights.items()}
    with DoubleBackward(by_slopes=True):
        logits = torch.func.functional_call(net, weights, (x,))
    pulled = torch.zeros_like(logits, requires_grad=True)
    slopes = grad(logits, list(weights.values()), pulled, create_graph=True)
    (push,) = grad(slopes, pulled, list(along.values()))
    plain = net(x).flatten()
    rows = [grad(logit, list(weights.values()), retain_graph=True) for logit in plain]
    exact = [sum((s * d).sum() for s, d in zip(row, along.values(), strict=True)) for row in rows]
    assert torch.allclose(push.flatten(), torch.stack(exact))


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("curvature", "kept", "anew"), [("hessian", 2.0, 3.0), ("gauss_newton", 4 / 3, 7 / 3)], ids=["hessian", "gn"]
)
def test_products_cost_the_arithmetic_that_they_need(curvature: str, kept: float, anew: float) -> None:
    model = resnet18(classes=10, channels=4, mean=None, std=None).eval()
    batches = [Batch(torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64))] * 2
    weights = perturbable(model, norm_layers=True)
    products = CurvatureProducts(model, batches, weights, curvature=curvature, memory_budget=None)
    v = torch.ones(products.dimension)

    def gradient() -> Sequence[Tensor]:
        return [grad(F.cross_entropy(model(b.x), b.y), list(model.parameters())) for b in batches]

    unit = flops(gradient)
    # Images need no gradient: the first layer takes less, in the gradient and in products.
    assert flops(lambda: products(v)) / unit == pytest.approx(anew, rel=0.03)
    assert flops(lambda: products(v)) / unit == pytest.approx(kept, rel=0.03)
