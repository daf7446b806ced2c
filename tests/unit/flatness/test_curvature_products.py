"""Curvature products against dense matrices by autograd, per-example gradients, and curvlinops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from robustflat.errors import UserError
from robustflat.flatness.curvature_products import CurvatureProducts
from robustflat.models.modes import perturbable
from robustflat.rng import generator_for
from robustflat.types import Batch
from tests.unit.flatness.networks import Quadratic, convnet, examples, spectrum


def batches(count: int = 7, dtype: torch.dtype = torch.float64) -> list[Batch]:
    x, y = examples(count, dtype)
    return [Batch(x[:4], y[:4]), Batch(x[4:], y[4:])]


def smooth_net() -> nn.Sequential:
    model = convnet(dtype=torch.float64)
    model[2], model[5] = nn.Tanh(), nn.Tanh()
    return model


def matrix_of(products: CurvatureProducts) -> Tensor:
    return products(torch.eye(products.dimension, dtype=products.dtype))


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
    """Second derivatives by torch.autograd.functional of a function of one flat vector."""
    start = dict(model.named_parameters())
    shapes = [start[n].shape for n in names]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([s.numel() for s in shapes])
        changed = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, changed, (x,)), y)

    flat = torch.cat([start[n].detach().flatten() for n in names])
    return torch.autograd.functional.hessian(loss, flat)


def example_gradients(model: nn.Module, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
    rows = []
    for one, label in zip(x, y, strict=True):
        loss = F.cross_entropy(model(one[None]), label[None])
        wanted = [dict(model.named_parameters())[n] for n in names]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)]))
    return torch.stack(rows)


def joined(parts: list[Batch]) -> tuple[Tensor, Tensor]:
    return torch.cat([b.x for b in parts]), torch.cat([b.y for b in parts])


@pytest.mark.parametrize("norm_layers", [False, True])
def test_the_hessian_is_that_of_the_mean_over_all_examples_in_unequal_batches(norm_layers: bool) -> None:
    model, parts = smooth_net(), batches()
    weights = perturbable(model, norm_layers=norm_layers)
    ours = matrix_of(CurvatureProducts(model, parts, weights, precision="fp64"))
    exact = dense_hessian(model, *joined(parts), list(weights))
    assert torch.allclose(ours, exact, rtol=1e-10, atol=1e-12)


def test_the_sum_over_batches_adds_their_means() -> None:
    model, parts = smooth_net(), batches()
    weights = {"7.weight": perturbable(model)["7.weight"]}
    ours = matrix_of(CurvatureProducts(model, parts, weights, precision="fp64", reduction="sum_over_batches"))
    exact = sum(dense_hessian(model, b.x, b.y, list(weights)) for b in parts)
    assert torch.allclose(ours, exact, rtol=1e-10, atol=1e-12)


def test_gauss_newton_is_the_jacobian_around_the_curvature_of_the_logits() -> None:
    model, parts = smooth_net(), batches()
    weights = {n: t for n, t in perturbable(model).items() if n.startswith(("3", "7"))}
    ours = matrix_of(CurvatureProducts(model, parts, weights, precision="fp64", curvature="gauss_newton"))
    x, y = joined(parts)
    exact = torch.zeros_like(ours)
    for label in range(3):  # the exact expectation of g g^T over the model's own labels
        rows = example_gradients(model, x, torch.full_like(y, label), list(weights))
        exact += rows.T @ (rows * model(x).softmax(dim=1)[:, label : label + 1].detach()) / len(x)
    assert torch.allclose(ours, exact, rtol=1e-9, atol=1e-12)


def test_fisher_matrices_are_means_of_outer_products_of_gradients() -> None:
    model, parts = smooth_net(), batches()
    weights = {"3.weight": perturbable(model)["3.weight"]}
    x, y = joined(parts)
    empirical = matrix_of(CurvatureProducts(model, parts, weights, precision="fp64", curvature="empirical_fisher"))
    rows = example_gradients(model, x, y, list(weights))
    assert torch.allclose(empirical, rows.T @ rows / len(x), rtol=1e-9, atol=1e-13)

    drawn = torch.cat(
        [
            torch.multinomial(model(b.x).softmax(dim=1), 1, generator=generator_for(3, "fisher", i))[:, 0]
            for i, b in enumerate(parts)
        ]
    )
    sampled = matrix_of(CurvatureProducts(model, parts, weights, precision="fp64", curvature="fisher", seed=3))
    rows = example_gradients(model, x, drawn, list(weights))
    assert torch.allclose(sampled, rows.T @ rows / len(x), rtol=1e-9, atol=1e-13)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of its own imports and tracing
def test_curvlinops_agrees_on_hessian_and_gauss_newton() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, parts = smooth_net(), batches()
    weights = perturbable(model, norm_layers=True)
    vectors = torch.randn(2, sum(w.numel() for w in weights.values()), dtype=torch.float64)
    data = [(b.x, b.y) for b in parts]
    params = list(model.parameters())
    for name, kind in (("hessian", "HessianLinearOperator"), ("gauss_newton", "GGNLinearOperator")):
        theirs = getattr(curvlinops, kind)(model, nn.CrossEntropyLoss(), params, data, check_deterministic=False)
        ours = CurvatureProducts(model, parts, weights, precision="fp64", curvature=name)(vectors)
        assert torch.allclose(ours, (theirs @ vectors.T).T, rtol=1e-8, atol=1e-11)


def test_a_quadratic_loss_gives_its_matrix_and_zero_gradient() -> None:
    matrix = spectrum(3.0, 1.0, 0.2, -0.5)
    model = Quadratic(matrix)
    batch = Batch(torch.full((3, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))
    products = CurvatureProducts(model, [batch], perturbable(model), precision="fp64")
    assert torch.allclose(matrix_of(products), matrix, atol=1e-12)
    assert torch.allclose(products.gradient(), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert products.count == 4


@pytest.mark.parametrize("c", [0.5, 2.0])
def test_scaling_weights_before_batch_norm_by_c_divides_their_block_by_c_squared(c: float) -> None:
    model, parts = smooth_net(), batches()
    for layer in (model[1], model[4]):
        layer.eps = 1e-30  # none, but torch 2.11 wants one
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[3].weight.mul_(c)
        scaled[3].bias.mul_(c)
        scaled[4].running_mean.mul_(c)
        scaled[4].running_var.mul_(c * c)
    names = ["3.weight", "3.bias"]
    blocks = [
        matrix_of(CurvatureProducts(m, parts, {n: perturbable(m)[n] for n in names}, precision="fp64"))
        for m in (model, scaled)
    ]
    assert torch.allclose(blocks[1], blocks[0] / c**2, rtol=1e-8, atol=1e-12)


def test_one_vector_has_the_shape_it_came_with_and_the_model_is_untouched() -> None:
    model, parts = convnet(), batches(dtype=torch.float32)
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    products = CurvatureProducts(model, parts, perturbable(model), precision="fp64")
    vector = torch.ones(products.dimension)
    assert products(vector).shape == vector.shape
    assert products(vector).dtype == torch.float64
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "fisher"])
@pytest.mark.parametrize("budget", ["auto", None, 0, 0.025], ids=str)
def test_products_are_the_same_to_the_last_bit_whatever_is_kept(curvature: str, budget: float | str | None) -> None:
    model, parts = smooth_net(), batches()
    options = {"curvature": curvature, "precision": "fp64"}
    products = CurvatureProducts(model, parts, perturbable(model), memory_budget=budget, **options)
    vector = torch.randn(products.dimension, dtype=torch.float64)
    first, second = products(vector), products(vector)
    products.release()
    assert torch.equal(first, second)
    assert torch.equal(first, products(vector))
    assert torch.equal(first, CurvatureProducts(model, parts, perturbable(model), **options)(vector))


@pytest.mark.parametrize("norm_layers", [False, True])
def test_with_relus_it_is_the_hessian_of_the_piece_that_the_weights_lie_in(norm_layers: bool) -> None:
    model, parts = convnet(dtype=torch.float64), batches()
    weights = perturbable(model, norm_layers=norm_layers)
    ours = matrix_of(CurvatureProducts(model, parts, weights, precision="fp64"))
    assert torch.allclose(ours, dense_hessian(model, *joined(parts), list(weights)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_the_gradient_is_that_of_the_loss_for_any_curvature(curvature: str) -> None:
    model, parts = convnet(dtype=torch.float64), batches()
    weights = perturbable(model)
    ours = CurvatureProducts(model, parts, weights, precision="fp64", curvature=curvature).gradient()
    x, y = joined(parts)
    wanted = [dict(model.named_parameters())[n] for n in weights]
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), wanted)
    assert torch.allclose(ours, torch.cat([g.flatten() for g in exact]), rtol=1e-10, atol=1e-13)


def test_names_and_vectors_convert_both_ways() -> None:
    model = convnet()
    weights = perturbable(model)
    products = CurvatureProducts(model, batches(dtype=torch.float32), weights)
    flat = products.flat(weights)
    assert all(torch.equal(products.named(flat)[n], w) for n, w in weights.items())


def test_wrong_options_are_refused() -> None:
    model = convnet()
    with pytest.raises(UserError, match="curvature must be one of"):
        CurvatureProducts(model, batches(), perturbable(model), curvature="hesian")
    with pytest.raises(UserError, match="at least one batch"):
        CurvatureProducts(model, [], perturbable(model))
    with pytest.raises(UserError, match="vectors must have shape"):
        CurvatureProducts(model, batches(), perturbable(model))(torch.zeros(3))
