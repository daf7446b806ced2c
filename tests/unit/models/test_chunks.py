"""Networks that take a batch in pieces: the same numbers, and what a pass takes of memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustflat.models.chunks import InChunks, bounded, bytes_per_image, pieces
from robustflat.models.resnet import resnet_tiny


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet_tiny(classes=3, in_channels=1, channels=4).double().eval()


class Notes(nn.Module):
    """Notes the sizes of the batches it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.sizes = inner, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize(("count", "most", "sizes"), [(7, 3, [3, 3, 1]), (8, 3, [3, 3, 2]), (4, 4, [4]), (3, 9, [3])])
def test_pieces_are_at_most_that_large_and_change_no_logit_and_no_gradient(
    count: int, most: int, sizes: list[int]
) -> None:
    model = Notes(network())
    x, same = images(count).requires_grad_(), images(count).requires_grad_()
    logits = InChunks(model, most)(x)
    assert model.sizes == sizes
    torch.testing.assert_close(logits, model(same), rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(z.square().sum(), t)[0] for z, t in ((logits, x), (model(same), same)))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_pieces_of_anything_else_are_the_whole() -> None:
    x, y = images(5), torch.arange(5)
    ((forward, (a, b)),) = pieces(torch.sin, x, y)
    assert forward is torch.sin
    assert a is x
    assert b is y


def test_pieces_split_all_tensors_alike() -> None:
    model = network()
    parts = list(pieces(InChunks(model, 2), images(5), torch.arange(5)))
    assert [len(x) for _, (x, _) in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([y for _, (_, y) in parts]), torch.arange(5))
    assert all(forward is model for forward, _ in parts)


@pytest.mark.parametrize(
    ("limit", "most"), [(800, None), (799, 4), (400, 4), (399, 2), (200, 2), (199, 1), (1, 1), (0, 1)]
)
def test_number_of_pieces_is_a_power_of_two_that_fits(limit: float, most: int | None) -> None:
    model = network()
    kept = bounded(model, images(8), need=100, limit=limit)
    if most is None:
        assert kept is model
    else:
        assert isinstance(kept, InChunks)
        assert kept.images == most


def test_batch_norm_that_looks_at_the_batch_gets_the_whole() -> None:
    whole, parts = (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=k)).eval() for k in (False, True))
    assert bounded(whole, images(8), need=1.0, limit=2.0) is whole
    assert isinstance(bounded(parts, images(8), need=1.0, limit=2.0), InChunks)


def test_wrapping_leaves_the_modes_of_the_layers_alone() -> None:
    model = network()
    model.get_submodule("body.stem.norm").train()
    InChunks(model, 2)
    assert not model.training
    assert model.get_submodule("body.stem.norm").training


def test_memory_of_a_pass_by_hand() -> None:
    # tanh keeps its output of 64 numbers; at work thrice the largest, of 64.
    model = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(64, 3, bias=False).double())
    # The frozen linear layer keeps nothing: its weight is no memory of the pass.
    assert bytes_per_image(model, images(5)) == 8 * (64 + 3 * 64)


def test_memory_grows_with_the_width_and_counts_no_pass() -> None:
    passes = []
    model = network()
    model.register_forward_hook(lambda *_: passes.append(1))
    wide = resnet_tiny(classes=3, in_channels=1, channels=8).double().eval()
    assert bytes_per_image(wide, images(3)) == pytest.approx(2 * bytes_per_image(model, images(3)), rel=0.05)
    assert passes == []


def test_measuring_moves_neither_random_numbers_nor_the_network() -> None:
    model = nn.Sequential(network().train(), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with torch.inference_mode():
        assert bytes_per_image(model, images(3)) > 0
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
