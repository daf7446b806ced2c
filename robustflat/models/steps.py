"""The steps of a fused network: a convolution with what follows it, and whatever else as autograd has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from robustflat.models.convolutions import Forward, InputGradient
from robustflat.models.inference import MeanOfPixels
from robustflat.models.normalize import Normalize

Value: TypeAlias = Any
"""A tensor, or a number that code computes with, such as a shape."""


class Kept(dict[int, Any]):
    """What gradients need of one pass, by the number of the value."""


class Gradients:
    """Gradients to values, by number; each with whether nobody else holds the tensor, so that it may be changed."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, bool]] = {}

    def add(self, value: int, grad: Tensor, *, ours: bool) -> None:
        """Add to the gradient to a value."""
        if value not in self._found:
            self._found[value] = grad, ours
            return
        old, old_ours = self._found[value]
        self._found[value] = (old.add_(grad) if old_ours else old + grad), True

    def take(self, value: int) -> tuple[Tensor | None, bool]:
        """The gradient, removed from here; `None` if there is none."""
        return self._found.pop(value, (None, False))

    def to_change(self, value: int) -> Tensor | None:
        """The gradient so far, if it may be changed and its pixels lie channels-last."""
        grad, ours = self._found.get(value, (None, False))
        return grad if grad is not None and ours and _in_order(grad) else None


class Step(Protocol):
    """Computes values from values, and gradients from gradients.

    Attributes:
        sources, targets: numbers of the values it takes and gives.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]

    def run(self, values: dict[int, Value], kept: Kept | None) -> None:
        """Compute the targets; keep what `pull` needs, if that will be called."""

    def pull(self, gradients: Gradients, kept: Kept) -> None:
        """Hand the gradients of the targets on to the sources; may be called again, with other gradients."""


class Convolution:
    """A convolution, then the addition of another value, then ReLU, the latter two if wanted.

    Args:
        layer: the convolution.
        source, target: numbers of its input and of the result.
        other: number of the value that is added.
        overwrite: whether nobody needs that value afterwards.
        rectified: whether ReLU follows.
    """

    def __init__(
        self, layer: nn.Conv2d, source: int, target: int, *, other: int | None, overwrite: bool, rectified: bool
    ) -> None:
        self.sources: tuple[int, ...] = (source,) if other is None else (source, other)
        self.targets: tuple[int, ...] = (target,)
        self._source, self._other, self._target = source, other, target
        self._leaves_out = layer.kernel_size == (1, 1) and max(layer.stride) > 1
        self._overwrite, self._rectified = overwrite, rectified
        self._forward, self._input_gradient = Forward(layer, rectify=rectified), InputGradient(layer)

    @property
    def is_sparse(self) -> bool:
        """Whether it reads some pixels only, and stands alone: a shortcut that leaves pixels out."""
        return self._leaves_out and self._other is None

    def run(self, values: dict[int, Value], kept: Kept | None) -> None:
        """See `Step`."""
        x = values[self._source]
        other = None if self._other is None else values[self._other]
        overwrite = self._overwrite and other is not None and _in_order(other)
        values[self._target] = y = self._forward(x, other, overwrite=overwrite)
        if kept is not None:
            kept[self._target] = x.shape, (y if self._rectified else None)

    def pull(self, gradients: Gradients, kept: Kept) -> None:
        """See `Step`."""
        grad, ours = gradients.take(self._target)
        if grad is None:
            return
        shape, y = kept[self._target]
        if y is not None:
            room = grad if ours and grad.stride() == y.stride() else torch.empty_like(y)
            torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=room)
            grad, ours = room, True
        elif not _in_order(grad):
            grad, ours = grad.contiguous(memory_format=torch.channels_last), True
        into = gradients.to_change(self._source)
        found = self._input_gradient(grad, shape, into)
        if found is not into:
            gradients.add(self._source, found, ours=True)
        if self._other is not None:
            gradients.add(self._other, grad, ours=ours)


class Layers:
    """Layers of `BY_HAND` one after the other, without autograd, whose own work takes longer than small layers do.

    Args:
        layers: in their order.
        source, target: numbers of the input and of the result.
    """

    def __init__(self, layers: Sequence[nn.Module], source: int, target: int) -> None:
        self._layers = list(layers)
        self.sources: tuple[int, ...] = (source,)
        self.targets: tuple[int, ...] = (target,)

    def run(self, values: dict[int, Value], kept: Kept | None) -> None:
        """See `Step`."""
        x, shapes = values[self.sources[0]], []
        for layer in self._layers:
            shapes.append(x.shape)
            x = layer(x)
        values[self.targets[0]] = x
        if kept is not None:
            kept[self.targets[0]] = shapes

    def pull(self, gradients: Gradients, kept: Kept) -> None:
        """See `Step`."""
        grad, _ = gradients.take(self.targets[0])
        if grad is None:
            return
        for layer, shape in zip(reversed(self._layers), reversed(kept[self.targets[0]]), strict=True):
            grad = BY_HAND[type(layer)](layer, grad, shape)
        gradients.add(self.sources[0], grad, ours=False)


def _of_normalize(layer: Any, grad: Tensor, shape: torch.Size) -> Tensor:
    return grad if layer.std is None else grad / layer.std.to(grad.dtype)


def _of_mean(layer: Any, grad: Tensor, shape: torch.Size) -> Tensor:
    return (grad / (shape[-2] * shape[-1])).expand(shape)


def _of_flatten(layer: Any, grad: Tensor, shape: torch.Size) -> Tensor:
    return grad.reshape(shape)


def _of_linear(layer: Any, grad: Tensor, shape: torch.Size) -> Tensor:
    return torch.mm(grad, layer.weight) if grad.ndim == 2 else torch.matmul(grad, layer.weight)


BY_HAND: Mapping[type[nn.Module], Callable[[Any, Tensor, torch.Size], Tensor]] = {
    Normalize: _of_normalize, MeanOfPixels: _of_mean, nn.Flatten: _of_flatten, nn.Linear: _of_linear,
}  # fmt: skip
"""Layer, gradient to its result, shape of its input -> gradient to its input, with autograd's bits."""


class Call:
    """One call inside `Calls`.

    Args:
        function: what is called; a layer, say.
        arguments, keywords: its arguments; numbers of values are wrapped in `Place`.
        target: number of the result.
    """

    def __init__(
        self, function: Callable[..., Value], arguments: Sequence[Any], keywords: Mapping[str, Any], target: int
    ) -> None:
        self.function, self.arguments, self.keywords, self.target = function, arguments, keywords, target


class Place(int):
    """Number of a value among arguments."""


class Calls:
    """Layers and functions in a row, differentiated by autograd.

    Args:
        calls: in their order.
        sources: values from outside.
        targets: values that are needed outside.
    """

    def __init__(self, calls: Sequence[Call], sources: Sequence[int], targets: Sequence[int]) -> None:
        self._calls = calls
        self.sources, self.targets = tuple(sources), tuple(targets)

    def run(self, values: dict[int, Value], kept: Kept | None) -> None:
        """See `Step`."""
        if kept is None:
            inside = {n: values[n] for n in self.sources}
            self._run(inside)
            values |= {n: inside[n] for n in self.targets}
            return
        with torch.enable_grad():
            inside = {n: _leaf(values[n]) for n in self.sources}
            leaves = [v for v in inside.values() if isinstance(v, Tensor) and v.requires_grad]
            numbers = [n for n, v in inside.items() if isinstance(v, Tensor) and v.requires_grad]
            self._run(inside)
        for n in self.targets:
            result = inside[n]
            values[n] = result.detach() if isinstance(result, Tensor) else result
            kept[n] = result, leaves, numbers

    def _run(self, values: dict[int, Value]) -> None:
        for call in self._calls:
            arguments = _filled(call.arguments, values)
            keywords = _filled(call.keywords, values)
            values[call.target] = call.function(*arguments, **keywords)

    def pull(self, gradients: Gradients, kept: Kept) -> None:
        """See `Step`."""
        leaves: list[Tensor] = []
        numbers: list[int] = []
        total: Tensor | None = None
        with torch.enable_grad():
            for n in self.targets:
                grad, _ = gradients.take(n)
                result, leaves, numbers = kept[n]
                if grad is not None and isinstance(result, Tensor) and result.requires_grad:
                    # A number to differentiate: given tensors, torch imports what takes a second and 45 MiB.
                    part = (result * grad).sum()
                    total = part if total is None else total + part
        if total is None:
            return
        found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        for n, grad in zip(numbers, found, strict=True):
            if grad is not None:
                gradients.add(n, grad, ours=False)


def _leaf(value: Value) -> Value:
    differentiable = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if differentiable else value


def _filled(argument: Any, values: Mapping[int, Value]) -> Any:
    """The argument with values in their places, which may stand inside lists, slices and the like."""
    return map_aggregate(argument, lambda part: values[part] if isinstance(part, Place) else part)


def _in_order(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)
