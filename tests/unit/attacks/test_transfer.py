"""A search on one network judged by another, and what is found inside nested attacks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.fmn import Fmn
from robustflat.attacks.foreign import Foreign
from robustflat.attacks.multi_targeted import MultiTargeted
from robustflat.attacks.nested import ball_of, is_black_box, nested
from robustflat.attacks.noise import RandomNoise
from robustflat.attacks.objectives import cross_entropy
from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.attacks.square import Square
from robustflat.attacks.transfer import Transfer
from robustflat.attacks.wrappers import OnlyCorrect, Restarts, WorstOf
from robustflat.errors import UserError
from robustflat.geometry.input_ball import L2Ball, LinfBall

BALL = LinfBall(0.1)
ATTACK = Pgd(BALL, steps=4, step_size=0.05)


class Pixels(nn.Module):
    """Two pixels, two classes; logits are the pixels, turned into each other by `sign`."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * x.flatten(1)


def two() -> tuple[Tensor, Tensor]:
    x = torch.tensor([[0.9, 0.2], [0.55, 0.45]]).view(2, 1, 1, 2)
    return x, torch.zeros(2, dtype=torch.int64)


def test_the_search_is_on_the_surrogate_and_the_judgement_on_the_network() -> None:
    x, y = two()
    found = Transfer(ATTACK, Pixels(-1.0))(Pixels(), x, y)
    # The surrogate prefers the other class, so the search moves the wrong way for the network.
    torch.testing.assert_close(found.x_adv, x + torch.tensor([0.1, -0.1]).view(1, 1, 1, 2))
    torch.testing.assert_close(found.value, cross_entropy(Pixels()(found.x_adv), y).detach())
    assert found.fooled.tolist() == [False, False]


def test_between_equal_networks_transfer_is_the_attack_itself() -> None:
    x, y = two()
    found, own = Transfer(ATTACK, Pixels())(Pixels(), x, y), ATTACK(Pixels(), x, y)
    assert torch.equal(found.x_adv, own.x_adv)
    assert found.fooled.tolist() == own.fooled.tolist() == [False, True]


def test_a_name_waits_for_its_network() -> None:
    x, y = two()
    attack = Transfer(ATTACK, "3f2a9c1d")
    assert "surrogate=3f2a9c1d" in repr(attack)
    with pytest.raises(UserError, match="'3f2a9c1d' is a name"):
        attack(Pixels(), x, y)
    attack.give(Pixels())
    assert torch.equal(attack(Pixels(), x, y).x_adv, ATTACK(Pixels(), x, y).x_adv)
    with pytest.raises(UserError, match="must be a network, or the name of a run, got int"):
        Transfer(ATTACK, 3)  # type: ignore[arg-type]


def test_images_that_do_not_fit_are_refused_before_the_surrogate_sees_them() -> None:
    x, y = two()
    with pytest.raises(UserError, match="one label per image"):
        Transfer(ATTACK, Pixels())(Pixels(), x, y[:1])


def test_the_ball_of_nested_attacks() -> None:
    assert ball_of(ATTACK) is BALL
    assert ball_of(OnlyCorrect(Restarts(Transfer(ATTACK, Pixels()), 2))) is BALL
    assert ball_of(Foreign(lambda model, x, y: x, BALL)) is BALL
    assert ball_of(NoAttack()) is None
    assert ball_of(WorstOf({"a": ATTACK, "b": Fmn(L2Ball(1.0), steps=2)})) is None
    assert ball_of(WorstOf({"a": ATTACK, "b": MultiTargeted(ATTACK)})) is BALL
    assert len(list(nested(WorstOf({"a": ATTACK, "b": MultiTargeted(ATTACK)})))) == 4


def test_which_attacks_are_without_gradients_of_the_network() -> None:
    blind = Transfer(ATTACK, Pixels()), RandomNoise(BALL), Square(BALL)
    assert all(map(is_black_box, blind))
    assert is_black_box(Restarts(blind[0], 2))
    assert is_black_box(WorstOf({"a": blind[0], "b": blind[1]}))
    assert not is_black_box(WorstOf({"a": blind[0], "b": ATTACK}))
    assert not any(map(is_black_box, (ATTACK, NoAttack(), MultiTargeted(ATTACK), Foreign(lambda m, x, y: x, BALL))))
