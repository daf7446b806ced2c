"""PGD against a literal reference (one example at a time, gradient by hand), and its options one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.objectives import Targeted, cross_entropy, margin
from robustflat.attacks.pgd import GAUSSIAN_START, NoAttack, Pgd
from robustflat.errors import UserError
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall

SHAPE = (1, 2, 3)


class TwoLayers:
    """W2 tanh(W1 x): batched for the attack, and row by row with a gradient by hand for the reference."""

    def __init__(self, classes: int = 4) -> None:
        generator = torch.Generator().manual_seed(3)
        self.w1 = 2 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
        self.w2 = 3 * torch.randn(classes, 5, generator=generator, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.w1.T).tanh() @ self.w2.T

    def loss_and_gradient(self, row: list[float], label: int) -> tuple[float, list[float], bool]:
        """Cross-entropy of one example, its gradient to the input, and whether the prediction is wrong."""
        w1, w2 = self.w1.tolist(), self.w2.tolist()
        hidden = [math.tanh(sum(w * v for w, v in zip(ws, row, strict=True))) for ws in w1]
        logits = [sum(w * h for w, h in zip(ws, hidden, strict=True)) for ws in w2]
        top = max(logits)
        log_total = top + math.log(sum(math.exp(z - top) for z in logits))
        error = [math.exp(z - log_total) - (k == label) for k, z in enumerate(logits)]
        back = [(1 - h * h) * sum(error[k] * w2[k][j] for k in range(len(logits))) for j, h in enumerate(hidden)]
        gradient = [sum(back[j] * w1[j][i] for j in range(len(hidden))) for i in range(len(row))]
        return log_total - logits[label], gradient, logits.index(top) != label


@dataclass(frozen=True)
class Options:
    epsilon: float = 0.2
    steps: int = 6
    step_size: float = 0.07
    momentum: float = 0.0
    targeted: bool = False
    keep: str = "best"
    backtracking: float | None = None
    tau: int | None = None
    norm: str = "linf"


def project(row: list[float], centre: list[float], options: Options) -> list[float]:
    delta = [a - c for a, c in zip(row, centre, strict=True)]
    if options.norm == "l2":  # the box is far away in the tests that use this
        norm = math.sqrt(sum(d * d for d in delta))
        return [c + d * min(1, options.epsilon / norm) for c, d in zip(centre, delta, strict=True)]
    clipped = [min(max(d, -options.epsilon), options.epsilon) for d in delta]
    return [min(max(c + d, 0.0), 1.0) for c, d in zip(centre, clipped, strict=True)]


def steepest(gradient: list[float], options: Options) -> list[float]:
    if options.norm == "l2":
        norm = math.sqrt(sum(g * g for g in gradient))
        return [g / norm for g in gradient]
    return [math.copysign(1, g) if g else 0.0 for g in gradient]


def slow_pgd(
    model: TwoLayers, centre: list[float], start: list[float], label: int, o: Options
) -> tuple[list[float], float]:
    """The released algorithm, written out for one example. Returns image and value."""
    sign = -1 if o.targeted else 1

    def measure(row: list[float]) -> tuple[float, list[float], bool]:
        loss, gradient, wrong = model.loss_and_gradient(row, label)
        return sign * loss, [sign * g for g in gradient], wrong != o.targeted

    best: tuple[list[float], float, bool] | None = None
    stored: tuple[list[float], float] | None = None
    stores_left = 0 if o.tau is None else o.tau + 1
    point, size, velocity = start, o.step_size, [0.0] * len(start)
    accepted: tuple[list[float], float, list[float]] | None = None
    for step in range(o.steps + 1):
        value, gradient, fooled = measure(point)
        if fooled and stores_left > 0 and (stored is None or value > stored[1]):
            stored, stores_left = (point, value), stores_left - 1
        if (
            best is None
            or o.keep == "last"
            or (o.keep == "fooled" and (fooled, value) > (best[2], best[1]))
            or (o.keep == "best" and value > best[1])
        ):
            best = (point, value, fooled)
        if step == o.steps:
            break
        if o.backtracking is not None:
            if accepted is None or value >= accepted[1]:
                accepted = (point, value, gradient)
            else:
                size *= o.backtracking
            point, _, gradient = accepted
        direction = steepest(gradient, o)
        velocity = [o.momentum * v + (1 - o.momentum) * d for v, d in zip(velocity, direction, strict=True)]
        point = project([p + size * v for p, v in zip(point, velocity, strict=True)], centre, o)
    assert best is not None
    if o.tau is not None:
        return stored if stored is not None else (centre, measure(centre)[0])
    return best[0], best[1]


def images(size: int = 12, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = low + (high - low) * torch.rand(size, *SHAPE, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (size,), generator=generator)


CASES = {
    "plain": Options(),
    "momentum": Options(momentum=0.75),
    "last": Options(keep="last", step_size=0.3),
    "fooled_first": Options(keep="fooled", step_size=0.3),
    "targeted": Options(targeted=True),
    "backtracking": Options(backtracking=0.5, step_size=0.35, steps=9),
    "backtracking_with_momentum": Options(backtracking=0.3, step_size=0.35, steps=9, momentum=0.5),
    "tau_0": Options(tau=0, epsilon=0.08, step_size=0.02),
    "tau_2": Options(tau=2, epsilon=0.08, step_size=0.02),
    "tau_targeted": Options(tau=1, epsilon=0.15, step_size=0.03, targeted=True),
    "l2": Options(norm="l2"),
    "l2_momentum_backtracking": Options(norm="l2", momentum=0.9, backtracking=0.5, step_size=0.3, steps=9),
}


@pytest.mark.parametrize("random_start", [False, True], ids=["from_x", "from_noise"])
@pytest.mark.parametrize("case", CASES)
def test_pgd_agrees_with_the_slow_reference(case: str, random_start: bool) -> None:
    o, model = CASES[case], TwoLayers()
    ball: InputBall = L2Ball(o.epsilon) if o.norm == "l2" else LinfBall(o.epsilon)
    x, y = images(low=0.3, high=0.7) if o.norm == "l2" else images()
    attack = Pgd(
        ball,
        steps=o.steps,
        step_size=o.step_size,
        momentum=o.momentum,
        random_start=random_start,
        targeted=o.targeted,
        keep=o.keep,
        backtracking=False if o.backtracking is None else o.backtracking,
        tau=o.tau,
    )
    found = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    start = ball.sample(x, torch.Generator().manual_seed(0)) if random_start else x
    for i in range(len(x)):
        row, value = slow_pgd(model, x[i].flatten().tolist(), start[i].flatten().tolist(), int(y[i]), o)
        assert found.x_adv[i].flatten().tolist() == pytest.approx(row, abs=1e-10)
        assert found.value[i].item() == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_value_and_fooled_are_those_of_the_image_returned(case: str) -> None:
    o, model = CASES[case], TwoLayers()
    x, y = images()
    tau, back = o.tau, o.backtracking or False
    attack = Pgd(
        LinfBall(o.epsilon),
        steps=4,
        step_size=o.step_size,
        targeted=o.targeted,
        keep=o.keep,
        tau=tau,
        backtracking=back,
    )
    found = attack(model, x, y)
    logits = model(found.x_adv)
    value = Targeted(cross_entropy)(logits, y) if o.targeted else cross_entropy(logits, y)
    torch.testing.assert_close(found.value, value, rtol=0, atol=1e-12)
    assert torch.equal(found.fooled, (logits.argmax(1) == y) == o.targeted)
    assert 0 < found.fooled.sum() < len(x), "the case should have both kinds"


def test_a_never_fooled_example_stays_clean_under_tau() -> None:
    x, y = images()
    found = Pgd(LinfBall(0.02), steps=3, step_size=0.01, tau=0)(TwoLayers(), x, y)
    moved = (found.x_adv != x).flatten(1).any(1)
    assert torch.equal(moved, found.fooled)
    assert (~moved).any()


def test_tau_limits_how_often_an_example_gets_worse() -> None:
    x, y = images()
    values = [
        Pgd(LinfBall(0.2), steps=9, step_size=0.02, random_start=False, tau=tau)(TwoLayers(), x, y).value
        for tau in (0, 3, 99)
    ]
    assert (values[0] < values[1]).any()
    assert (values[1] < values[2]).any()
    full = Pgd(LinfBall(0.2), steps=9, step_size=0.02, random_start=False)(TwoLayers(), x, y)
    assert torch.equal(values[2][full.fooled], full.value[full.fooled])


class Counting(nn.Module):
    """Counts passes of a small network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(6, 4))
        self.forwards = self.backwards = self.with_graph = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        logits: Tensor = self.network(x)
        if logits.requires_grad:
            self.with_graph += 1
            logits.register_hook(lambda _: setattr(self, "backwards", self.backwards + 1))
        return logits


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_k_steps_cost_k_plus_1_forward_and_k_backward_passes(keep: str, restarts: int) -> None:
    model = Counting().eval()
    x, y = (t.float() if t.is_floating_point() else t for t in images())
    Pgd(LinfBall(0.1), steps=5, step_size=0.02, keep=keep, restarts=restarts)(model, x, y)
    assert (model.forwards, model.backwards, model.with_graph) == (6, 5, 5)


def test_weights_get_no_gradient_even_through_a_plain_callable() -> None:
    model = Counting().train()
    x, y = (t.float() if t.is_floating_point() else t for t in images())
    Pgd(LinfBall(0.1), steps=2, step_size=0.02)(lambda z: model(z), x, y)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_result(context: Callable[[], Any]) -> None:
    x, y = images()
    attack = Pgd(LinfBall(0.1), steps=3, step_size=0.05, random_start=False)
    expected = attack(TwoLayers(), x, y)
    model = TwoLayers()
    with context():
        found = attack(model, x + 0, y + 0)
    assert torch.equal(found.x_adv, expected.x_adv)


def test_restarts_keep_the_best_of_independent_searches() -> None:
    x, y = images()
    model = TwoLayers()
    many = Pgd(LinfBall(0.2), steps=2, step_size=0.02, restarts=4)
    one = Pgd(LinfBall(0.2), steps=2, step_size=0.02, random_start=False)
    found = many(model, x, y, generator=torch.Generator().manual_seed(1))
    starts = many.ball.sample(torch.cat([x] * 4), torch.Generator().manual_seed(1)).chunk(4)
    runs = [slow_best(model, x, start, y) for start in starts]
    expected = torch.stack(runs).amax(0)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-10)
    assert (found.value > one(model, x, y).value).any()


def slow_best(model: TwoLayers, x: Tensor, start: Tensor, y: Tensor) -> Tensor:
    o = Options(steps=2, step_size=0.02)
    rows = zip(x.flatten(1).tolist(), start.flatten(1).tolist(), y.tolist(), strict=True)
    return torch.tensor([slow_pgd(model, a, b, k, o)[1] for a, b, k in rows], dtype=torch.float64)


def test_the_objective_of_the_call_wins_over_the_attack_s_own() -> None:
    x, y = images()
    own = Pgd(LinfBall(0.1), steps=3, step_size=0.05, random_start=False, objective="margin")
    other = Pgd(LinfBall(0.1), steps=3, step_size=0.05, random_start=False)
    assert torch.equal(own(TwoLayers(), x, y).value, other(TwoLayers(), x, y, margin).value)
    assert not torch.equal(own(TwoLayers(), x, y).value, other(TwoLayers(), x, y).value)


def test_random_starts_have_their_documented_distributions() -> None:
    x = torch.full((2000, 1, 4, 4), 0.5)
    y = torch.zeros(2000, dtype=torch.int64)

    def start(kind: bool | str) -> Tensor:
        # A step far below rounding leaves the start itself.
        attack = Pgd(LinfBall(0.1), steps=1, step_size=1e-30, random_start=kind)
        return attack(lambda z: z.flatten(1), x, y).x_adv - x

    assert start(False).abs().max() == 0
    assert start(True).abs().mean().item() == pytest.approx(0.05, rel=0.02)
    assert start("uniform").abs().mean().item() == pytest.approx(0.05, rel=0.02)
    sizes = start("uniform_norm").abs().flatten(1).amax(1)
    assert sizes.mean().item() == pytest.approx(0.05, rel=0.05)
    assert sizes.std().item() == pytest.approx(0.1 / math.sqrt(12), rel=0.05)
    assert start("gaussian").std().item() == pytest.approx(GAUSSIAN_START, rel=0.02)


def test_a_sparse_l1_step_moves_the_documented_share_in_proportion() -> None:
    weight = torch.tensor([[1.0, -4, 2, 3, -5, 0]], dtype=torch.float64)
    x = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    attack = Pgd(L1Ball(1.0), steps=1, step_size=0.1, random_start=False, keep="last", l1_sparsity=0.5)
    found = attack(lambda z: torch.cat([z.flatten(1) @ weight.T, torch.zeros(1, 1)], 1), x, torch.tensor([1]))
    expected = 0.1 * torch.tensor([0, -4, 0, 3, -5, 0], dtype=torch.float64) / 12
    torch.testing.assert_close((found.x_adv - x).flatten(), expected)


def test_sparse_l1_steps_pass_over_pixels_at_the_end_of_the_box() -> None:
    """The optimum of a linear model in ball and box: fill the pixels in the order of their weights."""
    weight = torch.tensor([[6.0, -5, 4, 3, -2, 1]], dtype=torch.float64)
    x = torch.tensor([0.9, 0.2, 0.6, 0.5, 0.5, 0.5], dtype=torch.float64).view(1, *SHAPE)
    forward: Callable[[Tensor], Tensor] = lambda z: torch.cat([z.flatten(1) @ weight.T, torch.zeros(1, 1)], 1)  # noqa: E731
    y = torch.tensor([1])
    optimum = 6 * 0.1 + 5 * 0.2 + 4 * 0.4 + 3 * 0.1
    start = (weight @ x.flatten()).item()

    def gain(l1_sparsity: float) -> float:
        attack = Pgd(L1Ball(0.8), steps=100, step_size=0.05, random_start=False, l1_sparsity=l1_sparsity)
        return attack(forward, x, y, margin).value.item() - start

    assert 0.995 * optimum < gain(0.5) < optimum + 1e-12
    assert gain(1e-9) > 0.9 * optimum  # one coordinate at a time


def test_no_attack_returns_the_images_themselves() -> None:
    x, y = images()
    found = NoAttack()(TwoLayers(), x, y)
    assert found.x_adv is x
    assert torch.equal(found.value, cross_entropy(TwoLayers()(x), y))
    assert torch.equal(found.fooled, TwoLayers()(x).argmax(1) != y)


BALL = LinfBall(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps must lie in \[1, inf\), got 0. For no attack use attack=none"),
        ({"step_size": 0.0}, r"step_size must lie in \(0, inf\), got 0.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"restarts": 0}, r"restarts must lie in \[1, inf\), got 0"),
        ({"restarts": 2, "random_start": False}, "would repeat the same search: give a random_start"),
        ({"random_start": "gausian"}, "random_start must be one of.*Did you mean 'gaussian'"),
        ({"objective": "ce"}, "objective must be one of"),
        ({"keep": "first"}, "keep must be one of best, fooled, last"),
        ({"tau": -1}, r"tau must lie in \[0, inf\), got -1. tau=null is plain PGD"),
        ({"tau": 0, "keep": "last"}, "keep=last does not go with tau or backtracking"),
        ({"backtracking": True, "keep": "fooled"}, "keep=fooled does not go with tau or backtracking"),
        ({"backtracking": 1.0}, r"backtracking must lie in \(0, 1\), got 1.0"),
        ({"l1_sparsity": 0.1}, "l1_sparsity is for an L1 ball; this ball's norm is linf"),
        ({"ball": L1Ball(1.0), "l1_sparsity": 0.0}, r"l1_sparsity must lie in \(0, 1\], got 0.0"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"ball": BALL, "steps": 1, "step_size": 0.1, **options}
    with pytest.raises(UserError, match=message):
        Pgd(**arguments)


def test_a_model_without_gradients_is_refused_with_the_reason() -> None:
    x, y = images()
    model = TwoLayers()
    with pytest.raises(UserError, match=r"cannot be differentiated.*torch.no_grad\(\) or detach"):
        Pgd(BALL, steps=1, step_size=0.1)(lambda z: model(z.detach()), x, y)


def test_an_objective_that_averages_is_refused() -> None:
    x, y = images()
    with pytest.raises(UserError, match=r"one value per example, shape \(12,\), got \(\).*mean over the batch"):
        Pgd(BALL, steps=1, step_size=0.1)(TwoLayers(), x, y, lambda z, labels: cross_entropy(z, labels).mean())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_last_iterate_is_that_of_foolbox(norm: str) -> None:
    foolbox = pytest.importorskip("foolbox")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    x, y = images(low=0.3, high=0.7)
    x = x.float()
    peer = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    ball: InputBall = LinfBall(0.2) if norm == "linf" else L2Ball(0.2)
    theirs = peer(abs_stepsize=0.07, steps=5, random_start=False).run(
        foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu"),
        x,
        foolbox.criteria.Misclassification(y),
        epsilon=0.2,
    )
    ours = Pgd(ball, steps=5, step_size=0.07, random_start=False, keep="last")(network, x, y)
    torch.testing.assert_close(ours.x_adv, theirs, rtol=0, atol=1e-6)


def test_the_memory_format_of_the_images_is_kept() -> None:
    x, y = images()
    x = x.expand(12, 3, 2, 3).contiguous(memory_format=torch.channels_last)
    seen: list[bool] = []

    def forward(z: Tensor) -> Tensor:
        seen.append(z.is_contiguous(memory_format=torch.channels_last))
        return z.flatten(1)

    attack = Pgd(LinfBall(0.1), steps=3, step_size=0.05, restarts=2, momentum=0.5, backtracking=True)
    assert attack(forward, x, y).x_adv.is_contiguous(memory_format=torch.channels_last)
    assert all(seen)
