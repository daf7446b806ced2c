"""Input balls against closed forms, Dykstra's algorithm, and a greedy certificate of optimality."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from robustflat.errors import UserError
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall, input_ball

BALLS = (LinfBall, L2Ball, L1Ball)
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
EPSILONS = {"linf": 8 / 255, "l2": 0.5, "l1": 3.0}

few = settings(max_examples=25, deadline=None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(seed: int, spread: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Centres with pixels at 0 and 1 among them, and points around them, also outside of the box."""
    generator = seeded(seed)
    x = torch.rand(5, 2, 3, 3, generator=generator, dtype=torch.float64)
    x = (1.5 * x - 0.25).clamp(0, 1)
    y = x + spread * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def usual(kind: type[InputBall]) -> InputBall:
    return kind(EPSILONS[kind.norm])


def distances(ball: InputBall, z: Tensor, x: Tensor) -> np.ndarray:
    """Literal definition in NumPy."""
    moved = (z.double() - x.double()).flatten(1).numpy()
    return np.array([np.linalg.norm(row, ORDERS[ball.norm]) for row in moved])


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@few
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([1e-3, 0.05, 0.5, 20.0]), factor=st.floats(0.01, 2))
def test_projections_lie_in_ball_and_box_and_projecting_again_changes_nothing(kind, dtype, seed, spread, factor):
    x, y = case(seed, spread, dtype)
    ball = kind(min(factor * EPSILONS[kind.norm], 1.0) if kind is LinfBall else factor * EPSILONS[kind.norm])
    z = ball.project(y, x)
    assert z.dtype == dtype
    assert z.shape == x.shape
    assert (distances(ball, z, x) <= ball.epsilon * (1 + 1e-6)).all()
    assert ((z >= 0) & (z <= 1)).all()
    assert torch.equal(ball.project(z, x), z)


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@few
@given(seed=st.integers(0, 10_000))
def test_images_inside_come_back_bit_for_bit(kind, dtype, seed):
    x, y = case(seed, 0.3, dtype)
    ball = usual(kind)
    fraction = 0.99 * ball.epsilon / torch.from_numpy(distances(ball, y, x)).view(-1, 1, 1, 1).clamp_min(1e-9)
    inside = (x.double() + (y.double() - x.double()) * fraction.clamp_max(1)).clamp(0, 1).to(dtype)
    really = torch.from_numpy(distances(ball, inside, x) < ball.epsilon)
    assert torch.equal(ball.project(inside, x)[really], inside[really])
    assert dtype == torch.bfloat16 or really.all()


def test_linf_projection_is_the_closed_form():
    x, y = case(1, 0.2)
    z = LinfBall(0.1).project(y, x)
    for value, point, centre in zip(z.flatten(), y.flatten(), x.flatten(), strict=True):
        expected = min(max(point.item(), centre.item() - 0.1, 0.0), centre.item() + 0.1, 1.0)
        assert abs(value.item() - expected) < 1e-12


@few
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 0.4, 3.0]), epsilon=st.sampled_from([0.2, 0.7, 1.5]))
def test_l2_projection_agrees_with_dykstra(seed, spread, epsilon):
    x, y = case(seed, spread)
    centre, z = x.flatten(1).numpy(), y.flatten(1).numpy()
    p, q = np.zeros_like(z), np.zeros_like(z)
    for _ in range(3000):
        radii = np.linalg.norm(z + p - centre, axis=1, keepdims=True)
        in_ball = centre + (z + p - centre) * np.minimum(1, epsilon / np.maximum(radii, 1e-12))
        p = z + p - in_ball
        z = np.clip(in_ball + q, 0, 1)
        q = in_ball + q - z
    ours = L2Ball(epsilon).project(y, x).flatten(1).numpy()
    np.testing.assert_allclose(ours, z, atol=1e-5)


def best_in_l1_ball_and_box(slope: np.ndarray, centre: np.ndarray, epsilon: float) -> float:
    """Largest <slope, z - centre> over L1 ball and box: spend epsilon on the steepest pixels first."""
    left, gained = epsilon, 0.0
    for i in np.argsort(-np.abs(slope)):
        spent = min(left, 1 - centre[i] if slope[i] > 0 else centre[i])
        gained += abs(slope[i]) * spent
        left -= spent
    return gained


@few
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 0.4, 3.0]), epsilon=st.sampled_from([0.2, 1.0, 4.0]))
def test_l1_projection_satisfies_the_variational_inequality(seed, spread, epsilon):
    x, y = case(seed, spread)
    z = L1Ball(epsilon).project(y, x)
    for point, centre, found in zip(y.flatten(1).numpy(), x.flatten(1).numpy(), z.flatten(1).numpy(), strict=True):
        slope = point - found
        # z is the projection exactly if no allowed image lies farther along y - z than z itself.
        gap = best_in_l1_ball_and_box(slope, centre, epsilon) - slope @ (found - centre)
        assert gap <= 1e-9 * (1 + np.abs(slope).max())


@pytest.mark.parametrize("kind", [L2Ball, L1Ball])
def test_projection_in_float32_equals_float64_at_image_size(kind):
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    y = x + 0.3 * torch.randn_like(x)
    ball = usual(kind)
    torch.testing.assert_close(ball.project(y.float(), x.float()).double(), ball.project(y, x), atol=2e-6, rtol=0)


def test_l2_projection_is_exact_where_pixels_differ_by_orders_of_magnitude():
    y = torch.exp(4 * torch.randn(200, 60, dtype=torch.float64))
    x = torch.rand_like(y) ** 4
    sizes = L2Ball(0.8).size(L2Ball(0.8).project(y, x), x)
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.8), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", BALLS)
def test_points_outside_land_on_the_surface(kind):
    x, y = torch.full((3, 1, 4, 4), 0.5), 0.5 + 3 * torch.randn(3, 1, 4, 4)
    ball = kind(0.4)
    torch.testing.assert_close(ball.size(ball.project(y, x), x), torch.full((3,), 0.4))


@pytest.mark.parametrize("kind", BALLS)
def test_size_is_the_norm_of_each_example(kind):
    x, y = case(3, 0.3, torch.float32)
    ball = usual(kind)
    assert ball.size(y, x).shape == (5,)
    np.testing.assert_allclose(ball.size(y, x).numpy(), distances(ball, y, x), rtol=1e-5)
    assert ball.size(x, x).tolist() == [0.0] * 5


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["sample", "sample_uniform_norm"])
def test_samples_lie_in_ball_and_box_and_follow_the_generator(kind, dtype, method):
    x, _ = case(4, 0.0, dtype)
    kept, ball = x.clone(), usual(kind)
    first = getattr(ball, method)(x, seeded(1))
    assert first.dtype == dtype
    assert (distances(ball, first, x) <= ball.epsilon * (1 + 1e-6)).all()
    assert ((first >= 0) & (first <= 1)).all()
    assert torch.equal(first, getattr(ball, method)(x, seeded(1)))
    assert not torch.equal(first, getattr(ball, method)(x, seeded(2)))
    assert torch.equal(x, kept)


def one_pixel_law(norm: str, dimensions: int) -> stats.rv_continuous:
    """Law of one coordinate, scaled to [-1, 1], of a point uniform in the unit ball."""
    if norm == "linf":
        return stats.uniform(-1, 2)
    if norm == "l2":
        return stats.beta((dimensions + 1) / 2, (dimensions + 1) / 2, -1, 2)
    return None


@pytest.mark.parametrize("kind", BALLS)
def test_samples_are_uniform_in_the_ball(kind):
    x = torch.full((4000, 1, 2, 3), 0.5, dtype=torch.float64)
    ball = kind(0.4)
    z = ball.sample(x, seeded(0))
    fractions = (ball.size(z, x) / 0.4).numpy()
    assert stats.kstest(fractions**6, "uniform").pvalue > 1e-3
    pixel = ((z - x)[:, 0, 1, 2] / 0.4).numpy()
    if kind is L1Ball:  # |coordinate| of a point uniform in the L1 ball follows Beta(1, D)
        assert stats.kstest(np.abs(pixel), stats.beta(1, 6).cdf).pvalue > 1e-3
        assert stats.binomtest(int((pixel > 0).sum()), len(pixel)).pvalue > 1e-3
    else:
        assert stats.kstest(pixel, one_pixel_law(kind.norm, 6).cdf).pvalue > 1e-3


@pytest.mark.parametrize("kind", BALLS)
def test_the_released_start_has_a_uniform_norm_and_a_gaussian_direction(kind):
    x = torch.full((4000, 6), 0.5, dtype=torch.float64)
    ball = kind(0.4)
    delta = ball.sample_uniform_norm(x, seeded(0)) - x
    assert stats.kstest((ball.size(x + delta, x) / 0.4).numpy(), "uniform").pvalue > 1e-3
    # One coordinate of a Gaussian direction on the L2 sphere: Beta((D - 1) / 2, (D - 1) / 2) on [-1, 1].
    cosine = (delta[:, 0] / delta.norm(dim=1)).numpy()
    assert stats.kstest(cosine, stats.beta(2.5, 2.5, -1, 2).cdf).pvalue > 1e-3


def test_the_released_linf_start_is_as_small_as_measured_on_cifar():
    x = torch.full((200, 3, 32, 32), 0.5)
    delta = (LinfBall(0.03).sample_uniform_norm(x, seeded(0)) - x).abs() / 0.03
    assert delta.mean().item() == pytest.approx(0.113, abs=0.015)


@pytest.mark.parametrize("kind", BALLS)
@few
@given(seed=st.integers(0, 10_000))
def test_steepest_beats_random_directions_of_the_same_norm(kind, seed):
    ball = kind(1.0, low=-9, high=9)
    grad = torch.randn(3, 2, 2, 2, generator=seeded(seed), dtype=torch.float64)
    best = ball.steepest(grad)
    zero = torch.zeros_like(grad)
    np.testing.assert_allclose(distances(ball, best, zero), 1.0)
    for other in range(200):
        rival = ball.sample(zero, seeded(other))
        assert ((grad * rival).flatten(1).sum(1) <= (grad * best).flatten(1).sum(1) + 1e-12).all()


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_gradients_give_zero_directions_and_leave_other_examples_alone(kind, dtype):
    grad = torch.randn(3, 1, 2, 2).to(dtype)
    grad[1] = 0
    direction = kind(0.5).steepest(grad)
    assert direction.dtype == dtype
    assert direction[1].abs().max() == 0
    np.testing.assert_allclose(distances(kind(0.5), direction, torch.zeros_like(grad))[[0, 2]], 1, rtol=1e-2)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-25, 1e25])
def test_l2_direction_does_not_depend_on_the_magnitude_of_the_gradient(magnitude):
    grad = torch.randn(2, 5)
    torch.testing.assert_close(L2Ball(1).steepest(grad * magnitude), L2Ball(1).steepest(grad))


def test_l1_direction_takes_one_of_several_equal_pixels():
    direction = L1Ball(1).steepest(torch.tensor([[-2.0, 2.0, 1.0], [0.0, 3.0, -3.0]]))
    assert direction.abs().sum(1).tolist() == [1.0, 1.0]
    assert (direction != 0).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("kind", BALLS)
def test_an_empty_batch_stays_empty(kind):
    x, ball = torch.zeros(0, 3, 4, 4), usual(kind)
    for result in (ball.project(x, x), ball.sample(x), ball.sample_uniform_norm(x), ball.steepest(x)):
        assert result.shape == x.shape
    assert ball.size(x, x).shape == (0,)


@pytest.mark.parametrize("kind", BALLS)
def test_projection_keeps_channels_last_and_records_no_graph(kind):
    x = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    y = (x + torch.randn_like(x)).requires_grad_(True)
    z = usual(kind).project(y, x)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert not z.requires_grad


@pytest.mark.parametrize("kind", BALLS)
def test_another_box_is_respected(kind):
    x = 6 * torch.rand(4, 9) - 3
    ball = kind(0.9, low=-3.0, high=3.0)
    for z in (ball.project(x + torch.randn_like(x), x), ball.sample(x, seeded(0))):
        assert ((z >= -3) & (z <= 3)).all()
        assert (distances(ball, z, x) <= 0.9 * (1 + 1e-6)).all()


def test_epsilon_in_pixel_units_is_refused_with_the_remedy():
    message = r"epsilon must lie in \(0, 1\], got 8\. Is it in 0\.\.255 units\? Write 8/255 as 0\.03137\."
    with pytest.raises(UserError, match=message):
        LinfBall(8)


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("epsilon", [0, -0.1, math.nan, math.inf])
def test_an_epsilon_that_is_no_radius_is_refused(kind, epsilon):
    with pytest.raises(UserError, match="epsilon must lie in"):
        kind(epsilon)


def test_no_attack_is_named_as_the_alternative_to_epsilon_zero():
    with pytest.raises(UserError, match="attack=none"):
        L2Ball(0)


def test_large_l2_and_l1_balls_are_allowed_and_an_empty_box_is_not():
    assert (L2Ball(2.5).epsilon, L1Ball(12).epsilon) == (2.5, 12)
    with pytest.raises(UserError, match="low must be smaller than high, got low=1 and high=0"):
        LinfBall(0.1, low=1.0, high=0.0)
    with pytest.raises(UserError, match="low must be smaller than high, got low=nan"):
        LinfBall(0.1, low=math.nan)


def test_a_ball_prints_its_numbers():
    assert repr(LinfBall(0.25)) == "LinfBall(epsilon=0.25, low=0, high=1)"


@pytest.mark.parametrize("kind", BALLS)
def test_a_ball_can_be_named_by_its_norm(kind):
    ball = input_ball(kind.norm, 0.3)
    assert type(ball) is kind
    assert ball.epsilon == 0.3


def test_an_unknown_norm_is_refused_with_those_that_exist():
    with pytest.raises(UserError, match=r"norm must be one of l1, l2, linf, got 'linfty'\. Did you mean 'linf'\?"):
        input_ball("linfty", 0.3)


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_projector_of_fixed_centres_gives_the_bits_of_the_projection(kind, dtype):
    ball = usual(kind)
    for seed in range(5):
        x, y = case(seed, 0.3, dtype)
        ends = [x + ball.epsilon, x - ball.epsilon]
        around = [torch.nextafter(end, torch.full_like(x, to)) for end in ends for to in (-1, 2)]
        project = ball.onto(x)
        for z in (x, y, torch.full_like(x, 9.0), *ends, *around):
            assert torch.equal(project(z), ball.project(z, x))
        other = y.to(torch.float32 if dtype != torch.float32 else torch.bfloat16)
        assert torch.equal(project(other), ball.project(other, x))
