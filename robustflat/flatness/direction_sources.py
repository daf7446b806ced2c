"""Where the directions of a landscape come from: chance, ascent, the Hessian, or a file made for another network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from robustflat.errors import DataError, UserError, require_one_of, require_range
from robustflat.flatness.curvature_products import PRECISIONS, CurvatureProducts
from robustflat.flatness.directions import ascent_direction, loss_and_gradient, random_direction
from robustflat.flatness.lanczos import Lanczos
from robustflat.flatness.subject import Subject
from robustflat.geometry.weight_ball import WeightBall
from robustflat.memory import MemoryBudget, require_memory_budget
from robustflat.rng import generator_for
from robustflat.store.results import KEY, ResultStore
from robustflat.types import Batch, Weights

Examples = Callable[[], Sequence[Batch]]
"""Makes the batches that a direction is computed on; not called where directions need none."""

_GROUP = "directions"


@runtime_checkable
class DirectionSource(Protocol):
    """Makes `count` directions for a network; the landscape normalises them afterwards."""

    def __call__(self, found: Subject, examples: Examples, *, count: int, seed: int) -> list[Weights]:
        """Directions, each name -> tensor of that weight's shape."""
        ...

    def __str__(self) -> str:
        """What the directions are, in words that follow their number: "random directions"."""
        ...


class RandomDirections:
    """Gaussian entries that depend on seed, layout and kind of device: networks of one architecture share them."""

    def __call__(self, found: Subject, examples: Examples, *, count: int, seed: int) -> list[Weights]:
        """See `DirectionSource`; direction i is the same for every count."""
        draws = (generator_for(seed, "direction", i, device=found.device) for i in range(count))
        return [random_direction(found.weights, draw) for draw in draws]

    def __str__(self) -> str:
        return "random directions"


class AdversarialDirections:
    """Displacements that raise the loss most, by gradient ascent from random starts (Stutz et al., ICCV 2021).

    For a robust landscape the ascent sees adversarial examples found once, at w (as released); for a clean one the
    clean images.

    Args:
        ball: where to search; `None`: radius 0.003, L2, relative to each layer (the paper's worst case).
        steps: of the ascent, >= 1.
        step: length of each in the ball's units, > 0.

    Raises:
        UserError: if steps or step are out of range.
    """

    def __init__(self, ball: WeightBall | None = None, *, steps: int = 20, step: float = 0.001) -> None:
        require_range("steps", steps, low=1)
        require_range("step", step, low=0, low_open=True)
        self.ball = WeightBall(0.003) if ball is None else ball
        require_range("radius", self.ball.radius, low=0, low_open=True, hint="A ball of radius 0 has no direction.")
        self.steps, self.step = steps, step

    def __call__(self, found: Subject, examples: Examples, *, count: int, seed: int) -> list[Weights]:
        """See `DirectionSource`."""
        batches = examples()
        draws = (generator_for(seed, "ascent direction", i, device=found.device) for i in range(count))
        return [
            ascent_direction(found, batches, ball=self.ball, steps=self.steps, step=self.step, generator=draw)
            for draw in draws
        ]

    def __str__(self) -> str:
        return (
            f"adversarial weight directions ({self.steps} ascent steps of {self.step:g}, radius {self.ball.radius:g})"
        )


class HessianDirections:
    """Eigenvectors of the Hessian of the mean cross-entropy, the outermost first, signed so that the loss rises.

    For a robust landscape on adversarial examples found once, at w. With that sign the slope at w along the direction
    is not negative: an eigenvector has none of its own, and runs would otherwise differ by chance.

    Args:
        end: "top" (largest eigenvalues) or "bottom" (smallest).
        precision: "fp32" or "fp64".
        lanczos: tolerance, limit and memory; `None`: `Lanczos(tolerance=1e-3)`.
        memory_budget: for what is kept between products, as for `HessianSpectrum`.

    Raises:
        UserError: for another end or precision, or what is no budget.
    """

    def __init__(
        self,
        end: str = "top",
        *,
        precision: str = "fp32",
        lanczos: Lanczos | None = None,
        memory_budget: MemoryBudget = "auto",
    ) -> None:
        require_memory_budget(memory_budget)
        require_one_of("end", end, ("top", "bottom"))
        require_one_of("precision", precision, PRECISIONS)
        self.end, self.precision, self.lanczos = end, precision, lanczos or Lanczos(tolerance=1e-3)
        self.memory_budget = memory_budget

    def __call__(self, found: Subject, examples: Examples, *, count: int, seed: int) -> list[Weights]:
        """See `DirectionSource`.

        Raises:
            UserError: if the eigenvectors have not converged.
        """
        batches = examples()
        products = CurvatureProducts(
            found.model,
            batches,
            found.weights,
            precision=self.precision,
            seed=seed,
            memory_budget=self.memory_budget,
        )
        generator = generator_for(seed, "lanczos", device=products.device)
        start = torch.randn(products.dimension, generator=generator, dtype=products.dtype, device=products.device)
        wanted = {"top": count, "bottom": 0} if self.end == "top" else {"top": 0, "bottom": count}
        ends = self.lanczos(products, start, top=wanted["top"], bottom=wanted["bottom"])
        products.release()
        if not ends.converged:
            raise UserError(
                f"The {count} {self.end} eigenvectors have not converged after {products.count} products; raise "
                f"lanczos.max_products or lanczos.tolerance, or ask for fewer directions."
            )
        vectors = (ends.top if self.end == "top" else ends.bottom).vectors
        slope = _flat_gradient(found, batches).to(vectors)
        signs = torch.where(vectors @ slope < 0, -1.0, 1.0).to(vectors)
        shapes, sizes = products.shapes, products.sizes
        return [
            {n: part.view(s) for n, part, s in zip(products.names, v.split(sizes), shapes, strict=True)}
            for v in vectors * signs[:, None]
        ]

    def __str__(self) -> str:
        return f"{'leading' if self.end == 'top' else 'lowest'} Hessian eigenvectors"


class StoredDirections:
    """Directions from a file written by `save_directions`, for instance those of another network.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, found: Subject, examples: Examples, *, count: int, seed: int) -> list[Weights]:
        """See `DirectionSource`.

        Raises:
            DataError: if the file is missing or damaged, or holds fewer directions.
        """
        ready = load_directions(self.path)
        if len(ready) < count:
            raise DataError(f"{self.path} holds {len(ready)} directions, {count} are wanted: lower trials.")
        return ready[:count]

    def digest(self) -> str:
        """Sixteen hexadecimal digits of what the file holds.

        Raises:
            DataError: see `load_directions`.
        """
        total = hashlib.sha256()
        for direction in load_directions(self.path):
            for name in sorted(direction):
                total.update(name.encode() + direction[name].numpy().tobytes())
        return total.hexdigest()[:16]

    def __str__(self) -> str:
        return f"directions from {self.path.name}"


def save_directions(directions: Sequence[Weights], path: Path | str, words: str) -> Path:
    """Write directions to an HDF5 file, for `StoredDirections`.

    Args:
        directions: each name -> tensor; kept in float32.
        path: of the file; an old one is replaced when the new one is complete.
        words: what they are.
    """
    target = Path(path)
    arrays = {
        f"{index}:{name}": tensor.detach().float().cpu().numpy()
        for index, direction in enumerate(directions)
        for name, tensor in direction.items()
    }
    ResultStore(target).write(_GROUP, arrays, {KEY: "directions", "count": len(directions), "words": words})
    return target


def load_directions(path: Path | str) -> list[Weights]:
    """What `save_directions` wrote.

    Raises:
        DataError: if the file is missing, damaged, or holds no directions.
    """
    stored = ResultStore(Path(path)).read(_GROUP)
    directions: list[Weights] = [{} for _ in range(int(stored.attrs.get("count", 0)))]
    for key, array in stored.arrays.items():
        index, _, name = key.partition(":")
        if not index.isdigit() or int(index) >= len(directions):
            raise DataError(f"{path}: '{key}' is no tensor of a direction. Save the directions again.")
        directions[int(index)][name] = torch.from_numpy(array)
    return directions


def _flat_gradient(found: Subject, batches: Sequence[Batch]) -> torch.Tensor:
    _, slope = loss_and_gradient(found.model, batches, list(found.weights))
    return torch.cat([part.flatten() for part in slope.values()])
