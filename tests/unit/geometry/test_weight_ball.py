"""Weight balls: all twelve combinations against literal definitions, random rivals and known distributions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robustflat.errors import UserError
from robustflat.geometry.weight_ball import WeightBall
from robustflat.types import Weights

COMBINATIONS = list(itertools.product([2.0, math.inf], ["global", "layer", "filter"], [True, False]))
combinations = pytest.mark.parametrize(("norm", "grouping", "relative"), COMBINATIONS)
few = settings(max_examples=20, deadline=None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int, dtype: torch.dtype = torch.float64) -> Weights:
    """A convolution, a linear layer, a bias, and tensors or filters that are all zero."""
    generator = seeded(seed)
    shapes = {"conv.weight": (4, 3, 2, 2), "fc.weight": (5, 4), "fc.bias": (5,), "zero.bias": (3,)}
    w = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    w["conv.weight"][1] = 0
    w["zero.bias"].zero_()
    return w


def steps(seed: int, size: float, dtype: torch.dtype = torch.float64) -> Weights:
    generator = seeded(seed + 1)
    return {
        name: size * torch.randn(w.shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, w in network(seed).items()
    }


def groups(v: Weights, grouping: str) -> list[np.ndarray]:
    """Literal definition: the flat entries of each group."""
    arrays = [t.double().numpy() for t in v.values()]
    if grouping == "global":
        return [np.concatenate([a.ravel() for a in arrays])]
    if grouping == "layer":
        return [a.ravel() for a in arrays]
    return [f.ravel() for a in arrays for f in (a if a.ndim > 2 else [a])]


def literal_norms(v: Weights, norm: float, grouping: str) -> np.ndarray:
    return np.array([np.linalg.norm(g, norm) for g in groups(v, grouping)])


def literal_limits(w: Weights, ball: WeightBall) -> np.ndarray:
    norms = literal_norms(w, ball.norm, ball.grouping)
    return ball.radius * norms if ball.relative else np.full_like(norms, ball.radius)


def inner(a: Weights, b: Weights) -> float:
    return sum((a[name] * b[name]).sum().item() for name in a)


@combinations
def test_limits_are_the_literal_norms_and_broadcast_to_the_weights(norm, grouping, relative):
    w, ball = network(0), WeightBall(0.3, norm, grouping, relative)
    limits = ball.limits(w)
    assert list(limits) == list(w)
    for name, limit in limits.items():
        assert torch.broadcast_shapes(limit.shape, w[name].shape) == w[name].shape
        per_filter = grouping == "filter" and w[name].ndim > 2
        assert limit.shape == ((4, 1, 1, 1) if per_filter else ())
    ours = np.concatenate([limit.numpy().ravel() for limit in limits.values()])
    expected = literal_limits(w, ball)
    np.testing.assert_allclose(ours, np.repeat(expected, 4) if grouping == "global" else expected)


@combinations
@few
@given(seed=st.integers(0, 1000), size=st.sampled_from([0.01, 0.3, 10.0]))
def test_projections_lie_inside_and_projecting_again_changes_nothing(norm, grouping, relative, seed, size):
    for dtype in (torch.float64, torch.float32):
        w, nu = network(seed, dtype), steps(seed, size, dtype)
        ball = WeightBall(0.3, norm, grouping, relative)
        inside = ball.project(nu, w)
        assert all(inside[n].shape == w[n].shape and inside[n].dtype == dtype for n in w)
        assert (literal_norms(inside, norm, grouping) <= literal_limits(w, ball) * (1 + 2e-6)).all()
        again = ball.project(inside, w)
        assert all(torch.equal(again[n], inside[n]) for n in w)


@combinations
@few
@given(seed=st.integers(0, 1000))
def test_no_random_point_of_the_ball_is_nearer_than_the_projection(norm, grouping, relative, seed):
    w, nu = network(seed), steps(seed, 1.0)
    ball = WeightBall(0.3, norm, grouping, relative)
    residual = {n: nu[n] - p for n, p in ball.project(nu, w).items()}
    # A projection's residual makes no acute angle with any direction that stays in the ball.
    ahead = {n: nu[n] - residual[n] for n in nu}
    for rival in [ball.steepest(residual, w), *(ball.sample(w, seeded(i), surface=False) for i in range(5))]:
        assert inner(residual, {n: rival[n] - ahead[n] for n in rival}) <= 1e-9


@combinations
def test_points_inside_come_back_bit_for_bit(norm, grouping, relative):
    w = network(2, torch.float32)
    ball = WeightBall(0.3, norm, grouping, relative)
    nu = {name: 0.9 * step for name, step in ball.sample(w, seeded(0)).items()}
    projected = ball.project(nu, w)
    assert all(torch.equal(projected[n], nu[n]) for n in w)


@combinations
@pytest.mark.parametrize("sampling", ["sphere", "ball", "uniform_norm"])
def test_samples_lie_inside_or_on_the_surface_without_nan(norm, grouping, relative, sampling):
    w = network(3, torch.float32)
    kept = {name: tensor.clone() for name, tensor in w.items()}
    ball = WeightBall(0.3, norm, grouping, relative)
    nu = ball.sample(w, seeded(0), sampling=sampling)
    assert all(nu[n].shape == w[n].shape and nu[n].dtype == torch.float32 for n in w)
    norms, limits = literal_norms(nu, norm, grouping), literal_limits(w, ball)
    assert (norms <= limits * (1 + 2e-6)).all()
    assert np.allclose(norms, limits, rtol=2e-6) == (sampling == "sphere")
    assert all(torch.equal(w[n], kept[n]) for n in w)


def test_surface_selects_sphere_or_ball_and_draws_follow_the_generator():
    w, ball = network(4), WeightBall(0.3)
    by_flag, by_name = ball.sample(w, seeded(1), surface=False), ball.sample(w, seeded(1), sampling="ball")
    sphere, default = ball.sample(w, seeded(1), sampling="sphere"), ball.sample(w, seeded(1))
    assert all(torch.equal(by_flag[n], by_name[n]) and torch.equal(sphere[n], default[n]) for n in w)
    assert not torch.equal(ball.sample(w, seeded(2))["fc.weight"], default["fc.weight"])


@pytest.mark.parametrize("norm", [2.0, math.inf])
@pytest.mark.parametrize("grouping", ["global", "layer", "filter"])
def test_samples_are_uniform_in_the_ball_of_each_group(norm, grouping):
    w = {"a": torch.ones(2, 1, 2, 1, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    ball, generator = WeightBall(0.5, norm, grouping, relative=False), seeded(0)
    draws = [ball.sample(w, generator, surface=False) for _ in range(1500)]
    for group in range(len(groups(w, grouping))):
        points = np.array([groups(nu, grouping)[group] for nu in draws]) / 0.5
        d = points.shape[1]
        radii = np.linalg.norm(points, norm, axis=1)
        assert stats.kstest(radii**d, "uniform").pvalue > 1e-3
        law = stats.uniform(-1, 2) if norm == math.inf else stats.beta((d + 1) / 2, (d + 1) / 2, -1, 2)
        assert stats.kstest(points[:, 0], law.cdf).pvalue > 1e-3


def test_the_released_start_has_a_uniform_norm_and_the_sphere_a_uniform_direction():
    w, ball, generator = {"a": torch.ones(5, dtype=torch.float64)}, WeightBall(0.5, relative=False), seeded(0)
    starts = torch.stack([ball.sample(w, generator, sampling="uniform_norm")["a"] for _ in range(1500)])
    assert stats.kstest((starts.norm(dim=1) / 0.5).numpy(), "uniform").pvalue > 1e-3
    surface = torch.stack([ball.sample(w, generator)["a"] for _ in range(1500)]) / 0.5
    assert stats.kstest(surface[:, 2].numpy(), stats.beta(2, 2, -1, 2).cdf).pvalue > 1e-3


def test_the_surface_of_a_cube_is_covered_uniformly():
    w, generator = {"a": torch.ones(3, dtype=torch.float64)}, seeded(0)
    ball = WeightBall(0.5, math.inf, relative=False)
    surface = torch.stack([ball.sample(w, generator)["a"] for _ in range(3000)]) / 0.5
    face = surface.abs().argmax(dim=1)
    assert stats.chisquare(torch.bincount(face, minlength=3).numpy()).pvalue > 1e-3
    others = surface[face == 0][:, 1].numpy()
    assert stats.kstest(others, stats.uniform(-1, 2).cdf).pvalue > 1e-3


@combinations
@few
@given(seed=st.integers(0, 1000))
def test_steepest_beats_random_points_of_the_ball_and_lies_in_it(norm, grouping, relative, seed):
    w, grad = network(seed), steps(seed, 1.0)
    ball = WeightBall(0.3, norm, grouping, relative)
    best = ball.steepest(grad, w)
    assert (literal_norms(best, norm, grouping) <= literal_limits(w, ball) * (1 + 1e-9)).all()
    assert all(inner(grad, ball.sample(w, seeded(i))) <= inner(grad, best) for i in range(20))


@combinations
def test_steepest_reaches_the_dual_norm(norm, grouping, relative):
    w, grad = network(6), steps(6, 1.0)
    ball = WeightBall(0.3, norm, grouping, relative)
    dual = literal_norms(grad, 2 if norm == 2 else 1, grouping)
    assert inner(grad, ball.steepest(grad, w)) == pytest.approx((literal_limits(w, ball) * dual).sum())


@combinations
def test_zero_gradients_zero_steps_and_zero_weights_never_give_nan(norm, grouping, relative):
    w = {"a": torch.zeros(2, 2, 1, 1), "b": torch.zeros(3)}
    zero = {name: torch.zeros_like(tensor) for name, tensor in w.items()}
    ball = WeightBall(0.3, norm, grouping, relative)
    for result in (ball.steepest(zero, w), ball.project(zero, w)):
        assert all(not tensor.any() for tensor in result.values())
    moved = ball.project({name: torch.ones_like(tensor) for name, tensor in w.items()}, w)
    sampled = ball.sample(w, seeded(0))
    for result in (moved, sampled):
        assert all(tensor.isfinite().all() and tensor.any() != relative for tensor in result.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_without_gradient_stays_where_a_large_one_might_go_far(dtype):
    w = {"used": torch.ones(8, dtype=dtype), "idle": torch.full((400,), 50.0, dtype=dtype)}
    grad = {"used": torch.ones(8, dtype=dtype), "idle": torch.zeros(400, dtype=dtype)}
    step = WeightBall(0.5).steepest(grad, w)
    assert torch.equal(step["idle"], grad["idle"])
    assert float(step["used"].norm()) == pytest.approx(0.5 * math.sqrt(8))


def test_radius_zero_allows_no_step():
    w = network(7)
    ball = WeightBall(0)
    assert not any(t.any() for t in (*ball.sample(w, seeded(0)).values(), *ball.project(w, w).values()))


def test_large_float32_tensors_are_measured_accurately():
    w = {"conv.weight": torch.randn(256, 256, 3, 3), "vector": torch.randn(5000)}
    nu = WeightBall(0.5).sample(w, seeded(0))
    for name, tensor in w.items():
        ratio = nu[name].double().norm() / tensor.double().norm()
        assert ratio.item() == pytest.approx(0.5, rel=2e-6)


@pytest.mark.parametrize("grouping", ["global", "layer", "filter"])
def test_half_precision_weights_give_half_precision_steps(grouping):
    w = network(8, torch.bfloat16)
    ball = WeightBall(0.3, 2, grouping)
    for nu in (ball.sample(w, seeded(0)), ball.project(w, w), ball.steepest(w, w)):
        assert all(step.dtype == torch.bfloat16 for step in nu.values())
        np.testing.assert_allclose(literal_norms(nu, 2, grouping), literal_limits(w, ball), rtol=0.01)


def test_sizes_are_norms_per_group_and_an_empty_dictionary_stays_empty():
    w = network(9)
    sizes = WeightBall(1.0, grouping="layer").sizes(w)
    np.testing.assert_allclose([s.item() for s in sizes.values()], literal_norms(w, 2, "layer"))
    for grouping in ("global", "layer", "filter"):
        ball = WeightBall(1.0, grouping=grouping)
        assert ball.limits({}) == ball.project({}, {}) == ball.sample({}, surface=False) == {}


@pytest.mark.parametrize("method", ["project", "steepest"])
def test_perturbations_under_other_names_are_refused(method):
    w = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(UserError, match=r"same names as the weights. Missing: b; unknown: c"):
        getattr(WeightBall(0.1), method)({"a": torch.ones(2), "c": torch.ones(2)}, w)


def test_impossible_settings_are_refused_with_what_is_allowed():
    with pytest.raises(UserError, match=r"radius must lie in \[0, inf\), got -1"):
        WeightBall(-1)
    with pytest.raises(UserError, match=r"norm must be 2 or infinity \(in YAML .inf\), got 1.0"):
        WeightBall(0.1, norm=1.0)
    with pytest.raises(UserError, match=r"grouping must be one of filter, global, layer, got 'layers'. Did you mean"):
        WeightBall(0.1, grouping="layers")
    with pytest.raises(UserError, match="sampling must be one of ball, sphere, uniform_norm, got 'cube'"):
        WeightBall(0.1).sample({"a": torch.ones(1)}, sampling="cube")


def test_a_ball_prints_its_settings():
    expected = "WeightBall(radius=0.5, norm=inf, grouping='layer', relative=True)"
    assert repr(WeightBall(0.5, math.inf)) == expected
