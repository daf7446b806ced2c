"""Time of a Hessian-vector product over that of a gradient, ours and curvlinops', in one process.

    python benchmarks/curvature.py                              ResNet-18 with 16 channels, batch 128, CPU
    python benchmarks/curvature.py --device cuda --channels 16 64 --rounds 10

"ours, first" builds the graph of the gradient anew, as with several batches; "ours, next" is a further product with a
single batch, whose graph is kept. Ratios are costs in gradients.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import torch
from torch import Tensor, nn

from benchmarks.harness import Report, Way, parser
from benchmarks.subjects import forward_gflop, made_up
from robustflat.flatness.curvature_products import CurvatureProducts
from robustflat.flatness.directions import loss_and_gradient
from robustflat.models.modes import perturbable
from robustflat.types import Batch

GOAL = 2.3
"""Gradients that a product may cost."""


def options() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--channels", type=int, nargs="+", default=[16])
    result.add_argument("--images", type=int, default=128)
    return result


def main() -> None:
    warnings.simplefilter("ignore")  # curvlinops and torch's notes on double backward
    given = options().parse_args()
    report = Report(given)
    for channels in given.channels:
        report.goals = channels == 16
        model, x, y = made_up(channels, given.images, given.device)
        title = f"Hessian-vector product, ResNet-18, {channels} channels, batch {given.images}, {given.device}"
        report.compare(title, contestants(model, Batch(x, y)), judge=agreement, cost="gradients")


def contestants(model: nn.Module, batch: Batch) -> dict[str, Way]:
    """A gradient is a forward and a backward pass for images and weights (3 F); a product differentiates both: 6 F."""
    chosen, forward = perturbable(model, norm_layers=True), forward_gflop(model, batch.x)
    products = CurvatureProducts(model, [batch], chosen)
    vector = torch.randn(products.dimension, device=batch.x.device)

    def first() -> Tensor:
        products.release()
        return products(vector)

    ways = {
        "gradient": Way(lambda: loss_and_gradient(model, [batch], list(chosen)), gflop=3 * forward),
        "ours, first": Way(first, goal=GOAL, gflop=9 * forward),
        "ours, next": Way(lambda: products(vector), goal=GOAL, gflop=6 * forward),
    }
    theirs = peer(model, batch, vector)
    return ways | ({} if theirs is None else {"curvlinops": Way(theirs, gflop=9 * forward, as_scripts=True)})


def peer(model: nn.Module, batch: Batch, vector: Tensor) -> Callable[[], Tensor] | None:
    """curvlinops' product of the same vector with the same matrix, or `None` where it is not installed."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        return None
    chosen = perturbable(model, norm_layers=True)
    named = {name: p for name, p in model.named_parameters() if name in chosen}
    try:
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), named, [(batch.x, batch.y)], check_deterministic=False
        )
    except (TypeError, AttributeError):  # releases before 3.0 take a list
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(named.values()), [(batch.x, batch.y)], check_deterministic=False
        )
    return lambda: operator @ vector


def agreement(found: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """Norm of each product, and its distance from ours as a share of it."""
    first = found["ours, first"]
    assert isinstance(first, Tensor)
    return {
        name: {"norm": f"{float(p.norm()):.5g}", "distance": f"{float((p - first).norm() / first.norm()):.1e}"}
        for name, p in found.items()
        if isinstance(p, Tensor)
    }


if __name__ == "__main__":
    main()
