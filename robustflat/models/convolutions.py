"""Convolutions of frozen layers on a CPU with what follows them in one pass over memory, and their input gradients.

Uses the operators of oneDNN that PyTorch's compiler calls, with weights in the order that oneDNN computes with. Results
are those of PyTorch's own operators bit for bit, wherever oneDNN sums in one order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHANNELS_LAST = torch.channels_last
_NEEDED = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
_ONE = [1, 1]

# oneDNN computes 16 channels at least: for images of few channels some pixels side by side take the place of the rest.
_FEW, _PIXELS = 4, 4

_Settings: TypeAlias = tuple[list[int], list[int], list[int], int]
"""Padding, stride, dilation, groups."""


def can_convolve() -> bool:
    """Whether the operators are there, and not switched off (`torch.backends.mkldnn`)."""
    return _registered() and bool(torch.backends.mkldnn.enabled)


@cache
def _registered() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available) and all(hasattr(torch.ops.mkldnn, name) for name in _NEEDED)


class Forward:
    """A convolution, then the addition of a tensor and ReLU where wanted.

    Args:
        layer: with zero padding; its weights change in place only.
        rectify: whether ReLU follows.
    """

    def __init__(self, layer: nn.Conv2d, *, rectify: bool) -> None:
        self._bias, self._settings = layer.bias, _settings(layer)
        self._after = "relu" if rectify else None
        self._weights = _Packed(layer.weight, self._settings)

    def __call__(self, x: Tensor, add: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
        """layer(x) + add, cut at 0 if ReLU follows: channels-last.

        Args:
            x: (B, C, H, W).
            add: of the result's shape.
            overwrite: put the result in the place of `add`, which is channels-last.
        """
        weight = self._weights.for_images(x)
        return _convolved(x, weight, self._bias, self._settings, add, overwrite=overwrite, after=self._after)


class InputGradient:
    """Gradient of a convolution to its input; with stride 1 a convolution by turned-around weights.

    Args:
        layer: with zero padding; its weights change in place only.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self._weight, self._settings = layer.weight, _settings(layer)
        margins = [k - 1 - p for k, p in zip(layer.kernel_size, self._settings[0], strict=True)]
        plain = layer.dilation == (1, 1) and layer.groups == 1
        self._by_convolution = plain and layer.stride == (1, 1) and min(margins) >= 0
        self._few = self._by_convolution and layer.in_channels <= _FEW
        # A 1x1 convolution with a stride: only every other pixel has a gradient.
        self._sparse = plain and layer.kernel_size == (1, 1) and margins == [0, 0] and not self._by_convolution
        self._turned: _Settings = (margins, _ONE, _ONE, 1)
        self._wide: _Settings = (margins, [1, _PIXELS], _ONE, 1)
        self._turned_weights = _Packed(layer.weight, self._turned, _turned_around)
        self._wide_weights = _Packed(layer.weight, self._wide, _widened)

    def __call__(self, grad: Tensor, shape: torch.Size, into: Tensor | None = None) -> Tensor:
        """Gradient to the input of that shape; added to `into`, and returned, if that is given and can be."""
        if self._few and shape[-1] % _PIXELS == 0:
            found = _convolved(grad, self._wide_weights.for_images(grad), None, self._wide)
            return found.permute(0, 2, 3, 1).reshape(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        if self._by_convolution:
            return _convolved(grad, self._turned_weights.for_images(grad), None, self._turned, into, overwrite=True)
        if self._sparse and into is not None:
            _, (down, right), _, _ = self._settings
            into[:, :, ::down, ::right] += _convolved(grad, self._turned_weights.for_images(grad), None, self._turned)
            return into
        return self._by_torch(grad, shape)

    def _by_torch(self, grad: Tensor, shape: torch.Size) -> Tensor:
        like = torch.empty(shape, dtype=grad.dtype, memory_format=_CHANNELS_LAST)  # its shape counts, not its values
        padding, stride, dilation, groups = self._settings
        more = (False, [0, 0], groups, [True, False, False])
        found: Tensor = torch.ops.aten.convolution_backward.default(
            grad, like, self._weight, None, stride, padding, dilation, *more
        )[0]
        return found


class _Packed:
    """Weights as `change` makes them, in oneDNN's order; made anew when the layer's have changed."""

    def __init__(
        self, weight: Tensor, settings: _Settings, change: Callable[[Tensor], Tensor] = torch.Tensor.detach
    ) -> None:
        self._weight, self._settings, self._change = weight, settings, change
        self._packed, self._version = weight, -1

    def __getstate__(self) -> dict[str, object]:
        """Without the packed weights, which cannot be copied: a copy packs its own."""
        return self.__dict__ | {"_packed": self._weight, "_version": -1}

    def for_images(self, x: Tensor) -> Tensor:
        """The weights, in an order that suits images like these, or others that were first."""
        if self._version != self._weight._version:
            changed = self._change(self._weight.detach())
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(changed, *self._settings, list(x.shape))
            self._version = self._weight._version
        return self._packed


def _settings(layer: nn.Conv2d) -> _Settings:
    return [int(p) for p in layer.padding], list(layer.stride), list(layer.dilation), layer.groups


def _turned_around(weight: Tensor) -> Tensor:
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=_CHANNELS_LAST)


def _widened(weight: Tensor) -> Tensor:
    """Turned-around weights that compute `_PIXELS` pixels side by side as so many times the channels."""
    turned = _turned_around(weight)
    parts = [F.pad(turned, (pixel, _PIXELS - 1 - pixel)) for pixel in range(_PIXELS)]
    return torch.cat(parts).contiguous(memory_format=_CHANNELS_LAST)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: _Settings,
    add: Tensor | None = None,
    *,
    overwrite: bool = False,
    after: str | None = None,
) -> Tensor:
    """The overloads by name: finding them takes Python longer than a small convolution."""
    operators = torch.ops.mkldnn
    if add is None:
        found = operators._convolution_pointwise.default(x, weight, bias, *settings, after or "none", [], "")
    elif overwrite:
        found = operators._convolution_pointwise_.binary(add, x, weight, bias, *settings, "add", None, after, [], "")
    else:
        found = operators._convolution_pointwise.binary(x, add, weight, bias, *settings, "add", None, after, [], "")
    return found  # type: ignore[no-any-return]
