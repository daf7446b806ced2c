"""State managers put back exactly what they found; the choice of weights goes by module type."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.models.modes import (
    displaced,
    evaluating,
    frozen,
    frozen_statistics,
    is_norm_layer,
    perturbable,
)


class Scale(nn.Module):
    """A normalisation layer of our own, without a base class of torch; its name gives nothing away."""

    is_normalization = True

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return x * self.gain.view(-1, 1, 1)


class Rotation(nn.Module):
    """An auxiliary head with layers inside."""

    is_auxiliary = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.whatever = nn.BatchNorm2d(4)
        self.normal_looking = nn.Conv2d(4, 4, 1)  # "norm" in the name of an ordinary layer
        self.group = nn.GroupNorm(2, 4)
        self.own = Scale()
        self.head = nn.Linear(4, 2)
        self.turns = Rotation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.own(self.group(self.normal_looking(self.whatever(self.stem(x)))))
        return self.head(h.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(5, 3, 6, 6)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_frozen_stops_weight_gradients_and_restores_each_flag(net, x):
    net.stem.bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    x.requires_grad_(True)
    with frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
        net(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == flags


def test_frozen_takes_several_modules_that_share_parameters(net):
    with frozen(net, net.stem, nn.Linear(2, 2)):
        assert not net.stem.weight.requires_grad
    assert net.stem.weight.requires_grad


def test_evaluating_restores_the_mode_of_every_submodule(net):
    net.train()
    net.whatever.eval()
    modes = [m.training for m in net.modules()]
    with evaluating(net):
        assert not any(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize("manager", [frozen, evaluating, frozen_statistics])
def test_state_comes_back_after_an_exception(manager, net, x):
    net.train()
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError), manager(net):
        if manager is frozen_statistics:
            net(x)
        raise ZeroDivisionError
    assert_unchanged(net, before)
    assert all(p.requires_grad for p in net.parameters())
    assert all(m.training for m in net.modules())


class Own(nn.BatchNorm2d):
    """A subclass with statistics that are replaced instead of written to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.training:
            self.running_mean = self.running_mean + 1
        return y


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, momentum=None),
        nn.BatchNorm2d(3, momentum=1.0, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3, track_running_stats=True),
        Own(3),
    ],
    ids=["batch", "cumulative", "momentum1", "untracked", "instance", "subclass"],
)
def test_frozen_statistics_keep_buffers_while_normalising_by_the_batch(layer, x):
    layer.train()
    layer(x)
    before, own = snapshot(layer), dict(layer.named_buffers())
    expected = copy.deepcopy(layer)(2 * x)
    with frozen_statistics(layer):
        first, second = layer(2 * x), layer(2 * x)
    torch.testing.assert_close(first, expected, rtol=0, atol=0)
    assert torch.equal(first, second)
    assert_unchanged(layer, before)
    assert all(buffer is own[name] for name, buffer in layer.named_buffers())


def test_statistics_do_change_without_the_manager(x):
    layer = nn.BatchNorm2d(3).train()
    before = snapshot(layer)
    layer(x)
    assert not torch.equal(layer.running_mean, before["running_mean"])


def test_frozen_statistics_cover_sync_batch_norm_and_layers_of_our_own(net, x):
    net.train()
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert isinstance(sync.whatever, nn.SyncBatchNorm)
    own = sync.whatever.running_mean
    with frozen_statistics(sync):
        assert sync.whatever.running_mean is not own
        sync.own(torch.zeros(1, 4, 1, 1))
    assert sync.whatever.running_mean is own
    assert sync.own.seen == 0


def test_a_graph_recorded_under_frozen_statistics_can_be_differentiated_outside(net, x):
    net.train()
    reference = copy.deepcopy(net)
    wanted = torch.autograd.grad(reference(x).square().sum(), list(reference.stem.parameters()))
    with frozen_statistics(net):
        loss = net(x).square().sum()
    found = torch.autograd.grad(loss, list(net.stem.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_displaced_adds_and_restores_bit_for_bit(net):
    before = snapshot(net)
    nu = {name: 1e3 * torch.randn_like(p) for name, p in net.named_parameters()}
    with displaced(net, nu):
        for name, p in net.named_parameters():
            assert torch.equal(p.detach(), before[name] + nu[name])
    assert_unchanged(net, before)
    # Adding and subtracting would not have done.
    assert any(not torch.equal((before[n] + step) - step, before[n]) for n, step in nu.items())


def test_displaced_restores_after_an_exception_and_whatever_the_body_did(net):
    before = snapshot(net)
    nu = {"stem.weight": torch.ones_like(net.stem.weight)}
    with pytest.raises(ZeroDivisionError), displaced(net, nu):
        nn.init.zeros_(net.stem.weight)
        raise ZeroDivisionError
    assert_unchanged(net, before)


def test_displacements_can_be_nested(net):
    before = snapshot(net)
    one = {"stem.weight": torch.full_like(net.stem.weight, 0.1)}
    with displaced(net, one):
        middle = snapshot(net)
        with displaced(net, one):
            assert torch.equal(net.stem.weight.detach(), middle["stem.weight"] + 0.1)
        assert_unchanged(net, middle)
    assert_unchanged(net, before)


def test_gradients_are_those_at_the_displaced_weights(net, x):
    net.eval()
    nu = {name: 0.1 * torch.randn_like(p) for name, p in net.named_parameters()}
    moved = copy.deepcopy(net)
    moved.load_state_dict({**net.state_dict(), **{n: p.detach() + nu[n] for n, p in net.named_parameters()}})
    (wanted,) = torch.autograd.grad(moved(x).square().sum(), [moved.stem.weight])
    with displaced(net, nu):
        (found,) = torch.autograd.grad(net(x).square().sum(), [net.stem.weight])
    torch.testing.assert_close(found, wanted)


def test_autograd_refuses_to_differentiate_after_the_weights_moved_back(net, x):
    net.eval()
    with displaced(net, {"head.weight": torch.ones_like(net.head.weight)}):
        loss = net(x).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_displaced_names_what_does_not_fit(net):
    before = snapshot(net)
    unknown = {"stem.bias": torch.ones(4), "stem.wait": torch.ones(1)}
    with (
        pytest.raises(UserError, match=r"Net has no parameter called 'stem.wait'.*'stem.weight'"),
        displaced(net, unknown),
    ):
        pass
    wrong = {"head.bias": torch.ones(1)}
    with (
        pytest.raises(UserError, match=r"'head.bias' must have the parameter's shape \(2,\), got \(1,\)"),
        displaced(net, wrong),
    ):
        pass
    assert_unchanged(net, before)


def test_a_shared_parameter_takes_one_displacement_under_either_name():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    before = snapshot(model)
    step = torch.ones(2, 2)
    for name in ("a.weight", "b.weight"):
        with displaced(model, {name: step}):
            assert torch.equal(model["a"].weight.detach(), before["a.weight"] + step)
    both = {"a.weight": step, "b.weight": step}
    with pytest.raises(UserError, match="mean one shared parameter of ModuleDict"), displaced(model, both):
        pass


def test_perturbable_leaves_out_norm_layers_by_type_and_auxiliary_heads(net):
    expected = ["stem.weight", "stem.bias", "normal_looking.weight", "normal_looking.bias"]
    assert list(perturbable(net)) == [*expected, "head.weight", "head.bias"]


def test_perturbable_leaves_out_biases_on_request(net):
    assert list(perturbable(net, biases=False)) == ["stem.weight", "normal_looking.weight", "head.weight"]
    with_norms = list(perturbable(net, norm_layers=True, biases=False))
    assert with_norms == [
        "stem.weight", "whatever.weight", "normal_looking.weight", "group.weight", "own.gain", "head.weight",
    ]  # fmt: skip


def test_perturbable_takes_norm_layers_on_request_but_never_auxiliary_or_frozen_ones(net):
    net.head.bias.requires_grad_(False)
    names = list(perturbable(net, norm_layers=True))
    main = [n for n, _ in net.named_parameters() if not n.startswith("turns") and n != "head.bias"]
    assert names == main


def test_perturbable_returns_detached_views(net):
    w = perturbable(net)
    assert not any(t.requires_grad for t in w.values())
    assert w["stem.weight"].data_ptr() == net.stem.weight.data_ptr()


def test_biases_of_attention_count_as_biases():
    assert list(perturbable(nn.MultiheadAttention(4, 2), biases=False)) == ["in_proj_weight", "out_proj.weight"]


def test_what_lies_inside_a_norm_layer_belongs_to_it():
    class Adaptive(nn.LayerNorm):
        def __init__(self) -> None:
            super().__init__(4)
            self.style = nn.Linear(2, 4)

    model = nn.ModuleDict({"adaptive": Adaptive(), "body": nn.Linear(4, 4)})
    assert list(perturbable(model)) == ["body.weight", "body.bias"]


def test_a_shared_parameter_is_counted_once_and_main_modules_win_over_auxiliary_ones():
    model = nn.ModuleDict({"aux": Rotation(), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["a"].weight = model["aux"].inner[0].weight
    model["b"].weight = model["a"].weight
    w = perturbable(model)
    assert list(w) == ["a.weight", "a.bias", "b.bias"]
    with displaced(model, {name: torch.ones_like(t) for name, t in w.items()}):
        pass


def test_a_whole_network_marked_as_nothing_to_perturb_is_refused_with_counts(net):
    for p in net.head.parameters():
        p.requires_grad_(False)
    small = nn.Sequential(nn.BatchNorm2d(4), net.head, Rotation())
    message = r"Sequential has no weights to perturb.*2 in auxiliary.*2 with requires_grad=False.*2 in norm"
    with pytest.raises(UserError, match=message):
        perturbable(small)
    assert perturbable(small, require=False) == {}
    with pytest.raises(UserError, match=r"Its parameter tensors: none at all"):
        perturbable(nn.ReLU())


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(2), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.RMSNorm(2), Scale()]
)
def test_norm_layers_are_recognised(layer):
    assert is_norm_layer(layer)
    assert not is_norm_layer(nn.Conv2d(2, 2, 1))
