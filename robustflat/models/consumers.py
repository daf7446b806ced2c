"""What reads the tensors inside a network, found by watching every operation of a pass.

Values cannot tell: the batch norm of an untrained network does next to nothing, a scale of 0 hides what goes around it,
and a ReLU of positive numbers changes none of them. So memory is watched, which a tensor shares with its views.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustflat.models.modes import evaluating, frozen

_FEW = 2

_Layer = TypeVar("_Layer", bound=nn.Module)

_Called: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]
"""What to do after a call of a layer: layer, arguments, keywords, output."""


@torch.no_grad()
def alone(network: nn.Module, example: Tensor, pairs: Sequence[tuple[str, str]]) -> set[str]:
    """Paths of the layers whose outputs go into the layers named beside them and nowhere else, such as around a block.

    Nor does anything else read the weights of the two, as a second layer with the same weights would.

    Args:
        network: images -> logits; left as found.
        example: a few images (B, C, H, W) that it takes; two are enough.
        pairs: paths of a layer and of a normalisation that takes its output.
    """
    norms: defaultdict[str, set[nn.Module]] = defaultdict(set)
    for path, norm in pairs:
        norms[path].add(network.get_submodule(norm))
    layers = {network.get_submodule(path): path for path in norms}
    outputs: list[tuple[str, Tensor]] = []
    reads = _Reads()

    def called(layer: nn.Module, taken: tuple[Any, ...], keywords: dict[str, Any], given: Tensor) -> None:
        if layer in layers:
            reads.by.pop(_memory(given), None)  # the reads of what lay there before
            outputs.append((layers[layer], given))

    with frozen(network), evaluating(network), reads.of({*layers, *set().union(*norms.values())}, called):
        logits = network(example[:_FEW])
    elsewhere = {p for p, given in outputs if not reads.only_by(given, norms[p]) or _memory(given) == _memory(logits)}
    for layer, path in layers.items():
        owners = (layer, *norms[path])
        if any(not reads.only_by(t, {owner}) for owner in owners for t in (*owner.parameters(), *owner.buffers())):
            elsewhere.add(path)
    return {*norms} - elsewhere


@torch.no_grad()
def overwritable(layers: Sequence[_Layer], logits_of: Callable[[Tensor], Tensor], example: Tensor) -> list[_Layer]:
    """Layers that may overwrite their input: nothing reads it after them, nor in another pass.

    Args:
        layers: each takes one tensor, and does not overwrite it yet.
        logits_of: how the network is called that they are in, in eval mode.
        example: a few images (B, C, H, W); two are enough.
    """
    inputs: defaultdict[nn.Module, list[tuple[Tensor, int, bool]]] = defaultdict(list)
    reads = _Reads()

    def called(layer: nn.Module, taken: tuple[Any, ...], keywords: dict[str, Any], given: Tensor) -> None:
        (x,) = (*taken, *keywords.values())
        inputs[layer].append((x, reads.clock, _memory(x) in reads.made))

    with reads.of(layers, called):
        logits = logits_of(example[:_FEW])

    def fits(x: Tensor, clock: int, made: bool) -> bool:
        return made and reads.last[_memory(x)] <= clock and _memory(x) != _memory(logits)

    return [layer for layer in layers if inputs[layer] and all(fits(*taken) for taken in inputs[layer])]


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what reads memory.

    Attributes:
        by: memory -> the watched layers at work when it was read; `None` for anything else.
        last: memory -> the last operation that read it, as the value of `clock` then.
        made: memory that appeared during the pass.
        clock: how many operations there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by: defaultdict[int | None, set[nn.Module | None]] = defaultdict(set)
        self.last: defaultdict[int | None, int] = defaultdict(int)
        self.made: set[int | None] = set()
        self.clock = 0
        self._at_work: list[nn.Module | None] = [None]

    @contextmanager
    def of(self, layers: Iterable[nn.Module], called: _Called) -> Iterator[None]:
        """Watch what happens inside the block, and call `called` after each call of a layer."""
        handles = []
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(self._begin))
            handles += [layer.register_forward_hook(self._end), layer.register_forward_hook(called, with_kwargs=True)]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, layer: nn.Module, _: tuple[Any, ...]) -> None:
        self._at_work.append(layer)

    def _end(self, *_: Any) -> None:
        self._at_work.pop()

    def only_by(self, tensor: Tensor, layers: set[nn.Module]) -> bool:
        """Whether nothing but layers has read a tensor."""
        return self.by[_memory(tensor)] <= layers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and note what it reads and makes."""
        self.clock += 1
        result = func(*args, **(kwargs or {}))
        taken = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for memory in taken:
            self.by[memory].add(self._at_work[-1])
            self.last[memory] = self.clock
        self.made |= {_memory(t) for t in tree_leaves(result) if isinstance(t, Tensor)} - taken
        return result


def _memory(tensor: Tensor) -> int | None:
    """What tells the memory of tensors apart that are alive."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
