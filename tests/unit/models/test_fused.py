"""Fused networks against float64 autograd of the networks they come from, and what they leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.models.convolutions import Forward, InputGradient, can_convolve
from robustflat.models.fused import Fused, fast_copy, fused
from robustflat.models.inference import MeanOfPixels, rewrite
from robustflat.models.mirror import Mirror
from robustflat.models.normalize import Normalize
from robustflat.models.passes import PassCounter, Passes
from robustflat.models.preact_resnet import preact_resnet18
from robustflat.models.resnet import resnet18, resnet50, resnet_tiny
from robustflat.models.steps import Gradients, Kept, Layers
from robustflat.models.wide_resnet import wide_resnet

pytestmark = pytest.mark.skipif(not can_convolve(), reason="PyTorch without oneDNN's fused convolutions")

COLOURS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "classes": 5}


class Reused(nn.Module):
    """Adds, concatenates and rectifies what other layers read, too; some layers work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, (3, 5), padding=(1, 2))
        self.third = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(16, 8, 3, padding=1, groups=2, stride=2)
        self.clip = nn.ReLU6(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(torch.relu(a))
        b += self.third(a)
        c = F.relu(b + a, inplace=True)
        d = self.clip(self.third(c) + self.second(c).sigmoid())
        e = self.grouped(torch.cat([d, c * 0.5], dim=1)).add(F.avg_pool2d(d, 2))
        logits: Tensor = self.head(F.adaptive_max_pool2d(e, 1).flatten(1))
        return logits


class Itself(nn.Module):
    """A residual branch of one convolution around its own input, and a value used twice by one addition."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Conv2d(3, 5, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x) + x
        logits: Tensor = self.head(y + y).view(x.shape[0], 5)
        return logits


class Sliced(nn.Module):
    """Sizes from the images inside slices and lists; something after the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[2] // 2
        y = F.relu(self.first(x))[:, :, :half, half:]
        logits: Tensor = self.head(y.reshape([x.shape[0], 8, -1]).mean(2))
        logits.sum() + y.sum()
        return logits


class Changing(nn.Module):
    """Changes values and numbers, some of which were read before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += 0.1 * y.detach().mean((1, 2, 3), keepdim=True)
        z = self.second(y)
        z -= 0.5
        z /= 2
        z *= y.sigmoid()
        pixels = x.shape[2]
        pixels *= x.shape[3]
        logits: Tensor = self.head(z.reshape(x.shape[0], 8, pixels).mean(2))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: resnet18(channels=8, norm="rebn", **COLOURS),
    "imagenet stem": lambda: resnet18(channels=8, stem="imagenet", **COLOURS),
    "bottlenecks": lambda: resnet50(channels=4, **COLOURS),
    "auxiliary head": lambda: resnet18(channels=8, auxiliary=True, activation="silu", **COLOURS),
    "preact": lambda: preact_resnet18(channels=8, **COLOURS),
    "wide": lambda: wide_resnet(depth=10, widen=1, **COLOURS),
    "reused": Reused,
    "itself": Itself,
    "sliced": Sliced,
    "changing": Changing,
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[request.param]()
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(8, 3, 16, 16))  # running statistics of their own
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def fused_copy(model: nn.Module) -> Fused:
    result = fused(rewrite(model, images(2)), images(2))
    assert isinstance(result, Fused)
    return result


def in_float64(model: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and gradient of their weighted sum by autograd."""
    point = x.double().requires_grad_()
    logits = copy.deepcopy(model).double()(point)
    (grad,) = torch.autograd.grad((logits * weights).sum(), point)
    return logits.detach().float(), grad.float()


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 2e-5


def test_logits_and_gradients(network: nn.Module) -> None:
    x, weights = images(), torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    logits, grad = in_float64(network, x, weights)
    ours, point = fused_copy(network), x.clone().requires_grad_()
    found = ours.run(point)
    assert_close(found.detach(), logits)
    for keep in (True, False):  # the second time as good as the first
        assert_close(torch.autograd.grad((found * weights).sum(), point, retain_graph=keep)[0], grad)
    with torch.no_grad():
        assert torch.equal(ours.run(x), found)
    assert torch.equal(x, images())


def test_gradients_of_a_function_of_the_logits(network: nn.Module) -> None:
    x, weights = images(), torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    logits, grad = in_float64(network, x, weights)
    ours = fused_copy(network)
    for size in (0, 2**20):  # the network itself, and the steps
        ours._size = size
        found, value, slope = ours.with_gradient(x.clone(), lambda z: (z * weights).sum(1))
        assert_close(found, logits)
        assert_close(value, (logits * weights).sum(1))
        assert_close(slope, grad)
        assert not any(t.requires_grad for t in (found, value, slope))


def test_bf16_is_as_close_as_the_copy_it_runs(network: nn.Module) -> None:
    copied = rewrite(network, images(2), precision="bf16", check_half=False)
    ours = fused(copied, images(2))
    assert isinstance(ours, Fused)
    weights = torch.ones(16, 5)
    expected = in_float64(network, images(16), weights)
    distances = []
    for run in (copied, ours.run):
        point = images(16).requires_grad_()
        logits = run(point)
        assert logits.dtype == torch.float32
        found = logits.detach(), torch.autograd.grad((logits * weights).sum(), point)[0]
        distances.append([float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)])
    assert all(mine < 1.25 * its + 0.005 for its, mine in zip(*distances, strict=True))


def test_follows_weights() -> None:
    torch.manual_seed(0)
    model = resnet18(channels=8, **COLOURS).eval()
    mirror = Mirror(model, images(2))
    ours = fused(mirror.copy, images(2))
    assert isinstance(ours, Fused)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    mirror.refreshed()
    weights = torch.ones(6, 5)
    logits, grad = in_float64(model, images(), weights)
    point = images().requires_grad_()
    found = ours.run(point)
    assert_close(found.detach(), logits)
    assert_close(torch.autograd.grad(found.sum(), point)[0], grad)


class Scaled(Sliced):
    """Computes with buffers before it looks at images."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 / self.spread))  # type: ignore[operator]


def test_follows_buffers() -> None:
    model = Scaled().eval()
    mirror = Mirror(model, images(2))
    ours = fused(mirror.copy, images(2))
    assert isinstance(ours, Fused)
    model.spread.fill_(3)  # type: ignore[operator]
    mirror.refreshed()
    assert_close(ours.run(images()).detach(), model(images()).detach())


def test_looking_at_a_network_leaves_its_weights_bit_for_bit() -> None:
    copied = rewrite(resnet18(channels=8, **COLOURS).eval(), images(2))
    before = {name: value.clone() for name, value in copied.state_dict().items()}
    assert isinstance(fused(copied, images(2)), Fused)
    assert all(torch.equal(value, before[name]) for name, value in copied.state_dict().items())


def test_copies_follow_their_own_weights() -> None:
    ours = fused_copy(resnet18(channels=8, **COLOURS).eval())
    before = ours.run(images())
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert torch.equal(ours.run(images()), before)
    assert torch.equal(other.run(images()), other.network(images()))


def test_second_derivatives_are_refused() -> None:
    ours = fused_copy(resnet18(channels=8, **COLOURS).eval())
    point = images().requires_grad_()
    (grad,) = torch.autograd.grad(ours.run(point).logsumexp(1).sum(), point, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        torch.autograd.grad(grad.square().sum(), point)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("add", ["nothing", "kept", "overwritten"])
def test_convolution_and_what_follows(rectify: bool, add: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 9, 3, stride=2, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
    x, other = (torch.randn(s).to(memory_format=torch.channels_last) for s in ((4, 6, 9, 8), (4, 9, 5, 4)))
    expected = layer(x) + (0 if add == "nothing" else other)
    expected = expected.relu() if rectify else expected
    before = other.clone()
    with torch.no_grad():
        found = Forward(layer, rectify=rectify)(x, None if add == "nothing" else other, overwrite=add == "overwritten")
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(other, before) != (add == "overwritten")


@pytest.mark.parametrize(
    ("inputs", "outputs", "options"),
    [
        (6, 9, {"kernel_size": 3, "padding": 1}),
        (6, 9, {"kernel_size": (1, 5), "padding": (0, 3)}),
        (6, 9, {"kernel_size": 3, "padding": 4}),
        (6, 9, {"kernel_size": 3, "padding": 1, "stride": 2}),
        (6, 9, {"kernel_size": 3, "padding": 2, "dilation": 2}),
        (6, 9, {"kernel_size": 1}),
        (6, 9, {"kernel_size": 1, "stride": (3, 2)}),
        (6, 9, {"kernel_size": 1, "padding": 1, "stride": 2}),
        (6, 9, {"kernel_size": 3, "padding": 1, "groups": 3}),
        (3, 9, {"kernel_size": 3, "padding": 1}),
        (1, 9, {"kernel_size": 5, "padding": 2}),
        (3, 9, {"kernel_size": 7, "padding": 1}),
        (2, 9, {"kernel_size": 4}),
        (3, 9, {"kernel_size": 3, "padding": 1, "stride": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [8, 11])
def test_input_gradient(inputs: int, outputs: int, options: dict[str, int], width: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(inputs, outputs, **options).requires_grad_(False)  # type: ignore[arg-type]
    ours = InputGradient(layer.to(memory_format=torch.channels_last))
    for _ in range(2):  # with other weights the second time
        x = torch.randn(4, inputs, 8, width).to(memory_format=torch.channels_last).requires_grad_()
        y = layer(x)
        grad = torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, x, grad)
        into = torch.randn_like(x).detach()
        start = into.clone()
        with torch.no_grad():
            alone, added = ours(grad, x.shape), ours(grad, x.shape, into)
            torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(added, expected + (start if added is into else 0), rtol=1e-4, atol=1e-5)
            layer.weight.mul_(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_differentiated_by_hand_give_autograds_bits(dtype: torch.dtype) -> None:
    layers = nn.Sequential(Normalize([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]), MeanOfPixels(), nn.Flatten(), nn.Linear(3, 5))
    layers.to(dtype).requires_grad_(False)
    x = torch.rand(6, 3, 7, 9, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layers(x)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    step, values, kept, gradients = Layers(list(layers), 0, 1), {0: x.detach()}, Kept(), Gradients()
    step.run(values, kept)
    for _ in range(2):
        gradients.add(1, grad, ours=False)
        step.pull(gradients, kept)
        found, _ = gradients.take(0)
        assert torch.equal(values[1], y)
        assert torch.equal(found, expected)


class _Branches(Reused):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class _Overwrites(Reused):
    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = F.relu(a, inplace=True)
        return self.head((a + b).mean((2, 3)))  # type: ignore[no-any-return]


class _NoConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class _Gated(nn.Module):
    """A branch of scale 0 that is computed without a graph, or from a tensor that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.gate, self.head = nn.Parameter(torch.zeros(8, 1, 1)), nn.Linear(8, 5)

    def branch(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head((y + self.gate * self.branch(y)).mean((2, 3)))  # type: ignore[no-any-return]


class _WithoutGraph(_Gated):
    def branch(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self.second(y)  # type: ignore[no-any-return]


class _InHalf(_Gated):
    def branch(self, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.second(y).float()  # type: ignore[no-any-return]


class _UnderTwoNames(_Gated):
    def branch(self, y: Tensor) -> Tensor:
        z = other = self.second(y)
        z += y
        return z * other  # type: ignore[no-any-return]


class _ByKeyword(Reused):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.clip(input=self.first(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kind", [_Branches, _Overwrites, _ByKeyword, _NoConvolution, _WithoutGraph, _UnderTwoNames, _InHalf]
)
def test_other_networks_are_left_alone(kind: type[nn.Module]) -> None:
    copied = rewrite(kind().eval(), images(2))
    assert fused(copied, images(2)) is copied


def test_hooks_work_or_keep_a_network_from_being_fused() -> None:
    torch.manual_seed(0)
    inner, outer = (resnet18(channels=8, **COLOURS).eval() for _ in range(2))
    inner.body[0].conv.register_forward_hook(lambda _, __, y: 2 * y)  # type: ignore[index,union-attr]
    outer.body[1].register_forward_hook(lambda _, __, y: 2 * y)  # type: ignore[index,union-attr]
    assert_close(fused_copy(inner).run(images()), inner(images()).detach())
    copied = rewrite(outer, images(2))
    assert fused(copied, images(2)) is copied


def test_types_devices_and_little_work_are_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fused_copy(resnet_tiny(in_channels=3, classes=5).eval())
    monkeypatch.setattr(ours, "run", lambda x: pytest.fail("ran the steps"))
    ours(images())
    monkeypatch.setattr(ours, "_size", 2**20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours(images())
    monkeypatch.setattr("robustflat.models.fused.can_convolve", lambda: False)
    ours(images())
    double = rewrite(resnet_tiny(in_channels=3, classes=5).double().eval(), images(2).double())
    assert fused(double, images(2).double()) is double


def test_inference_mode_makes_and_runs_it() -> None:
    torch.manual_seed(0)
    model = resnet18(channels=8, **COLOURS).eval()
    with torch.inference_mode():
        ours = fast_copy(model, images(2), "fp32")
        assert isinstance(ours, Fused)
        logits = ours.run(images())
    assert_close(logits.clone(), in_float64(model, images(), torch.ones(6, 5))[0])
    assert_close(ours.run(images()), logits.clone())


@pytest.mark.parametrize("size", [0, 2**20])
def test_passes_are_counted(size: int) -> None:
    model, counter = resnet_tiny(in_channels=3, classes=5).eval(), PassCounter()
    with counter.counting(model):
        copied = rewrite(model, images(2))
    before = counter.passes
    ours = fused(copied, images(2))
    assert isinstance(ours, Fused)
    assert counter.passes.since(before) == Passes(0, 0, 0)
    ours._size = size
    point = images().requires_grad_()
    ours(point).sum().backward()  # type: ignore[no-untyped-call]
    ours.with_gradient(images(), lambda z: z.sum(1))
    with torch.no_grad():
        ours(images())
    assert counter.passes.since(before) == Passes(3, 2, 18)


def test_memory_goes_layer_by_layer() -> None:
    ours = fused_copy(resnet18(channels=8, **COLOURS).eval())
    sizes: list[int] = []
    for step in ours._program._steps:
        pull = step.pull

        def noted(gradients: object, kept: dict[int, object], pull: Callable[..., None] = pull) -> None:
            sizes.append(len(kept))
            pull(gradients, kept)

        step.pull = noted  # type: ignore[method-assign,assignment]
    ours._size = 2**20
    ours.with_gradient(images(), lambda z: z.sum(1))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 1
