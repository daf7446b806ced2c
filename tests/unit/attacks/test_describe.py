"""Settings in words."""

from __future__ import annotations

from robustflat.attacks.describe import describe
from robustflat.attacks.pgd import Pgd
from robustflat.geometry.input_ball import LinfBall


def test_an_attack_is_described_with_its_ball_and_without_options_not_taken() -> None:
    text = describe(Pgd(LinfBall(0.0314), steps=20, step_size=0.007))
    assert text.startswith("Pgd(ball=LinfBall(epsilon=0.0314")
    assert "steps=20, step_size=0.007" in text
    assert "objective=cross_entropy" in text
    assert "tau" not in text
    assert "targeted" not in text


def test_nested_objects_and_private_attributes() -> None:
    class Wrapper:
        def __init__(self, attack: object) -> None:
            self.attack, self.times, self._secret = attack, 3, 7

    class Inner:
        pass

    assert describe(Wrapper(Inner())) == "Wrapper(attack=Inner(), times=3)"
    assert describe(1 / 3) == "0.333333"
    assert describe("text") == "'text'"
