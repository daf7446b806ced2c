"""Each sanity check on a model that should pass it and on one that should not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.sanity import (
    Finding,
    check_black_box,
    check_gradients,
    check_model,
    check_network,
    check_others,
    check_range,
    check_search,
    check_verified,
    report,
    verify,
)
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall

SHAPE = (1, 4, 4)


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()


def images(count: int = 8) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


@pytest.mark.parametrize("ball", [LinfBall(0.03), L2Ball(0.5), L1Ball(2.0)], ids=lambda ball: ball.norm)
def test_images_at_the_border_are_allowed_and_beyond_it_are_not(ball: InputBall) -> None:
    x = torch.full((3, *SHAPE), 0.5)
    entries = {"linf": 1, "l2": 4, "l1": 16}[ball.norm]
    per_entry = {"linf": ball.epsilon, "l2": ball.epsilon / 2, "l1": ball.epsilon / 16}[ball.norm]
    delta = torch.zeros(3, 16)
    delta[:, :entries] = per_entry * torch.tensor([[0.5], [1.0], [1.01]])
    found = verify(x + delta.view_as(x), x, ball)
    assert found.allowed.tolist() == [True, True, False]
    expected = ball.epsilon * torch.tensor([0.5, 1.0, 1.01], dtype=torch.float64)
    torch.testing.assert_close(found.size, expected, rtol=1e-5, atol=0)


def test_an_image_outside_the_box_is_not_allowed() -> None:
    x = torch.ones(1, *SHAPE)
    found = verify(x + 0.01, x, LinfBall(0.1))
    assert found.allowed.tolist() == [False]
    assert found.outside_box.item() == pytest.approx(0.01, rel=1e-4)


def test_images_divided_twice_or_all_alike_are_noticed() -> None:
    assert check_range(images()).level == "ok"
    assert "twice" in check_range(images() / 255).message
    assert check_range(torch.full((2, *SHAPE), 0.5)).level == "warning"


def test_an_honest_model_passes_every_check() -> None:
    model, x = linear(), images()
    y = model(x).argmax(1)
    findings = check_model(model, x) + check_gradients(model, x, y, LinfBall(0.02), seeded())
    assert report(findings).warnings == ()
    assert len(findings) == 7


def test_training_mode_is_reported_and_left_as_found() -> None:
    model = linear().train()
    assert levels(check_model(model, images()))["mode"] == "warning"
    assert model.training


def test_a_softmax_inside_the_network_is_noticed_and_its_logarithm_is_fine() -> None:
    model, x = linear(), images()
    assert "softmax" in {f.check: f.message for f in check_model(lambda v: model(v).softmax(1), x)}["logits"]
    for fine in (lambda v: model(v).log_softmax(1), lambda v: torch.eye(3)[:1].expand(len(v), 3)):
        assert "logits" not in levels(check_model(fine, x))


def test_a_random_model_is_sent_to_the_rand_version() -> None:
    findings = check_model(lambda x: x.flatten(1)[:, :3] + torch.rand(len(x), 3), images())
    assert levels(findings)["deterministic"] == "warning"
    assert "rand" in findings[-1].message


def test_a_model_that_mixes_its_batch_is_noticed() -> None:
    findings = check_model(lambda x: x.flatten(1)[:, :3] - x.flatten(1)[:, :3].mean(0), images())
    assert levels(findings) == {"mode": "ok", "deterministic": "ok", "batch independence": "warning"}


def test_rounded_images_give_zero_gradients_and_an_unbounded_attack_that_fails() -> None:
    inner = linear()

    def masked(x: Tensor) -> Tensor:
        return inner((x * 8).round() / 8 + 0 * x)

    x = images()
    y = masked(x).argmax(1)
    found = levels(check_gradients(masked, x, y, LinfBall(0.02), seeded()))
    assert found["gradients of the margin"] == "warning"
    assert found["unbounded attack"] == "warning"


def test_a_model_without_any_gradient_is_counted_not_crashed_on() -> None:
    class Saturated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[1e4, 0.0, 0.0]]) + 0 * x.flatten(1)[:, :3]

    x, y = images(), torch.zeros(8, dtype=torch.int64)
    findings = check_gradients(Saturated(), x, y, LinfBall(0.02), seeded())
    assert "8 of 8 examples have a gradient of zero" in findings[0].message


def test_gradients_and_logits_that_are_not_numbers_are_noticed() -> None:
    inner, x = linear(), images()

    def rooted(v: Tensor) -> Tensor:
        """Adds nothing, by way of a square root at zero, whose slope is infinite."""
        logits: Tensor = inner(v)
        return logits + 0 * (v - v.detach()).abs().sqrt().sum()

    findings = check_gradients(rooted, x, inner(x).argmax(1), LinfBall(0.02), seeded())
    assert "8 of 8 examples have a gradient of zero or none" in findings[0].message
    assert levels(findings)["gradients of the cross-entropy"] == "warning"
    assert levels(check_model(lambda v: inner(v) * torch.nan, x))["deterministic"] == "warning"


def test_steps_that_lower_the_loss_are_noticed() -> None:
    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return torch.zeros_like(grad)

    inner, x = linear(), images()
    y = inner(x).argmax(1)
    flat = check_gradients(lambda v: inner(x[: len(v)]) + 0 * Backwards.apply(v).sum(), x, y, LinfBall(0.02), seeded())
    assert levels(flat)["more steps"] == "warning"


def test_no_correct_example_leaves_nothing_to_check() -> None:
    x, y = torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.int64)
    assert check_gradients(linear(), x, y, LinfBall(0.02))[0].level == "ok"


@pytest.mark.parametrize(
    ("tried", "broken", "level"), [(0, 0, "ok"), (100, 5, "ok"), (100, 6, "warning"), (9, 2, "ok")]
)
def test_gradient_free_success_on_survivors_is_a_sign(tried: int, broken: int, level: str) -> None:
    assert check_black_box(tried, broken).level == level


def test_a_search_without_gradients_finds_what_masked_gradients_hide() -> None:
    inner, x = linear(), images(12)
    y = inner(x).argmax(1)

    def masked(v: Tensor) -> Tensor:
        """The gradient points the wrong way."""
        logits: Tensor = inner(v)
        return 2 * logits.detach() - logits

    ball = LinfBall(0.5)
    assert check_search(inner, x, y, ball, seeded()).level == "ok"
    hidden = check_search(masked, x, y, ball, seeded())
    assert hidden.level == "warning"
    assert "survivors of the gradient attacks were broken" in hidden.message
    assert check_search(inner, x[:0], y[:0], ball).level == "ok"


def test_attacks_without_gradients_are_compared_with_the_others() -> None:
    fine, bad = check_others(40, {"noise": 2, "transfer": 9})
    assert (fine.check, fine.level) == ("noise against white box", "ok")
    assert (bad.check, bad.level) == ("transfer against white box", "warning")


def test_all_checks_of_a_network_at_once() -> None:
    model, x = linear(), images(12)
    findings = check_network(model, x, model(x).argmax(1), LinfBall(0.02), seeded())
    assert report(findings).warnings == ()
    assert len(findings) == 9
    wrong = check_network(model, x, (model(x).argmax(1) + 1) % 3, LinfBall(0.02), seeded())
    assert levels(wrong)["gradients"] == "ok"


def test_refused_examples_are_named() -> None:
    assert check_verified(0, 7).level == "ok"
    assert "2 of 7" in check_verified(2, 7).message
    assert "are counted as errors" in check_verified(2, 7, counted=True).message


def test_the_report_reads_as_text() -> None:
    text = str(report(Finding("a", "ok", "fine"), [Finding("b", "warning", "bad")]))
    assert text.splitlines() == ["sanity: 2 checks, 1 warnings", "  ok      a: fine", "  warning b: bad"]
