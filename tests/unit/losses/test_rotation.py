"""Rotation self-supervision: which images turn, which head they are attacked through, what is refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.attacks.wrappers import Fraction
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall
from robustflat.gradients.plain import Plain
from robustflat.losses.rotation import Rotation, rotated
from robustflat.models.resnet import resnet_tiny
from robustflat.types import Batch


def network(auxiliary: bool = True) -> nn.Module:
    return resnet_tiny(classes=3, channels=4, auxiliary=auxiliary).train()


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.rand(8, 1, 6, 6), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))


def test_each_image_turns_by_its_own_number_of_quarters():
    x = torch.arange(16.0).reshape(4, 1, 2, 2)
    turned = rotated(x, torch.tensor([0, 1, 2, 3]))
    expected = [[[0, 1], [2, 3]], [[5, 7], [4, 6]], [[11, 10], [9, 8]], [[14, 12], [15, 13]]]
    assert turned[:, 0].tolist() == expected


def test_every_second_image_is_turned_and_labelled_so(batch):
    crafted = Rotation().craft(network(), NoAttack(), batch, torch.Generator().manual_seed(0))
    assert torch.equal(crafted.x[0::2], batch.x[0::2])
    assert torch.equal(crafted.y[0::2], batch.y[0::2])
    for row in (1, 3, 5, 7):
        assert -4 <= crafted.y[row] <= -1
        assert torch.equal(crafted.x[row], batch.x[row].rot90(int(-1 - crafted.y[row]), dims=(1, 2)))
    assert torch.equal(crafted.x_adv, crafted.x)


def test_all_images_are_attacked_and_the_model_stays(batch):
    model = network()
    before = [value.clone() for value in model.state_dict().values()]
    attack = Pgd(LinfBall(0.1), steps=2, step_size=0.05)
    crafted = Rotation().craft(model, attack, batch, torch.Generator().manual_seed(0))
    distance = (crafted.x_adv - crafted.x).abs().amax(dim=(1, 2, 3))
    assert (distance > 0.01).all()
    assert (distance <= 0.1 + 1e-6).all()
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_half_of_each_kind_stays_clean_as_in_the_released_code(batch):
    attack = Fraction(Pgd(LinfBall(0.1), steps=1, step_size=0.1), 0.5)
    crafted = Rotation().craft(network(), attack, batch, torch.Generator().manual_seed(0))
    moved = (crafted.x_adv != crafted.x).any(dim=1).any(dim=1).any(dim=1)
    assert moved.tolist() == [False, False, False, False, True, True, True, True]


def test_micro_batches_hold_both_kinds(batch):
    loss, model = Rotation(weight=2.0), network().eval()
    crafted = loss.craft(model, NoAttack(), batch, torch.Generator().manual_seed(0))
    whole = Plain()(model, lambda: crafted, lambda piece: loss(model, piece))
    parts = Plain(micro_batches=4)(model, lambda: crafted, lambda piece: loss(model, piece))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)


def test_parts_that_cannot_hold_as_many_of_each_kind_are_refused(batch):
    """Their means would weigh unequally: of single images the gradient was half of the batch's."""
    loss, model = Rotation(), network()
    crafted = loss.craft(model, NoAttack(), batch, torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"even number of images at once, got 1: .*micro_batches"):
        Plain(micro_batches=8)(model, lambda: crafted, lambda piece: loss(model, piece))


def test_no_network_outlives_its_last_use(batch):
    loss = Rotation()
    for _ in range(2):  # as copies of a network for an average of its weights come and go
        model = network()
        loss.craft(model, Pgd(LinfBall(0.1), steps=1, step_size=0.1), batch)
    gone = weakref.ref(model)
    del model
    loss.craft(network(), Pgd(LinfBall(0.1), steps=1, step_size=0.1), batch)
    gc.collect()
    assert gone() is None


REFUSED = {
    "model.auxiliary=true": (network(auxiliary=False), torch.rand(4, 1, 6, 6), torch.zeros(4, dtype=torch.long)),
    "one class per image": (network(), torch.rand(4, 1, 6, 6), torch.rand(4, 3)),
    "must be square": (network(), torch.rand(4, 1, 6, 5), torch.zeros(4, dtype=torch.long)),
    "at least two images": (network(), torch.rand(1, 1, 6, 6), torch.zeros(1, dtype=torch.long)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_trained_so_is_refused(message):
    model, x, y = REFUSED[message]
    with pytest.raises(UserError, match=message):
        Rotation().craft(model, NoAttack(), Batch(x, y))


def test_a_negative_weight_is_refused():
    with pytest.raises(UserError, match="weight must lie in"):
        Rotation(weight=-1.0)
