"""The norm that an evaluation takes from the attack of training."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from robustflat.apps.config import register

BALL = "robustflat.geometry.input_ball"


@pytest.mark.parametrize(
    ("ball", "expected"),
    [
        ({"_target_": f"{BALL}.L2Ball", "epsilon": 1}, "l2"),
        ({"_target_": f"{BALL}.L1Ball", "epsilon": 1}, "l1"),
        ({"_target_": f"{BALL}.LinfBall", "epsilon": 1}, "linf"),
        ({"_target_": f"{BALL}.input_ball", "norm": "l2", "epsilon": 1}, "l2"),  # attack=pgd20 evaluation.norm=l2
        ({"_target_": f"{BALL}.input_ball", "norm": "${evaluation.norm}", "epsilon": 1}, "linf"),
        (None, "linf"),
    ],
)
def test_it_is_that_of_the_ball(ball: object, expected: str) -> None:
    register()
    config = OmegaConf.create({"attack": {"ball": ball}, "evaluation": {"norm": "${training_norm:}"}})
    assert config.evaluation.norm == expected
