"""Attacks that search on a copy: the same adversarial examples as on the network itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.attacks.searching import Searching
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall
from robustflat.losses.rotation import Rotation
from robustflat.models.chunks import bytes_per_image
from robustflat.models.resnet import resnet_tiny
from robustflat.types import Batch

BALL = LinfBall(0.1)


def network(auxiliary: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return resnet_tiny(classes=3, in_channels=1, channels=4, auxiliary=auxiliary).double()


def batch(count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64),
        torch.randint(3, (count,), generator=generator),
    )


def attack(search: str) -> Searching:
    return Searching(Pgd(BALL, steps=3, step_size=0.04), search)


def found(search: str, model: nn.Module) -> Tensor:
    x, y = batch()
    return attack(search)(model, x, y, None, torch.Generator().manual_seed(1)).x_adv


def test_same_examples_as_on_the_network_itself_also_after_it_has_moved() -> None:
    model = network().eval()
    searching, (x, y) = attack("fp32"), batch()
    for _ in range(2):
        plain = Pgd(BALL, steps=3, step_size=0.04)(model, x, y, None, torch.Generator().manual_seed(1))
        ours = searching(model, x, y, None, torch.Generator().manual_seed(1))
        torch.testing.assert_close(ours.x_adv, plain.x_adv, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.value, plain.value, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            model.train()(x)
            model.eval()


def test_callables_and_networks_in_training_mode_are_attacked_as_they_are() -> None:
    model = network().train()
    calls = []

    def forward(x: Tensor) -> Tensor:
        calls.append(len(x))
        logits: Tensor = model(x)
        return logits

    x, y = batch()
    attack("fp32")(forward, x, y)
    assert len(calls) == 4
    searching = attack("fp32")
    searching(model, x, y)
    assert not len(searching._mirrors)


def test_bf16_search_stays_in_the_ball_and_reaches_nearly_the_same_loss() -> None:
    model = network().float().eval()
    x, y = batch()
    x = x.float()
    values = {}
    for search in ("plain", "bf16"):
        x_adv = attack(search)(model, x, y, None, torch.Generator().manual_seed(1)).x_adv
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6
        values[search] = nn.functional.cross_entropy(model(x_adv), y)
    assert abs(values["bf16"] - values["plain"]) < 0.02


def test_both_heads_of_self_supervision_search_on_copies() -> None:
    model, loss = network(auxiliary=True), Rotation()
    crafted = {
        search: loss.craft(model, attack(search), batch(), torch.Generator().manual_seed(3))
        for search in ("plain", "fp32")
    }
    torch.testing.assert_close(crafted["fp32"].x_adv, crafted["plain"].x_adv, rtol=0, atol=1e-9)
    assert model.training


def test_unknown_search_is_refused() -> None:
    with pytest.raises(UserError, match="search"):
        Searching(Pgd(BALL, steps=1, step_size=0.1), "fp16")


BUDGETED = {
    "best": Pgd(BALL, steps=3, step_size=0.04),
    "tau": Pgd(BALL, steps=3, step_size=0.04, tau=1, momentum=0.5),
    "restarts": Pgd(BALL, steps=2, step_size=0.04, restarts=2, backtracking=True, random_start="uniform_norm"),
}


@pytest.mark.parametrize("search", ["plain", "fp32"])
@pytest.mark.parametrize("kind", BUDGETED)
def test_pieces_within_a_budget_find_what_the_whole_batch_does(search: str, kind: str) -> None:
    model, (x, y) = network().eval(), batch(7)
    found = [
        Searching(BUDGETED[kind], search, memory_budget=budget)(model, x, y, None, torch.Generator().manual_seed(1))
        for budget in (None, "auto", 0.02, 0)
    ]
    for pieces in found[1:]:
        torch.testing.assert_close(pieces.x_adv, found[0].x_adv, rtol=0, atol=1e-9)
        torch.testing.assert_close(pieces.value, found[0].value, rtol=1e-9, atol=1e-9)
        assert torch.equal(pieces.fooled, found[0].fooled)


def test_a_budget_bounds_the_images_of_a_pass() -> None:
    model, (x, y), sizes = network().eval(), batch(8), list[int]()
    model.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    need = bytes_per_image(model, x) / 2**20
    attack = Searching(Pgd(BALL, steps=1, step_size=0.04), "plain", memory_budget=2.5 * need)
    attack(model, x, y)
    assert sizes == [2] * 8


def test_what_is_no_budget_is_refused() -> None:
    with pytest.raises(UserError, match="memory_budget"):
        Searching(Pgd(BALL, steps=1, step_size=0.1), "fp32", memory_budget="little")


@pytest.mark.parametrize(("channels", "sizes"), [(4, [128]), (256, [64, 64])])
def test_by_itself_it_takes_large_networks_64_images_at_once(channels: int, sizes: list[int]) -> None:
    model = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    seen, x = list[int](), torch.rand(128, 1, 16, 16)
    model.eval().register_forward_hook(lambda _, arguments, __: seen.append(len(arguments[0])))
    Searching(Pgd(BALL, steps=1, step_size=0.1), "plain")(model, x, torch.zeros(128, dtype=torch.int64))
    assert seen == 2 * sizes
