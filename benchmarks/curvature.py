"""Time of a Hessian-vector product over that of a gradient, ours and curvlinops', in one process.

    python benchmarks/curvature.py                              ResNet-18 with 16 channels, 16 images, CPU
    python benchmarks/curvature.py --device cuda --channels 16 64 --images 128 --rounds 10

All are timed in turn (processor time on a CPU) and the medians over the rounds compared, so that a busy machine slows
each of them alike. "ours, first" builds the graph of the gradient anew, as with several batches; "ours, next" is a
further product with a single batch, whose graph is kept. Prints Markdown; the goal is at most 2.3 gradients.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from robustflat.flatness.curvature_products import CurvatureProducts
from robustflat.flatness.directions import loss_and_gradient
from robustflat.models.inference import keep_freed_memory
from robustflat.models.modes import perturbable
from robustflat.models.resnet import resnet18
from robustflat.types import Batch

GOAL = 2.3


def seconds(run: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def peer(model: nn.Module, batch: Batch, vector: torch.Tensor) -> Callable[[], object] | None:
    """curvlinops' product of the same vector with the same matrix, or `None` where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from curvlinops import HessianLinearOperator
    except ImportError:
        return None
    chosen = perturbable(model, norm_layers=True)
    parameters = [p for name, p in model.named_parameters() if name in chosen]
    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, [(batch.x, batch.y)], check_deterministic=False
    )
    return lambda: operator @ vector


def contestants(model: nn.Module, batch: Batch) -> dict[str, Callable[[], object]]:
    chosen = perturbable(model, norm_layers=True)
    products = CurvatureProducts(model, [batch], chosen)
    vector = torch.randn(products.dimension, device=batch.x.device)

    def first() -> None:
        products.release()
        products(vector)

    runs: dict[str, Callable[[], object]] = {
        "gradient": lambda: loss_and_gradient(model, [batch], list(chosen)),
        "ours, first": first,
        "ours, next": lambda: products(vector),
    }
    theirs = peer(model, batch, vector)
    return runs | ({} if theirs is None else {"curvlinops": theirs})


def rows(channels: int, images: int, rounds: int, device: torch.device) -> list[str]:
    torch.manual_seed(0)
    model = resnet18(classes=10, channels=channels, mean=None, std=None).to(device).eval()
    batch = Batch(torch.rand(images, 3, 32, 32, device=device), torch.randint(0, 10, (images,), device=device))
    runs = contestants(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, run in runs.items():
                spent = seconds(run, device)
                if number:  # the first round warms up
                    times[name].append(spent)
    gradient = median(times["gradient"])
    return [
        f"| {channels} | {images} | {name} | {1000 * median(spent):.0f} | {median(spent) / gradient:.2f} |"
        for name, spent in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[16])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the commands do; for all contestants
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads; goal {GOAL} gradients\n")
    print("| channels | images | what | ms | gradients |\n|---|---|---|---|---|")
    for channels in options.channels:
        print("\n".join(rows(channels, options.images, options.rounds, torch.device(options.device))))


if __name__ == "__main__":
    main()
