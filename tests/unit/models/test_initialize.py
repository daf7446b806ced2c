"""Initialisation: measured standard deviations, seeds, and residual branches that really are zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.models.initialize import Initialization, fan_of, zero_residuals_
from robustflat.models.resnet import BasicBlock, Bottleneck, resnet18, resnet50, resnet_tiny
from robustflat.models.small import lenet


@pytest.mark.parametrize(
    ("module", "fan_in", "fan_out"),
    [
        (nn.Conv2d(8, 16, 3), 72, 144),
        (nn.Conv2d(8, 16, (5, 1), bias=False), 40, 80),
        (nn.Conv2d(8, 16, 3, groups=4), 18, 36),
        (nn.Conv2d(8, 8, 7, groups=8), 49, 49),
        (nn.Linear(30, 20), 30, 20),
    ],
)
def test_fans_count_the_connections_of_one_unit(module: nn.Conv2d | nn.Linear, fan_in: int, fan_out: int) -> None:
    assert fan_of(module, "in") == fan_in
    assert fan_of(module, "out") == fan_out


@pytest.mark.parametrize(
    ("options", "activation", "conv", "linear"),
    [
        (Initialization(), "relu", (2 / (9 * 128)) ** 0.5, (2 / 300) ** 0.5),
        (Initialization(fan="in"), "relu", (2 / (9 * 64)) ** 0.5, (2 / 300) ** 0.5),
        (Initialization(linear_fan="out"), "relu", (2 / (9 * 128)) ** 0.5, (2 / 100) ** 0.5),
        (Initialization(), "tanh", 5 / 3 / (9 * 128) ** 0.5, 5 / 3 / 300**0.5),
        (Initialization(scale=3.0, gain=1.0), "relu", 3 / (9 * 128) ** 0.5, 3 / 300**0.5),
    ],
)
def test_standard_deviations_are_scale_times_gain_over_root_fan(
    options: Initialization, activation: str, conv: float, linear: float
) -> None:
    network = nn.Sequential(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.Linear(300, 100))
    options(network, activation)
    assert network[0].weight.std().item() == pytest.approx(conv, rel=0.03)
    assert network[2].weight.std().item() == pytest.approx(linear, rel=0.03)
    assert abs(network[0].weight.mean().item()) < 0.02 * conv
    assert not network[0].bias.any()
    assert not network[2].bias.any()
    assert torch.equal(network[1].weight, torch.ones(128))


def test_resnet18_has_the_stds_of_the_paper_code() -> None:
    model = resnet18(classes=10, channels=32)
    assert model.body.stem.conv.weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.08)
    assert model.body.blocks[7].conv2.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert model.body.blocks[6].shortcut.conv.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)


def test_lenet_uses_fan_in_for_convolutions_too() -> None:
    model = lenet(classes=10, image_size=8, channels=32, hidden=64, initialization=None)
    assert model.body.stage0.conv.weight.std().item() == pytest.approx((2 / 25) ** 0.5, rel=0.08)


def test_embeddings_start_small() -> None:
    embedding = nn.Embedding(200, 50)
    Initialization()(embedding, "relu")
    assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_one_seed_gives_one_network_whatever_the_global_generator() -> None:
    first = resnet_tiny(classes=10, initialization=Initialization(seed=3)).state_dict()
    torch.manual_seed(99)
    second = resnet_tiny(classes=10, initialization=Initialization(seed=3)).state_dict()
    other = resnet_tiny(classes=10, initialization=Initialization(seed=4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_without_a_seed_the_global_generator_decides() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(resnet_tiny(classes=10).head.weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_nothing_is_drawn_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert resnet_tiny(classes=10, initialization=Initialization(seed=0)).head.weight.is_meta


@pytest.mark.parametrize("norm", ["bn", "rebn", "gn", "ln"])
@pytest.mark.parametrize("build", [resnet_tiny, resnet50])
def test_zero_residuals_leave_only_the_shortcut_of_every_block(norm: str, build: object) -> None:
    assert callable(build)
    model = build(classes=3, in_channels=1, channels=8, norm=norm, zero_residuals=True)
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]
    assert blocks
    for block in blocks:
        x = torch.randn(4, block.conv1.in_channels, 8, 8)
        torch.testing.assert_close(block(x), block.shortcut(x).relu(), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["bn", "rebn"])
def test_without_zero_residuals_the_branch_takes_part(norm: str) -> None:
    block = resnet_tiny(classes=3, norm=norm, zero_residuals=False).body.blocks[0]
    x = torch.randn(4, 16, 8, 8)
    assert (block(x) - x.relu()).abs().max() > 0.1


def test_default_zeroes_where_a_scale_exists_and_else_nothing() -> None:
    assert not resnet18(classes=3, channels=4, norm="bn").body.blocks[0].norm2.weight.any()
    assert torch.equal(resnet18(classes=3, channels=4, norm="rebn").body.blocks[0].norm2.weight, -torch.ones(4))
    block = resnet18(classes=3, channels=4, norm="none").body.blocks[0]
    x = torch.randn(4, 4, 8, 8)
    assert (block(x) - x.relu()).abs().max() > 0.01


def test_the_tiny_resnet_starts_with_its_branches_at_work() -> None:
    assert torch.equal(resnet_tiny(classes=3).body.blocks[0].norm2.weight, torch.ones(16))


@pytest.mark.parametrize("norm", ["none", "fixedbn"])
def test_zero_residuals_without_a_scale_are_refused(norm: str) -> None:
    with pytest.raises(UserError, match=f"zero_residuals=true needs .*got norm='{norm}'"):
        zero_residuals_(nn.Identity(), norm, True)


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"scale must lie in \(0, inf\), got 0"):
        Initialization(scale=0.0)
    with pytest.raises(UserError, match="fan must be one of in, out, got 'both'"):
        Initialization(fan="both")
    with pytest.raises(UserError, match="linear_fan must be one of"):
        Initialization(linear_fan="both")
    with pytest.raises(UserError, match="gain must lie in"):
        Initialization(gain=-1.0)
    with pytest.raises(UserError, match="seed must lie in"):
        Initialization(seed=-1)
