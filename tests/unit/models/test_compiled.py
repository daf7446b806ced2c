"""Compiled networks: the same results, compiled once, and clear words where compiling is not possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from robustflat.errors import UserError
from robustflat.models.compiled import Compiled
from robustflat.models.inference import InferenceModel
from robustflat.models.mirror import Mirror
from robustflat.models.resnet import resnet_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Counting:
    """A backend that needs no compiler, and counts the graphs that it was given."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.graphs = 0
        self._backend = lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Tensor], **options: Any) -> Callable[..., Any]:
        self.graphs += 1
        compiled: Callable[..., Any] = self._backend(graph, examples)
        return compiled


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return resnet_tiny(classes=3, in_channels=1, channels=4).double().eval()


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def logits_and_gradient(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    point = x.detach().requires_grad_()
    logits = network(point)
    (grad,) = torch.autograd.grad(logits.square().sum(), point)
    return logits.detach(), grad


def test_follows_weights_and_takes_other_batches_without_compiling_again() -> None:
    model, backend, x = network(), Counting(), images()
    mirror = Mirror(model, x, double=True)
    compiled = Compiled(mirror.copy, backend=backend)
    for step in range(3):
        mirror.refreshed()
        for count, layout in ((4, torch.contiguous_format), (4, torch.channels_last), (3, torch.contiguous_format)):
            z = images(count).contiguous(memory_format=layout)
            for ours, plain in zip(logits_and_gradient(compiled, z), logits_and_gradient(model, z), strict=True):
                torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
            with torch.no_grad():
                torch.testing.assert_close(compiled(z), model(z), rtol=1e-9, atol=1e-9)
        assert backend.graphs == 2, step
        with torch.no_grad():
            model.train()(images(8) + step)
            model.eval()
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))


@torch._dynamo.config.patch(recompile_limit=2)
def test_every_network_has_a_limit_of_its_own() -> None:
    for seed in range(2):
        model, backend = network(seed), Counting()
        compiled = Compiled(Mirror(model, images(), double=True).copy, backend=backend)
        for ours, plain in zip(
            logits_and_gradient(compiled, images()), logits_and_gradient(model, images()), strict=True
        ):
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
        assert backend.graphs == 2


def test_leaves_random_streams_and_modes_alone() -> None:
    compiled, state = Compiled(Mirror(network(), images()).copy, backend=Counting("eager")), torch.get_rng_state()
    compiled(images())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in compiled.modules())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        logits = x.flatten(1)[:, :3]
        return -logits if logits.sum() > 0 else logits


def as_copy(network: nn.Module) -> InferenceModel:
    return InferenceModel(network.eval(), dtype=torch.float64, channels_last=False, notes=())


def test_a_network_that_cannot_be_compiled_as_a_whole_is_refused() -> None:
    with pytest.raises(UserError, match=r"does not take this network as a whole: .*compile=none"):
        Compiled(as_copy(Branching()), backend="eager")(images())


def failing(error: BaseException) -> Callable[..., Any]:
    def backend(graph: torch.fx.GraphModule, examples: list[Tensor], **options: Any) -> Callable[..., Any]:
        raise error

    return backend


def errors() -> dict[str, BaseException]:
    from torch._inductor import exc

    return {
        "install g\\+\\+": exc.InvalidCxxCompiler(),
        "Python's header files": exc.CppCompileError(["g++", "x.cpp"], "fatal error: Python.h"),
        "pip install triton": exc.TritonMissing(None),
        "as a whole": ValueError("odd"),
    }


@pytest.mark.parametrize("words", list(errors()))
def test_what_is_missing_is_said(words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        Compiled(Mirror(network(), images()).copy, backend=failing(errors()[words]))(images())
    assert "compile=none" in str(raised.value)


def test_a_real_missing_compiler_is_said() -> None:
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}),
        pytest.raises(UserError, match=r"install g\+\+"),
    ):
        Compiled(Mirror(network(), images()).copy, backend="inductor")(images())
