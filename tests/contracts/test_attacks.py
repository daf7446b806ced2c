"""What every attack and every wrapper promises, checked for a table of them.

A new attack gets one line in `ATTACKS`; where it documents an exception, it names it there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.autoattack import AutoAttackSearch
from robustflat.attacks.autopgd import AutoPgd
from robustflat.attacks.fab import Fab
from robustflat.attacks.fmn import Fmn
from robustflat.attacks.foreign import Foreign
from robustflat.attacks.multi_targeted import MultiTargeted
from robustflat.attacks.noise import NFgsm, RandomNoise
from robustflat.attacks.objectives import cross_entropy, kl_divergence, margin
from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.attacks.rehearsal import rehearse
from robustflat.attacks.square import Square
from robustflat.attacks.transfer import Transfer
from robustflat.attacks.wrappers import Fraction, OnlyCorrect, PredictedLabels, Restarts, WorstOf
from robustflat.errors import UserError
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall
from robustflat.types import Attack, Found
from tests.waiting import NoWaiting, without_checks_on_cpu

LINF, L2, L1 = LinfBall(8 / 255), L2Ball(0.5), L1Ball(4.0)


UNPREDICTABLE = MultiTargeted | Fraction | AutoPgd | Fab | Square | AutoAttackSearch
"""What an attack of these draws may depend on what it finds."""


class Case(NamedTuple):
    """An attack, the ball it stays in, and what it may do otherwise."""

    attack: Attack
    ball: InputBall
    random_start: bool = False  # its search begins elsewhere than at x, so its value is not compared with that of x
    may_lower: bool = False  # its result may have a lower value than where it began, for a documented reason
    optimal: bool = True  # finds the best image of a linear model
    harmful: bool = True  # raises the mean value of a batch clearly; false for those that search something else
    looks: bool = False  # looks at what it found and waits for the device: per call, query, or few steps


def pgd(ball: InputBall = LINF, **options: object) -> Pgd:
    settings: dict[str, object] = {
        "steps": 10,
        "step_size": ball.epsilon / 4,
        "random_start": False,
        **options,
    }
    return Pgd(ball, **settings)  # type: ignore[arg-type]


def source() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


ATTACKS: dict[str, Case] = {
    "none": Case(NoAttack(), LINF, harmful=False, optimal=False),
    "pgd_linf": Case(pgd(), LINF),
    "pgd_linf_uniform": Case(pgd(random_start=True), LINF, random_start=True),
    "pgd_linf_uniform_norm": Case(pgd(random_start="uniform_norm"), LINF, random_start=True),
    "pgd_linf_gaussian": Case(pgd(random_start="gaussian"), LINF, random_start=True),
    "pgd_linf_momentum": Case(pgd(momentum=0.5), LINF),
    "pgd_linf_backtracking": Case(pgd(backtracking=True), LINF),
    "pgd_linf_restarts": Case(pgd(random_start=True, restarts=3), LINF, random_start=True),
    "pgd_linf_fooled_first": Case(pgd(keep="fooled"), LINF, may_lower=True, optimal=False),
    "pgd_linf_last": Case(pgd(keep="last"), LINF, may_lower=True),
    "pgd_linf_tau": Case(pgd(tau=0, random_start=True), LINF, may_lower=True, harmful=False, optimal=False),
    "pgd_linf_margin": Case(pgd(objective="margin"), LINF),
    "pgd_linf_dlr": Case(pgd(objective="dlr"), LINF, optimal=False),
    "pgd_linf_targeted": Case(pgd(targeted=True), LINF),
    "fgsm_linf": Case(pgd(steps=1, step_size=LINF.epsilon, keep="last"), LINF, may_lower=True),
    "fgsm_rs_linf": Case(
        pgd(steps=1, step_size=1.25 * LINF.epsilon, random_start=True, keep="last"),
        LINF,
        may_lower=True,
        optimal=False,
    ),
    "pgd_l2": Case(pgd(L2), L2),
    "pgd_l2_random": Case(pgd(L2, random_start=True, steps=60), L2, random_start=True, optimal=False),
    "pgd_l1": Case(pgd(L1, steps=40, step_size=L1.epsilon), L1),
    "pgd_l1_one_coordinate": Case(pgd(L1, l1_sparsity=1e-9), L1),
    "random_noise": Case(RandomNoise(LINF, trials=3), LINF, random_start=True, harmful=False, optimal=False),
    "random_noise_gaussian": Case(
        RandomNoise(L2, trials=3, kind="gaussian"), L2, random_start=True, harmful=False, optimal=False
    ),
    "n_fgsm": Case(
        NFgsm(LINF, step_size=LINF.epsilon),
        LinfBall(3 * LINF.epsilon),
        random_start=True,
        may_lower=True,
        optimal=False,
    ),
    "multi_targeted": Case(MultiTargeted(pgd(), targets=2), LINF),
    "multi_targeted_dlr": Case(MultiTargeted(pgd(), objective="dlr_targeted"), LINF, optimal=False),
    "fmn_linf": Case(Fmn(LINF, steps=20, step_size=0.5), LINF, may_lower=True, harmful=False, optimal=False),
    "fmn_l2": Case(Fmn(L2, steps=20, step_size=0.5), L2, harmful=False, optimal=False),
    "fmn_l1": Case(Fmn(L1, steps=20, step_size=0.5), L1, harmful=False, optimal=False),
    "auto_pgd_linf": Case(AutoPgd(LINF, steps=10), LINF, random_start=True),
    "auto_pgd_l2": Case(AutoPgd(L2, steps=10), L2, random_start=True, optimal=False),
    "auto_pgd_l1": Case(AutoPgd(L1, steps=10, wide_start=True), L1, random_start=True, optimal=False),
    "auto_pgd_targets": Case(AutoPgd(LINF, steps=10, objective="dlr_targeted"), LINF, optimal=False),
    "auto_pgd_stops": Case(
        AutoPgd(LINF, steps=10, restarts=2, stop_when_fooled=True),
        LINF,
        random_start=True,
        may_lower=True,
        harmful=False,
        optimal=False,
        looks=True,
    ),
    "fab_linf": Case(Fab(LINF, steps=5), LINF, may_lower=True, harmful=False, optimal=False, looks=True),
    "fab_l2": Case(Fab(L2, steps=5), L2, may_lower=True, harmful=False, optimal=False, looks=True),
    "fab_l1": Case(
        Fab(L1, steps=5, targets=None, stop_when_fooled=True),
        L1,
        may_lower=True,
        harmful=False,
        optimal=False,
        looks=True,
    ),
    "square_linf": Case(Square(LINF, queries=30), LINF, random_start=True, harmful=False, optimal=False, looks=True),
    "square_l2": Case(Square(L2, queries=30), L2, random_start=True, harmful=False, optimal=False, looks=True),
    "square_l1": Case(
        Square(L1, queries=30, stop_when_fooled=True),
        L1,
        random_start=True,
        may_lower=True,
        harmful=False,
        optimal=False,
        looks=True,
    ),
    "autoattack": Case(
        AutoAttackSearch(LINF, version="custom", attacks=["apgd-ce"]),
        LINF,
        random_start=True,
        may_lower=True,
        optimal=False,
        looks=True,
    ),
    "foreign": Case(
        Foreign(lambda model, x, y: x + LINF.epsilon, LINF),
        LINF,
        may_lower=True,
        harmful=False,
        optimal=False,
        looks=True,
    ),
    "restarts": Case(Restarts(pgd(random_start=True), 2), LINF, random_start=True),
    "worst_of": Case(WorstOf({"pgd": pgd(), "margin": pgd(objective="margin")}), LINF, may_lower=True),
    "fraction": Case(Fraction(pgd(), 0.5), LINF, optimal=False),
    "predicted_labels": Case(PredictedLabels(pgd()), LINF, may_lower=True, harmful=False, optimal=False),
    "only_correct": Case(OnlyCorrect(pgd()), LINF, optimal=False),
    "transfer": Case(Transfer(pgd(), source()), LINF, may_lower=True, harmful=False, optimal=False),
}


def cases(condition: Callable[[Case], bool] = lambda _: True) -> pytest.MarkDecorator:
    """Run a test for every attack of the table, or for those that promise what it checks."""
    chosen = [pytest.param(case, id=name) for name, case in ATTACKS.items() if condition(case)]
    return pytest.mark.parametrize("case", chosen)


def keeps_the_start(case: Case) -> bool:
    return not case.random_start and not case.may_lower


def alike_in_any_batch(case: Case) -> bool:
    mixes = isinstance(case.attack, Fraction)
    random = case.random_start or getattr(case.attack, "random_start", None) is not None
    return not mixes and not random and has_no_own_dtype(case)


def has_no_own_dtype(case: Case) -> bool:
    return not isinstance(case.attack, Transfer)  # the source has one


class Network(nn.Module):
    """Small network with everything an attack could disturb: batch norm, dropout, frozen weights, a gradient."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(16, classes)
        self.conv.bias.requires_grad_(False)  # type: ignore[union-attr]
        self.linear.weight.grad = torch.ones_like(self.linear.weight)
        with torch.no_grad():
            self.norm.running_mean.normal_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 4 * self.linear(self.dropout(self.norm(self.conv(x)).tanh().flatten(1)))
        return logits


def batch(size: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.rand(size, 3, 4, 4, generator=generator)
    x[0], x[1] = 0.0, 1.0  # images at the ends of the box
    return x, torch.randint(classes, (size,), generator=generator)


def run(case: Case, model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> Found:
    return case.attack(model, x, y, generator=torch.Generator().manual_seed(seed))


def objective_of(case: Case, logits: Tensor, y: Tensor) -> Tensor:
    value: Tensor = getattr(case.attack, "objective", cross_entropy)(logits, y)
    return -value if getattr(case.attack, "targeted", False) else value


@pytest.mark.parametrize("classes", [2, 3, 100])
@cases()
def test_the_result_lies_in_ball_and_box(case: Case, classes: int) -> None:
    x, y = batch(classes=classes)
    found = run(case, Network(classes), x, y % 3 if isinstance(case.attack, Transfer) else y)
    assert (case.ball.size(found.x_adv.double(), x.double()) <= case.ball.epsilon * (1 + 1e-6)).all()
    assert found.x_adv.min() >= 0
    assert found.x_adv.max() <= 1


@cases()
def test_a_rehearsal_draws_what_a_call_draws_or_says_that_it_cannot(case: Case) -> None:
    x, y = batch()
    real, rehearsed = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    if not rehearse(case.attack, x, rehearsed):
        assert isinstance(case.attack, UNPREDICTABLE)
        return
    case.attack(Network(), x, y, generator=real)
    assert torch.equal(real.get_state(), rehearsed.get_state())


@cases()
def test_value_and_fooled_describe_the_returned_image(case: Case) -> None:
    x, y = batch(32)
    model = Network().train()
    found = run(case, model, x, y)
    logits = model.eval()(found.x_adv)
    torch.testing.assert_close(found.value, objective_of(case, logits, y), rtol=1e-4, atol=1e-5)
    reached = logits.argmax(1) == y
    assert torch.equal(found.fooled, reached if getattr(case.attack, "targeted", False) else ~reached)


@cases(keeps_the_start)
def test_the_value_is_not_lower_than_at_the_start(case: Case) -> None:
    x, y = batch(32)
    found = run(case, Network(), x, y)
    start = objective_of(case, Network().eval()(x), y)
    assert (found.value >= start - 1e-6).all()


@cases(lambda case: case.harmful)
def test_the_attack_does_harm(case: Case) -> None:
    """On average over a batch; the promise above is about each image."""
    x, y = batch(32)
    found = run(case, Network(), x, y)
    start = objective_of(case, Network().eval()(x), y)
    assert found.value.mean() > start.mean() + 0.01


@cases()
def test_the_same_generator_state_gives_the_same_result(case: Case) -> None:
    x, y = batch()
    one, other = run(case, Network(), x, y), run(case, Network(), x, y)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    changed = run(case, Network(), x, y, seed=1)
    assert not case.random_start or not torch.equal(one.x_adv, changed.x_adv)


@pytest.mark.parametrize("training", [True, False])
@cases()
def test_the_model_is_left_as_it_was_found(case: Case, training: bool) -> None:
    model = Network().train(training)
    model.norm.eval()
    before = copy.deepcopy(model)
    run(case, model, *batch())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad, name
        assert torch.equal(p, q), name
        assert (p.grad is None) == (name != "linear.weight"), name
        assert p.grad is None or (p.grad == 1).all(), name
    for buffer, original in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(buffer, original)


@cases()
def test_a_module_is_attacked_in_eval_mode(case: Case) -> None:
    x, y = batch()
    assert torch.equal(run(case, Network().train(), x, y).x_adv, run(case, Network().eval(), x, y).x_adv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@cases(has_no_own_dtype)
def test_shape_dtype_and_device_of_the_images_are_kept(case: Case, dtype: torch.dtype) -> None:
    x, y = batch()
    found = run(case, Network().to(dtype), x.to(dtype), y)
    assert (found.x_adv.dtype, found.x_adv.device, found.x_adv.shape) == (dtype, x.device, x.shape)
    assert (found.value.dtype, found.value.shape) == (dtype, y.shape)
    assert (found.fooled.dtype, found.fooled.shape) == (torch.bool, y.shape)
    assert not any(part.requires_grad for part in found)


@cases()
def test_images_and_labels_are_not_modified(case: Case) -> None:
    x, y = batch()
    copies = x.clone(), y.clone()
    found = run(case, Network(), x, y)
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])
    assert not x.requires_grad
    shared = found.x_adv.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shared == isinstance(case.attack, NoAttack)


@cases()
def test_an_empty_batch_gives_an_empty_result(case: Case) -> None:
    x, y = batch()
    found = run(case, Network(), x[:0], y[:0])
    assert (found.x_adv.shape, found.value.shape, found.fooled.shape) == ((0, 3, 4, 4), (0,), (0,))
    assert found.fooled.dtype == torch.bool


@cases()
def test_labels_that_are_no_class_are_refused_on_the_cpu(case: Case) -> None:
    x, y = batch()
    for bad in (y + 3, y - 3):
        with pytest.raises(UserError, match="labels must be"):
            run(case, Network(), x, bad)


@cases(lambda case: not isinstance(case.attack, NoAttack))
def test_images_outside_the_box_are_refused_on_the_cpu(case: Case) -> None:
    x, y = batch()
    for bad in (255 * x, x - 0.5, x * torch.nan):
        with pytest.raises(UserError, match="must lie in"):
            run(case, Network(), bad, y)


@cases(alike_in_any_batch)
def test_an_image_alone_is_attacked_as_in_a_batch(case: Case) -> None:
    x, y = (t[2:] for t in batch())
    model, x = Network().double(), x.double()
    together, alone = run(case, model, x, y), run(case, model, x[:1], y[:1])
    torch.testing.assert_close(alone.value, together.value[:1])
    torch.testing.assert_close(alone.x_adv, together.x_adv[:1])


@cases()
def test_the_objective_of_the_call_is_the_one_reported(case: Case) -> None:
    x, y = batch()
    found = case.attack(Network(), x, y, margin, torch.Generator().manual_seed(0))
    logits = Network().eval()(found.x_adv)
    expected = -margin(logits, y) if getattr(case.attack, "targeted", False) else margin(logits, y)
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=1e-5)


@cases()
def test_probabilities_work_as_labels_of_the_divergence(case: Case) -> None:
    x, _ = batch()
    y = Network().eval()(x).detach().softmax(1)
    found = case.attack(Network(), x, y, kl_divergence, torch.Generator().manual_seed(0))
    assert found.value.isfinite().all()


class Plane(nn.Module):
    """Two logits, linear in the image: +w.x / 2 and -w.x / 2."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.w = nn.Parameter(torch.randn(48, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        half = x.flatten(1) @ self.w / 2
        return torch.stack([half, -half], dim=1)


DUAL_NORM: dict[str, Callable[[Tensor], Tensor]] = {
    "linf": lambda w: w.abs().sum(),
    "l2": lambda w: w.square().sum().sqrt(),
    "l1": lambda w: w.abs().max(),
}


@cases(lambda case: case.optimal)
def test_a_linear_model_is_moved_by_epsilon_times_the_dual_norm(case: Case) -> None:
    """Far from the box the best image lowers the margin of a linear model by epsilon * ||w||_dual."""
    model = Plane()
    # So far inside an enlarged box that the box plays no part; the attacks share one, from 0 to 1.
    x = 0.5 + 0.05 * torch.rand(8, 3, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 1] * 4)
    attack, ball = case.attack, case.ball
    if ball.norm != "linf":
        attack = _with_epsilon(attack, ball, 0.3)
    epsilon = ball.epsilon if ball.norm == "linf" else 0.3
    found = attack(model, x, y, None, torch.Generator().manual_seed(0))
    change = margin(model(found.x_adv), y) - margin(model(x), y)
    sign = -1 if getattr(attack, "targeted", False) else 1
    optimum = epsilon * DUAL_NORM[ball.norm](model.w.detach())
    torch.testing.assert_close(sign * change, optimum.expand(8), rtol=1e-6, atol=0)


def _with_epsilon(attack: Attack, ball: InputBall, epsilon: float) -> Attack:
    """The same attack in a ball so small that no pixel reaches the box."""
    smaller = copy.deepcopy(attack)
    assert isinstance(smaller, Pgd)
    smaller.step_size *= epsilon / ball.epsilon
    smaller.ball = type(ball)(epsilon)
    return smaller


@cases(lambda case: not case.looks)
def test_the_search_reads_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(case.attack, AutoPgd) and case.ball.norm == "l1":
        pytest.skip("on a CPU only, its projection looks whether it may end early")
    without_checks_on_cpu(monkeypatch)
    x, y = batch()
    generator = torch.Generator().manual_seed(0)
    with NoWaiting():
        case.attack(Network(), x, y, generator=generator)


@pytest.mark.gpu
@cases(lambda case: not case.looks)
def test_the_search_does_not_wait_for_the_device(case: Case) -> None:
    x, y = (t.cuda() for t in batch())
    model = Network().cuda()
    attack = copy.deepcopy(case.attack)
    if isinstance(attack, Transfer):
        assert isinstance(attack.surrogate, nn.Module)
        attack.surrogate.cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    attack(model, x, y, generator=generator)  # the first call may set up libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        attack(model, x, y, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
