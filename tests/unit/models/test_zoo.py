"""The contract that every model builder keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.models import convnext, external, preact_resnet, resnet, small, vit, wide_resnet
from robustflat.models.initialize import Initialization

CLASSES = 7


class Case(NamedTuple):
    """A builder, its arguments for the smallest sensible network, and the images' (C, H, W)."""

    build: Callable[..., nn.Module]
    shape: tuple[int, int, int]
    has_norm: bool = True
    any_size: bool = True


def _external(*, classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(4, classes))
    return external.Wrapped(
        network, classes=classes, channels=in_channels, mean=options.get("mean"), std=options.get("std")
    )


ZOO = {
    "resnet18": Case(partial(resnet.resnet18, channels=4), (3, 16, 16)),
    "resnet18_imagenet": Case(partial(resnet.resnet18, channels=4, stem="imagenet"), (3, 64, 64)),
    "resnet34": Case(partial(resnet.resnet34, channels=4), (3, 16, 16)),
    "resnet50": Case(partial(resnet.resnet50, channels=4), (3, 16, 16)),
    "resnet_tiny": Case(resnet.resnet_tiny, (1, 8, 8)),
    "preact_resnet18": Case(partial(preact_resnet.preact_resnet18, channels=4), (3, 16, 16)),
    "wide_resnet": Case(partial(wide_resnet.wide_resnet, depth=10, widen=1), (3, 16, 16)),
    "lenet": Case(
        partial(small.lenet, in_channels=1, image_size=28, channels=4, hidden=8), (1, 28, 28), any_size=False
    ),
    "mlp": Case(partial(small.mlp, in_channels=3, image_size=8, units=(16,)), (3, 8, 8), any_size=False),
    "convnext": Case(partial(convnext.convnext, channels=8, depths=(1, 1)), (3, 16, 16)),
    "vit": Case(partial(vit.vit, image_size=16, width=24, depth=2), (3, 16, 16), has_norm=False, any_size=False),
    "external": Case(_external, (3, 16, 16)),
}
OURS = [name for name in ZOO if name != "external"]


def _build(name: str, **options: object) -> nn.Module:
    case = ZOO[name]
    channels = case.shape[0]
    return case.build(
        **{
            "classes": CLASSES,
            "in_channels": channels,
            "mean": (0.4,) * channels,
            "std": (0.3,) * channels,
            **options,
        }
    )


def _images(name: str, count: int = 6) -> torch.Tensor:
    return torch.rand(count, *ZOO[name].shape, generator=torch.Generator().manual_seed(1))


def _trained(name: str) -> nn.Module:
    """A model whose running statistics are not those of a fresh one."""
    model = _build(name)
    model(_images(name, 16))
    return model.eval()


def test_every_public_builder_is_in_the_zoo() -> None:
    modules = (resnet, preact_resnet, wide_resnet, small, convnext, vit)
    builders = {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and "classes" in inspect.signature(value).parameters and name[0] != "_"
    }
    assert builders - set(ZOO) == {"wrn_28_10", "wrn_34_10", "wrn_34_20", "wrn_70_16"}


@pytest.mark.parametrize("name", ZOO)
def test_images_in_the_unit_interval_become_logits(name: str) -> None:
    model = _build(name)
    for mode in (True, False):
        logits = model.train(mode)(_images(name))
        assert logits.shape == (6, CLASSES)
        assert logits.isfinite().all()
    assert model.classes == CLASSES


@pytest.mark.parametrize("name", ZOO)
def test_in_evaluation_mode_an_image_does_not_see_its_batch_mates(name: str) -> None:
    model, x = _trained(name), _images(name)
    with torch.no_grad():
        whole = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    assert whole.std(0).max() > 1e-4  # the images do get different logits


@pytest.mark.parametrize("name", ZOO)
def test_training_reaches_every_parameter(name: str) -> None:
    options: dict[str, object] = {"zero_residuals": False} if name.startswith("resnet") else {}
    model, x = _build(name, **options), _images(name)
    nn.functional.cross_entropy(model(x), torch.arange(6) % CLASSES).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter


@pytest.mark.parametrize("name", ZOO)
def test_state_dict_loads_strictly_and_is_free_of_normalisation_constants(name: str) -> None:
    model, x = _trained(name), _images(name)
    state = model.state_dict()
    assert not [key for key in state if key.startswith("normalize")]
    other = _build(name)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.eval()(x), model(x))
    plain = _build(name, mean=None, std=None)
    assert list(plain.state_dict()) == list(state)


@pytest.mark.parametrize("name", ZOO)
def test_mean_and_std_act_before_everything_else(name: str) -> None:
    model = _trained(name)
    plain = _build(name, mean=None, std=None).eval()
    plain.load_state_dict(model.state_dict())
    x = _images(name)
    torch.testing.assert_close(model(x), plain((x - 0.4) / 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_wrong_number_of_channels_is_refused(name: str) -> None:
    channels, height, width = ZOO[name].shape
    with pytest.raises(UserError, match=r"images of shape \(B, "):
        _build(name)(torch.rand(2, 4 - channels, height, width))


@pytest.mark.parametrize("name", OURS)
def test_wrong_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"activation must be one of .*Did you mean 'relu'"):
        _build(name, activation="reluu")
    with pytest.raises(UserError, match=r"classes must lie in"):
        _build(name, classes=0)
    with pytest.raises(UserError, match=r"in_channels must lie in"):
        _build(name, in_channels=0, mean=None, std=None)
    if ZOO[name].has_norm:
        with pytest.raises(UserError, match=r"norm must be one of .*Did you mean 'rebn'"):
            _build(name, norm="rebnn")


@pytest.mark.parametrize("norm", ["bn", "fixedbn", "rebn", "gn", "ln", "none"])
@pytest.mark.parametrize("name", [n for n in OURS if ZOO[n].has_norm])
def test_every_norm_fits_every_network(name: str, norm: str) -> None:
    logits = _build(name, norm=norm)(_images(name))
    assert logits.shape == (6, CLASSES)
    assert logits.isfinite().all()


@pytest.mark.parametrize("activation", ["silu", "mish", "gelu", "gelu_sigmoid", "softplus", "tanh"])
@pytest.mark.parametrize("name", ["resnet_tiny", "wide_resnet", "lenet"])
def test_activations_change_the_network(name: str, activation: str) -> None:
    seed = Initialization(seed=0, gain=1.0)
    x = _images(name)
    changed = _build(name, activation=activation, initialization=seed)(x)
    assert not torch.allclose(changed, _build(name, initialization=seed)(x))


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [n for n in ZOO if ZOO[n].any_size])
def test_grey_and_colour_images_of_usual_sizes_fit(name: str, channels: int, size: int) -> None:
    model = _build(name, in_channels=channels, mean=None, std=None).eval()
    with torch.no_grad():
        assert model(torch.rand(2, channels, size, size)).shape == (2, CLASSES)


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [n for n in ZOO if not ZOO[n].any_size])
def test_networks_with_a_fixed_size_are_built_for_it(name: str, channels: int, size: int) -> None:
    model = _build(name, in_channels=channels, image_size=size, mean=None, std=None).eval()
    assert model.image_shape == (channels, size, size)
    with torch.no_grad():
        assert model(torch.rand(2, channels, size, size)).shape == (2, CLASSES)
    with pytest.raises(UserError, match="image_size"):
        model(torch.rand(2, channels, size + 2, size + 2))


@pytest.mark.parametrize("name", OURS)
def test_one_seed_gives_one_network(name: str) -> None:
    first = _build(name, initialization=Initialization(seed=5)).state_dict()
    torch.manual_seed(77)
    second = _build(name, initialization=Initialization(seed=5)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", OURS)
def test_double_precision_runs_throughout(name: str) -> None:
    logits = _build(name).double()(_images(name).double())
    assert logits.dtype == torch.float64
