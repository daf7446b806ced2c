"""Convolutions and ReLUs whose gradient is differentiated at the cost of its arithmetic, for products with Hessians.

PyTorch differentiates the gradient of a convolution by rewriting weight gradients as convolutions with kernels as
large as the image, and that of a ReLU by adding zeros; on a CPU this takes nearly twice the time of the arithmetic.
Here every part of the second derivative is one ordinary convolution or convolution gradient.

With F the cost of a forward pass, a gradient costs 3 F, and a product with the Hessian on top of it 6 F: each layer
y = w * x needs w * Rx + Rw * x, and two terms each for the slopes of x and w, with R the derivative along the vector
(Pearlmutter, Neural Computation 1994). So a product costs 2 gradients where the gradient's graph is kept, and 3 else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

_backward = torch.ops.aten.convolution_backward.default
_masked = torch.ops.aten.threshold_backward.default
_RELUS = (F.relu, torch.relu, Tensor.relu)


class DoubleBackward(TorchFunctionMode):
    """Inside the block, networks compute the same numbers, with graphs made to be differentiated twice.

    Replaces `conv2d` (with padding in numbers) and `relu` (not in place) wherever they are called; all else is as
    ever. Gradients of any order are right.

    >>> x, w = torch.ones(1, 1, 2, 2), torch.full((1, 1, 1, 1), 3.0, requires_grad=True)
    >>> with DoubleBackward():
    ...     loss = F.relu(F.conv2d(x, w)).square().sum()
    >>> (slope,) = torch.autograd.grad(loss, w, create_graph=True)
    >>> slope.item(), torch.autograd.grad(slope.sum(), w)[0].item()
    (24.0, 8.0)

    Args:
        by_slopes: gradients will be differentiated by the vector that was pulled back alone, as for products
            with a Jacobian: they are constant in images and weights then, and cost and keep less.
    """

    def __init__(self, *, by_slopes: bool = False) -> None:
        super().__init__()
        self.by_slopes = by_slopes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch, or its replacement."""
        kwargs = kwargs or {}
        if func is torch.conv2d:
            return self._convolved(*args, **kwargs)
        if func in _RELUS:
            return self._rectified(*args, **kwargs)
        return func(*args, **kwargs)

    def _rectified(self, input: Tensor, inplace: bool = False) -> Tensor:
        if inplace:
            return torch.relu_(input)
        output: Tensor = _Rectify.apply(input)
        return output

    def _convolved(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        if isinstance(padding, str) or input.ndim != 4:
            return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        options = _Options(_pair(stride), _pair(padding), _pair(dilation), groups)
        output: Tensor = _Convolve.apply(input, weight, bias, options, self.by_slopes)
        return output


class _Options(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class _Convolve(Function):
    """x (B, C, H, W), w, b -> w * x + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, options: _Options, by_slopes: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options, ctx.by_slopes = options, by_slopes
        ctx.set_materialize_grads(False)
        return torch.conv2d(x, w, b, *options)

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None) -> tuple[Tensor | None, ...]:
        if slope is None:
            return (None,) * 5
        x, w = ctx.saved_tensors
        if ctx.by_slopes:
            x, w = x.detach(), w.detach()
        return *_Slopes.apply(slope, x, w, ctx.options, ctx.needs_input_grad[:3]), None, None


class _Slopes(Function):
    """Slope of a convolution's output, and its x and w -> slopes of x, w and b, those that are wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        slope: Tensor,
        x: Tensor,
        w: Tensor,
        options: _Options,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        linear = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        ctx.save_for_backward(None if linear else slope, x, w)
        ctx.options, ctx.shape = options, slope.shape
        ctx.set_materialize_grads(False)
        return _slopes(slope, x, w, options, wanted)

    @staticmethod
    def backward(ctx: Any, of_x: Tensor | None, of_w: Tensor | None, of_b: Tensor | None) -> tuple[Tensor | None, ...]:
        slope, x, w = ctx.saved_tensors
        options: _Options = ctx.options
        by_slope = by_x = by_w = None
        if ctx.needs_input_grad[0]:
            by_slope = _pushed((x, w), (of_x, of_w, of_b), options)
            if by_slope is None and of_b is not None:  # a bias that moves alone
                by_slope = of_b.view(-1, 1, 1).expand(ctx.shape)
        if ctx.needs_input_grad[1] and of_w is not None:
            by_x = _slopes(slope, x, of_w, options, (True, False, False))[0]
        if ctx.needs_input_grad[2] and of_x is not None:
            by_w = _slopes(slope, of_x, w, options, (False, True, False))[1]
        return by_slope, by_x, by_w, None, None


def _slopes(
    slope: Tensor, x: Tensor, w: Tensor, options: _Options, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    bias = [w.shape[0]] if wanted[2] else None
    stride, padding, dilation, groups = options
    slopes: tuple[Tensor | None, ...] = _backward(
        slope, x, w, bias, stride, padding, dilation, False, [0, 0], groups, list(wanted)
    )
    return slopes


def _pushed(
    place: tuple[Tensor, Tensor], along: tuple[Tensor | None, Tensor | None, Tensor | None], options: _Options
) -> Tensor | None:
    """Derivative of w * x + b at x and w along a direction of x, w and b: w * dx + dw * x + db."""
    (x, w), (dx, dw, db) = place, along
    if dw is None:
        return None if dx is None else torch.conv2d(dx, w, db, *options)
    pushed = torch.conv2d(x, dw, db, *options)
    return pushed if dx is None else pushed.add_(torch.conv2d(dx, w, None, *options))


class _Rectify(Function):
    """max(x, 0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        output = torch.relu(x)
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None) -> Tensor | None:
        if slope is None:
            return None
        masked: Tensor = _Mask.apply(slope, ctx.saved_tensors[0].detach())
        return masked


class _Mask(Function):
    """Slope where the output of a ReLU is positive, 0 elsewhere; the mask has no derivative."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)
        masked: Tensor = _masked(slope, output, 0)
        return masked

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None) -> tuple[Tensor | None, None]:
        if slope is None:
            return None, None
        return _Mask.apply(slope, ctx.saved_tensors[0]), None


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value] * (2 // len(value))
