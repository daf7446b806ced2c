"""APGD against closed forms of linear models, its published schedule, and what it does on odd models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.apgd_steps import changed_pixels, checks, random_start
from robustflat.attacks.autopgd import AutoPgd, wrong_classes
from robustflat.attacks.hunt import PlainJudge
from robustflat.attacks.objectives import cross_entropy, margin
from robustflat.errors import UserError
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall, input_ball
from tests.reference.models import mlp_digits

SHAPE = (1, 4, 4)


def linear(classes: int = 3, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    with torch.no_grad():
        model[1].weight.mul_(scale)
    return model.eval()


def images(count: int = 6, seed: int = 0) -> Tensor:
    """Away from the border, so that the box does not touch the closed forms."""
    return 0.35 + 0.3 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gain(ball: InputBall, slope: Tensor) -> Tensor:
    """Largest <slope, delta> over the ball, rows of slope (B, D)."""
    dual = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}[ball.norm]
    return ball.epsilon * torch.linalg.vector_norm(slope, dual, dim=1)


BALLS = [LinfBall(0.05), L2Ball(0.2), L1Ball(0.3)]


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
@pytest.mark.parametrize("objective", ["margin", "cross_entropy"])
def test_two_class_linear_model_is_driven_to_its_optimum(ball: InputBall, objective: str) -> None:
    model, x = linear(2), images()
    y = model(x).argmax(1)
    weight = model[1].weight.detach()
    slope = weight[1 - y] - weight[y]
    best = margin(model(x), y) + gain(ball, slope)
    found = AutoPgd(ball, objective=objective, wide_start=ball.norm == "l1")(model, x, y, generator=seeded())
    reached = margin(model(found.x_adv), y)
    change = best - margin(model(x), y)
    assert bool((reached >= best - 0.05 * change).all())
    assert bool((ball.size(found.x_adv, x) <= ball.epsilon * (1 + 1e-5)).all())


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_targeted_runs_find_the_best_class_of_a_linear_model(ball: InputBall) -> None:
    model, x = linear(4), images()
    y = model(x).argmax(1)
    weight = model[1].weight.detach()
    logits = model(x).detach()
    best = torch.full((len(x),), -torch.inf)
    for target in range(4):
        value = logits[:, target] - logits.gather(1, y[:, None])[:, 0] + gain(ball, weight[target] - weight[y])
        best = torch.where(y == target, best, torch.maximum(best, value))
    found = AutoPgd(ball, objective="margin_to_target")(model, x, y, generator=seeded())
    clean = margin(logits, y)
    assert bool((margin(model(found.x_adv), y) >= best - 0.05 * (best - clean)).all())
    torch.testing.assert_close(found.value, margin(model(found.x_adv), y))


def test_checks_follow_the_published_intervals() -> None:
    assert list(checks(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checks(100)[22] == 22
    assert checks(100)[41] == 19
    assert list(checks(1)) == [1]


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_random_starts_lie_in_ball_and_box_and_differ(ball: InputBall) -> None:
    x = images()
    x[0], x[1] = 0.0, 1.0
    generator = seeded()
    first, second = (random_start(ball, x, generator) for _ in range(2))
    assert bool((ball.size(first, x) <= ball.epsilon * (1 + 1e-5)).all())
    assert bool(((first >= 0) & (first <= 1)).all())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_stopping_early_reaches_the_same_verdicts(ball: InputBall) -> None:
    model, x = linear(3, 2.0), images(24)
    y = model(x).argmax(1)
    settings = {"steps": 30, "objective": "dlr_targeted"}
    whole = AutoPgd(ball, **settings)(model, x, y, generator=seeded())  # type: ignore[arg-type]
    early = AutoPgd(ball, **settings, stop_when_fooled=True)  # type: ignore[arg-type]
    hunted = early.hunt(model, x, y, generator=seeded(), confirm=PlainJudge(model))
    assert 0 < int(whole.fooled.sum()) < len(x)
    assert torch.equal(hunted.found.fooled, whole.fooled)
    assert torch.equal(model(hunted.found.x_adv).argmax(1) != y, whole.fooled)
    assert bool((hunted.queries[whole.fooled] < hunted.queries[~whole.fooled].min()).all())


def test_an_example_that_is_wrong_already_is_returned_as_it_is() -> None:
    model, x = linear(3), images(4)
    y = (model(x).argmax(1) + 1) % 3
    hunted = AutoPgd(LinfBall(0.1), stop_when_fooled=True).hunt(model, x, y, generator=seeded())
    assert torch.equal(hunted.found.x_adv, x)
    assert bool(hunted.found.fooled.all())
    assert hunted.queries.tolist() == [1] * 4


def test_unconfirmed_successes_are_searched_on() -> None:
    model, x = linear(3, 5.0), images(8)
    y = model(x).argmax(1)
    never = AutoPgd(LinfBall(0.1), steps=20, stop_when_fooled=True).hunt(
        model, x, y, generator=seeded(), confirm=lambda x_adv, labels: torch.zeros(len(labels), dtype=torch.bool)
    )
    assert not bool(never.found.fooled.any())
    assert never.queries.unique().tolist() == [1 + 1 + 20]


def test_more_restarts_never_lower_the_objective() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).eval()
    x = images()
    y = model(x).argmax(1)
    one, three = (AutoPgd(LinfBall(0.2), steps=5, restarts=n)(model, x, y, generator=seeded()) for n in (1, 3))
    assert bool((three.value >= one.value).all())


def test_one_seed_gives_one_result_and_the_model_stays_as_it_was() -> None:
    model, x = linear(3).train(), images()
    y = torch.zeros(6, dtype=torch.int64)
    weights = [p.clone() for p in model.parameters()]
    attack = AutoPgd(L1Ball(1.0), steps=10, wide_start=True)
    first, second = (attack(model, x, y, generator=seeded(5)) for _ in range(2))
    assert torch.equal(first.x_adv, second.x_adv)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_sparse_steps_reach_a_sparse_point() -> None:
    model = linear(2)
    x = images()
    y = model(x).argmax(1)
    found = AutoPgd(L1Ball(0.3), wide_start=True)(model, x, y, generator=seeded())
    assert bool((changed_pixels(found.x_adv, x) <= 4).all())


def test_passes_over_a_random_model_are_averaged() -> None:
    calls = 0

    def noisy(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        noise = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(calls))
        return x.flatten(1)[:, :3] + 0.1 * noise

    x = images()
    found = AutoPgd(LinfBall(0.1), steps=3, eot=4)(noisy, x, torch.zeros(6, dtype=torch.int64), generator=seeded())
    assert calls == 1 + 4 * (1 + 3) + 2
    assert bool(((found.x_adv - x).abs() <= 0.1 + 1e-6).all())


def test_targets_are_the_likeliest_wrong_classes_and_adapt_to_few_classes() -> None:
    logits = torch.tensor([[5.0, 1.0, 3.0, 2.0]])
    x, y = images(1), torch.tensor([0])
    assert wrong_classes(lambda _: logits, x, y, 9).tolist() == [[2, 3, 1]]
    assert wrong_classes(lambda _: logits, x, torch.tensor([2]), 2).tolist() == [[0, 3]]


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_models_of_few_and_many_classes_can_be_attacked(classes: int) -> None:
    model, x = linear(classes, 4.0), images()
    y = model(x).argmax(1)
    for objective in ("cross_entropy", "dlr", "dlr_targeted"):
        attack = AutoPgd(LinfBall(0.2), steps=10, objective=objective, stop_when_fooled=True)
        assert bool(attack(model, x, y, generator=seeded()).fooled.all())


def test_a_model_without_gradient_keeps_its_images() -> None:
    def constant(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * 0

    x = images()
    found = AutoPgd(LinfBall(0.1), steps=5)(constant, x, torch.zeros(6, dtype=torch.int64), generator=seeded())
    assert not bool(found.fooled.any())
    assert bool(((found.x_adv - x).abs() <= 0.1 + 1e-6).all())


def test_logits_that_are_not_numbers_fool_nobody() -> None:
    def broken(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * torch.nan

    hunted = AutoPgd(LinfBall(0.1), steps=3, stop_when_fooled=True).hunt(
        broken, images(), torch.ones(6, dtype=torch.int64), generator=seeded(), confirm=PlainJudge(broken)
    )
    assert not bool(hunted.found.fooled.any())
    assert bool(hunted.found.x_adv.isfinite().all())


def test_an_empty_batch_gives_an_empty_result() -> None:
    found = AutoPgd(LinfBall(0.1))(linear(), torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.int64))
    assert found.x_adv.shape == (0, *SHAPE)
    assert found.fooled.shape == (0,)


def test_an_objective_of_the_call_is_maximised_untargeted() -> None:
    model, x = linear(3), images()
    y = model(x).argmax(1)
    found = AutoPgd(LinfBall(0.05), objective="dlr_targeted")(model, x, y, cross_entropy, seeded())
    torch.testing.assert_close(found.value, cross_entropy(model(found.x_adv), y))
    assert bool((found.value > cross_entropy(model(x), y)).all())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "steps must lie in"),
        ({"restarts": 0}, "restarts must lie in"),
        ({"targets": 0}, "targets must lie in"),
        ({"rho": 1.0}, "rho must lie in"),
        ({"eot": 0}, "eot must lie in"),
        ({"objective": "drl"}, "Did you mean 'dlr'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        AutoPgd(LinfBall(0.1), **settings)  # type: ignore[arg-type]


def test_a_model_of_one_class_has_no_target() -> None:
    with pytest.raises(UserError, match="at least 2 classes, got 1"):
        wrong_classes(lambda x: x.flatten(1)[:, :1], images(), torch.zeros(6, dtype=torch.int64), 9)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.12), ("l2", 0.6), ("l1", 2.5)])
def test_runs_side_by_side_give_the_results_of_one_after_another(
    norm: str, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = mlp_digits(torch.float64)
    ball = input_ball(norm, epsilon)
    results, states = [], []
    for fill in (1, 64):
        monkeypatch.setattr("robustflat.attacks.autopgd.FILL", fill)
        attack = AutoPgd(ball, steps=10, objective="dlr_targeted", wide_start=norm == "l1", stop_when_fooled=True)
        generator = torch.Generator().manual_seed(3)
        results.append(attack.hunt(model, x[:60], y[:60], generator=generator, confirm=PlainJudge(model)).found)
        states.append(generator.get_state())
    alone, together = results
    assert torch.equal(alone.fooled, together.fooled)
    torch.testing.assert_close(together.x_adv, alone.x_adv, rtol=0, atol=1e-6)
    assert torch.equal(states[0], states[1])
