"""One pass of a gradient attack: forward, objective and gradient, plainly or captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from robustflat.attacks.inputs import check_labels_on_cpu
from robustflat.attacks.judging import require_values
from robustflat.attacks.objectives import OBJECTIVES, Targeted
from robustflat.errors import UserError
from robustflat.models.fused import Fused
from robustflat.models.passes import count_instead, count_pass
from robustflat.types import Forward, Objective

MOST = 4
"""Passes captured per network; a graph keeps the memory of its pass."""

_WARM_UP = 3  # libraries choose their kernels and take their buffers before a capture


class Passed(NamedTuple):
    """What a pass finds, detached: logits (B, K), value (B,) of the objective, and its gradient (B, C, H, W)."""

    logits: Tensor
    value: Tensor
    grad: Tensor


Record: TypeAlias = Callable[[Callable[[], Passed], torch.device], tuple[Passed, Callable[[], None]]]
"""Takes work on fixed memory of a device; gives its results, in fixed memory, and what to call to compute them anew."""


def passed(forward: Forward, point: Tensor, y: Tensor, goal: Objective) -> Passed:
    """Forward and backward pass at images `point` (B, C, H, W), from a captured graph where `forward` has one.

    Args:
        forward: images -> logits (B, K).
        point: images; what they were computed from does not matter.
        y: labels, as `goal` takes them.
        goal: logits, y -> one value per example.

    Raises:
        UserError: if the value is not one per example or cannot be differentiated; on the CPU also for labels that
            are no class.
    """
    return forward.passed(point, y, goal) if isinstance(forward, Captured) else _passed(forward, point, y, goal)


class Captured(nn.Module):
    """A network whose attack passes are captured as CUDA graphs: one launch instead of one per kernel.

    Images and labels are copied into fixed memory, the graph is replayed, and its results are copied out. A pass is
    captured anew for another shape or type of images or labels, another objective, or another autocast, up to `MOST`
    times; further ones run plainly, and so does every objective that is none of `objectives.OBJECTIVES`: it might hold
    tensors of its own, of which a graph would see the first forever. Weights may change in place only. Hooks of the
    network run while a pass is captured; only counters of passes (`PassCounter`) see every replay.

    Args:
        network: images -> logits; frozen, in eval mode.
        record: how to capture; see `cuda_graph`.
    """

    def __init__(self, network: nn.Module, *, record: Record | None = None) -> None:
        super().__init__()
        self.network = network
        self._record = record or cuda_graph
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self.eval()
        count_instead(network, onto=self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, K), plainly."""
        logits: Tensor = self.network(x)
        return logits

    def passed(self, point: Tensor, y: Tensor, goal: Objective) -> Passed:
        """As `passed`; the first call of a kind takes several passes."""
        kind = _kind(point, y, goal)
        if kind is None or (kind not in self._graphs and len(self._graphs) >= MOST):
            return _passed(self, point, y, goal)
        if kind not in self._graphs:
            self._graphs[kind] = _Graph(self.network, point, y, goal, self._record)
        found = self._graphs[kind](point, y)
        count_pass(self, point, found.logits)
        return found


class _Graph:
    """A captured pass and its fixed memory."""

    def __init__(self, network: nn.Module, point: Tensor, y: Tensor, goal: Objective, record: Record) -> None:
        self._point, self._y = point.detach().clone(), y.clone()
        self._results, self._replay = record(lambda: _passed(network, self._point, self._y, goal), point.device)

    def __call__(self, point: Tensor, y: Tensor) -> Passed:
        self._point.copy_(point.detach())
        self._y.copy_(y)
        self._replay()
        return Passed(*(result.clone() for result in self._results))  # the next replay overwrites them


def cuda_graph(work: Callable[[], Passed], device: torch.device) -> tuple[Passed, Callable[[], None]]:
    """Capture work as a CUDA graph, after a few runs on a side stream; see `Record`.

    Raises:
        UserError: if it holds something that cannot be captured, such as waiting for the device.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            main, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(main)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    work()
            main.wait_stream(side)
            with torch.cuda.graph(graph):
                results = work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"compile=graph: this network cannot be captured as a CUDA graph ({reason}): does it wait for the device, "
            "or copy from the host? Set compile=default or none."
        ) from error
    return results, graph.replay


def _passed(forward: Forward, point: Tensor, y: Tensor, goal: Objective) -> Passed:
    def valued(logits: Tensor) -> Tensor:
        check_labels_on_cpu(logits, y)
        value = goal(logits, y)
        require_values(value, y)
        return value

    if isinstance(forward, Fused):
        return Passed(*forward.with_gradient(point.detach(), valued))
    point = point.detach().requires_grad_()
    logits = forward(point)
    value = valued(logits)
    (grad,) = torch.autograd.grad(value.sum(), point)
    return Passed(logits.detach(), value.detach(), grad)


def _kind(point: Tensor, y: Tensor, goal: Objective) -> tuple[object, ...] | None:
    """What a captured pass is good for; `None` for what must not be captured."""
    targeted = isinstance(goal, Targeted)
    objective = goal.objective if isinstance(goal, Targeted) else goal
    if not any(objective is one for one in OBJECTIVES.values()):
        return None
    device = point.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (point.shape, point.dtype, point.device, y.shape, y.dtype, objective, targeted, autocast)
