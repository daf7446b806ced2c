"""Checks that an evaluation of robustness can be believed: inputs, model, gradients, and what the attacks returned.

After Carlini et al., "On evaluating adversarial robustness", 2019, and Croce et al., "Evaluating the adversarial
robustness of adaptive test-time defenses", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustflat.attacks.autopgd import AutoPgd
from robustflat.attacks.examples import are_probabilities
from robustflat.attacks.judging import held_still, judge
from robustflat.attacks.objectives import cross_entropy, margin, predicted_wrong
from robustflat.attacks.square import Square
from robustflat.errors import require_one_of
from robustflat.geometry.input_ball import InputBall, LinfBall
from robustflat.types import Forward, Objective

EXAMPLES = 32
"""Examples that the checks which need attacks are made with."""

QUERIES = 200
"""Of the search without gradients."""

# Rounding x + delta to float32 moves norms by about this much, relative to epsilon; more is a violation.
_RELATIVE_SLACK = 1e-5
_ABSOLUTE_SLACK = 1e-7


class Finding(NamedTuple):
    """Outcome of one check: its name, "ok" or "warning", and a sentence."""

    check: str
    level: str
    message: str


@dataclass(frozen=True)
class SanityReport:
    """Findings of all checks, in order."""

    findings: tuple[Finding, ...]

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that ask for attention."""
        return tuple(finding for finding in self.findings if finding.level != "ok")

    def __str__(self) -> str:
        lines = [f"sanity: {len(self.findings)} checks, {len(self.warnings)} warnings"]
        lines += [f"  {f.level:<7} {f.check}: {f.message}" for f in self.findings]
        return "\n".join(lines)


class Verified(NamedTuple):
    """Adversarial examples measured in float64: distances (N,), distance outside the box (N,), allowed (N,)."""

    size: Tensor
    outside_box: Tensor
    allowed: Tensor


def verify(x_adv: Tensor, x: Tensor, ball: InputBall) -> Verified:
    """Whether images lie in ball and box, computed in float64, up to the rounding of float32 images.

    Args:
        x_adv, x: adversarial and clean images (N, C, H, W).
        ball: the threat model.
    """
    wide_adv, wide_x = x_adv.double().flatten(1), x.double().flatten(1)
    order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
    require_one_of("norm", ball.norm, order)
    size = torch.linalg.vector_norm(wide_adv - wide_x, order[ball.norm], dim=1)
    outside = torch.maximum(ball.low - wide_adv, wide_adv - ball.high).clamp_min(0).amax(dim=1)
    near = size <= ball.epsilon * (1 + _RELATIVE_SLACK) + _ABSOLUTE_SLACK
    return Verified(size, outside, near & (outside == 0))


def check_range(x: Tensor) -> Finding:
    """Whether images use the interval [0, 1] (values outside are refused elsewhere) and are not all alike.

    Args:
        x: images (N, C, H, W), N >= 1.
    """
    low, high = (float(bound) for bound in torch.aminmax(x))
    text = f"values from {low:.4g} to {high:.4g}"
    if high <= 2 / 255:
        return Finding("image range", "warning", f"{text}: were the images divided by 255 twice?")
    if low == high:
        return Finding("image range", "warning", f"every pixel is {low:.4g}")
    return Finding("image range", "ok", text)


def check_mode(model: Forward) -> Finding:
    """Whether a network comes in eval mode, in which attacks and measures look at it."""
    if not isinstance(model, nn.Module):
        return Finding("mode", "ok", "a plain function, taken as it is")
    training = sum(module.training for module in model.modules())
    return _expect(
        "mode",
        training == 0,
        "in eval mode",
        f"{training} of its modules were in training mode; it was evaluated in eval mode",
    )


@torch.no_grad()
def check_model(model: Forward, x: Tensor) -> list[Finding]:
    """Mode, logits, determinism and independence of the batch.

    Args:
        model: images -> logits; looked at in eval mode, left as found.
        x: a few images (N, C, H, W), N >= 1.
    """
    findings = [check_mode(model)]
    x = x[:EXAMPLES]
    with held_still(model):
        first, again = model(x), model(x)
        halves = torch.cat([model(part) for part in x.flip(0).chunk(2)]).flip(0)
    if are_probabilities(first):
        text = "the network returns probabilities, so every loss is another than that of its logits: leave softmax out"
        findings.append(Finding("logits", "warning", text))
    scale = float(first.abs().max().clamp_min(1e-6))
    repeated = float((first - again).abs().max()) / scale
    apart = float((first - halves).abs().max()) / scale
    if not repeated <= 1e-5:  # also for not-a-number
        text = f"two passes differ by {repeated:.1e} of the largest logit: attack it with version='rand'"
        findings.append(Finding("deterministic", "warning", text))
        return findings
    findings.append(Finding("deterministic", "ok", "two passes agree"))
    # Batches of another size sum in another order, which alone makes about 1e-6 (TF32: 1e-3).
    if apart > 3e-3:
        text = f"logits depend on the other images of a batch ({apart:.1e} of the largest): no attack is valid"
        findings.append(Finding("batch independence", "warning", text))
    else:
        findings.append(Finding("batch independence", "ok", "logits do not depend on the batch"))
    return findings


def check_gradients(
    model: Forward, x: Tensor, y: Tensor, ball: InputBall, generator: torch.Generator | None = None
) -> list[Finding]:
    """Signs of masked gradients: zeros, an unbounded attack that fails, and steps that do not help.

    Args:
        model: images -> logits; held still, left as found.
        x, y: correctly classified images and labels; the first `EXAMPLES` are used.
        ball: the threat model.
        generator: source of random starts.
    """
    x, y = x[:EXAMPLES], y[:EXAMPLES]
    if len(x) == 0:
        return [Finding("gradients", "ok", "no example is classified correctly: nothing to check")]
    findings = [
        _zero_gradients(model, x, y, margin, "margin", 0.0),
        _zero_gradients(model, x, y, cross_entropy, "cross-entropy", 0.05),
    ]
    whole_box = LinfBall(min(ball.high - ball.low, 1.0), ball.low, ball.high)
    anything = AutoPgd(whole_box, steps=50, objective="margin", stop_when_fooled=True)
    left = int((~anything(model, x, y, generator=generator).fooled).sum())
    findings.append(
        _expect(
            "unbounded attack",
            left == 0,
            f"all of {len(x)} examples broken when every image is allowed",
            f"{left} of {len(x)} examples survive although every image is allowed: gradients mislead",
        )
    )
    clean = judge(model, x, y, cross_entropy).value.mean()
    few, many = (AutoPgd(ball, steps=steps)(model, x, y, cross_entropy, generator).value.mean() for steps in (5, 25))
    findings.append(
        _expect(
            "more steps",
            bool(few > clean) and bool(many >= few - 0.01 * few.abs()),
            f"loss {float(clean):.3f} clean, {float(few):.3f} after 5 steps, {float(many):.3f} after 25",
            f"steps do not help: loss {float(clean):.3f} clean, {float(few):.3f} after 5 steps, "
            f"{float(many):.3f} after 25",
        )
    )
    return findings


def check_black_box(tried: int, broken: int) -> Finding:
    """Whether a search without gradients breaks what attacks with gradients left.

    Args:
        tried: examples that survived all gradient attacks and met the search without gradients.
        broken: how many of them it broke.
    """
    text = f"without gradients {broken} of {tried} survivors of the gradient attacks were broken"
    suspicious = broken >= 3 and broken > 0.05 * tried
    return _expect("black box against white box", not suspicious, text, f"{text}: gradients mislead")


def check_search(
    model: Forward, x: Tensor, y: Tensor, ball: InputBall, generator: torch.Generator | None = None
) -> Finding:
    """Whether a short search without gradients breaks what one with gradients leaves; see `check_black_box`.

    Args:
        model, x, y, ball, generator: see `check_gradients`.
    """
    x, y = x[:EXAMPLES], y[:EXAMPLES]
    if len(x) == 0:
        return check_black_box(0, 0)
    white = AutoPgd(ball, steps=25, objective="margin", stop_when_fooled=True)(model, x, y, generator=generator)
    left = ~white.fooled
    black = Square(ball, queries=QUERIES, stop_when_fooled=True)(model, x[left], y[left], generator=generator)
    return check_black_box(int(left.sum()), int(black.fooled.sum()))


def check_others(tried: int, broken: Mapping[str, int]) -> list[Finding]:
    """Whether attacks without gradients of the network break what those with gradients left.

    Args:
        tried: examples that all attacks with gradients left.
        broken: name of each other attack (transfer, noise, random search) -> how many of these it broke.
    """
    return [check_black_box(tried, count)._replace(check=f"{name} against white box") for name, count in broken.items()]


def check_network(
    model: Forward, x: Tensor, y: Tensor, ball: InputBall, generator: torch.Generator | None = None
) -> list[Finding]:
    """Every check that needs no evaluation: images, model, gradients, and a short search without gradients.

    Args:
        model: images -> logits; held still, left as found.
        x, y: some images (N, C, H, W) and labels (N,), N >= 1; of the correct ones `EXAMPLES` are attacked.
        ball: the threat model.
        generator: source of random starts.
    """
    findings = [check_range(x), *check_model(model, x)]
    with torch.no_grad(), held_still(model):
        correct = ~predicted_wrong(model(x), y)
    x, y = x[correct], y[correct]
    findings += check_gradients(model, x, y, ball, generator)
    return [*findings, check_search(model, x, y, ball, generator)]


def check_verified(refused: int, found: int, *, counted: bool = False) -> Finding:
    """Whether every adversarial example lies in ball and box, in float64.

    Args:
        refused: misclassified images outside ball or box.
        found: misclassified images in all.
        counted: whether those outside count as errors all the same (AutoAttack drops them).
    """
    what = "are counted as errors: this attack leaves the threat model" if counted else "are not counted"
    return _expect(
        "ball and box",
        refused == 0,
        f"all {found} adversarial examples verified in float64",
        f"{refused} of {found} adversarial examples lie outside and {what}",
    )


def report(*findings: Finding | Iterable[Finding]) -> SanityReport:
    """All findings in one report."""
    flat: list[Finding] = []
    for item in findings:
        flat += [item] if isinstance(item, Finding) else list(item)
    return SanityReport(tuple(flat))


def _expect(check: str, ok: bool, fine: str, bad: str) -> Finding:
    return Finding(check, "ok", fine) if ok else Finding(check, "warning", bad)


def _zero_gradients(model: Forward, x: Tensor, y: Tensor, objective: Objective, name: str, tolerated: float) -> Finding:
    """How many examples have no gradient at all, or none that is a number."""
    with torch.enable_grad(), held_still(model):
        point = x.detach().clone().requires_grad_()
        value = objective(model(point), y).sum()
        (slope,) = torch.autograd.grad(value, point, allow_unused=True) if value.requires_grad else (None,)
    zero = len(x) if slope is None else int((slope.nan_to_num(nan=0.0).flatten(1) == 0).all(dim=1).sum())
    text = f"{zero} of {len(x)} examples have a gradient of zero or none"
    return _expect(f"gradients of the {name}", zero <= tolerated * len(x), text, text)
