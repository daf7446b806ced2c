"""How much a network was used: forward and backward passes, counted where they happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from robustflat.rng import of_the_whole


class Passes(NamedTuple):
    """Batches that went forward and backward through a network, and images that went forward."""

    forwards: int
    backwards: int
    images: int

    def since(self, before: Passes) -> Passes:
        """What was added to an earlier count."""
        return Passes(*(now - then for now, then in zip(self, before, strict=True)))


_COUNTING: ContextVar[bool] = ContextVar("counting", default=True)


@contextmanager
def uncounted() -> Iterator[None]:
    """Inside, passes are counted by nobody: those that look at a network, to copy it for example, and do not use it."""
    token = _COUNTING.set(False)
    try:
        yield
    finally:
        _COUNTING.reset(token)


class PassCounter:
    """Counts the passes of the networks that it is attached to, and of copies that are made of them meanwhile.

    Of a batch that several processes share, the images of all are counted, and the passes of this one.
    A backward pass is a gradient that reaches a network's output. It costs microseconds a pass and changes no number.

    >>> import torch
    >>> network, counter = nn.Linear(2, 3), PassCounter()
    >>> with counter.counting(network):
    ...     network(torch.zeros(5, 2)).sum().backward()
    >>> counter.passes
    Passes(forwards=1, backwards=1, images=5)
    """

    def __init__(self) -> None:
        self._forwards = self._backwards = self._images = 0

    def __deepcopy__(self, memo: dict[int, object]) -> PassCounter:
        return self  # a copy of a network counts into the same book

    @property
    def passes(self) -> Passes:
        """The counts so far."""
        return Passes(self._forwards, self._backwards, self._images)

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[PassCounter]:
        """Count the passes of a network inside the block."""
        handle = model.register_forward_hook(self._forward)
        try:
            yield self
        finally:
            handle.remove()

    def attach(self, model: nn.Module) -> None:
        """Count the passes of a network from now on."""
        model.register_forward_hook(self._forward)

    def _forward(self, _: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        if not _COUNTING.get():
            return
        self._forwards += 1
        first = arguments[0] if arguments else None
        self._images += of_the_whole(len(first)) if isinstance(first, Tensor) and first.ndim else 0
        outputs = output if isinstance(output, tuple | list) else (output,)
        followed = [part for part in outputs if isinstance(part, Tensor) and part.requires_grad]
        if followed:
            register_multi_grad_hook(followed, self._backward, mode="any")

    def _backward(self, _: Tensor) -> None:
        self._backwards += 1


def hooks_of(module: nn.Module) -> dict[int, object]:
    """Hooks of a module, by numbers that no two hooks share; without counters of passes, which change nothing."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    found = {number: hook for kind in kinds for number, hook in kind.items()}
    return {number: hook for number, hook in found.items() if not isinstance(_owner(hook), PassCounter)}


def has_hooks(module: nn.Module) -> bool:
    """Whether calls of a module do something else than its class says: hooks, or a `forward` put onto the object."""
    return bool(hooks_of(module)) or "forward" in vars(module)


def count_instead(network: nn.Module, onto: nn.Module) -> None:
    """Let the counters of a network, or of its parts, count the calls of `onto`, which calls it once a pass.

    For wrappers whose compiled code calls no hooks.
    """
    for module in network.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(_owner(hook), PassCounter):
                del module._forward_hooks[key]
                onto.register_forward_hook(hook)


def count_pass(module: nn.Module, x: Tensor, logits: Tensor) -> None:
    """Let whoever counts passes of a module count one that called no hooks: forward, and a gradient of the output."""
    for hook in module._forward_hooks.values():
        output = logits.detach().requires_grad_()
        hook(module, (x,), output)
        torch.autograd.grad(output.view_as(output).sum(), output)


def _owner(hook: object) -> object:
    return getattr(hook, "__self__", None)
