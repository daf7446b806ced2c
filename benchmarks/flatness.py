"""Time of average-case and worst-case flatness against a literal implementation in the same process, as ratios.

    python benchmarks/flatness.py                           10 draws x PGD-20, 10 restarts x 20 steps, 128 images
    python benchmarks/flatness.py --trials 2 --steps 5      a quick look
    python benchmarks/flatness.py --search bf16

The literal implementation does one perturbation at a time as one would write it first: a deep copy of the network
for every perturbation, attacks that call `backward()` (and so compute weight gradients too), a copy per ascent step.
Both get the reference loss, and run alternately. Images and weights are made up: time does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.attacks.strongest import SEARCHES
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.models.inference import keep_freed_memory
from robustflat.models.modes import perturbable
from robustflat.models.resnet import resnet18

EPSILON, INPUT_STEP = 8 / 255, 0.007


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=16, help="width of the first stage of the ResNet-18")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--trials", type=int, default=10, help="draws of the average, restarts of the worst case")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs, of which the median counts")
    parser.add_argument("--search", choices=SEARCHES, nargs="*", default=list(SEARCHES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-memory", action="store_true", help="set glibc's thresholds first; helps both sides")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.keep_memory:
        keep_freed_memory()
    report(given)


def report(given: argparse.Namespace) -> None:
    model, x, y = subject(given.channels, given.images)
    reference = F.cross_entropy(model(x), y, reduction="none").detach()
    attack = Pgd(LinfBall(EPSILON), steps=given.steps, step_size=INPUT_STEP)
    cases: dict[str, dict[str, Callable[[], object]]] = {
        "average case": {"literal": lambda: literal_average(model, x, y, given.trials, given.steps)},
        "worst case": {"literal": lambda: literal_worst(model, x, y, given.trials, given.steps)},
    }
    for search in given.search:
        average = AverageFlatness(trials=given.trials, attack=attack, search=search)
        cases["average case"][f"search {search}"] = lambda m=average: m(model, x, y, reference=reference)
        if search != "bf16":  # the ascent stays in fp32
            worst = WorstFlatness(restarts=given.trials, steps=given.steps, search=search)
            cases["worst case"][f"search {search}"] = lambda m=worst: m(model, x, y, reference=reference)
    print(f"ResNet-18, {given.channels} channels, {given.images} images, {given.trials} trials x {given.steps} steps")
    print(f"torch {torch.__version__}, {platform.machine()}, {given.threads} threads")
    print(f"CPU seconds, median of {given.repeats}")
    for case, ways in cases.items():
        seconds = timed(ways, given.repeats)
        for way, value in seconds.items():
            print(f"  {case:<13} {way:<13} {value:8.2f} s   ratio {seconds['literal'] / value:5.2f}")
    print(f"  peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def subject(channels: int, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = resnet18(classes=10, channels=channels, mean=[0.5] * 3, std=[0.25] * 3)
    x, y = torch.rand(count, 3, 32, 32), torch.randint(0, 10, (count,))
    with torch.no_grad():
        model(x)  # batch-norm statistics that are not those of a new layer
    return model.eval(), x, y


def timed(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each way (a busy machine hardly changes them); the ways take turns."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            start = time.process_time()
            run()
            found[way].append(time.process_time() - start)
    return {way: median(values) for way, values in found.items()}


def literal_average(model: nn.Module, x: Tensor, y: Tensor, trials: int, steps: int) -> Tensor:
    names, losses = perturbable(model).keys(), []
    for _ in range(trials):
        moved = copy.deepcopy(model)
        for name, parameter in moved.named_parameters():
            if name in names:
                direction = torch.randn_like(parameter)
                parameter.data += 0.5 * parameter.norm() * torch.rand(()) * direction / direction.norm()
        x_adv = literal_pgd(moved, x, y, steps)
        losses.append(F.cross_entropy(moved(x_adv), y, reduction="none").detach())
    return torch.stack(losses)


def literal_pgd(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    delta = (2 * torch.rand_like(x) - 1) * EPSILON
    best, best_loss = delta.clone(), torch.full((len(x),), -float("inf"))
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        model.zero_grad()
        loss = F.cross_entropy(model(x + delta), y, reduction="none")
        loss.sum().backward()
        better = loss.detach() > best_loss
        best = torch.where(better[:, None, None, None], delta.detach(), best)
        best_loss = torch.where(better, loss.detach(), best_loss)
        assert delta.grad is not None
        delta = (delta.detach() + INPUT_STEP * delta.grad.sign()).clamp(-EPSILON, EPSILON)
        delta = (x + delta).clamp(0, 1) - x
    return x + best


def literal_worst(model: nn.Module, x: Tensor, y: Tensor, restarts: int, steps: int) -> Tensor:
    names, losses = perturbable(model).keys(), []
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if name in names}
    ball, stride = WeightBall(0.003), WeightBall(0.001)
    for _ in range(restarts):
        nu = ball.sample(weights)
        delta = (2 * torch.rand_like(x) - 1) * EPSILON
        for _ in range(steps):
            moved = copy.deepcopy(model)
            for name, parameter in moved.named_parameters():
                if name in nu:
                    parameter.data += nu[name]
            delta = delta.detach().requires_grad_()
            F.cross_entropy(moved(x + delta), y).backward()
            grads = {n: p.grad for n, p in moved.named_parameters() if n in nu and p.grad is not None}
            step = stride.steepest(grads, weights)
            nu = ball.project({name: nu[name] + step[name] for name in nu}, weights)
            assert delta.grad is not None
            delta = (delta.detach() + INPUT_STEP * delta.grad.sign()).clamp(-EPSILON, EPSILON)
        moved = copy.deepcopy(model)
        for name, parameter in moved.named_parameters():
            if name in nu:
                parameter.data += nu[name]
        losses.append(F.cross_entropy(moved(x + delta), y, reduction="none").detach())
    return torch.stack(losses)


if __name__ == "__main__":
    main()
