"""Time of average-case and worst-case flatness against a literal implementation in the same process, as ratios.

    python benchmarks/flatness.py                           10 draws x PGD-20, 10 restarts x 20 steps, 128 images
    python benchmarks/flatness.py --trials 2 --steps 5      a quick look
    python benchmarks/flatness.py --search bf16

The literal implementation does one perturbation at a time as one would write it first: a deep copy of the network
for every perturbation, attacks that call `backward()` (and so compute weight gradients too), a copy per ascent step.
Both get the reference loss and make the same random draws. Images and weights are made up: time does not mind.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import torch
from torch import Tensor, nn

from benchmarks.harness import Report, Way, parser
from benchmarks.literal import literal_ascent, literal_point, losses_at
from benchmarks.subjects import EPSILON, STEP, forward_gflop, made_up
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.strongest import SEARCHES
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.result import FlatnessResult
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall
from robustflat.models.modes import perturbable
from robustflat.rng import generator_for

AVERAGE_GOALS = {"fp32": 1.6, "bf16": 3.3}
WORST_GOALS = {"fp32": 1.5, "bf16": 2.5}


class Subject(NamedTuple):
    """What is measured."""

    model: nn.Module
    x: Tensor
    y: Tensor
    reference: Tensor
    gflop: float


def options() -> argparse.ArgumentParser:
    result = parser(__doc__, rounds=3)
    result.add_argument("--channels", type=int, default=16, help="width of the first stage of the ResNet-18")
    result.add_argument("--images", type=int, default=128)
    result.add_argument("--trials", type=int, default=10, help="draws of the average, restarts of the worst case")
    result.add_argument("--steps", type=int, default=20)
    result.add_argument("--search", choices=SEARCHES, nargs="*", default=list(SEARCHES))
    return result


def main() -> None:
    given = options().parse_args()
    report = Report(given)
    report.goals = (given.channels, given.images, given.trials, given.steps) == (16, 128, 10, 20)
    model, x, y = made_up(given.channels, given.images, given.device)
    subject = Subject(model, x, y, losses_at(model, x, y), forward_gflop(model, x))
    what = f"ResNet-18, {given.channels} channels, batch {given.images}, {given.device}"
    judge, work = functools.partial(values, subject), (given.trials * given.images, "images")
    title = f"Average-case flatness, {given.trials} draws x PGD-{given.steps}, {what}"
    report.compare(title, average(subject, given), judge=judge, work=work, warm=False)
    title = f"Worst-case flatness, {given.trials} restarts x {given.steps} steps, {what}"
    report.compare(title, worst(subject, given), judge=judge, work=work, warm=False)


def average(subject: Subject, given: argparse.Namespace) -> dict[str, Way]:
    """By trial: a forward pass at every iterate of the attack, an input gradient at all but one."""
    need = given.trials * (2 * given.steps + 1) * subject.gflop

    def literal(trials: int, steps: int) -> Tensor:
        model, x, y, _, _ = subject
        weights = {name: w.detach() for name, w in perturbable(model).items()}
        measure, losses = AverageFlatness(), []
        for trial in range(trials):
            nu = measure.ball.sample(weights, generator_for(0, "weights", trial, 0, device=x.device), sampling="ball")
            drawn = generator_for(0, "attack", trial, 0, device=x.device)
            losses.append(literal_point(model, nu, x, y, steps=steps, generator=drawn))
        return torch.stack(losses)

    def ours(search: str, trials: int, steps: int) -> FlatnessResult:
        attack = Pgd(LinfBall(EPSILON), steps=steps, step_size=STEP)
        return measured(AverageFlatness(trials=trials, attack=attack, search=search), subject)

    few = min(given.steps, 2)
    ways = {
        "literal": Way(
            lambda: literal(given.trials, given.steps), gflop=need, brief=lambda: literal(1, few), as_scripts=True
        )
    }
    for search in given.search:
        ways[f"ours, {search}"] = Way(
            lambda search=search: ours(search, given.trials, given.steps),
            goal=AVERAGE_GOALS.get(search),
            gflop=need,
            half=search == "bf16",
            brief=lambda search=search: ours(search, 1, few),
        )
    return ways


def worst(subject: Subject, given: argparse.Namespace) -> dict[str, Way]:
    """By step: a forward pass and gradients of images and weights; a forward pass at the last point."""
    need = given.trials * (3 * given.steps + 1) * subject.gflop

    def literal(restarts: int, steps: int) -> Tensor:
        model, x, y, _, _ = subject
        draws = [generator_for(0, "ascent", restart, 0, device=x.device) for restart in range(restarts)]
        return torch.stack([literal_ascent(model, x, y, steps=steps, generator=drawn) for drawn in draws])

    def ours(search: str, restarts: int, steps: int) -> FlatnessResult:
        return measured(WorstFlatness(restarts=restarts, steps=steps, search=search), subject)

    few = min(given.steps, 2)
    ways = {
        "literal": Way(
            lambda: literal(given.trials, given.steps), gflop=need, brief=lambda: literal(1, few), as_scripts=True
        )
    }
    for search in given.search:
        ways[f"ours, {search}"] = Way(
            lambda search=search: ours(search, given.trials, given.steps),
            goal=WORST_GOALS.get(search),
            gflop=need,
            brief=lambda search=search: ours(search, 1, few),
        )
    return ways


def measured(measure: AverageFlatness | WorstFlatness, subject: Subject) -> FlatnessResult:
    model, x, y, reference, _ = subject
    return measure(model, x, y, reference=reference, batch_size=len(x))


def values(subject: Subject, found: Mapping[str, Tensor | FlatnessResult]) -> dict[str, dict[str, str]]:
    """The flatness found, and how far the mean loss of a trial is from the literal one at most."""
    losses = {name: f.losses if isinstance(f, FlatnessResult) else f.cpu() for name, f in found.items()}
    first = next(iter(losses.values())).mean(dim=1)
    worst_case = any(isinstance(f, FlatnessResult) and f.reduction == "max" for f in found.values())
    result = {}
    for name, of_trials in losses.items():
        trials = of_trials.mean(dim=1)
        rises = trials - subject.reference.mean().cpu()
        flatness = float(rises.max() if worst_case else rises.mean())
        distance = float((trials - first).abs().max())
        result[name] = {"flatness found": f"{flatness:.4f}", "largest difference of a trial": f"{distance:.1e}"}
    return result


if __name__ == "__main__":
    main()
