"""Time and memory of PGD and of adversarial training steps, against a literal implementation in the same process.

    python benchmarks/training.py                                ResNet-18 with 16 channels, batch 128, PGD-7 and PGD-20
    python benchmarks/training.py --channels 64 --rounds 3
    python benchmarks/training.py --limits                       also the machine's own rates

"Literal" is what common scripts do: the network as it is, weight gradients computed in the attack by `backward()`, the
adversarial loss kept with one `.item()` per example and step. All start from the same weights; the attack's value
(mean cross-entropy reached, judged by the plain float32 network) stands beside its time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Table, Way, in_turn, limits, parser, peak_memory
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.searching import Searching
from robustflat.geometry.input_ball import LinfBall
from robustflat.gradients.plain import Plain
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.models.inference import keep_freed_memory
from robustflat.models.resnet import resnet18
from robustflat.training.optimizers import sgd
from robustflat.types import AdvBatch, Batch

EPSILON, STEP = 8 / 255, 0.007


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--channels", type=int, default=16)
    options.add_argument("--images", type=int, default=128)
    options.add_argument("--pgd", type=int, nargs="*", default=[7, 20], help="steps of PGD (default: 7 20)")
    options.add_argument("--limits", action="store_true")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.limits:
        for name, value in limits(given.device).items():
            print(f"{name} {value:.4g}")
    model, x, y = subject(given.channels, given.images, given.device)
    what = f"ResNet-18, {given.channels} channels, batch {given.images}, {given.device}"
    for steps in given.pgd:
        if given.device == "cpu" and steps == 7:
            memory(model, x, y, steps)
        keep_freed_memory()
        ways = attacks(model, x, y, steps)
        notes = {name: {"loss found": f"{reached(model, run, y):.4f}"} for name, run in ways.items()}
        timings = in_turn(ways, given.rounds, device=given.device, warm=False)
        Table(f"PGD-{steps}, {what}", "literal", images=given.images).report(timings, notes)
    timings = in_turn(steps_of_training(model, x, y), given.rounds, device=given.device)
    Table(f"AT step, PGD-7, {what}", "literal", images=given.images).report(timings)


def subject(channels: int, count: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with statistics of made-up images, and those images."""
    torch.manual_seed(0)
    model = resnet18(classes=10, channels=channels, mean=[0.5] * 3, std=[0.25] * 3).to(device)
    x, y = torch.rand(count, 3, 32, 32, device=device), torch.randint(0, 10, (count,), device=device)
    with torch.no_grad():
        model(x)
    return model.eval(), x, y


@torch.no_grad()
def reached(model: nn.Module, run: Callable[[], Tensor], y: Tensor) -> float:
    """Mean cross-entropy of an attack's result under the plain network."""
    with torch.enable_grad():
        x_adv = run().detach()
    return float(F.cross_entropy(model(x_adv), y))


def attacks(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Callable[[], Tensor]]:
    def ours(search: str) -> Callable[[], Tensor]:
        attack = Searching(Pgd(LinfBall(EPSILON), steps=steps, step_size=STEP), search)
        return lambda: attack(model, x, y, generator=torch.Generator(x.device).manual_seed(0)).x_adv

    return {"literal": lambda: literal_pgd(model, x, y, steps)} | {
        f"ours, {search}": ours(search) for search in ("plain", "fp32", "bf16")
    }


def literal_pgd(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(0)
    delta = (2 * torch.rand(x.shape, generator=generator, device=x.device) - 1) * EPSILON
    best, best_loss = delta.clone(), [-float("inf")] * len(x)
    for step in range(steps + 1):
        delta = delta.detach().requires_grad_()
        loss = F.cross_entropy(model(x + delta), y, reduction="none")
        for i in range(len(x)):
            if loss[i].item() > best_loss[i]:
                best_loss[i] = loss[i].item()
                best[i] = delta[i].detach()
        model.zero_grad()
        loss.sum().backward()
        assert delta.grad is not None
        if step < steps:
            delta = (delta.detach() + STEP * delta.grad.sign()).clamp(-EPSILON, EPSILON)
            delta = (x + delta).clamp(0, 1) - x
    return x + best


def steps_of_training(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Way]:
    """One optimizer step each, on a copy of the network each."""

    def literal() -> Way:
        network = copy.deepcopy(model)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

        def run() -> None:
            network.eval()
            x_adv = literal_pgd(network, x, y, 7)
            network.train()
            optimizer.zero_grad()
            F.cross_entropy(network(x_adv), y).backward()
            optimizer.step()

        return run

    def ours(search: str, half: bool) -> Way:
        network = copy.deepcopy(model).train()
        optimizer = sgd(network, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
        attack = Searching(Pgd(LinfBall(EPSILON), steps=7, step_size=STEP), search)
        loss, rule = CrossEntropy(), Plain()

        def craft() -> AdvBatch:
            return loss.craft(network, attack, Batch(x, y))

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
                rule(network, craft, lambda batch: loss(network, batch))
            optimizer.step()

        return run

    return {
        "literal": literal(),
        "ours, plain": ours("plain", False),
        "ours, fp32": ours("fp32", False),
        "ours, bf16 search": ours("bf16", False),
        "ours, bf16": ours("bf16", True),
    }


def memory(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Peak memory of one attack, in a process of its own each."""
    print("\nPeak memory of PGD, MiB above the start\n\n| | MiB | of literal |\n|---|---:|---:|")
    first = None
    for name, run in attacks(model, x, y, steps).items():
        used = peak_memory(run)
        first = first or used
        print(f"| {name} | {used:.0f} | {used / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
