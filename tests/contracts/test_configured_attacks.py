"""Every attack in conf/attack/, built as a run builds it, keeps the contract on a small network."""

from __future__ import annotations

import copy

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from robustflat.apps.build import build
from robustflat.apps.config import config_folder, register
from robustflat.attacks.objectives import cross_entropy
from robustflat.attacks.rehearsal import rehearse
from robustflat.attacks.transfer import Transfer
from robustflat.geometry.input_ball import input_ball
from robustflat.models.resnet import resnet_tiny
from robustflat.types import Attack

CHOICES = sorted(path.stem for path in (config_folder() / "attack").glob("*.yaml"))
LEAVES_THE_BALL = {"n_fgsm_linf"}  # by definition
MAY_LOWER = {"pgd_tau", "fmn", "n_fgsm_linf", "autoattack"}  # search something else than the highest loss
SETTINGS = {
    "autoattack": ["attack.version=custom", "+attack.attacks=[apgd-ce]"],
    "transfer": ["attack.surrogate=x", "attack.attack.steps=2", "attack.attack.restarts=1"],
}
CHEAPER = {"steps": 2, "restarts": 1, "trials": 2}


def configured(choice: str) -> tuple[Attack, DictConfig]:
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose("train", [f"attack={choice}", *SETTINGS.get(choice, [])])
    for key, value in CHEAPER.items():
        if key in config.attack:
            config.attack[key] = min(value, config.attack[key])
    attack = build(config.attack)
    if isinstance(attack, Transfer):
        torch.manual_seed(0)
        attack.give(resnet_tiny(classes=10, channels=4, mean=[0.3], std=[0.3]))
    return attack, config


DRAWS_UNKNOWN = {"autoattack", "multi_targeted", "worst_of"}  # depend on what is found, or on the number of classes


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("images", [1, 5])
def test_a_rehearsal_draws_what_the_attack_draws(choice, images):
    attack, _ = configured(choice)
    model = resnet_tiny(classes=10, channels=4, mean=[0.3], std=[0.3])
    x, y = torch.rand(images, 1, 8, 8), torch.arange(images)
    real, rehearsed = (torch.Generator().manual_seed(5) for _ in range(2))
    assert rehearse(attack, x, rehearsed) == (choice not in DRAWS_UNKNOWN)
    if choice not in DRAWS_UNKNOWN:
        attack(model, x, y, None, real)
        assert torch.equal(real.get_state(), rehearsed.get_state())


@pytest.mark.parametrize("choice", CHOICES)
def test_a_configured_attack_keeps_the_contract(choice):
    attack, config = configured(choice)
    torch.manual_seed(0)
    model = resnet_tiny(classes=10, channels=4, mean=[0.3], std=[0.3]).train()
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    before, state, kept = copy.deepcopy(model.state_dict()), torch.get_rng_state(), x.clone()
    found = [attack(model, x, y, None, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(found[0].x_adv, found[1].x_adv)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    x_adv = found[0].x_adv
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    if choice not in LEAVES_THE_BALL:
        norm = next((n for n in ("l2", "l1") if choice.endswith(n)), "linf")
        ball = input_ball(norm, config.dataset.threat[norm].epsilon)
        assert (ball.size(x_adv.double(), x.double()) <= ball.epsilon * (1 + 1e-6)).all()
    if choice not in MAY_LOWER | {"none"}:
        with torch.no_grad():
            model.eval()
            rise = cross_entropy(model(x_adv), y).mean() - cross_entropy(model(x), y).mean()
        assert rise > -0.02 if choice.startswith("noise") else rise > 0
