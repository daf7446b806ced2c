"""What a card makes of one robust network: epochs of training, flatness, AutoAttack, and bf16 training beside fp32.

    python benchmarks/card.py --device cuda --data cifar.npz        ResNet-18 with 64 channels; minutes on an H200
    python benchmarks/card.py --channels 4 --train 256 --images 16 --epochs 1 --trials 2 --steps 2 --budget preview

Trains with PGD-7 in fp32 and in bf16 from the same weights and draws, then measures what fp32 trained. The .npz holds
uint8 arrays train_images, test_images (N, H, W, C) and integer train_labels, test_labels; without it images are made
up. The time of a full CIFAR-10 epoch is that of 390 steps at the measured rate.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Report, limits, parser
from benchmarks.subjects import EPSILON, STEP, forward_gflop
from benchmarks.timing import on_cuda
from robustflat.attacks.autoattack import AutoAttack
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.searching import Searching
from robustflat.attacks.strongest import strongest
from robustflat.data.augment import Flip, PadCrop
from robustflat.data.images import ImageSet
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall
from robustflat.gradients.plain import Plain
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.models.resnet import resnet18
from robustflat.rng import Streams, generator_for
from robustflat.training.optimizers import sgd
from robustflat.types import AdvBatch, LossTerms

BATCH, EPOCH = 128, 390
"""Images of a step, and steps of an epoch of CIFAR-10."""

Row = dict[str, Any]


def options() -> argparse.ArgumentParser:
    result = parser(__doc__, rounds=1)
    result.add_argument("--data", type=Path, help="images; see above")
    result.add_argument("--channels", type=int, default=64)
    result.add_argument("--train", type=int, default=10_000, help="training images")
    result.add_argument("--epochs", type=int, default=10, help="of the training images")
    result.add_argument("--images", type=int, default=1000, help="test images that are measured")
    result.add_argument("--trials", type=int, default=10, help="draws and restarts of flatness")
    result.add_argument("--steps", type=int, default=20, help="of PGD and of the worst case")
    result.add_argument("--budget", default="full", help="of AutoAttack")
    result.add_argument("--searches", nargs="+", default=["bf16", "fp32"])
    result.add_argument("--compile", default="none", help="of the training attack: none, default or graph")
    return result


def main() -> None:
    given = options().parse_args()
    report = Report(given)
    train, test = sets(given)
    what = f"ResNet-18, {given.channels} channels, {train.name}, {given.device}"
    networks, rows = {}, {}
    for precision in ("fp32", "bf16"):
        networks[precision], rows[precision] = trained(precision, train, test, given)
    how = f"{given.epochs} x {given.train} images, compile {given.compile}"
    report.figures(f"AT, PGD-7, batch {BATCH}, {how}, {what}", rows)
    model, x, y = networks["fp32"], *next(iter(test.batches(given.images)))
    for title, ways in measurements(given).items():
        found = {search: measured(run, model, x, y, search) for search, run in ways.items()}
        report.figures(f"{title}, {len(x)} images, {what}", found)


def sets(given: argparse.Namespace) -> tuple[ImageSet, ImageSet]:
    """Training and test images on the device."""
    if given.data is None:
        drawn = np.random.default_rng(0)
        shape = {"train": given.train, "test": given.images}
        found = {f"{k}_images": drawn.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for k, n in shape.items()}
        found |= {f"{k}_labels": drawn.integers(0, 10, n) for k, n in shape.items()}
    else:
        found = dict(np.load(given.data))
    name = "made-up images" if given.data is None else given.data.stem

    def made(split: str, count: int) -> ImageSet:
        images = torch.from_numpy(found[f"{split}_images"][:count]).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(found[f"{split}_labels"][:count].astype(np.int64))
        return ImageSet(images, labels, name, 10).to(torch.device(given.device))

    return made("train", given.train), made("test", given.images)


def trained(precision: str, train: ImageSet, test: ImageSet, given: argparse.Namespace) -> tuple[nn.Module, Row]:
    """A network after a short training, and what it cost and reached."""
    torch.manual_seed(0)
    model = resnet18(classes=10, channels=given.channels).to(given.device).train()
    steps = given.epochs * max(given.train // BATCH, 1)
    optimizer = sgd(model, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    attack = Searching(Pgd(LinfBall(EPSILON), steps=7, step_size=STEP), precision, compile=given.compile)
    streams, loss, rule = Streams(0, given.device), CrossEntropy(), Plain()
    data = train.stream(BATCH, {"crop": PadCrop(padding=4), "flip": Flip()}, streams)

    def craft() -> AdvBatch:
        return loss.craft(model, attack, next(data), streams["attack"])

    def score(batch: AdvBatch) -> LossTerms:
        return loss(model, batch, streams["loss"])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(given.device).type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            rule(model, craft, score)
        optimizer.step()
        schedule.step()

    warm = min(3, steps - 1)
    for _ in range(warm):
        step()
    seconds = elapsed(lambda: [step() for _ in range(steps - warm)], given.device)[1] / (steps - warm)
    gflop = (2 * 7 + 1 + 3) * forward_gflop(model, torch.rand(BATCH, 3, 32, 32, device=given.device))
    row = figures_of(seconds, BATCH, gflop, given.device, precision)
    model.eval()
    x, y = next(iter(test.batches(given.images)))
    with torch.no_grad():
        clean = float((model(x).argmax(1) != y).float().mean())
    hard = Pgd(LinfBall(EPSILON), steps=20, step_size=STEP)
    logits = strongest(model, x, y, hard, restarts=1, search="fp32", generator=generator_for(0, device=x.device)).logits
    robust_loss = nn.functional.cross_entropy(logits, y, reduction="none")
    error, deviation = float((logits.argmax(1) != y).float().mean()), float(robust_loss.std()) / len(y) ** 0.5
    row["found"] = {
        "step ms": f"{1e3 * seconds:.2f}",
        "epoch s": f"{EPOCH * seconds:.1f}",
        "error": f"{clean:.1%}",
        "RErr (PGD-20)": f"{error:.1%}",
        "RLoss": f"{float(robust_loss.mean()):.3f} +- {deviation:.3f}",
    }
    return model, row


Measure = Callable[[nn.Module, Tensor, Tensor], tuple[str, int]]
"""Network, images, labels -> what was found, and how many images went through the network, forward or backward."""


def measurements(given: argparse.Namespace) -> Mapping[str, Mapping[str, Measure]]:
    """By title, then by search."""

    def flat(measure: AverageFlatness | WorstFlatness, passes: int) -> Measure:
        def run(model: nn.Module, x: Tensor, y: Tensor) -> tuple[str, int]:
            found = measure(model, x, y)
            return f"{found.value:.4f} +- {found.standard_error:.4f}", passes * len(x)

        return run

    def autoattack(search: str) -> Measure:
        def run(model: nn.Module, x: Tensor, y: Tensor) -> tuple[str, int]:
            found = AutoAttack(norm="linf", epsilon=EPSILON, search=search, budget=given.budget)(model, x, y)
            return f"RErr {1 - found.robust_accuracy:.1%}", sum(r.forwards + r.backwards for r in found.attacks)

        return run

    attack = Pgd(LinfBall(EPSILON), steps=given.steps, step_size=STEP)
    trials, steps = given.trials, given.steps
    average = {
        search: flat(AverageFlatness(trials=trials, attack=attack, search=search), trials * (2 * steps + 1))
        for search in given.searches
    }
    worst = {"fp32": flat(WorstFlatness(restarts=trials, steps=steps, search="fp32"), trials * (3 * steps + 1))}
    return {
        f"Average-case flatness, {trials} draws x PGD-{steps}": average,
        f"Worst-case flatness, {trials} restarts x {steps} steps": worst,
        f"AutoAttack standard, {given.budget}": {search: autoattack(search) for search in given.searches},
    }


def measured(run: Measure, model: nn.Module, x: Tensor, y: Tensor, search: str) -> Row:
    (text, images), seconds = elapsed(lambda: run(model, x, y), str(x.device))
    gflop = images * forward_gflop(model, x[:1])
    precision = "bf16" if search == "bf16" else "fp32"
    return figures_of(seconds, images, gflop, str(x.device), precision) | {"found": {"value": text}}


def figures_of(seconds: float, images: float, gflop: float, device: str, precision: str) -> Row:
    share = gflop / seconds / limits(device)[f"convolution_{precision}_gflops"]
    return {"wall": seconds, "images_per_second": images / seconds, "gflop": gflop, "share_of_limit": share}


def elapsed(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """Result and seconds of work, the card's included."""
    if on_cuda(device):
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if on_cuda(device):
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
