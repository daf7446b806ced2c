"""Speed of our AutoAttack and PGD against the authors' AutoAttack and foolbox, at compared verdicts.

    python benchmarks/attacks.py                               all norms, both networks; hours
    python benchmarks/attacks.py --norms linf --networks small --images 64 --rounds 1

Every implementation attacks the same model and images in one process, in turn; figures are medians over the rounds
and ratios of medians. Networks: "small" is the reference CNN, "residual" a ResNet-18 of a few channels, trained here
against PGD on all 128 reference images for a minute or two (so that part of them resists).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import torch
from torch import Tensor, nn

from benchmarks.harness import Report, Way, parser
from benchmarks.subjects import forward_gflop
from robustflat.attacks.autoattack import AutoAttack
from robustflat.attacks.ensemble_result import AutoAttackResult
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.searching import Searching
from robustflat.attacks.strongest import SEARCHES
from robustflat.geometry.input_ball import LinfBall
from robustflat.models.resnet import resnet18
from robustflat.rng import generator_for
from tests.reference.models import cnn_cifar10

EPSILON = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
THEIR_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
STEPS, STEP_SIZE = 20, 2 / 255
GOALS = {"fp32": 1.7, "bf16": 2.4}


def options() -> argparse.ArgumentParser:
    result = parser(__doc__, rounds=3)
    result.add_argument("--networks", nargs="+", default=["small", "residual"], choices=["small", "residual"])
    result.add_argument("--norms", nargs="*", default=list(EPSILON), choices=list(EPSILON), help="of AutoAttack")
    result.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=SEARCHES)
    result.add_argument("--images", type=int, default=128, help="images attacked, at most 128 (default)")
    result.add_argument("--channels", type=int, default=8, help="width of the residual network (default: 8)")
    result.add_argument("--epochs", type=int, default=60, help="training steps of the residual network (default: 60)")
    return result


def main() -> None:
    given = options().parse_args()
    report = Report(given)
    for network in given.networks:
        model, x, y = build(network, given)
        name = "small CNN" if network == "small" else f"ResNet-18, {given.channels} channels"
        what = f"{name}, {len(x)} images, {given.device}"
        judge = verdicts(model, x, y)
        title = f"PGD-{STEPS}, {what}, linf {EPSILON['linf']:.4g}"
        report.compare(title, pgd(model, x, y, given.searches), judge=judge, work=(len(x), "images"))
        report.goals = network == "residual" and given.channels == 8
        report.memory = False  # of AutoAttack: that of its parts, at the price of another run
        for norm in given.norms:
            title = f"AutoAttack standard, {what}, {norm} {EPSILON[norm]:.4g}"
            ways = autoattack(model, x, y, norm, given)
            report.compare(title, ways, judge=judge, work=(len(x), "images"), warm=False)
        report.memory = given.memory


def build(network: str, given: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in eval mode, images and labels."""
    small, x, y = cnn_cifar10()
    x, y = x.to(given.device), y.to(given.device)
    if network == "small":
        return small.to(given.device), x[: given.images], y[: given.images]
    torch.manual_seed(0)
    model = resnet18(classes=10, channels=given.channels).to(given.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    attack = Pgd(LinfBall(8 / 255), steps=3, step_size=4 / 255)
    generator = generator_for(0, device=given.device)
    for _ in range(given.epochs):
        x_adv = attack(model, x, y, generator=generator).x_adv
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
    return model.eval(), x[: given.images], y[: given.images]


def autoattack(model: nn.Module, x: Tensor, y: Tensor, norm: str, given: argparse.Namespace) -> dict[str, Way]:
    from pyautoattack import AutoAttack as Theirs

    def theirs() -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            attack = Theirs(model, norm=THEIR_NORM[norm], eps=EPSILON[norm], seed=0, device=given.device)
            found = attack.run_standard_evaluation(x, y)
        adversarial: Tensor = found[0] if isinstance(found, tuple) else found
        return adversarial

    def ours(search: str) -> AutoAttackResult:
        return AutoAttack(norm=norm, epsilon=EPSILON[norm], search=search)(model, x, y)

    image = forward_gflop(model, x) / len(x)

    def needed(result: AutoAttackResult) -> float:
        """What this run did; it depends on when examples break."""
        return image * sum(record.forwards + record.backwards for record in result.attacks)

    ways = {"pyautoattack": Way(theirs, as_scripts=True)}
    for search in given.searches:
        goal = GOALS.get(search) if norm == "linf" else None
        ways[f"ours, {search}"] = Way(
            lambda search=search: ours(search), goal=goal, gflop=needed, half=search == "bf16"
        )
    return ways


def pgd(model: nn.Module, x: Tensor, y: Tensor, searches: list[str]) -> dict[str, Way]:
    import foolbox

    def theirs() -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        attack = foolbox.attacks.LinfPGD(steps=STEPS, abs_stepsize=STEP_SIZE, random_start=True)
        adversarial: Tensor = attack(wrapped, x, y, epsilons=EPSILON["linf"])[1]
        return adversarial

    def ours(search: str) -> Tensor:
        attack = Searching(Pgd(LinfBall(EPSILON["linf"]), steps=STEPS, step_size=STEP_SIZE), search)
        return attack(model, x, y, generator=generator_for(0, device=x.device)).x_adv

    need = (2 * STEPS + 1) * forward_gflop(model, x)
    ways = {"foolbox": Way(theirs, gflop=need, as_scripts=True)}
    for search in searches:
        ways[f"ours, {search}"] = Way(lambda search=search: ours(search), gflop=need, half=search == "bf16")
    return ways


def verdicts(
    model: nn.Module, x: Tensor, y: Tensor
) -> Callable[[Mapping[str, Tensor | AutoAttackResult]], dict[str, dict[str, str]]]:
    """Judge: images robust by the plain network, and those that only one of a way and the first breaks."""

    @torch.no_grad()
    def judge(found: Mapping[str, Tensor | AutoAttackResult]) -> dict[str, dict[str, str]]:
        images = {n: f.adversarial if isinstance(f, AutoAttackResult) else f for n, f in found.items()}
        clean = model(x).argmax(1) == y
        robust = {name: clean & (model(x_adv.to(x)).argmax(1) == y) for name, x_adv in images.items()}
        first = next(iter(robust.values()))
        return {
            name: {
                "robust": f"{int(own.sum())}/{len(y)}",
                "only it leaves": str(int((own & ~first).sum())),
                "only it breaks": str(int((first & ~own).sum())),
            }
            for name, own in robust.items()
        }

    return judge


if __name__ == "__main__":
    main()
