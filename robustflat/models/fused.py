"""A rewritten network run on a CPU as a list of steps with gradients of their own.

A convolution takes the addition and the ReLU after it along; in the backward pass the gradient of a shortcut is added
by the convolution that computes the other branch's, and ReLU masks gradients where they lie. That saves memory traffic:
up to a tenth of the time of a residual network on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from robustflat.models.convolutions import can_convolve
from robustflat.models.inference import InferenceModel, rewrite
from robustflat.models.likeness import alike, answer, fewest, moved
from robustflat.models.passes import count_instead, count_pass
from robustflat.models.steps import Gradients, Kept, Step, Value
from robustflat.models.tracing import Traced, UntraceableError, traced

_TYPES = (torch.float32, torch.bfloat16)
_WORTH = 2**20  # numbers that a pass computes; with fewer Python takes longer than is saved
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.5  # in bf16 gradients differ by ReLUs that open or close


class Fused(nn.Module):
    """Runs a network's steps on a CPU, and the network itself elsewhere and for little work.

    Differentiable to the images only, and once. Its ReLU makes 0 of what is no number: whoever judges, judges by the
    network itself.

    Weights are looked up at every call: changes in place (`Mirror.refreshed`) need nothing new.

    Args:
        network: rewritten, with frozen weights, in eval mode; its modules must stay the same.
        traced: its steps.
    """

    def __init__(self, network: InferenceModel, traced: Traced) -> None:
        super().__init__()
        self.network = network
        self._program, self._size = _Program(traced.steps, traced.result), traced.size
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, K) in at least float32; differentiable once with respect to x."""
        if not self._pays(x):
            plain: Tensor = self.network(x)
            return plain
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """As `forward`, by the steps in any case; x (B, C, H, W) is on a CPU, in float32 or bf16."""
        x = self._prepared(x)
        if torch.is_grad_enabled() and x.requires_grad:
            logits: Tensor = _Pass.apply(x, self._program)
        else:
            logits = self._program.run(x, None)
        return _at_least_float(logits)

    def with_gradient(self, x: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, K), a function of them, and the gradient of its sum to x; memory is given back layer by layer.

        Args:
            x: images (B, C, H, W), detached.
            value: differentiable, logits -> any shape.
        """
        if not self._pays(x):
            point = x.clone().requires_grad_()
            logits = self(point)
            values = value(logits)
            (grad,) = torch.autograd.grad(values.sum(), point)
            return logits.detach(), values.detach(), grad
        kept = Kept()
        with torch.no_grad():
            logits = _at_least_float(self._program.run(self._prepared(x), kept)).requires_grad_()
        with torch.enable_grad():
            values = value(logits)
        (slope,) = torch.autograd.grad(values.sum(), logits)
        with torch.no_grad():
            pulled = self._program.pull(slope, kept, once=True)
        count_pass(self, x, logits.detach())
        return logits.detach(), values.detach(), torch.zeros_like(x) if pulled is None else pulled.to(x.dtype)

    def _pays(self, x: Tensor) -> bool:
        return len(x) * self._size >= _WORTH and _suits(x)

    def _prepared(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last).to(self.network.dtype)


def _at_least_float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def fast_copy(model: nn.Module, few: Tensor, precision: str) -> nn.Module:
    """The fastest copy of a network there is for searching: rewritten, and fused where that can be.

    Args:
        model: images in [0, 1] -> logits; not touched.
        few: a few images (B, C, H, W) that it takes, on its device.
        precision: "fp32" or "bf16"; see `inference.rewrite`.

    Raises:
        UserError: as `inference.rewrite` does.
    """
    return fused(rewrite(model, few, precision=precision), few)


def fused(network: InferenceModel, example: Tensor) -> nn.Module:
    """`Fused`, or the network itself where that cannot be: on other devices and types, or with other code inside.

    Args:
        network: rewritten, in eval mode.
        example: a few images (B, C, H, W) that it takes; logits and gradients are compared on them.
    """
    if not network.channels_last or network.dtype not in _TYPES or not _suits(example):
        return network
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return fused(network, example.clone())
    counters = nn.Module()
    count_instead(network, onto=counters)  # neither tracing nor comparing is a pass of the search
    result = _fused(network, example) or network
    count_instead(counters, onto=result)
    return result


def _fused(network: InferenceModel, example: Tensor) -> Fused | None:
    try:
        result = Fused(network, traced(network.network, example.to(network.dtype)))
    except UntraceableError:
        return None
    return result if _same(result, network, example) else None


class _Program:
    """Steps in their order, each followed by what is needed no longer."""

    def __init__(self, steps: Sequence[Step], result: int) -> None:
        self._steps = list(steps)
        last = {source: position for position, step in enumerate(self._steps) for source in step.sources}
        self._ends: list[list[int]] = [[] for _ in self._steps]
        for value, position in last.items():
            if value != result:
                self._ends[position].append(value)
        self._result = result

    def run(self, x: Tensor, kept: Kept | None) -> Tensor:
        """Logits; what gradients need goes into `kept`."""
        values: dict[int, Value] = {0: x}
        for step, ends in zip(self._steps, self._ends, strict=True):
            step.run(values, kept)
            for value in ends:
                del values[value]
        logits = values[self._result]
        assert isinstance(logits, Tensor)
        return logits

    def pull(self, grad: Tensor, kept: Kept, *, once: bool = False) -> Tensor | None:
        """Gradient to the images, given that to the logits; with `once`, `kept` is emptied on the way."""
        gradients = Gradients()
        gradients.add(self._result, grad, ours=False)
        for step in reversed(self._steps):
            step.pull(gradients, kept)
            for target in step.targets if once else ():
                kept.pop(target, None)
        return gradients.take(0)[0]


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, program: _Program) -> Tensor:
        ctx.program, ctx.kept = program, Kept()  # type: ignore[attr-defined]
        return program.run(x.detach(), ctx.kept)  # type: ignore[attr-defined]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.program.pull(grad, ctx.kept), None  # type: ignore[attr-defined]


def _suits(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _TYPES and can_convolve() and not torch.is_autocast_enabled("cpu")


def _same(ours: Fused, network: InferenceModel, example: Tensor) -> bool:
    """Whether logits and gradients are the network's up to rounding, at its weights and at others."""
    half = any(p.dtype == torch.bfloat16 for p in network.parameters())
    tolerance = _HALF_TOLERANCE if half else _TOLERANCE
    if not alike(answer(network, example), answer(ours.run, example), tolerance):
        return False
    few = example if half else fewest(network, example)
    with moved(network):  # the gradient of a few images in bf16 is too rough there: maxima change places
        theirs, mine = (answer(way, few, gradient=not half) for way in (network, ours.run))
    return alike(theirs, mine, tolerance)
