"""Every part of a method explains itself, and what it says it costs is what a step really costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor, nn

from robustflat.apps.build import build
from robustflat.apps.check import resolve_target
from robustflat.apps.config import config_folder
from robustflat.apps.explain import method_of, print_method
from robustflat.attacks.transfer import Transfer
from robustflat.errors import UserError
from robustflat.explanation import Cost, CountsPasses, Explains, explanation_of
from robustflat.losses.base import TrainingLoss
from robustflat.training.method import explain_method
from tests.config.tiny import TINY, tiny_trainer

CONF = config_folder()
TRAINERS = sorted(p.stem for p in (CONF / "trainer").glob("*.yaml") if p.stem != "base")
RULES = sorted(p.stem for p in (CONF / "trainer" / "gradient").glob("*.yaml"))
LOSSES = sorted(p.stem for p in (CONF / "trainer" / "loss").glob("*.yaml"))
ATTACKS = sorted(p.stem for p in (CONF / "attack").glob("*.yaml"))
NOT_PARTS = ("robustflat.geometry.", "robustflat.training.trainer.")
"""Values of parts, and the loop that they are plugged into."""


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for child in node.values():
            yield from targets(child)


def reachable(compose) -> set[str]:
    found: set[str] = set()
    choices = [[f"trainer={name}"] for name in TRAINERS]
    choices += [[f"attack={name}", *SURROGATE.get(name, [])] for name in ATTACKS]
    choices += [[f"trainer/gradient={name}"] for name in RULES]
    choices += [[f"trainer/loss={name}"] for name in LOSSES]
    for choice in choices:
        config = compose(*choice)
        found |= {t for group in ("trainer", "attack") for t in targets(OmegaConf.to_container(config[group]))}
    return {target for target in found if not target.startswith(NOT_PARTS)}


def test_every_class_of_a_trainer_or_attack_explains_itself(compose):
    found = reachable(compose)
    assert len(found) > 20
    silent = []
    for target in sorted(found):
        made = resolve_target(target)
        kind = made if isinstance(made, type) else get_type_hints(made)["return"]
        if not issubclass(kind, Explains):
            silent.append(target)
    assert silent == []


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_in_words_has_formula_cost_and_sources(compose, name):
    config = compose(f"trainer={name}", *TINY)
    text = str(method_of(config, build(config.dataset)))
    method = method_of(config, build(config.dataset))
    assert "L = CE(" in text or "L = BCE(" in text
    assert method.steps == config.trainer.epochs * 2
    slots = [part.slot for part in method.parts]
    assert {"loss", "attack", "gradient", "optimizer", "schedule"} <= set(slots)
    assert all(part.explanation.formula for part in method.parts)
    for slot in ("loss", *(slot for slot in slots if slot.startswith("wrapper"))):
        assert method.parts[slots.index(slot)].explanation.source, slot
    assert "not known" not in method.cost.numbers()


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts images that pass forward, backward with weight gradients (B) and without (Bx), at the first layer."""
    counts: Counter[str] = Counter()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))

    def passed(layer: nn.Module, inputs: object, output: Tensor) -> None:
        counts["F"] += len(output)
        kind = "B" if layer.weight.requires_grad else "Bx"
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.update({kind: len(gradient)}))

    handle = first.register_forward_hook(passed)
    try:
        yield counts
    finally:
        handle.remove()


def require_counted(cost: Cost, counts: Counter[str], images: int) -> None:
    stated = {"F": cost.forward, "B": cost.backward, "Bx": cost.input_backward}
    found = {name: counts[name] / images for name in stated}
    if cost.at_most:
        assert all(found[name] <= stated[name] for name in stated), (found, stated)
    else:
        assert found == stated


def require_real_cost(trainer) -> None:
    """One step of a trainer costs what its parts say."""
    cost = trainer_cost(trainer)
    trainer.model.train()
    for callback in trainer.callbacks.values():
        callback.on_fit_start(trainer)
    with counted(trainer.model) as counts:
        trainer._train_step()
    require_counted(cost, counts, 4)


def trainer_cost(trainer) -> Cost:
    return explain_method(
        loss=trainer.loss, attack=trainer.attack, gradient=trainer.gradient, callbacks=trainer.callbacks
    ).cost


SURROGATE = {"transfer": ["attack.surrogate=another"]}
STARTED = {"trades_awp": ["trainer.gradient.warmup_epochs=0"]}
MORE = {
    "tau": ["trainer=at", "attack=pgd_tau"],
    "awp of three steps": ["trainer=awp", "trainer.gradient.steps=3"],
    "three draws": ["trainer=random_weights", "trainer.gradient.population=3"],
    "three inner steps": ["trainer=entropy_sgd", "trainer.gradient.inner_steps=3"],
    "trades without attack": ["trainer=trades", "attack=none"],
    "trades, joint": ["trainer=trades", "+trainer.loss.joint_forward=true"],
    "micro-batches": ["trainer=at", "+trainer.gradient.micro_batches=2"],
    "mode": ["trainer=at", "+trainer.loss.attack_mode=train"],
    "clipped": ["trainer=at", "trainer/gradient=clipped"],
    "fast": ["trainer=at", "attack=fgsm_random_start_linf"],
    "noise": ["trainer=at", "attack=n_fgsm_linf"],
    "mart with sam": ["trainer=mart", "trainer/gradient=sam"],
    "restarts": ["trainer=at", "+attack.restarts=3"],
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_of_every_trainer_takes_the_passes_it_states(compose, name):
    require_real_cost(tiny_trainer(compose, f"trainer={name}", *STARTED.get(name, [])))


@pytest.mark.parametrize("name", MORE)
def test_so_does_a_step_with_other_settings(compose, name):
    require_real_cost(tiny_trainer(compose, *MORE[name]))


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "autoattack"])
def test_every_attack_takes_the_passes_it_states(compose, name):
    config = compose(f"attack={name}", *SURROGATE.get(name, []), *TINY)
    attack, model = build(config.attack), build(config.model)
    if isinstance(attack, Transfer):
        attack.give(build(config.model))
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    with counted(model) as counts:
        attack(model, x, y, generator=torch.Generator().manual_seed(0))
    require_counted(explanation_of(attack).cost, counts, 4)


def test_autoattack_says_that_its_cost_depends_on_the_data(compose):
    explanation = explanation_of(build(compose("attack=autoattack").attack))
    assert "not known" in explanation.cost.numbers()
    assert "apgd-ce" in explanation.formula


class Silent:
    """An attack, or a gradient rule, of somebody's own that says nothing."""

    def __call__(self, *arguments):
        raise AssertionError


def test_a_part_that_says_nothing_makes_the_cost_unknown_and_is_named(compose):
    trainer = tiny_trainer(compose, "trainer=at")
    method = explain_method(loss=trainer.loss, attack=Silent(), gradient=trainer.gradient)
    assert "cost(Silent) + F + B" in str(method)
    assert "not known" in method.cost.numbers()
    assert "cost(Silent)" in str(explain_method(loss=trainer.loss, attack=trainer.attack, gradient=Silent()))


def test_losses_and_rules_are_what_the_protocols_ask(compose):
    for name in RULES:
        rule = build(compose(f"trainer/gradient={name}").trainer.gradient)
        assert isinstance(rule, CountsPasses) and isinstance(rule, Explains)
    for name in LOSSES:
        assert isinstance(build(compose(f"trainer/loss={name}").trainer.loss), TrainingLoss)


@pytest.mark.parametrize(
    "wrong", ["model.norm=soft", "evaluation.batch_size=0", "flatness.trials=0", "dataset.batch_size=0"]
)
def test_what_training_would_refuse_is_refused(compose, wrong):
    key = wrong.partition("=")[0].rpartition(".")[2]
    with pytest.raises(UserError, match=key):
        print_method(compose(wrong), Console(quiet=True))
