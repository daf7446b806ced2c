"""Batch norm over the shares of two processes, against torch's own over the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from robustflat.models.norms import ReBatchNorm
from robustflat.models.synchronised import synchronised
from robustflat.ranks import current

LAYERS = {
    "2d": lambda: nn.BatchNorm2d(3),
    "fixed": lambda: nn.BatchNorm2d(3, affine=False),
    "plain average": lambda: nn.BatchNorm2d(3, momentum=None),
    "no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "rebn": lambda: ReBatchNorm(3),
    "3d": lambda: nn.BatchNorm3d(3),
    "1d": lambda: nn.BatchNorm1d(3),
}
CUT = 3
"""Of seven examples the first rank has three."""


def features(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (7, 3, *{"1d": (), "3d": (2, 2, 2)}.get(name, (4, 4)))
    x = 2 + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def layer_of(name: str, dtype: torch.dtype) -> nn.Module:
    layer = LAYERS[name]().to(torch.promote_types(dtype, torch.float32))
    for i, p in enumerate(layer.parameters()):
        nn.init.normal_(p, mean=1.0 + i, generator=torch.Generator().manual_seed(i))
    return layer


def passed(name: str, dtype: torch.dtype, rows: slice, *, evaluate: bool = False) -> list[torch.Tensor]:
    """Output, gradients at input, weight and bias, and statistics, after a first pass on other images."""
    layer, (x, slope) = layer_of(name, dtype), features(name, dtype)
    x = x[rows].requires_grad_()
    with synchronised(layer):
        layer(1 - x.detach())
        output = layer.train(not evaluate)(x)
    names = list(layer.state_dict())
    assert names == list(layer_of(name, dtype).state_dict())
    found = torch.autograd.grad((output * slope[rows]).sum(), [x, *layer.parameters()])
    return [output.detach(), *found, *(b.double() for b in layer.buffers())]


def of_both(pair, *arguments, **options):
    one, other = (answer for answer in pair(shares, *arguments))
    for answer in (one, other):
        if isinstance(answer, Exception):
            raise answer
    return one, other


def shares(name, dtype, evaluate=False):
    rank = current().rank
    return passed(name, dtype, slice(CUT) if rank == 0 else slice(CUT, None), evaluate=evaluate)


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_output_gradients_and_statistics_are_those_of_the_whole_batch(pair, name, evaluate):
    whole = passed(name, torch.float64, slice(None), evaluate=evaluate)
    one, other = of_both(pair, name, torch.float64, evaluate)
    parameters = len(list(LAYERS[name]().parameters()))
    for i, expected in enumerate(whole):
        if i < 2:
            found = torch.cat([one[i], other[i]])
        elif i < 2 + parameters:
            found = one[i] + other[i]
        else:
            assert torch.equal(one[i], other[i])
            found = one[i]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_half_precision_is_normalised_by_float32_statistics(pair):
    exact = passed("2d", torch.float64, slice(None))
    one, other = of_both(pair, "2d", torch.bfloat16)
    assert one[0].dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([one[0], other[0]]).double(), exact[0], rtol=0.02, atol=0.1)
    torch.testing.assert_close(torch.cat([one[1], other[1]]).double(), exact[1], rtol=0.05, atol=0.05)
    torch.testing.assert_close(one[4], exact[4], rtol=0.01, atol=0.01)


def copied() -> list[bool]:
    layer = nn.BatchNorm2d(3)
    with synchronised(layer):
        twin = copy.deepcopy(layer)
        twin(torch.randn(2, 3, 2, 2))
    return [bool(layer.num_batches_tracked == 0), bool(twin.num_batches_tracked == 1), "forward" in layer.__dict__]


def test_a_copy_made_inside_has_statistics_of_its_own_and_the_layer_comes_back_as_it_was(pair):
    assert pair(copied) == [[True, True, False]] * 2


def test_one_process_changes_nothing():
    layer = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout2d(0.5))
    with synchronised(layer):
        assert all("forward" not in part.__dict__ for part in layer)
