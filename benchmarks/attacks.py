"""Speed of our AutoAttack and PGD against the authors' AutoAttack and foolbox, at compared verdicts.

    python benchmarks/attacks.py                               all norms, both networks; about an hour
    python benchmarks/attacks.py --norms linf --networks small --images 64 --rounds 1

Every implementation attacks the same model and images in one process, in turn; figures are medians over the rounds
and ratios of medians. Networks: "small" is the reference CNN, "residual" a ResNet-18 of a few channels, trained here
against PGD on all 128 reference images for a minute or two (so that part of them resists). Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from robustflat.attacks.autoattack import AutoAttack
from robustflat.attacks.pgd import Pgd
from robustflat.geometry.input_ball import LinfBall
from robustflat.models.inference import keep_freed_memory, rewrite
from robustflat.models.resnet import resnet18
from robustflat.rng import generator_for
from tests.reference.models import cnn_cifar10

EPSILON = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
THEIR_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
STEPS = 20
STEP_SIZE = 2 / 255

Attacked = Callable[[], Tensor]
"""Runs an attack; returns the adversarial images."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["small", "residual"], choices=["small", "residual"])
    parser.add_argument("--norms", nargs="+", default=list(EPSILON), choices=list(EPSILON))
    parser.add_argument("--searches", nargs="+", default=["plain", "fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured (default: 3)")
    parser.add_argument("--images", type=int, default=128, help="images attacked, at most 128 (default)")
    parser.add_argument("--channels", type=int, default=8, help="width of the residual network (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep-memory", action="store_true", help="raise malloc's thresholds, for all alike")
    parser.add_argument("--skip-autoattack", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = options.keep_memory and keep_freed_memory()
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    print(
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {name}, {options.threads} threads, "
        f"{options.images} images, {options.rounds} rounds, freed memory {'kept' if kept else 'given back'}.\n"
    )
    for network in options.networks:
        model, x, y = build(network, options)
        if not options.skip_autoattack:
            for norm in options.norms:
                autoattack_table(network, model, x, y, norm, options)
        pgd_table(network, model, x, y, options)


def build(network: str, options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in eval mode, images and labels."""
    small, x, y = cnn_cifar10()
    x, y = x.to(options.device), y.to(options.device)
    if network == "small":
        return small.to(options.device), x[: options.images], y[: options.images]
    torch.manual_seed(0)
    model = resnet18(classes=10, channels=options.channels).to(options.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    attack = Pgd(LinfBall(8 / 255), steps=3, step_size=4 / 255)
    generator = generator_for(0, device=options.device)
    for _ in range(60):
        x_adv = attack(model, x, y, generator=generator).x_adv
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
    return model.eval(), x[: options.images], y[: options.images]


def autoattack_table(
    network: str, model: nn.Module, x: Tensor, y: Tensor, norm: str, options: argparse.Namespace
) -> None:
    from pyautoattack import AutoAttack as Theirs

    def theirs() -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            attack = Theirs(model, norm=THEIR_NORM[norm], eps=EPSILON[norm], seed=0, device=options.device)
            found = attack.run_standard_evaluation(x, y)
        adversarial: Tensor = found[0] if isinstance(found, tuple) else found
        return adversarial

    def ours(search: str) -> Attacked:
        return lambda: AutoAttack(norm=norm, epsilon=EPSILON[norm], search=search)(model, x, y).adversarial

    runs: dict[str, Attacked] = {"pyautoattack": theirs}
    runs |= {f"ours, search {search}": ours(search) for search in options.searches}
    print(f"AutoAttack standard, {network}, {norm} {EPSILON[norm]:.4g}\n")
    table(runs, model, x, y, options)


def pgd_table(network: str, model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> None:
    import foolbox

    def theirs() -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        attack = foolbox.attacks.LinfPGD(steps=STEPS, abs_stepsize=STEP_SIZE, random_start=True)
        adversarial: Tensor = attack(wrapped, x, y, epsilons=EPSILON["linf"])[1]
        return adversarial

    attack = Pgd(LinfBall(EPSILON["linf"]), steps=STEPS, step_size=STEP_SIZE)
    searched: dict[str, nn.Module] = {"plain": model}
    searched |= {p: rewrite(model, x[:32], precision=p) for p in options.searches if p != "plain"}

    def ours(search: str) -> Attacked:
        return lambda: attack(searched[search], x, y, generator=generator_for(0, device=x.device)).x_adv

    runs: dict[str, Attacked] = {"foolbox": theirs}
    runs |= {f"ours, search {search}": ours(search) for search in searched}
    print(f"PGD-{STEPS}, {network}, linf {EPSILON['linf']:.4g}\n")
    for run in runs.values():
        run()
    table(runs, model, x, y, options)


def table(runs: Mapping[str, Attacked], model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> None:
    """Time all in turn and print medians, ratios to the first, and the examples that only one of them breaks."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    robust: dict[str, Tensor] = {}
    for _ in range(options.rounds):
        for name, run in runs.items():
            start, start_busy = time.perf_counter(), time.process_time()
            x_adv = run()
            synchronize(options.device)
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - start_busy)
            with torch.no_grad():
                robust[name] = (model(x).argmax(1) == y) & (model(x_adv.to(x)).argmax(1) == y)
    first = next(iter(runs))
    print("| | seconds | of the first | processor seconds | of the first | robust | only it leaves | only it breaks |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in runs:
        left = int((robust[name] & ~robust[first]).sum())
        broken = int((robust[first] & ~robust[name]).sum())
        print(
            f"| {name} | {median(wall[name]):.3g} | {median(wall[name]) / median(wall[first]):.2f} "
            f"| {median(busy[name]):.3g} | {median(busy[name]) / median(busy[first]):.2f} "
            f"| {int(robust[name].sum())}/{len(y)} | {left} | {broken} |",
            flush=True,
        )
    print()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
