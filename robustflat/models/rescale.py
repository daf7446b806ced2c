"""Function-preserving scaling of weights that a normalisation layer follows, for studies of scale invariance.

A layer that batch norm follows can be scaled by any c > 0 without changing the network's function, if the running
mean is scaled by c and the running variance by c^2. Measures that change with it tell nothing about the function (Dinh
et al., ICML 2017; Stutz et al., ICCV 2021, scale by 1/2 and 2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from robustflat.errors import UserError, require_range
from robustflat.models.consumers import alone
from robustflat.models.modes import evaluating, is_norm_layer
from robustflat.models.precision import device_of, dtype_of, exact_float32

_NOT_INVARIANT = (nn.LocalResponseNorm,)
_SCALABLE = (nn.Linear, nn.modules.conv._ConvNd)


class Rescaled(NamedTuple):
    """A scaled copy, its factor per layer name, and the largest change of a logit on the images of the check.

    `change` is relative to the largest absolute logit.
    """

    model: nn.Module
    factors: dict[str, float]
    change: float


@torch.no_grad()
def normalized_layers(model: nn.Module, images: Tensor) -> dict[str, list[str]]:
    """Names of the convolutions and linear layers whose output goes into normalisation layers only, and their names.

    They are found by watching passes in eval mode, not by their names or order in the module tree. A layer whose output
    also goes around the normalisation, such as the first of a pre-activation network, is none.

    Args:
        model: any network; left as found.
        images: (B, C, H, W); one is enough.
    """
    producers: dict[int, str] = {}
    alive: list[Tensor] = []  # an id means something only while its tensor lives
    pairs: dict[str, list[str]] = {}

    def produced(name: str, output: Tensor) -> None:
        producers[id(output)] = name
        alive.append(output)

    def consumed(name: str, inputs: tuple[Any, ...]) -> None:
        if inputs and id(inputs[0]) in producers:
            norms = pairs.setdefault(producers[id(inputs[0])], [])
            norms += [name] if name not in norms else []

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _SCALABLE):
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: produced(name, o)))
        elif is_norm_layer(module) and not isinstance(module, _NOT_INVARIANT):
            handles.append(module.register_forward_pre_hook(lambda m, i, name=name: consumed(name, i)))
    try:
        _logits(model, images)
    finally:
        for handle in handles:
            handle.remove()
    x = images.to(device_of(model), dtype_of(model))
    fitting = alone(model, x, [(name, norm) for name, norms in pairs.items() for norm in norms])
    return {name: norms for name, norms in pairs.items() if name in fitting}


def rescaled(
    model: nn.Module,
    factor: float | Mapping[str, float],
    images: Tensor,
    *,
    absorb_epsilon: bool = True,
    tolerance: float = 1e-3,
) -> Rescaled:
    """Copy of a network whose layers before normalisation have their weights and biases times `factor`.

    Running statistics move along. Batch norm's epsilon does not, so that scaling the variance by c^2 alone (the
    released code) keeps the function only roughly; with `absorb_epsilon` variance + epsilon is what is scaled, which
    keeps it to rounding in eval mode. Convolutions without normalisation and the classifier stay.

    Args:
        model: left as found.
        factor: c > 0 for all such layers, or one per layer name (others stay).
        images: (B, C, H, W) in [0, 1] to compare outputs on.
        absorb_epsilon: see above.
        tolerance: largest allowed change of a logit, relative to the largest logit.

    Raises:
        UserError: if a factor is not positive, no layer is normalised, a name is none of them, or the outputs
            change by more than `tolerance`.
    """
    pairs = normalized_layers(model, images)
    if not pairs:
        raise UserError(
            f"{type(model).__name__} has no convolution or linear layer followed by a normalisation layer alone, so no "
            f"weights can be scaled without changing its function."
        )
    factors = dict(factor) if isinstance(factor, Mapping) else dict.fromkeys(pairs, float(factor))
    for name, value in factors.items():
        require_range(f"factor of {name}", value, low=0, low_open=True, high=math.inf, high_open=True)
        if name not in pairs:
            raise UserError(f"No normalisation layer follows {name!r} alone. These can be scaled: {', '.join(pairs)}.")
    scaled = copy.deepcopy(model)
    for name, value in factors.items():
        _scale(scaled, name, pairs[name], value, absorb_epsilon)
    change = output_change(model, scaled, images)
    if not change <= tolerance:
        raise UserError(
            f"Scaling changed the outputs by {change:.2g} of the largest logit (allowed: {tolerance:g}). Are weights "
            "of a scaled layer used in another place too, or is the factor too small for batch norm's epsilon?"
        )
    return Rescaled(scaled, factors, change)


def rescaled_like(
    model: nn.Module,
    reference: nn.Module,
    images: Tensor,
    *,
    norm: float = 2.0,
    per_layer: bool = False,
    absorb_epsilon: bool = True,
    tolerance: float = 1e-3,
) -> Rescaled:
    """Copy of a network scaled so that its normalised layers have the norm of another's.

    Args:
        model: left as found.
        reference: a network with the same layer names.
        images: see `rescaled`.
        norm: 1, 2 or infinity, of the weights and biases of the normalised layers.
        per_layer: match every layer, instead of all of them together by one factor.
        absorb_epsilon, tolerance: see `rescaled`.

    Raises:
        UserError: if the networks' layers differ, or a norm is zero; and as `rescaled`.
    """
    if norm not in (1, 2, math.inf):
        raise UserError(f"norm must be 1, 2 or infinity (in YAML .inf), got {norm!r}.")
    names = list(normalized_layers(model, images))
    known = dict(reference.named_modules())
    missing = [name for name in names if not isinstance(known.get(name), _SCALABLE)]
    if missing:
        raise UserError(
            f"The reference network has no layer {', '.join(map(repr, missing[:3]))}: use one of equal layout."
        )
    mine, theirs = dict(model.named_modules()), known
    groups = [[name] for name in names] if per_layer else [names]
    factors: dict[str, float] = {}
    for group in groups:
        own, wanted = (_norm([modules[name] for name in group], norm) for modules in (mine, theirs))
        if group and not (own > 0 and wanted > 0):
            raise UserError(
                f"The weights of {group[0]} have norm {own:g} here and {wanted:g} in the reference: both > 0."
            )
        factors |= {name: wanted / own for name in group}
    return rescaled(model, factors, images, absorb_epsilon=absorb_epsilon, tolerance=tolerance)


def output_change(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Largest difference of two networks' logits in eval mode, over the first one's largest absolute logit."""
    first, second = _logits(one, images), _logits(other, images)
    scale = float(first.abs().amax())
    return float((first - second).abs().amax()) / (scale or 1.0)


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    x = images.to(device_of(model), dtype_of(model))
    with evaluating(model), exact_float32(x.device):
        logits: Tensor = model(x)
    return logits.double()


@torch.no_grad()
def _scale(model: nn.Module, name: str, norms: list[str], factor: float, absorb_epsilon: bool) -> None:
    """Scale one layer in place, and the statistics of the norms that follow."""
    for parameter in model.get_submodule(name).parameters(recurse=False):
        parameter.mul_(factor)
    for norm in norms:
        layer = model.get_submodule(norm)
        if not isinstance(layer, _NormBase) or layer.running_mean is None or layer.running_var is None:
            continue  # group and layer norms compute their statistics afresh
        layer.running_mean.mul_(factor)
        epsilon = layer.eps if absorb_epsilon else 0.0
        layer.running_var.copy_(((layer.running_var + epsilon) * factor**2 - epsilon).clamp_min(0))


def _norm(layers: list[nn.Module], norm: float) -> float:
    parts = [p.detach().double().flatten() for layer in layers for p in layer.parameters(recurse=False)]
    return float(torch.linalg.vector_norm(torch.cat(parts), norm)) if parts else 0.0
