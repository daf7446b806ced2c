"""A network as a function of weights and images, with batch norm folded into the layers before it.

For searches that move the weights: folding happens on the moved weights, differentiably, at every call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustflat.errors import UserError
from robustflat.models.inference import _LINEAR, BatchNorm, Linear, has_instance_norm, scale_and_shift
from robustflat.models.inference import _pairs as foldable_pairs
from robustflat.models.modes import evaluating, frozen
from robustflat.models.norms import ReBatchNorm
from robustflat.models.precision import exact_float32
from robustflat.models.rectifiers import rectify_in_place_
from robustflat.models.slots import ParameterSlots

WeightsForward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(some weights by name, images (B, C, H, W)) -> logits (B, K); other weights are the network's own."""

_TOLERANCE = 1e-3


def plain_forward(model: nn.Module) -> WeightsForward:
    """The network itself as such a function."""
    return lambda weights, x: functional_call(model, dict(weights), (x,))


def folded_forward(model: nn.Module, example: Tensor, *, first_order: bool = False) -> WeightsForward:
    """The same function with running-statistics batch norms folded, and convolutions in channels-last order.

    Args:
        model: images in [0, 1] -> logits; not touched, and not needed in eval mode.
        example: a few images that the model takes, on its device.
        first_order: for loops that need first derivatives only: ReLU layers overwrite their input where these stay, and
            convolutions are called in channels-last order, in which they take four-dimensional weights best.

    Returns:
        The folded function, a `FoldedForward`; the plain one where nothing can be folded, folding changes logits by
        more than rounding, or a layer needs the usual order.
    """
    if has_instance_norm(model):
        return plain_forward(model)
    try:
        network = copy.deepcopy(model).eval().requires_grad_(False)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be copied for rewriting ({error}). Search with the plain model."
        ) from error
    folds = {}
    for linear_path, norm_path in foldable_pairs(network, example):
        linear, norm = network.get_submodule(linear_path), network.get_submodule(norm_path)
        assert isinstance(linear, _LINEAR)
        folds[linear_path] = _Fold(linear, norm, norm_path)  # type: ignore[arg-type]  # pairs end in a batch norm
        if linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros_like(folds[linear_path].shift), requires_grad=False)
        network.set_submodule(norm_path, nn.Identity())
    if not folds:
        return plain_forward(model)
    forward = FoldedForward(network, folds)
    if not _same(model, forward, example):
        return plain_forward(model)
    return forward.for_first_order(example) if first_order else forward


class FoldedForward:
    """What `folded_forward` makes.

    Args:
        network: a copy of its own, whose folded batch norms are identities and whose folded layers have a bias.
        folds: by path of the folded layer.
    """

    def __init__(self, network: nn.Module, folds: Mapping[str, _Fold]) -> None:
        self._network = network
        self._folds = folds
        self._of_norms = {f"{fold.norm_path}.{name}" for fold in folds.values() for name in ("weight", "bias")}
        self._slots = ParameterSlots(network)
        self._first_order = False

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Logits (B, K) of images x (B, C, H, W) at some weights by name; see `WeightsForward`."""
        moved = {name: t for name, t in weights.items() if name not in self._of_norms}
        for path, fold in self._folds.items():
            moved |= fold(path, weights)
        if self._first_order:
            # The strides of weights for one channel fit both orders, and the convolution takes the other one.
            moved |= {n: t.clone(memory_format=torch.channels_last) for n, t in moved.items() if _ambiguous(t)}
        with self._slots.filled(moved):
            logits: Tensor = self._network(x.contiguous(memory_format=torch.channels_last))
        return logits

    def for_first_order(self, example: Tensor) -> FoldedForward:
        """Itself, with ReLU layers that overwrite their input where logits of `example` and derivatives allow it."""
        self._first_order = True
        with torch.enable_grad():
            leaves = {name: p.detach().clone().requires_grad_() for name, p in self._slots.own.items()}

        def logits(x: Tensor) -> Tensor:
            with self._slots.filled(leaves):
                return self._network(x.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]

        rectify_in_place_(self._network, logits, example, list(leaves.values()))
        return self


class _Fold:
    """How one batch norm acts on the weights of the layer before it: scale per channel, and shift."""

    def __init__(self, linear: Linear, norm: BatchNorm, norm_path: str) -> None:
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale, shift = scale_and_shift(norm)
        dtype = linear.weight.dtype
        self.weight, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self.scale, self.shift = scale.to(dtype), shift.to(dtype)
        self.norm_path = norm_path
        self.deviation = torch.rsqrt(norm.running_var.double() + norm.eps).to(dtype)
        self.mean = norm.running_mean.to(dtype)
        self.offset = 1.0 if isinstance(norm, ReBatchNorm) else 0.0
        self.norm_bias = None if norm.bias is None else norm.bias.detach().to(dtype)

    def __call__(self, path: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Folded weight and bias of the layer at `path`."""
        weight = weights.get(f"{path}.weight", self.weight)
        bias = weights.get(f"{path}.bias", self.bias)
        scale, shift = self._affine(weights)
        scaled = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        return {f"{path}.weight": scaled, f"{path}.bias": shift if bias is None else shift + bias * scale}

    def _affine(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scale and shift, with the batch norm's own parameters where these are among the weights."""
        scale = self.scale
        if f"{self.norm_path}.weight" in weights:
            scale = (self.offset + weights[f"{self.norm_path}.weight"]) * self.deviation
        elif f"{self.norm_path}.bias" not in weights:
            return self.scale, self.shift
        bias = weights.get(f"{self.norm_path}.bias", self.norm_bias)
        shift = -self.mean * scale
        return scale, shift if bias is None else shift + bias


def _ambiguous(t: Tensor) -> bool:
    return t.ndim == 4 and t.shape[1] == 1


@torch.no_grad()
def _same(model: nn.Module, forward: WeightsForward, example: Tensor) -> bool:
    """Whether the folded function gives the network's logits, up to rounding."""
    with exact_float32(example.device):
        with frozen(model), evaluating(model):
            plain = model(example)
        try:
            logits = forward({}, example)
        except RuntimeError:  # a layer that cannot take channels-last images (`view` of them, say)
            return False
    return bool((logits - plain).abs().max() <= _TOLERANCE * plain.abs().max().clamp_min(1e-6))
