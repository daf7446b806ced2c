"""Points per second of a loss landscape against a literal loop: deep copy, set the weights, attack, evaluate.

    python benchmarks/landscape.py                       11 points of one line: robust (PGD-10) and clean loss
    python benchmarks/landscape.py --points 5 --steps 3 --rounds 1

Both go along the same direction with the same draws at every point. The largest difference of a point's loss stands
beside the times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import torch
from torch import Tensor, nn

from benchmarks.harness import Report, Way, parser
from benchmarks.literal import literal_point
from benchmarks.subjects import EPSILON, STEP, forward_gflop, made_up
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.strongest import SEARCHES
from robustflat.flatness.landscape import Landscape
from robustflat.flatness.landscape_result import LandscapeResult
from robustflat.geometry.input_ball import LinfBall
from robustflat.models.modes import perturbable
from robustflat.rng import generator_for

LENGTH = 0.5


def options() -> argparse.ArgumentParser:
    result = parser(__doc__, rounds=3)
    result.add_argument("--channels", type=int, default=16, help="width of the first stage of the ResNet-18")
    result.add_argument("--images", type=int, default=128)
    result.add_argument("--points", type=int, default=11, help="on the line, odd (default: 11)")
    result.add_argument("--steps", type=int, default=10, help="of the attack at every point (default: 10)")
    result.add_argument("--search", choices=SEARCHES, nargs="*", default=list(SEARCHES))
    return result


def main() -> None:
    given = options().parse_args()
    report = Report(given)
    subject = made_up(given.channels, given.images, given.device)
    what = f"{given.points} points, ResNet-18, {given.channels} channels, batch {given.images}, {given.device}"
    for steps, name in ((given.steps, f"robust loss, PGD-{given.steps}"), (0, "clean loss")):
        searches = given.search if steps else ["plain"]
        ways = lines(*subject, points=given.points, steps=steps, searches=searches)
        report.compare(f"Landscape, {name}, {what}", ways, judge=values, work=(given.points, "points"), warm=not steps)


def lines(model: nn.Module, x: Tensor, y: Tensor, *, points: int, steps: int, searches: list[str]) -> dict[str, Way]:
    """One line of points; 0 steps: of the clean loss."""
    weights = {name: w.detach() for name, w in perturbable(model).items()}
    drawn = generator_for(0, "direction", device=x.device)
    direction = {n: torch.randn(w.shape, generator=drawn, device=w.device) for n, w in weights.items()}
    need = points * (2 * steps + 1) * forward_gflop(model, x)

    def literal(points: int, steps: int) -> Tensor:
        unit = {n: d * (LENGTH * weights[n].norm() / d.norm()) for n, d in direction.items()}
        found = []
        for s in torch.linspace(-1, 1, points, dtype=torch.float64).tolist():
            generator = generator_for(0, "attack", 0, device=x.device)
            nu = {n: s * d for n, d in unit.items()}
            found.append(literal_point(model, nu, x, y, steps=steps, generator=generator).mean())
        return torch.stack(found)

    def ours(search: str, points: int, steps: int) -> LandscapeResult:
        attack = Pgd(LinfBall(EPSILON), steps=steps, step_size=STEP) if steps else None
        landscape = Landscape(
            loss="robust" if steps else "clean", attack=attack, points=points, trials=1, length=LENGTH, search=search
        )
        return landscape(model, x, y, directions=[direction], batch_size=len(x))

    few = min(steps, 2)
    ways = {"literal": Way(lambda: literal(points, steps), gflop=need, brief=lambda: literal(3, few), as_scripts=True)}
    for search in searches:
        ways[f"ours, {search}"] = Way(
            lambda search=search: ours(search, points, steps),
            gflop=need,
            half=search == "bf16",
            brief=lambda search=search: ours(search, 3, few),
        )
    return ways


def values(found: Mapping[str, Tensor | LandscapeResult]) -> dict[str, dict[str, str]]:
    curves = {n: (f.losses[0] if isinstance(f, LandscapeResult) else f.cpu()).double() for n, f in found.items()}
    first = next(iter(curves.values()))
    return {
        name: {
            "mean loss of the points": f"{float(curve.mean()):.4f}",
            "largest difference": f"{float((curve - first).abs().max()):.1e}",
        }
        for name, curve in curves.items()
    }


if __name__ == "__main__":
    main()
