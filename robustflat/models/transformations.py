"""Copies of a network that compute the same function (or, for a temperature, decide the same) from other weights.

What changes between such copies says nothing about the function (Dinh et al., ICML 2017). Each is found by trial: a
change of two layers is kept where it leaves the logits as they were, so that no architecture need be known. Scaling
weights before normalisation layers is in `robustflat.models.rescale`.
"""

from __future__ import annotations

import copy
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, require_range
from robustflat.models.inference import _BATCH_NORM, _LINEAR, _fold_
from robustflat.models.inference import _pairs as foldable_pairs
from robustflat.models.modes import evaluating, is_norm_layer
from robustflat.models.rescale import output_change

_EXACT = 1e-9
"""Largest change of a logit, relative to the largest logit, that rounding in float64 makes."""


class Transformed(NamedTuple):
    """A copy in float64, what was done in words, and the largest relative change of a logit on the images of the
    check.
    """

    model: nn.Module
    what: str
    change: float


class Tempered(nn.Module):
    """A network whose logits are divided by a temperature > 0."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        require_range("temperature", temperature, low=0, low_open=True)
        self.network, self.temperature = network, temperature

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits (B, K)."""
        logits: Tensor = self.network(x) / self.temperature
        return logits


def tempered(model: nn.Module, images: Tensor, temperature: float = 0.5) -> Transformed:
    """Copy whose logits are divided by a temperature: same decisions, other losses.

    Args:
        model: left as found.
        images: (B, C, H, W) of the check; `change` is the share of changed decisions.
        temperature: > 0.
    """
    made = Tempered(copy.deepcopy(model).double(), temperature)
    with torch.no_grad(), evaluating(made):
        x = images.double()
        changed = (made(x).argmax(dim=1) != made.network(x).argmax(dim=1)).double().mean()
    return Transformed(made, f"logits divided by {temperature:g}", float(changed))


@torch.no_grad()
def batch_norm_folded(model: nn.Module, images: Tensor) -> Transformed:
    """Copy whose batch norms are folded into the layers before them, which get biases.

    Args:
        model: left as found.
        images: (B, C, H, W) of the check.

    Raises:
        UserError: if there is no batch norm that follows a linear layer directly, or folding changes the logits.
    """
    plain = copy.deepcopy(model).double().eval()
    made = copy.deepcopy(plain)
    pairs = foldable_pairs(made, images.double())
    if not pairs:
        raise UserError("no batch norm follows a convolution or linear layer directly")
    for linear_path, norm_path in pairs:
        linear, norm = made.get_submodule(linear_path), made.get_submodule(norm_path)
        assert isinstance(linear, _LINEAR) and isinstance(norm, _BATCH_NORM)
        _fold_(linear, norm)
        for parameter in linear.parameters(recurse=False):
            parameter.requires_grad_(True)
        made.set_submodule(norm_path, nn.Identity())
    change = output_change(plain, made, images)
    if not change <= _EXACT:
        raise UserError(f"folding batch norm changed the logits by {change:.2g} of the largest")
    return Transformed(made, f"{len(pairs)} batch norms folded", change)


@torch.no_grad()
def layers_scaled(model: nn.Module, images: Tensor, factor: float = 2.0) -> Transformed:
    """Copy with weights and biases of layers times a and the weights of the next ones divided by it.

    Possible where only positively homogeneous functions (rectifiers, pooling) lie between two layers. Pair after pair
    takes a = factor and a = 1 / factor in turn.

    Args:
        model: left as found.
        images: (B, C, H, W) of the check.
        factor: > 0, not 1.

    Raises:
        UserError: if no pair of layers allows it.
    """
    require_range("factor", factor, low=0, low_open=True)
    made, kept = copy.deepcopy(model).double().eval(), 0
    for before, after, _ in _neighbours(made, images):
        a = factor if kept % 2 == 0 else 1 / factor
        trial = copy.deepcopy(made)
        first, second = trial.get_submodule(before), trial.get_submodule(after)
        for parameter in first.parameters(recurse=False):
            parameter.mul_(a)
        second.get_parameter("weight").div_(a)
        if output_change(made, trial, images) <= _EXACT:
            made, kept = trial, kept + 1
    if not kept:
        raise UserError("no two layers have only a positively homogeneous function between them")
    what = f"{kept} pairs of layers scaled by {factor:g} and 1/{factor:g}"
    return Transformed(made, what, output_change(_plain(model), made, images))


@torch.no_grad()
def permuted(model: nn.Module, images: Tensor, generator: torch.Generator) -> Transformed:
    """Copy with hidden neurons (channels) in another order.

    Args:
        model: left as found.
        images: (B, C, H, W) of the check.
        generator: source of the permutations, on the CPU.

    Raises:
        UserError: if no layer's neurons can be permuted.
    """
    made, kept = copy.deepcopy(model).double().eval(), 0
    for before, after, norms in _neighbours(made, images):
        width = len(made.get_submodule(before).get_parameter("weight"))
        order = torch.randperm(width, generator=generator)
        trial = copy.deepcopy(made)
        fits = _permute_inputs(trial.get_submodule(after), order)
        if not fits or torch.equal(order, torch.arange(width)):
            continue
        for name in (before, *norms):
            _permute_outputs(trial.get_submodule(name), order)
        if output_change(made, trial, images) <= _EXACT:
            made, kept = trial, kept + 1
    if not kept:
        raise UserError("no layer's neurons can be permuted")
    what = f"neurons of {kept} layers permuted"
    return Transformed(made, what, output_change(_plain(model), made, images))


def _plain(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()


def _neighbours(model: nn.Module, images: Tensor) -> list[tuple[str, str, list[str]]]:
    """Linear layers in the order of their calls, in pairs of neighbours, and the norm layers called in between."""
    calls: list[tuple[str, bool]] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _LINEAR) or is_norm_layer(module):
            linear = isinstance(module, _LINEAR)

            def called(m: nn.Module, inputs: object, name: str = name, linear: bool = linear) -> None:
                calls.append((name, linear))

            handles.append(module.register_forward_pre_hook(called))
    try:
        with evaluating(model):
            model(images[:1].double())
    finally:
        for handle in handles:
            handle.remove()
    once = [call for call in calls if calls.count(call) == 1]
    places = [index for index, (_, linear) in enumerate(once) if linear]
    return [(once[i][0], once[j][0], [name for name, _ in once[i + 1 : j]]) for i, j in itertools.pairwise(places)]


def _permute_outputs(layer: nn.Module, order: Tensor) -> None:
    for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
        if tensor.ndim and len(tensor) == len(order):
            tensor.copy_(tensor[order.to(tensor.device)])


def _permute_inputs(layer: nn.Module, order: Tensor) -> bool:
    """Permute the input channels of a layer; whether its shape allows it."""
    weight = layer.get_parameter("weight")
    inputs, width = weight.shape[1], len(order)
    if getattr(layer, "groups", 1) != 1 or inputs % width:
        return False
    # After flattening, a channel is a block of pixels.
    blocks = weight.view(len(weight), width, -1)
    weight.copy_(blocks[:, order.to(weight.device)].view_as(weight))
    return True
