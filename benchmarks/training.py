"""Time and memory of PGD and of adversarial training steps, against a literal implementation in the same process.

    python benchmarks/training.py                                ResNet-18 with 16 channels, batch 128, PGD-7 and PGD-20
    python benchmarks/training.py --channels 64 --rounds 3
    python benchmarks/training.py --limits                       also the machine's own rates

All start from the same weights and draws. The value that an attack reached (mean cross-entropy, judged by the plain
float32 network) and the loss of the first training step stand beside the times.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Report, Way, limits, parser
from benchmarks.literal import literal_pgd
from benchmarks.subjects import EPSILON, STEP, forward_gflop, made_up
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.searching import Searching
from robustflat.geometry.input_ball import LinfBall
from robustflat.gradients.plain import Plain
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.training.optimizers import sgd
from robustflat.types import AdvBatch, Batch, LossTerms

PGD_GOALS = {"ours, fp32": 2.4, "ours, bf16": 4.3}
STEP_GOALS = {"ours, fp32": 1.7, "ours, bf16": 3.0}
MEMORY_GOALS = {"ours, fp32": 0.45, "ours, bf16": 0.25}


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--channels", type=int, default=16)
    result.add_argument("--images", type=int, default=128)
    result.add_argument("--pgd", type=int, nargs="*", default=[7, 20], help="steps of PGD (default: 7 20)")
    result.add_argument("--limits", action="store_true")
    return result


def main() -> None:
    given = options().parse_args()
    report = Report(given)
    report.goals = (given.channels, given.images) == (16, 128)
    if given.limits:
        for name, value in limits(given.device).items():
            print(f"{name} {value:.4g}")
    model, x, y = made_up(given.channels, given.images, given.device)
    what = f"ResNet-18, {given.channels} channels, batch {given.images}, {given.device}"
    work = (given.images, "images")
    if given.memory and given.pgd:
        report.compare_memory(
            f"Peak memory of PGD-{given.pgd[0]}, {what}", attacks(model, x, y, given.pgd[0]), MEMORY_GOALS
        )
    for steps in given.pgd:
        ways = attacks(model, x, y, steps)
        report.compare(f"PGD-{steps}, {what}", ways, judge=lambda found: reached(model, found, y), work=work)
    report.compare(f"AT step, PGD-7, {what}", steps_of_training(model, x, y), judge=first_losses, work=work)


@torch.no_grad()
def reached(model: nn.Module, found: Mapping[str, Tensor], y: Tensor) -> dict[str, dict[str, str]]:
    """Mean cross-entropy of each attack's images under the plain network."""
    return {name: {"loss found": f"{F.cross_entropy(model(x_adv), y):.4f}"} for name, x_adv in found.items()}


def first_losses(found: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {name: {"loss of the first step": f"{float(loss):.4f}"} for name, loss in found.items()}


def attacks(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Way]:
    need = (2 * steps + 1) * forward_gflop(
        model, x
    )  # a forward pass at every iterate, an input gradient at all but one

    def literal(steps: int) -> Callable[[], Tensor]:
        return lambda: literal_pgd(model, x, y, steps, torch.Generator(x.device).manual_seed(0))

    def ours(search: str, steps: int) -> Callable[[], Tensor]:
        attack = Searching(Pgd(LinfBall(EPSILON), steps=steps, step_size=STEP), search)
        return lambda: attack(model, x, y, generator=torch.Generator(x.device).manual_seed(0)).x_adv.detach()

    ways = {"literal": Way(literal(steps), gflop=need, brief=literal(min(steps, 2)), as_scripts=True)}
    for search in ("plain", "fp32", "bf16"):
        ways[f"ours, {search}"] = Way(
            ours(search, steps),
            goal=PGD_GOALS.get(f"ours, {search}"),
            gflop=need,
            half=search == "bf16",
            brief=ours(search, min(steps, 2)),
        )
    return ways


def steps_of_training(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Way]:
    """One optimizer step each, on a copy of the network each."""
    need = (2 * 7 + 1 + 3) * forward_gflop(model, x)  # the attack; then forward, and gradients of inputs and weights

    def literal() -> Callable[[], Tensor]:
        network = copy.deepcopy(model)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

        def run() -> Tensor:
            network.eval()
            x_adv = literal_pgd(network, x, y, 7, torch.Generator(x.device).manual_seed(0))
            network.train()
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x_adv), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    def ours(search: str, half: bool) -> Callable[[], Tensor]:
        network = copy.deepcopy(model).train()
        optimizer = sgd(network, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
        attack = Searching(Pgd(LinfBall(EPSILON), steps=7, step_size=STEP), search)
        loss, rule = CrossEntropy(), Plain()

        def craft() -> AdvBatch:
            return loss.craft(network, attack, Batch(x, y), torch.Generator(x.device).manual_seed(0))

        def score(batch: AdvBatch) -> LossTerms:
            return loss(network, batch)

        def run() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
                parts = rule(network, craft, score)
            optimizer.step()
            return parts["loss"]

        return run

    ways = {"literal": Way(literal(), gflop=need, as_scripts=True)}
    for name, search, half in (
        ("ours, plain", "plain", False),
        ("ours, fp32", "fp32", False),
        ("ours, bf16 search", "bf16", False),
        ("ours, bf16", "bf16", True),
    ):
        ways[name] = Way(ours(search, half), goal=STEP_GOALS.get(name), gflop=need, half=half)
    return ways


if __name__ == "__main__":
    main()
