"""A network called with other tensors in place of its parameters, over and over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


class ParameterSlots:
    """The places of a network's parameters, looked up once.

    `torch.func.functional_call` finds names, modules and shared parameters anew at every call, which takes longer than
    the layers of a small network. A parameter that has been replaced once is an ordinary attribute afterwards: only for
    a copy of the network that nobody else sees.

    Args:
        network: a private copy.

    Attributes:
        own: the network's own parameters by name, also under further names of shared ones.
    """

    def __init__(self, network: nn.Module) -> None:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        self.own: dict[str, Tensor] = {}
        for path, module in network.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                places.setdefault(id(parameter), []).append((module, leaf))
                self.own[f"{path}.{leaf}" if path else leaf] = parameter
        self._places = {name: places[id(parameter)] for name, parameter in self.own.items()}
        self._replaced: set[str] = set()

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the named parameters are these tensors, under all names of a shared one; afterwards the network's."""
        for name in tensors.keys() - self._replaced:
            for module, leaf in self._places[name]:
                if leaf in dict(module.named_parameters(recurse=False, remove_duplicate=False)):
                    delattr(module, leaf)
        self._replaced |= tensors.keys()
        try:
            self._put(tensors)
            yield
        finally:
            self._put({name: self.own[name] for name in tensors})

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for module, leaf in self._places[name]:
                # Not `setattr`, which would register a `Parameter` again.
                object.__setattr__(module, leaf, tensor)
