"""From a network's code to the steps of a fused network."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from robustflat.models.passes import has_hooks
from robustflat.models.steps import BY_HAND, Call, Calls, Convolution, Layers, Place, Step

_ADDITIONS = (operator.add, torch.add)
_RECTIFIERS = (torch.relu, torch.relu_, F.relu)
# What x += y and the like change, and what computes the same numbers anew.
_CHANGING = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)  # in eval mode


class UntraceableError(Exception):
    """A network whose code does not come out as a list of steps."""


class Traced(NamedTuple):
    """A network as steps.

    Attributes:
        steps: in an order in which they can run; value 0 is the images.
        result: number of the logits.
        size: how many numbers they compute for one image.
    """

    steps: list[Step]
    result: int
    size: int


def traced(network: nn.Module, example: Tensor) -> Traced:
    """Steps that compute what the network does.

    Args:
        network: images (B, C, H, W) -> logits (B, K), in eval mode.
        example: a few images that it takes, in the type that it takes.

    Raises:
        UntraceableError: if its code branches on values, changes tensors in place that are used again, has hooks on
            parts that hold others or no convolution, or does not run on other tensors than its own forward pass.
    """
    if any(has_hooks(part) and next(part.children(), None) is not None for part in network.modules()):
        raise UntraceableError("hooks")
    network = _Images(network)
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            graph = _Tracer().trace(network)
        kinds = _Kinds(fx.GraphModule(network, graph))
        with torch.no_grad():
            kinds.run(example)
    except Exception as error:  # whatever the network's code raises when it is given no numbers
        raise UntraceableError(str(error)) from error
    _simplify_(network, graph)
    size = sum(kind.shape.numel() for kind in kinds.found.values()) // len(example)
    plan = _Plan(network, graph, kinds.found)
    return Traced(plan.steps(), plan.result, size)


class _Images(nn.Module):
    """The network as a function of images alone, whatever options it takes besides."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits


class _Tracer(fx.Tracer):
    """Looks into every module that has others inside; what is computed from buffers is computed in every pass."""

    proxy_buffer_attributes = True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A call, which must not depend on what surrounds it.

        Raises:
            UntraceableError: inside a block without gradients, or with types of its own.
        """
        if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            raise UntraceableError("a call inside no_grad or autocast")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the result of a call."""
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None


class _Value(fx.Proxy):
    """Tells x += y, which others may see, from x = x + y."""


def _changing(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda value, other: value.tracer.create_proxy("call_function", function, (value, other), {})


for _function in _CHANGING:
    setattr(_Value, f"__{_function.__name__}__", _changing(_function))


def _simplify_(network: nn.Module, graph: fx.Graph) -> None:
    """Leave out layers that do nothing.

    Raises:
        UntraceableError: for what changes tensors that others read.
    """
    for node in list(graph.nodes):
        idle = node.op == "call_module" and type(network.get_submodule(node.target)) in _NOTHING
        if idle and node.args and not has_hooks(network.get_submodule(node.target)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in graph.nodes:
        _require_harmless(network, node)
        if node.target in _CHANGING:
            node.target = _CHANGING[node.target]


class _Kind(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype


class _Kinds(fx.Interpreter):
    """Notes the shapes and types of all tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, _Kind] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = _Kind(result.shape, result.dtype)
        return result


class _Plan:
    """Which nodes become one step, in which order.

    Args:
        network: that the graph calls.
        graph: harmless calls.
        kinds: of all tensors.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, kinds: dict[fx.Node, _Kind]) -> None:
        self._network, self._kinds = network, kinds
        self._nodes = [node for node in graph.nodes if node.op != "output"]
        self._numbers = {node: number for number, node in enumerate(self._nodes)}
        (output,) = (node for node in graph.nodes if node.op == "output")
        self._result = output.args[0]
        if (
            not isinstance(self._result, fx.Node)
            or self._result not in self._kinds
            or [n.op for n in self._nodes].count("placeholder") != 1
        ):
            raise UntraceableError("not images -> logits")
        self._chains = self._found_chains()

    @property
    def result(self) -> int:
        """Number of the logits."""
        return self._numbers[self._result]

    def steps(self) -> list[Step]:
        """In an order in which they can run.

        Raises:
            UntraceableError: if there is no convolution.
        """
        if not self._chains:
            raise UntraceableError("no convolution")
        ends = {chain[-1]: chain for chain in self._chains}
        inner = {node for chain in self._chains for node in chain}
        steps: list[Step] = []
        row: list[fx.Node] = []
        for node in self._nodes:
            if node in ends:
                steps += [*self._calls(row), self._convolution(ends[node])]
                row = []
            elif node not in inner and node.op != "placeholder":
                row.append(node)
        return _early([*steps, *self._calls(row)])

    def _found_chains(self) -> list[tuple[fx.Node, ...]]:
        """Each a convolution with the addition and the ReLU that only it leads to; large ones choose first."""
        convolutions = [node for node in self._nodes if self._is_convolution(node)]
        taken: set[fx.Node] = set()
        chains: list[tuple[fx.Node, ...]] = []
        for node in sorted(convolutions, key=lambda n: -_count(self._layer(n))):
            chain: tuple[fx.Node, ...] = (node,)
            for fits in (self._is_addition, self._is_rectifier):
                (user,) = chain[-1].users if len(chain[-1].users) == 1 else (None,)
                if user is not None and user not in taken and fits(user):
                    chain += (user,)
            taken |= {*chain}
            chains.append(chain)
        return chains

    def _layer(self, node: fx.Node) -> nn.Module:
        return self._network.get_submodule(str(node.target))

    def _is_convolution(self, node: fx.Node) -> bool:
        if node.op != "call_module" or type(self._layer(node)) is not nn.Conv2d or node.kwargs:
            return False
        layer = self._layer(node)
        zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return (
            zeros and isinstance(node.args[0], fx.Node) and not has_hooks(layer) and len(self._kinds[node].shape) == 4
        )

    def _is_addition(self, node: fx.Node) -> bool:
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not (method or (node.op == "call_function" and node.target in _ADDITIONS)) or node.kwargs:
            return False
        first, second = node.args
        alike = all(self._kinds.get(part) == self._kinds[node] for part in (first, second))  # type: ignore[arg-type]
        return alike and first is not second

    def _is_rectifier(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self._layer(node)) is nn.ReLU and not has_hooks(self._layer(node))
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in _RECTIFIERS

    def _convolution(self, chain: tuple[fx.Node, ...]) -> Step:
        layer, source = self._layer(chain[0]), chain[0].args[0]
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(source, fx.Node)
        added = next((node for node in chain if self._is_addition(node)), None)
        others = [] if added is None else [part for part in added.args if part is not chain[0]]
        makers = [end for end in (c[-1] for c in self._chains) if end in others and not self._is_rectifier(end)]
        return Convolution(
            layer,
            self._numbers[source],
            self._numbers[chain[-1]],
            other=self._numbers[others[0]] if others else None,
            overwrite=any(len(end.users) == 1 for end in makers),
            rectified=self._is_rectifier(chain[-1]),
        )

    def _calls(self, row: list[fx.Node]) -> list[Step]:
        if not row:
            return []
        inside = set(row)
        sources = dict.fromkeys(part for node in row for part in node.all_input_nodes if part not in inside)
        targets = [n for n in row if n is self._result or any(user not in inside for user in n.users)]
        if self._is_row_of_layers(row) and targets == row[-1:]:
            (source,) = sources
            return [Layers([self._layer(node) for node in row], self._numbers[source], self._numbers[row[-1]])]
        calls = [call for node in row for call in self._call(node, inside)]
        numbers = self._numbers
        return [Calls(calls, [numbers[n] for n in sources], [numbers[n] for n in targets])] if targets else []

    def _is_row_of_layers(self, row: list[fx.Node]) -> bool:
        """Whether each is a layer of `BY_HAND` that takes what the one before it gives."""
        inputs = [*row[0].args[:1], *row[:-1]]
        if len(inputs) < len(row) or not isinstance(inputs[0], fx.Node):
            return False
        return all(
            node.op == "call_module"
            and type(self._layer(node)) in BY_HAND
            and not has_hooks(self._layer(node))
            and (node.args, node.kwargs) == ((before,), {})
            for before, node in zip(inputs, row, strict=True)
        )

    def _call(self, node: fx.Node, inside: set[fx.Node]) -> list[Call]:
        arguments: tuple[Any, ...] = fx.node.map_arg(node.args, self._place)
        keywords: Any = fx.node.map_arg(node.kwargs, self._place)
        number = self._numbers[node]
        if node.op == "get_attr":
            return [Call(operator.attrgetter(str(node.target)), [self._network], {}, number)]
        if _in_place(self._network, node) and node.args[0] not in inside:
            arguments = (Place(number), *arguments[1:])
            return [Call(torch.clone, [self._place(node.args[0])], {}, number), self._called(node, arguments, keywords)]
        return [self._called(node, arguments, keywords)]

    def _called(self, node: fx.Node, arguments: Any, keywords: Any) -> Call:
        function: Callable[..., Any]
        if node.op == "call_module":
            function = self._layer(node)
        elif node.op == "call_method":
            function = _Method(str(node.target))
        else:
            assert callable(node.target)
            function = node.target
        return Call(function, arguments, keywords, self._numbers[node])

    def _place(self, node: Any) -> Place:
        return Place(self._numbers[node])


class _Method:
    """Calls a method of its first argument."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, value: Any, *arguments: Any, **keywords: Any) -> Any:
        return getattr(value, self._name)(*arguments, **keywords)


def _early(steps: list[Step]) -> list[Step]:
    """Strided 1x1 convolutions right after their input is there.

    Going backwards they come last, and add to a gradient that is there already where they have pixels.
    """
    result: list[Step] = []
    for step in steps:
        if isinstance(step, Convolution) and step.is_sparse:
            made = [i for i, earlier in enumerate(result) if step.sources[0] in earlier.targets]
            result.insert(made[-1] + 1 if made else 0, step)
        else:
            result.append(step)
    return result


def _count(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def _require_harmless(network: nn.Module, node: fx.Node) -> None:
    """Refuse what changes tensors that others read.

    Raises:
        UntraceableError: naming the node.
    """
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_function" and ("out" in node.kwargs or node.target is operator.setitem):
        raise UntraceableError(name)
    if node.target in _CHANGING and any(user > node for user in _users(node.args[0])):
        raise UntraceableError(name)
    if node.op.startswith("call_") and _in_place(network, node):
        changed = node.args[0] if node.args else None
        if not isinstance(changed, fx.Node) or len(changed.users) > 1:
            raise UntraceableError(name)


def _users(value: object) -> list[fx.Node]:
    return list(value.users) if isinstance(value, fx.Node) else []


def _in_place(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    changing = name.endswith("_") and not name.endswith("__")
    return changing or bool(node.kwargs.get("inplace", False))
