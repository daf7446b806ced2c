"""The rewritten network against the plain one: logits, gradients, and what must not be folded."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.models.folded import FoldedForward, folded_forward
from robustflat.models.inference import keep_freed_memory, rewrite
from robustflat.models.norms import ReBatchNorm
from robustflat.models.resnet import resnet18
from tests.reference.models import cnn_cifar10

SHAPE = (3, 8, 8)


def images(count: int = 6) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module) -> nn.Module:
    """Statistics, scales and shifts as after some training: none of them 0 or 1."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.3, 2.0),
                (module.weight, 0.4, 1.2),
                (module.bias, -0.3, 0.3),
            ):
                if tensor is not None:
                    tensor.data = low + (high - low) * torch.rand(tensor.shape, generator=generator)
    return model.eval()


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x)
    return slope


class Coarse(nn.Sequential):
    """Rounds anew in every pass, unless a card would convolve exactly."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)
        exact = torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
        return logits if exact else logits * (1 + 0.01 * torch.randn_like(logits))


@pytest.mark.parametrize("autocast", [False, True])
def test_folding_is_judged_exactly_on_a_card_and_in_a_training_in_half_precision(autocast: bool) -> None:
    torch.manual_seed(0)
    model = trained(Coarse(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        fast, folded = rewrite(model, images()), folded_forward(model, images())
    assert fast.notes[0] == "1 of 1 batch norms folded"
    assert isinstance(folded, FoldedForward)


@pytest.mark.parametrize("norm", ["bn", "rebn", "fixedbn"])
def test_residual_network_folds_completely_and_keeps_logits_and_gradients(norm: str) -> None:
    model = trained(resnet18(classes=5, channels=4, norm=norm, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))).double()
    before = copy.deepcopy(model.state_dict())
    x = images(9).double()  # in float64 no rounding flips a rectifier
    fast = rewrite(model, x[:4])
    assert fast.notes == ("20 of 20 batch norms folded",)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(fast, x), gradient(model, x), rtol=1e-7, atol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in fast.parameters())


@pytest.mark.parametrize("channels_last", [True, False])
def test_reference_network_keeps_every_prediction(channels_last: bool) -> None:
    model, x, _ = cnn_cifar10()
    fast = rewrite(model, x[:4], channels_last=channels_last)
    assert fast.notes == ("3 of 3 batch norms folded",)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(fast(x).argmax(1), model(x).argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pooling_gives_the_same_bits_and_passes_gradients_on_in_channels_last_order(dtype: torch.dtype) -> None:
    plain = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fast = rewrite(nn.Sequential(nn.Conv2d(3, 3, 1), *plain), images()).network[1:]
    assert type(fast[0]) is not nn.AdaptiveAvgPool2d
    x = (3000 * images(5)).to(dtype).contiguous(memory_format=torch.channels_last)
    weights = images(5)[:, :, 0, 0].to(dtype)
    slopes = []
    for network in (plain, fast):
        point = x.clone().requires_grad_()
        assert torch.equal(network(point), plain(x))
        slopes += torch.autograd.grad((network(point) * weights).sum(), point)
    assert torch.equal(*slopes)
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((fast(point.relu()) * weights).sum(), point)
    assert slope.is_contiguous(memory_format=torch.channels_last)


def test_bf16_comes_close_and_gives_float32_logits() -> None:
    model, x, _ = cnn_cifar10()
    fast = rewrite(model, x[:4], precision="bf16")
    with torch.no_grad():
        rough, exact = fast(x), model(x)
    assert rough.dtype == torch.float32
    assert float((rough - exact).abs().max()) < 0.1
    assert len(rough[:, 0].unique()) > 100  # logits are not rounded to 8 bits
    assert gradient(fast, x).dtype == torch.float32


def test_bf16_normalises_images_in_float32() -> None:
    model = trained(resnet18(classes=5, channels=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)))
    fast = rewrite(model, images(), precision="bf16")
    assert fast.dtype == torch.float32
    assert fast.network.normalize.layer.mean.dtype == torch.float32
    halves = [p.dtype for name, p in fast.network.named_parameters() if name.startswith("body")]
    assert set(halves) == {torch.bfloat16}
    with torch.no_grad():
        rough, exact = fast(images()), model(images())
    assert float((rough - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_linear_layers_and_grouped_convolutions_are_folded_too() -> None:
    model = trained(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3, bias=False),
            nn.BatchNorm2d(6),
            nn.Flatten(),
            nn.Linear(216, 10),
            ReBatchNorm(10),
        )
    )
    fast = rewrite(model, images())
    assert fast.notes == ("2 of 2 batch norms folded",)
    torch.testing.assert_close(fast(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """Convolution and batch norm that must not be merged, for the reason named."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3, track_running_stats=reason != "no statistics")
        self.tokens, self.of_tokens = nn.Linear(64, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.reason == "used again":
            out = self.conv(x)
            out = self.norm(out) + out
        elif self.reason == "called twice":
            out = self.norm(self.conv(self.conv(x)))
        elif self.reason == "changed in place":
            out = self.norm(self.conv(x).relu_())
        elif self.reason == "other channels":
            return self.of_tokens(self.tokens(x.flatten(2))).mean(2)  # type: ignore[no-any-return]
        elif self.reason == "two norms":
            out = self.conv(x)
            out = self.norm(out) * self.of_tokens(out.flatten(2)).view_as(out)
        elif self.reason == "asked for its size":
            out = self.norm(self.conv(x)) * self.norm.num_features
        else:
            out = self.norm(self.conv(x))
        return out.mean((2, 3))


@pytest.mark.parametrize(
    "reason", ["used again", "called twice", "changed in place", "hooked", "other channels", "two norms"]
)
@pytest.mark.parametrize("state", [trained, nn.Module.eval])
def test_what_cannot_be_folded_is_left_alone_and_said(reason: str, state: Callable[[nn.Module], nn.Module]) -> None:
    model = state(Odd(reason))
    if reason == "hooked":
        model.conv.register_forward_hook(lambda module, args, output: output * 2)  # type: ignore[operator]
    fast = rewrite(model, images())
    torch.testing.assert_close(fast(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)
    assert fast.notes[0] == "0 of 2 batch norms folded"


def test_a_network_that_looks_at_its_batch_norm_keeps_it() -> None:
    model = trained(Odd("asked for its size"))
    fast = rewrite(model, images())
    torch.testing.assert_close(fast(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)
    assert "left as it is" in fast.notes[0]


def test_what_changes_gradients_on_their_way_back_is_kept() -> None:
    model = trained(Odd("nothing"))
    for part in (model.conv, model.norm):
        assert isinstance(part, nn.Module)
        part.register_full_backward_hook(lambda module, taken, given: (taken[0].cumsum(1),))
    torch.testing.assert_close(gradient(rewrite(model, images()), images()), gradient(model, images()))


class Renamed(nn.Module):
    """Batch norm without scale and shift, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, affine=False))
        self.norm = self.first[1]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.first[0](x))
        return out.mean((2, 3))


def test_a_batch_norm_under_two_names_is_folded_once() -> None:
    model = trained(Renamed())
    fast = rewrite(model, images())
    assert fast.notes[0] == "1 of 1 batch norms folded"
    torch.testing.assert_close(fast(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)


class Remembers(nn.Module):
    """Uses what came before the rectifier, in the value or only in the gradient."""

    def __init__(self, value: bool) -> None:
        super().__init__()
        self.value = value
        self.conv = nn.Conv2d(3, 3, 3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        before = out if self.value else out.square()  # autograd keeps `out`
        rectified: Tensor = self.relu(out)
        return rectified.mean((2, 3)) + before.mean((2, 3))


@pytest.mark.parametrize("value", [True, False])
def test_rectifiers_overwrite_nothing_that_is_needed(value: bool) -> None:
    model = Remembers(value)
    fast = rewrite(model, images())
    torch.testing.assert_close(fast(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(fast, images(4)), gradient(model, images(4)), rtol=1e-3, atol=1e-5)
    assert not fast.network.relu.inplace


def test_biases_of_zero_do_not_hide_that_a_rectifier_overwrites_what_is_needed() -> None:
    model = Remembers(True)
    nn.init.zeros_(model.conv.bias)  # type: ignore[arg-type]
    fast = rewrite(model, images())
    torch.testing.assert_close(fast(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)


def test_rectifiers_overwrite_what_is_not_needed_in_the_copy_only() -> None:
    model, x, _ = cnn_cifar10()
    fast = rewrite(model, x[:4])
    assert fast.network.relu1.inplace
    assert not model.relu1.inplace


def test_a_network_that_needs_the_usual_memory_order_keeps_it() -> None:
    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).view(len(x), -1)[:, :5]

    model = Flattens()
    fast = rewrite(model, images())
    assert "channels-last left out" in fast.notes[-1]
    torch.testing.assert_close(fast(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)


def test_gradients_of_instance_norm_are_right_for_a_single_image() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten())
    fast = rewrite(model, images())
    torch.testing.assert_close(gradient(fast, images(1)), gradient(model, images(1)), rtol=1e-3, atol=1e-5)


def test_a_network_that_takes_no_single_image_is_in_channels_last_order() -> None:
    class Squeezes(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()  # type: ignore[no-any-return]

    model = trained(Squeezes(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)))
    fast = rewrite(model, images())
    assert fast.channels_last
    torch.testing.assert_close(fast(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)


def test_a_network_that_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    model.register_buffer("last", torch.ones(1, requires_grad=True) * 2)
    with pytest.raises(UserError, match="Sequential cannot be copied for rewriting"):
        rewrite(model, images())


class Turned(nn.Module):
    """Batch norm of a tensor whose only image has strides that PyTorch 2.14 gets wrong on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        turned = y.permute(0, 2, 3, 1).reshape(len(y), 36, 4).transpose(1, 2).reshape(y.shape)
        return (self.norm(turned) * y.contiguous()).flatten(1)


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_of_single_images_are_right(count: int) -> None:
    torch.manual_seed(0)
    model = trained(Turned())
    fast = rewrite(model, images().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(gradient(fast, images(count)), gradient(model, images(count)), rtol=1e-3, atol=1e-5)


def test_shared_layers_are_not_folded() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = trained(nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3), nn.Flatten()))
    fast = rewrite(model, images())
    assert fast.notes == ("0 of 2 batch norms folded",)
    torch.testing.assert_close(fast(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_folding_can_be_left_out() -> None:
    model, x, _ = cnn_cifar10()
    fast = rewrite(model, x[:4], fold_batch_norm=False, channels_last=False)
    assert fast.notes == ()
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


def test_training_mode_of_the_model_is_left_and_the_copy_evaluates() -> None:
    model = trained(resnet18(classes=3, channels=2)).train()
    fast = rewrite(model, images())
    assert model.training
    assert not fast.training
    assert torch.equal(fast(images()), fast(images()))


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'bf16'"):
        rewrite(nn.Flatten(), images(), precision="fb16")


def test_a_model_that_bf16_ruins_is_refused() -> None:
    class Fine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            flat = (1000 + x.flatten(1)[:, :3]) * self.weight
            return flat - 1000

    with pytest.raises(UserError, match="use precision fp32"):
        rewrite(Fine(), images(), precision="bf16")


def test_memory_is_kept_where_glibc_manages_it() -> None:
    expected = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")
    assert keep_freed_memory() is expected
    assert keep_freed_memory() is expected


def test_other_platforms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


class Hidden(nn.Module):
    """A ReLU whose input goes around it, too, behind a branch that is still closed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.relu(y)
        return (z + self.gate * y).mean((2, 3))  # type: ignore[no-any-return]


def test_relu_keeps_an_input_that_a_closed_branch_reads() -> None:
    model = Hidden().eval()
    copied = rewrite(model, images())
    assert not copied.network.gate.any()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        for network in (model, copied.network):
            network.gate.fill_(-3.0)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(copied(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)
