"""A rewritten network compiled by `torch.compile`, for one shape of its batch."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.models.inference import InferenceModel
from robustflat.models.passes import count_instead

MODES = ("default", "reduce-overhead")
"""Modes of `torch.compile`: fused kernels, or on CUDA also replayed as CUDA graphs."""

_REMEDY = "Or set compile=none, which computes the same up to rounding."


class Compiled(nn.Module):
    """Runs a network through `torch.compile` for the first shape of images that it is given; eagerly for others.

    So a smaller last batch never compiles anew. Two graphs are compiled, both at the first call: one with the gradient
    to the images and one without. Weights are inputs of the graphs: changes in place (`Mirror.refreshed`) need no
    compilation. Compiled code lies in inductor's cache on disk (folder: environment variable TORCHINDUCTOR_CACHE_DIR)
    and is found there by the next process. Results differ from the network's by rounding.

    Args:
        network: rewritten for searching, with frozen weights, in eval mode; its modules must stay the same.
        mode: one of `MODES`; on a CPU both are the same.
        backend: of `torch.compile`.
    """

    def __init__(self, network: InferenceModel, *, mode: str = "default", backend: str | Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self._overwrites = mode == "reduce-overhead"
        self._order = torch.channels_last if network.channels_last else torch.contiguous_format
        self._run = torch.compile(_own_code(network), fullgraph=True, dynamic=False, mode=mode, backend=backend)
        self._compiled_for: tuple[object, ...] | None = None
        self.eval()
        count_instead(network, onto=self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, K).

        Raises:
            UserError: if the network cannot be compiled here; it says what is missing.
        """
        kind = (x.shape, x.dtype, x.device)
        if self._compiled_for is None:
            self._compile(x)
            self._compiled_for = kind
        return self._compiled(x) if kind == self._compiled_for else self.network(x)

    def _compile(self, x: Tensor) -> None:
        """Try both graphs, so that whatever compiling raises is raised here, that of the backward pass included."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own parts, and advice for other settings
            with torch.no_grad():
                self._compiled(x)
            with torch.enable_grad():
                point = x.detach().clone().requires_grad_()
                logits = self._compiled(point)
                if logits.requires_grad:
                    with _explained():
                        torch.autograd.grad(logits.sum(), point)

    def _compiled(self, x: Tensor) -> Tensor:
        # Always the same strides: others would need another graph.
        x = x.clone(memory_format=self._order)
        if self._overwrites and x.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            if x.requires_grad:
                # The next pass overwrites what this one returns.
                x.register_hook(torch.clone)  # type: ignore[no-untyped-call]
        with _explained():
            logits: Tensor = self._run(x)
        return logits.clone() if self._overwrites else logits


def _own_code(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that calls the network and has a code object of its own, by which torch counts compilations.

    Otherwise all networks of a process would share one limit on their number.
    """

    def call(x: Tensor) -> Tensor:
        logits: Tensor = network(x)
        return logits

    return FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


class _explained:  # noqa: N801  # a context manager; one made by a generator would cost more than a small pass
    """Turns what the compiler raises inside into a `UserError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and isinstance(error, _compiler_errors()):
            raise UserError(_explanation(error)) from error


@cache
def _compiler_errors() -> tuple[type[BaseException], ...]:
    found: list[type[BaseException]] = []
    for room, names in (
        ("torch._dynamo.exc", ("TorchDynamoException", "FailOnRecompileLimitHit", "TritonUnavailableError")),
        ("torch._inductor.exc", ("OperatorIssue", "InvalidCxxCompiler", "CppCompileError", "CppWrapperCodegenError")),
    ):
        module = importlib.import_module(room)  # imported late: they take a second
        found += [getattr(module, name) for name in names if hasattr(module, name)]
    return tuple(found)


def _explanation(error: BaseException) -> str:
    """What is missing, by the names of the errors in the chain."""
    names, link = set[str](), [error]
    while link:
        one = link.pop()
        names.add(type(one).__name__)
        inner = (one.__cause__, one.__context__, getattr(one, "inner_exception", None))
        link += [e for e in inner if isinstance(e, BaseException) and type(e).__name__ not in names]
    if "InvalidCxxCompiler" in names:
        return f"compile needs a C++ compiler, and none was found: install g++, or name yours in CXX. {_REMEDY}"
    if names & {"CppCompileError", "CUDACompileError"}:
        missing = "is the compiler complete, and are Python's header files installed?"
        return f"compile: the C++ compiler failed on generated code ({missing}): {_first_line(error)} {_REMEDY}"
    if names & {"TritonMissing", "TritonUnavailableError"}:
        return f"compile needs Triton on this GPU, and it is not installed: pip install triton. {_REMEDY}"
    if "GPUTooOldForTriton" in names:
        return "compile: this GPU is too old for Triton. Set compile=none."
    return f"compile: torch.compile does not take this network as a whole: {_first_line(error)} {_REMEDY}"


def _first_line(error: BaseException) -> str:
    error = getattr(error, "inner_exception", None) or error
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text[:200].rstrip(".") + "."
