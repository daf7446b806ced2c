"""Directions in weight space: random, between networks, uphill; and the ways to give them a length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from robustflat.attacks.judging import held_still
from robustflat.attacks.objectives import cross_entropy
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.subject import Subject
from robustflat.geometry.numerics import normal, positive
from robustflat.geometry.weight_ball import WeightBall
from robustflat.models.modes import displaced
from robustflat.models.precision import exact_float32
from robustflat.types import Batch, Weights

NORMALISATIONS: Mapping[str, tuple[float, str, bool]] = MappingProxyType(
    {
        "layer": (2, "layer", True),
        "filter": (2, "filter", True),
        "relative": (2, "global", True),
        "global": (2, "global", False),
        "layer_max_abs": (math.inf, "layer", True),
        "filter_max_abs": (math.inf, "filter", True),
    }
)
"""Name -> norm, grouping, relative to the weights; "none" leaves a direction as it is.

"layer" is the paper's formula (Stutz et al., ICCV 2021): each tensor's L2 norm is that of the weights. What the
released code calls layer_l2 compares largest absolute entries: "layer_max_abs". "filter" is that of Li et al. (2018).
"relative" and "global" give all tensors together the norm of all weights, or norm 1.
"""


def normalisation_names() -> tuple[str, ...]:
    """All names that `normalised` knows."""
    return (*NORMALISATIONS, "none")


@torch.no_grad()
def normalised(direction: Weights, weights: Weights, normalisation: str, length: float) -> Weights:
    """Direction with `length` times the norm that the normalisation demands; groups that are zero stay zero.

    Args:
        direction: name -> tensor; need not be normalised.
        weights: undisplaced weights with the same names and shapes.
        normalisation: one of `normalisation_names()`.
        length: factor > 0.

    Raises:
        UserError: if names or shapes differ, or an option is unknown or out of range.
    """
    require_one_of("normalisation", normalisation, normalisation_names())
    require_range("length", length, low=0, low_open=True, high=math.inf, high_open=True)
    _require_same(direction, weights)
    if normalisation == "none":
        return {name: length * d for name, d in direction.items()}
    norm, grouping, relative = NORMALISATIONS[normalisation]
    ball = WeightBall(length, norm=norm, grouping=grouping, relative=relative)
    limits, sizes = ball.limits(weights), ball.sizes(direction)
    return {name: (d * (limits[name] / positive(sizes[name]))).to(d.dtype) for name, d in direction.items()}


def random_direction(weights: Weights, generator: torch.Generator) -> Weights:
    """Independent standard normal entries; the same for equal layouts and generator states, whatever the weights."""
    return {name: normal(w.shape, w, generator).to(w.dtype) for name, w in weights.items()}


def direction_to(weights: Weights, target: Mapping[str, Tensor]) -> Weights:
    """From `weights` to the entries of another state dict.

    Raises:
        UserError: if the other lacks a name or has another shape; both shapes are listed.
    """
    problems = [
        f"{n} {tuple(w.shape)} here, {tuple(target[n].shape)} there"
        for n, w in weights.items()
        if n in target and target[n].shape != w.shape
    ]
    problems += [f"{n} {tuple(w.shape)} is missing there" for n, w in weights.items() if n not in target]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"There is no path between networks of different architecture: {'; '.join(problems[:5])}{more}."
        )
    return {name: target[name].to(w) - w for name, w in weights.items()}


def ascent_direction(
    found: Subject,
    batches: Sequence[Batch],
    *,
    ball: WeightBall,
    steps: int,
    step: float,
    generator: torch.Generator,
) -> Weights:
    """Displacement that raises the mean cross-entropy on given images the most, by projected gradient ascent in a ball.

    Starts at random in the ball; each step goes `step` along the ball's steepest direction; the best point counts. This
    is the adversarial direction of the paper's second picture, on images that do not change.

    Args:
        found: model and weights.
        batches: clean or adversarial images with labels.
        ball: where to search.
        steps: >= 1.
        step: in the ball's units (a fraction of each group's norm if relative), > 0.
        generator: source of the start.

    Raises:
        UserError: if steps or step are out of range.
    """
    require_range("steps", steps, low=1)
    require_range("step", step, low=0, low_open=True)
    stride = WeightBall(step, norm=ball.norm, grouping=ball.grouping, relative=ball.relative)
    w = {name: tensor.clone() for name, tensor in found.weights.items()}
    nu = ball.project(ball.sample(w, generator, surface=False), w)
    best, best_loss = nu, -math.inf
    for number in range(steps + 1):
        with displaced(found.model, nu):
            loss, slope = loss_and_gradient(found.model, batches, list(w))
        if loss > best_loss:
            best, best_loss = nu, loss
        if number < steps:
            move = stride.steepest(slope, w)
            nu = ball.project({name: nu[name] + move[name] for name in w}, w)
    return best


def total_norm(v: Weights) -> float:
    """L2 norm over all entries of all tensors."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in v.values()))


def loss_and_gradient(model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> tuple[float, Weights]:
    """Mean cross-entropy over all examples in eval mode, and its gradient in the named parameters; `.grad` stays.

    Without autocast and TF32, as values of measures are judged: the gradient's norm is one.
    """
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    total = sum(len(batch.y) for batch in batches)
    value = 0.0
    slopes = [torch.zeros_like(p) for p in wanted]
    with held_still(model), exact_float32(batches[0].x.device), torch.enable_grad():
        for parameter in wanted:
            parameter.requires_grad_(True)  # `held_still` has frozen them, and puts back what it found
        for x, y in batches:
            loss = cross_entropy(model(x), y).sum() / total
            for slope, part in zip(slopes, torch.autograd.grad(loss, wanted, materialize_grads=True), strict=True):
                slope += part
            value += float(loss.detach())
    return value, dict(zip(names, slopes, strict=True))


def _require_same(direction: Weights, weights: Weights) -> None:
    problems = [f"{n} is missing" for n in weights if n not in direction]
    problems += [
        f"{n} has shape {tuple(direction[n].shape)} instead of {tuple(w.shape)}"
        for n, w in weights.items()
        if n in direction and direction[n].shape != w.shape
    ]
    problems += [f"{n} is unknown" for n in direction if n not in weights]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"A direction must have the names and shapes of the weights: {'; '.join(problems[:5])}{more}.")
