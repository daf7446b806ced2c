"""FAB against minimal perturbations of linear models in closed form, and what it does on odd models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.fab import Fab, nearest_boundary
from robustflat.attacks.objectives import margin
from robustflat.errors import UserError
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall
from tests.reference.models import mlp_digits

SHAPE = (1, 4, 4)
BALLS = [LinfBall(0.05), L2Ball(0.2), L1Ball(0.5)]
DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}


def linear(classes: int, scale: float = 1.0) -> nn.Module:
    """Boundaries close to grey images, so that the box does not touch the closed forms."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    with torch.no_grad():
        model[1].weight.mul_(scale)
        model[1].bias.copy_(-model[1].weight.sum(1) * 0.5)
    return model.eval()


def images(count: int = 6) -> Tensor:
    return 0.45 + 0.1 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def minimal(model: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """min over classes k of (z_y - z_k) / |w_y - w_k|_dual."""
    weight, logits = model[1].weight.detach(), model(x).detach()
    best = torch.full((len(x),), torch.inf)
    for k in range(logits.shape[1]):
        gap = logits.gather(1, y[:, None])[:, 0] - logits[:, k]
        size = torch.linalg.vector_norm(weight[y] - weight[k], DUAL[norm], dim=1)
        best = torch.where(y == k, best, torch.minimum(best, gap / size))
    return best


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
@pytest.mark.parametrize("targets", [9, None], ids=["targeted", "untargeted"])
@pytest.mark.parametrize("classes", [2, 3, 12])
def test_minimal_perturbation_of_a_linear_model(ball: InputBall, targets: int | None, classes: int) -> None:
    model, x = linear(classes), images()
    y = model(x).argmax(1)
    attack = Fab(ball, steps=20, targets=targets)
    found = attack.closest(model, x, y, seeded())
    assert bool((model(found.x_adv).argmax(1) != y).all())
    best = minimal(model, x, y, ball.norm)
    assert bool((found.distance <= 1.05 * best).all())
    assert bool((found.distance >= best * (1 - 1e-3)).all())
    torch.testing.assert_close(found.distance, ball.size(found.x_adv, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_verdict_is_that_of_the_closed_form(ball: InputBall) -> None:
    model, x = linear(5), images(20)
    y = model(x).argmax(1)
    best = minimal(model, x, y, ball.norm)
    radius = float(best.median()) * 1.0001
    near = type(ball)(radius)
    for stop in (False, True):
        found = Fab(near, steps=20, stop_when_fooled=stop)(model, x, y, generator=seeded())
        clear = (best / radius - 1).abs() > 0.05
        assert torch.equal(found.fooled[clear], (best < radius)[clear])
        assert bool((near.size(found.x_adv, x) <= radius * (1 + 1e-5)).all())
        assert bool((model(found.x_adv).argmax(1) != y)[found.fooled].all())


def test_what_cannot_be_broken_ends_in_the_ball_and_not_below_its_start() -> None:
    model, x = linear(3), images()
    y = model(x).argmax(1)
    ball = L2Ball(1e-4)
    found = Fab(ball, steps=5)(model, x, y, generator=seeded())
    assert not bool(found.fooled.any())
    assert bool((ball.size(found.x_adv, x) <= 1e-4 * (1 + 1e-5)).all())
    assert bool((found.value >= margin(model(x), y)).all())


def test_an_image_that_fools_the_model_only_once_brought_into_the_ball_counts() -> None:
    """Few steps end far outside; on a curved boundary the point on the way back may be misclassified, too."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 4)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    x = torch.rand(200, *SHAPE)
    y = model(x).argmax(1)
    for ball in BALLS:
        attack = Fab(ball, steps=1)
        outside = attack.closest(model, x, y).distance > ball.epsilon
        found = attack(model, x, y)
        assert bool((outside & found.fooled).any())
        assert torch.equal(found.fooled, model(found.x_adv).argmax(1) != y)
        assert bool((ball.size(found.x_adv, x) <= ball.epsilon * (1 + 1e-5)).all())


def test_restarts_never_move_the_nearest_point_away() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4)).eval()
    x = images()
    y = model(x).argmax(1)
    one, three = (Fab(L2Ball(2.0), steps=10, restarts=n).closest(model, x, y, seeded()) for n in (1, 3))
    assert bool((three.distance <= one.distance * (1 + 1e-6)).all())


def test_an_example_that_is_wrong_already_is_at_distance_zero() -> None:
    model, x = linear(3), images()
    y = (model(x).argmax(1) + 1) % 3
    found = Fab(LinfBall(0.1)).closest(model, x, y, seeded())
    assert torch.equal(found.x_adv, x)
    assert found.distance.tolist() == [0.0] * 6


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_nearest_boundary_is_the_one_of_least_distance(norm: str) -> None:
    model, x = linear(4), images()
    y = model(x).argmax(1)
    classes = torch.tensor([[k for k in range(4) if k != label] for label in y.tolist()])
    value, slope = nearest_boundary(model, x, y, classes, norm)
    distance = value.abs() / torch.linalg.vector_norm(slope.flatten(1), DUAL[norm], dim=1)
    torch.testing.assert_close(distance, minimal(model, x, y, norm))


def test_one_seed_gives_one_result() -> None:
    model, x = linear(3), images()
    y = model(x).argmax(1)
    first, second = (Fab(L1Ball(0.5), steps=5, restarts=2)(model, x, y, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first.x_adv, second.x_adv)


def test_models_without_gradient_or_numbers_are_not_broken() -> None:
    x = images()
    for factor, label in ((0.0, 0), (torch.nan, 1)):  # the largest logit is then the first
        y = torch.full((6,), label)
        found = Fab(LinfBall(0.1), steps=3)(lambda v, f=factor: v.flatten(1)[:, :3] * f, x, y, generator=seeded())
        assert bool(found.x_adv.isfinite().all())
        assert not bool(found.fooled.any())


@pytest.mark.parametrize("stop", [False, True])
def test_logits_that_are_not_numbers_are_no_boundary(stop: bool) -> None:
    """A plane with a gap of not-a-number around it: the first step over the plane ends in the gap."""
    slope = torch.randn(16, generator=seeded(2))

    def forward(v: Tensor) -> Tensor:
        height = (v.flatten(1) - 0.5) @ slope
        return torch.stack([-height, height], dim=1).masked_fill((height.abs() < 0.1).unsqueeze(1), torch.nan)

    x = (0.5 + 0.08 * slope.sign()).expand(3, -1).reshape(3, *SHAPE)
    y = torch.ones(3, dtype=torch.int64)
    attack = Fab(LinfBall(0.2), steps=5, stop_when_fooled=stop)
    found = attack(forward, x, y, generator=seeded())
    assert torch.equal(found.fooled, forward(found.x_adv)[:, 0] > forward(found.x_adv)[:, 1])
    closest = attack.closest(forward, x, y, seeded())
    assert bool(forward(closest.x_adv).isfinite().all())


def test_an_empty_batch_gives_an_empty_result() -> None:
    x, y = torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.int64)
    assert Fab(LinfBall(0.1))(linear(3), x, y).x_adv.shape == (0, *SHAPE)
    assert Fab(LinfBall(0.1)).closest(linear(3), x, y).distance.shape == (0,)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "steps must lie in"),
        ({"restarts": 0}, "restarts must lie in"),
        ({"targets": 0}, "None goes to the nearest"),
        ({"eta": 0.9}, "eta must lie in"),
        ({"alpha_max": 2.0}, "alpha_max must lie in"),
        ({"beta": 1.0}, "beta must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Fab(LinfBall(0.1), **settings)  # type: ignore[arg-type]


def test_of_probabilities_the_most_probable_class_is_the_label() -> None:
    model, x = linear(3), images()
    y = model(x).argmax(1)
    soft = nn.functional.one_hot(y, 3) * 0.6 + 0.1
    one, other = (Fab(L2Ball(0.2), steps=5).closest(model, x, labels, seeded()) for labels in (y, soft))
    assert torch.equal(one.x_adv, other.x_adv)


@pytest.mark.parametrize("ball", [LinfBall(0.12), L2Ball(0.7), L1Ball(1.5)], ids=lambda ball: ball.norm)
def test_targets_side_by_side_give_the_verdicts_of_one_after_another(
    ball: InputBall, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = mlp_digits(torch.float64)
    x, y = x[:30], y[:30]
    attack = Fab(ball, steps=12, targets=5, stop_when_fooled=True)
    together = attack.hunt(model, x, y).found
    monkeypatch.setattr("robustflat.attacks.fab.FILL", 1)
    alone = attack.hunt(model, x, y).found
    assert torch.equal(together.fooled, alone.fooled)
    assert 0 < int(alone.fooled.sum()) < 30
    resists = ~alone.fooled
    torch.testing.assert_close(together.x_adv[resists], alone.x_adv[resists], rtol=0, atol=1e-4)
    assert torch.equal(model(together.x_adv).argmax(1) != y, together.fooled)
