"""ResNets: published and measured parameter counts; torchvision and a literal block as oracles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.models.classifier import Classifier
from robustflat.models.layers import Layers
from robustflat.models.modes import perturbable
from robustflat.models.resnet import BasicBlock, Bottleneck, resnet18, resnet34, resnet50, resnet_tiny


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _randomised(model: nn.Module) -> nn.Module:
    """Random values everywhere, also in scales, shifts and running statistics, so that nothing cancels."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and value.dim() == 1:
                value.copy_(0.5 + torch.rand_like(value) if "var" in name or "weight" in name else value.normal_())
    return model


def _copied_from(theirs: nn.Module, ours: Classifier, skipped: tuple[str, ...] = ()) -> None:
    """Copy torchvision's state into ours by order; names in `skipped` exist only in ours and become 0."""
    source = list(theirs.state_dict().values())
    with torch.no_grad():
        for name, value in ours.state_dict().items():
            if name in skipped:
                value.zero_()
            else:
                value.copy_(source.pop(0))
    assert not source


# rows: norm, channels -> parameters, BN buffers, (numbers, tensors) attacked, the same without biases
PAPER = {
    ("bn", 64): (11_174_922, 9_620, (11_165_322, 26), (11_164_352, 21)),
    ("rebn", 64): (11_174_922, 9_620, (11_165_322, 26), (11_164_352, 21)),
    ("none", 64): (11_165_322, 0, (11_165_322, 26), (11_164_352, 21)),
    ("fixedbn", 64): (11_165_322, 9_620, (11_165_322, 26), (11_164_352, 21)),
    ("gn", 64): (11_174_922, 0, (11_165_322, 26), (11_164_352, 21)),
    ("rebn", 32): (2_798_090, None, None, None),
}


@pytest.mark.parametrize("key", PAPER, ids=str)
def test_parameters_and_attacked_weights_are_counted_as_in_the_paper_code(key: tuple[str, int]) -> None:
    parameters, buffers, attacked, without_biases = PAPER[key]
    with torch.device("meta"):
        model = resnet18(classes=10, norm=key[0], channels=key[1], mean=(0.5,) * 3, std=(0.2,) * 3)
    assert _count(model) == parameters
    if buffers is None:
        return
    assert sum(v.numel() for v in model.state_dict().values()) == parameters + buffers
    for expected, biases in ((attacked, True), (without_biases, False)):
        chosen = perturbable(model, biases=biases)
        assert (sum(v.numel() for v in chosen.values()), len(chosen)) == expected


@pytest.mark.parametrize(
    ("build", "published"), [(resnet18, 11_689_512), (resnet34, 21_797_672), (resnet50, 25_557_032)]
)
def test_imagenet_stem_has_the_published_number_of_parameters(build: Callable[..., Classifier], published: int) -> None:
    with torch.device("meta"):
        assert _count(build(classes=1000, stem="imagenet")) == published


def test_tiny_resnet_is_tiny() -> None:
    assert _count(resnet_tiny(classes=10)) == 19_754


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_layout_computes_what_torchvision_computes(name: str) -> None:
    build = {"resnet18": resnet18, "resnet50": resnet50}[name]
    theirs = _randomised(torchvision.models.get_model(name, num_classes=7))
    ours = build(classes=7, stem="imagenet")
    _copied_from(theirs, ours)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.body.stem.norm.running_var, theirs.bn1.running_var)


def test_cifar_layout_without_its_biases_computes_what_torchvision_computes() -> None:
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    _randomised(theirs)
    ours = resnet18(classes=10)
    biases = tuple(f"body.{p}.bias" for p in ("stem.conv", *(f"blocks.{i}.shortcut.conv" for i in (2, 4, 6))))
    _copied_from(theirs, ours, skipped=biases)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


def _normalised(x: Tensor, norm: nn.Module, scale: Tensor) -> Tensor:
    column = (-1, 1, 1)
    unit = (x - norm.running_mean.view(column)) / (norm.running_var.view(column) + 1e-5).sqrt()
    return unit * scale.view(column) + norm.bias.view(column)


@pytest.mark.parametrize(("norm", "offset"), [("bn", 0.0), ("rebn", 1.0)])
def test_basic_block_matches_its_formula_with_the_biased_shortcut(norm: str, offset: float) -> None:
    block = BasicBlock(4, 6, stride=2, layers=Layers(norm, "silu"), shortcut_bias=True).double().eval()
    _randomised(block)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    out = F.silu(
        _normalised(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.norm1, block.norm1.weight + offset)
    )
    out = _normalised(F.conv2d(out, block.conv2.weight, padding=1), block.norm2, block.norm2.weight + offset)
    conv, last = block.shortcut.conv, block.shortcut.norm
    short = _normalised(F.conv2d(x, conv.weight, conv.bias, stride=2), last, last.weight + offset)
    torch.testing.assert_close(block(x), F.silu(out + short))


def test_dropout_sits_between_second_convolution_and_its_norm() -> None:
    block = BasicBlock(4, 4, stride=1, layers=Layers("ln", "relu", 0.5), shortcut_bias=True)
    x = torch.rand(2, 4, 6, 6)
    torch.manual_seed(5)
    dropped = block(x)
    torch.manual_seed(5)
    dropped_maps = F.dropout(block.conv2(torch.relu(block.norm1(block.conv1(x)))), 0.5)
    expected = torch.relu(block.norm2(dropped_maps) + x)
    torch.testing.assert_close(dropped, expected)
    assert not torch.allclose(dropped, block.eval()(x))


def test_bottleneck_puts_the_stride_on_the_3x3_convolution() -> None:
    block = Bottleneck(8, 4, stride=2, layers=Layers("bn", "relu"), shortcut_bias=False)
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))
    assert block(torch.rand(2, 8, 8, 8)).shape == (2, 16, 4, 4)


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_any_image_size_works(size: int, channels: int, stem: str) -> None:
    model = resnet18(classes=5, in_channels=channels, channels=4, stem=stem).eval()
    assert model(torch.rand(2, channels, size, size)).shape == (2, 5)


def test_unknown_stem_and_empty_widths_are_refused() -> None:
    with pytest.raises(UserError, match="stem must be one of cifar, imagenet, got 'cifar10'"):
        resnet18(classes=10, stem="cifar10")
    with pytest.raises(UserError, match="channels must lie in"):
        resnet_tiny(classes=10, channels=0)
    with pytest.raises(UserError, match="in_channels must lie in"):
        resnet_tiny(classes=10, in_channels=0)
