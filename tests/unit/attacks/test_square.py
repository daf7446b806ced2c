"""Square against what it promises: the ball, only rising objectives, closed forms it must come near, the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.hunt import PlainJudge
from robustflat.attacks.objectives import cross_entropy, margin
from robustflat.attacks.square import Square
from robustflat.attacks.square_proposals import Draws, apply_, draw, first_pattern, peaks
from robustflat.errors import UserError
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall
from robustflat.types import Objective

SHAPE = (2, 6, 7)
BALLS = [LinfBall(0.05), L2Ball(0.4), L1Ball(1.0)]


def linear(classes: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(84, classes)).eval()


def images(count: int = 4) -> Tensor:
    return 0.3 + 0.4 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_results_lie_in_ball_and_box_and_never_below_the_image(ball: InputBall) -> None:
    model, x = linear(4), images()
    x[0], x[1] = 0.0, 1.0
    y = model(x).argmax(1)
    before = x.clone()
    found = Square(ball, queries=60)(model, x, y, generator=seeded())
    assert torch.equal(x, before)
    assert bool((ball.size(found.x_adv, x) <= ball.epsilon * (1 + 1e-5)).all())
    assert bool(((found.x_adv >= 0) & (found.x_adv <= 1)).all())
    assert bool((found.value >= margin(model(x), y)).all())
    torch.testing.assert_close(found.value, margin(model(found.x_adv), y))


def test_linear_model_is_driven_to_its_optimum_in_linf() -> None:
    """With windows of one pixel at the end, coordinate search reaches eps * |w|_1 up to unlucky draws."""
    model, x = linear(), images()
    y = model(x).argmax(1)
    weight = model[1].weight.detach()
    best = 0.05 * (weight[1 - y] - weight[y]).abs().sum(1)
    found = Square(LinfBall(0.05), queries=1500)(model, x, y, generator=seeded())
    assert bool((found.value - margin(model(x), y) >= 0.95 * best).all())


@pytest.mark.parametrize(("ball", "share"), [(L2Ball(0.4), 0.5), (L1Ball(1.0), 0.8)], ids=["l2", "l1"])
def test_linear_model_is_pushed_most_of_the_way_in_other_norms(ball: InputBall, share: float) -> None:
    model, x = linear(), images()
    y = model(x).argmax(1)
    weight = model[1].weight.detach()
    dual = 2.0 if ball.norm == "l2" else torch.inf
    best = ball.epsilon * torch.linalg.vector_norm(weight[1 - y] - weight[y], dual, dim=1)
    found = Square(ball, queries=1000)(model, x, y, generator=seeded())
    assert bool((found.value - margin(model(x), y) >= share * best).all())


@pytest.mark.slow
@pytest.mark.parametrize(("ball", "theirs"), [(L2Ball(0.4), "L2"), (L1Ball(1.0), "L1")], ids=["l2", "l1"])
def test_linear_model_is_pushed_as_far_as_by_the_authors_code_in_other_norms(ball: InputBall, theirs: str) -> None:
    """Its windows cannot follow a random direction, so the optimum is out of reach of any Square in these norms."""
    peer = pytest.importorskip("pyautoattack.square").SquareAttack
    model, x = linear(), images()
    y = model(x).argmax(1)

    gains: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(len(x)):
        one, label = x[i : i + 1], y[i : i + 1]
        start = float(margin(model(one), label).item())
        found = Square(ball, queries=1000)(model, one, label, generator=seeded())
        gains["ours"].append(float(found.value.item()) - start)
        attack = peer(lambda z, label=label: model(z) + 100.0 * nn.functional.one_hot(label, 2), norm=theirs)
        attack.eps, attack.n_queries, attack.device = ball.epsilon, 1000, one.device
        attack.init_hyperparam(one)
        reached = attack.attack_single_run(one, label)[1]
        gains["theirs"].append(float(margin(model(reached), label).item()) - start)
    assert sum(gains["ours"]) >= 0.97 * sum(gains["theirs"])


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_more_queries_never_lower_the_objective(ball: InputBall) -> None:
    model, x = linear(3), images()
    y = model(x).argmax(1)
    few, many = (Square(ball, queries=n)(model, x, y, generator=seeded()).value for n in (20, 80))
    assert bool((many >= few - 1e-6).all())


def test_windows_shrink_as_published() -> None:
    attack = Square(LinfBall(0.1))
    x = torch.zeros(1, 3, 32, 32)
    for done, halvings in ((1, 0), (10, 0), (11, 1), (51, 2), (201, 3), (501, 4), (1001, 5), (2001, 6), (4001, 7)):
        assert attack._side(done, x) == round(math.sqrt(0.8 / 2**halvings * 1024))
    assert Square(L2Ball(0.1))._side(4999, x) == 3


@pytest.mark.parametrize("side", [3, 4, 7])
def test_the_pattern_has_a_peak_beside_a_valley(side: int) -> None:
    pattern = peaks(side, False, torch.zeros(1))
    assert float(torch.linalg.vector_norm(pattern)) == pytest.approx(1.0)
    assert bool((pattern[: side // 2] > 0).all())
    assert bool((pattern[side // 2 :] < 0).all())
    assert torch.equal(peaks(side, True, torch.zeros(1)), pattern.t())


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_the_first_pattern_has_full_size_where_the_box_allows(ball: InputBall) -> None:
    x = torch.full((3, *SHAPE), 0.5)
    start = first_pattern(ball, x, Draws(x, seeded()))
    torch.testing.assert_close(ball.size(start, x), torch.full((3,), ball.epsilon), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_stopping_at_the_first_success_keeps_the_verdicts_and_counts_queries(ball: InputBall) -> None:
    model, x = linear(3), images(12)
    y = model(x).argmax(1)
    hunted = Square(ball, queries=40, stop_when_fooled=True).hunt(
        model, x, y, generator=seeded(), confirm=PlainJudge(model)
    )
    assert torch.equal(model(hunted.found.x_adv).argmax(1) != y, hunted.found.fooled)
    assert bool((hunted.queries[~hunted.found.fooled] == 41).all())
    assert bool((hunted.queries <= 41).all())


def test_one_seed_gives_one_result_and_no_gradient_is_needed() -> None:
    model, x = linear(3), images()
    y = model(x).argmax(1)
    first, second = (Square(L2Ball(0.3), queries=30)(model, x, y, generator=seeded(2)) for _ in range(2))
    assert torch.equal(first.x_adv, second.x_adv)
    with torch.inference_mode():
        third = Square(L2Ball(0.3), queries=30)(model, x, y, generator=seeded(2))
    assert torch.equal(third.x_adv, first.x_adv)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 4)])
@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_images_of_any_size_can_be_searched(ball: InputBall, size: tuple[int, int]) -> None:
    x = torch.full((2, 1, *size), 0.5)
    found = Square(ball, queries=15)(
        lambda v: torch.stack([v.flatten(1).sum(1), -v.flatten(1).sum(1)], 1), x, torch.zeros(2, dtype=torch.int64)
    )
    assert bool((ball.size(found.x_adv, x) <= ball.epsilon * (1 + 1e-5)).all())


def test_odd_models_are_not_broken() -> None:
    x = images()
    for factor, label in ((0.0, 0), (torch.nan, 1)):  # the largest logit is then the first
        y = torch.full((4,), label)
        hunted = Square(LinfBall(0.1), queries=12, stop_when_fooled=True).hunt(
            lambda v, f=factor: v.flatten(1)[:, :3] * f, x, y, generator=seeded()
        )
        assert not bool(hunted.found.fooled.any())
        assert bool(hunted.found.x_adv.isfinite().all())


def test_an_empty_batch_gives_an_empty_result() -> None:
    x, y = torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.int64)
    assert Square(LinfBall(0.1))(linear(), x, y).x_adv.shape == (0, *SHAPE)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"queries": 0}, "queries must lie in"),
        ({"p_init": 0.0}, "p_init must lie in"),
        ({"restarts": 0}, "restarts must lie in"),
        ({"objective": "margn"}, "Did you mean 'margin'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Square(LinfBall(0.1), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("goal", [None, cross_entropy], ids=["margin", "cross_entropy"])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_proposals_tried_ahead_change_nothing(ball: InputBall, stop: bool, goal: Objective | None) -> None:
    model, x = linear(3).double(), images(5).double()
    y = model(x).argmax(1)
    passes: list[int] = []

    def forward(point: Tensor) -> Tensor:
        passes[-1] += 1
        logits: Tensor = model(point)
        return logits

    hunted = []
    for fill in (1, 12, 64):
        passes.append(0)
        attack = Square(ball, queries=153, stop_when_fooled=stop, fill=fill)
        hunted.append(attack.hunt(forward, x, y, goal, seeded()))
    for other in hunted[1:]:
        assert torch.equal(other.found.fooled, hunted[0].found.fooled)
        assert torch.equal(other.queries, hunted[0].queries)
        torch.testing.assert_close(other.found.x_adv, hunted[0].found.x_adv, rtol=0, atol=1e-6)
    assert passes[2] < passes[1] < passes[0]


@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(1.0), L1Ball(12.0)])
def test_every_proposal_is_an_image_of_the_ball(ball: InputBall) -> None:
    x = torch.rand(16, 3, 9, 9)
    draws = Draws(x, torch.Generator().manual_seed(0))
    point = first_pattern(ball, x, draws)
    for side in (7, 5, 3, 1) * 5:
        apply_(draw(ball, x, side, draws), ball, point, x)
        assert bool(((point >= 0) & (point <= 1)).all())  # numbers, too
        assert float(ball.size(point, x).max()) <= ball.epsilon * (1 + 1e-5)
