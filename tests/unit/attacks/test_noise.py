"""Random noise and N-FGSM, drawn again in the test from the same generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustflat.attacks.noise import NFgsm, RandomNoise
from robustflat.attacks.objectives import cross_entropy, margin
from robustflat.errors import UserError
from robustflat.geometry.input_ball import L2Ball, LinfBall


def forward(x: Tensor) -> Tensor:
    weight = torch.linspace(-3, 3, 12, dtype=x.dtype).view(3, 4)
    return (3 * x.flatten(1)).sin() @ weight.T


def images(size: int = 5) -> tuple[Tensor, Tensor]:
    return torch.rand(size, 1, 2, 2), torch.arange(size) % 3


def test_random_noise_is_the_worst_of_its_draws() -> None:
    x, y = images()
    ball = LinfBall(0.2)
    found = RandomNoise(ball, trials=4)(forward, x, y, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    draws = [ball.sample(x, generator) for _ in range(4)]
    values = [[float(cross_entropy(forward(d[i : i + 1]), y[i : i + 1])) for d in draws] for i in range(len(x))]
    for i, row in enumerate(values):
        best = row.index(max(row))
        assert found.value[i].item() == pytest.approx(row[best])
        assert torch.equal(found.x_adv[i], draws[best][i])


def test_a_draw_that_gives_no_number_does_not_stand_for_those_that_do() -> None:
    x, y = images(20)

    def half(z: Tensor) -> Tensor:
        return forward(z).masked_fill((z.flatten(1)[:, :1] > x.flatten(1)[:, :1]), torch.nan)

    found = RandomNoise(LinfBall(0.2), trials=20)(half, x, y, generator=torch.Generator().manual_seed(0))
    assert found.value.isfinite().all()


def test_gaussian_noise_lies_on_the_surface_of_the_ball() -> None:
    x = torch.full((200, 1, 4, 4), 0.5)
    ball = L2Ball(0.3)
    y = torch.zeros(200, dtype=torch.int64)
    x_adv = RandomNoise(ball, kind="gaussian")(lambda z: z.flatten(1), x, y).x_adv
    torch.testing.assert_close(ball.size(x_adv, x), torch.full((200,), 0.3))
    assert (x_adv - x).mean(0).abs().max() < 0.03  # in no direction more than in another


def test_gaussian_noise_is_scaled_not_clipped() -> None:
    x = torch.full((50, 1, 4, 4), 0.5)
    y = torch.zeros(50, dtype=torch.int64)
    noise = RandomNoise(LinfBall(0.3), kind="gaussian")(lambda z: z.flatten(1), x, y).x_adv - x
    assert torch.equal((noise.abs() > 0.3 - 1e-6).flatten(1).sum(dim=1), torch.ones(50, dtype=torch.int64))


def test_n_fgsm_takes_one_sign_step_from_unclipped_noise() -> None:
    x, y = images()
    found = NFgsm(LinfBall(0.1), step_size=0.07)(forward, x, y, margin, torch.Generator().manual_seed(1))
    unit = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    noisy = (x + (unit - 0.5) * 0.4).clamp(0, 1).requires_grad_()
    margin(forward(noisy), y).sum().backward()
    assert noisy.grad is not None
    expected = (noisy.detach() + 0.07 * noisy.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(found.x_adv, expected)
    torch.testing.assert_close(found.value, margin(forward(expected), y))


def test_n_fgsm_leaves_the_ball_but_not_its_documented_reach() -> None:
    x = torch.full((100, 1, 2, 2), 0.5)
    y = torch.zeros(100, dtype=torch.int64)
    ball = LinfBall(0.1)
    attack = NFgsm(ball, step_size=0.1, noise_factor=2)
    size = ball.size(attack(lambda z: z.flatten(1), x, y).x_adv, x)
    assert 0.25 < size.max() <= 0.3 + 1e-6
    assert (size > 0.1).float().mean() > 0.8


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"trials must lie in \[1, inf\), got 0"):
        RandomNoise(LinfBall(0.1), trials=0)
    with pytest.raises(UserError, match="kind must be one of gaussian, uniform, got 'normal'"):
        RandomNoise(LinfBall(0.1), kind="normal")
    with pytest.raises(UserError, match="needs an L-infinity ball, got one of norm l2"):
        NFgsm(L2Ball(0.1), step_size=0.1)
    with pytest.raises(UserError, match=r"step_size must lie in \(0, inf\)"):
        NFgsm(LinfBall(0.1), step_size=0)
    with pytest.raises(UserError, match=r"noise_factor must lie in \(0, inf\)"):
        NFgsm(LinfBall(0.1), step_size=0.1, noise_factor=0)
