"""Captured passes: what is replayed, when it is captured anew, and when not at all; the CUDA part needs a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.captured import MOST, Captured, Passed, cuda_graph
from robustflat.attacks.objectives import OBJECTIVES, cross_entropy, kl_divergence
from robustflat.attacks.pgd import Pgd
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall
from robustflat.models.chunks import InChunks
from robustflat.models.resnet import resnet_tiny
from robustflat.types import Objective

ATTACKS = {
    "plain": Pgd(LinfBall(0.1), steps=3, step_size=0.04),
    "backtracking": Pgd(LinfBall(0.1), steps=3, step_size=0.08, backtracking=True, momentum=0.5),
    "restarts": Pgd(LinfBall(0.1), steps=2, step_size=0.04, restarts=2, keep="fooled"),
    "tau": Pgd(LinfBall(0.1), steps=3, step_size=0.04, tau=1),
    "targeted": Pgd(LinfBall(0.1), steps=2, step_size=0.04, targeted=True, objective="margin"),
}


class Fake:
    """Stands in for CUDA graphs on a CPU: results keep their memory, and every replay overwrites them there."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, work: Callable[[], Passed], device: torch.device) -> tuple[Passed, Callable[[], None]]:
        self.captures += 1
        results = work()
        for tensor in results:
            tensor.fill_(torch.nan)  # a capture computes nothing

        def replay() -> None:
            self.replays += 1
            for tensor, new in zip(results, work(), strict=True):
                tensor.copy_(new)

        return results, replay


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet_tiny(classes=3, in_channels=1, channels=4).double().eval().requires_grad_(False)


def batch(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def attacked(
    attack: Pgd, network: nn.Module, x: Tensor, y: Tensor, objective: Objective | None = None
) -> tuple[Tensor, ...]:
    return tuple(attack(network, x, y, objective, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", ATTACKS)
def test_finds_what_the_plain_search_does(kind: str) -> None:
    model, fake = network(), Fake()
    captured = Captured(model, record=fake)
    for seed in range(2):  # other images and labels in the same graph
        x, y = batch(seed=seed)
        for ours, plain in zip(
            attacked(ATTACKS[kind], captured, x, y), attacked(ATTACKS[kind], model, x, y), strict=True
        ):
            assert torch.equal(ours, plain)
    assert (fake.captures, fake.replays) == (1, 2 * ATTACKS[kind].steps)


def test_follows_weights_that_change_in_place() -> None:
    model, (x, y) = network(), batch()
    captured = Captured(model, record=Fake())
    attacked(ATTACKS["plain"], captured, x, y)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    assert torch.equal(attacked(ATTACKS["plain"], captured, x, y)[0], attacked(ATTACKS["plain"], model, x, y)[0])


def test_other_shapes_and_objectives_are_captured_anew_up_to_a_limit() -> None:
    model, fake = network(), Fake()
    captured = Captured(model, record=fake)

    def check(count: int, objective: Objective, y: Tensor | None = None) -> None:
        x, labels = batch(count)
        y = labels if y is None else y
        ours, plain = (attacked(ATTACKS["plain"], one, x, y, objective) for one in (captured, model))
        assert torch.equal(ours[0], plain[0])
        assert torch.equal(ours[1], plain[1])

    probabilities = torch.full((6, 3), 1 / 3, dtype=torch.float64)
    for count, objective, y in ((6, cross_entropy, None), (5, cross_entropy, None), (6, kl_divergence, probabilities)):
        check(count, objective, y)
    assert fake.captures == 3
    check(6, cross_entropy, probabilities)
    assert fake.captures == MOST == 4
    before = fake.replays
    check(4, cross_entropy)
    assert (fake.captures, fake.replays) == (MOST, before)
    check(6, cross_entropy)
    assert fake.replays == before + 3


def test_an_objective_of_ones_own_is_not_captured() -> None:
    model, fake, (x, y) = network(), Fake(), batch()
    captured = Captured(model, record=fake)
    for scale in (1.0, -1.0):
        factor = torch.tensor(scale)

        def own(logits: Tensor, y: Tensor, factor: Tensor = factor) -> Tensor:
            return factor * cross_entropy(logits, y)

        ours, plain = (attacked(ATTACKS["plain"], one, x, y, own) for one in (captured, model))
        assert torch.equal(ours[0], plain[0])
    assert not fake.captures


def test_autocast_has_a_graph_of_its_own() -> None:
    model, fake, (x, y) = network().float(), Fake(), batch()
    captured = Captured(model, record=fake)
    for enabled in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            ours, plain = (attacked(ATTACKS["plain"], one, x.float(), y) for one in (captured, model))
        assert torch.equal(ours[0], plain[0])
    assert fake.captures == 2


def test_pieces_share_a_graph_but_for_a_smaller_last_one() -> None:
    model, fake, (x, y) = network(), Fake(), batch(7)
    ours = attacked(ATTACKS["plain"], InChunks(Captured(model, record=fake), 3), x, y)
    assert fake.captures == 2
    for one, other in zip(ours, attacked(ATTACKS["plain"], InChunks(model, 3), x, y), strict=True):
        assert torch.equal(one, other)


class Waiting(nn.Module):
    """Cannot be captured: it asks the host."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1).to(self.head.weight.dtype))
        return logits if float(logits.detach().sum()) > 0 else 2 * logits


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("objective", ["cross_entropy", "dlr"])
def test_cuda_graphs_find_what_the_plain_search_does(kind: str, objective: str) -> None:
    model = network().cuda()
    captured, goal = Captured(model), OBJECTIVES[objective]
    for seed in range(2):
        x, y = (t.cuda() for t in batch(seed=seed))
        ours, plain = (
            tuple(ATTACKS[kind](one, x, y, goal, torch.Generator("cuda").manual_seed(1))) for one in (captured, model)
        )
        torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(ours[1], plain[1], rtol=1e-9, atol=1e-9)
        for parameter in model.parameters():
            parameter.add_(0.01)


@pytest.mark.gpu
def test_a_network_that_waits_for_the_host_cannot_be_captured() -> None:
    x, y = (t.cuda() for t in batch())
    captured = Captured(Waiting().cuda().eval().requires_grad_(False))
    with pytest.raises(UserError, match="compile=graph"):
        captured.passed(x, y, cross_entropy)


@pytest.mark.gpu
def test_a_replay_computes_anew_in_the_same_memory() -> None:
    x = torch.ones(1, device="cuda")

    def work() -> Passed:
        return Passed(2 * x, 3 * x, 4 * x)

    results, replay = cuda_graph(work, x.device)
    x.fill_(5.0)
    replay()
    assert [float(t) for t in results] == [10.0, 15.0, 20.0]
