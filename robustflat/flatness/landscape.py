"""Clean or robust loss and error along lines, on a plane, and between two networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustflat.attacks.describe import describe
from robustflat.attacks.examples import Array, batches_for
from robustflat.attacks.judging import held_still
from robustflat.attacks.objectives import cross_entropy, predicted_wrong
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.strongest import judged_logits, strongest
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.batch_norm import recalibrated, statistic_layers
from robustflat.flatness.directions import direction_to, normalisation_names, normalised, random_direction
from robustflat.flatness.hessian import frozen_batches
from robustflat.flatness.landscape_result import LandscapeResult
from robustflat.flatness.subject import Subject, subject
from robustflat.geometry.input_ball import LinfBall
from robustflat.models.modes import displaced
from robustflat.models.precision import precision_of
from robustflat.rng import generator_for
from robustflat.types import Attack, Batch, Weights

LOSSES = ("robust", "clean", "frozen")


class _Height(NamedTuple):
    loss: float
    error: float


class Landscape:
    """Loss and error at w + s * d for directions d (Li et al., NeurIPS 2018; robust: Stutz et al., ICCV 2021).

    The robust loss attacks the images afresh at every point, with the same random draws at all points, so that
    curves are comparable; "frozen" keeps the adversarial examples of w. Random directions depend on the seed and the
    layout of the network alone: networks of one architecture are shown along the same ones, each normalised by its own
    weights.

    >>> lines = Landscape(trials=3)(model, images, labels)  # doctest: +SKIP
    >>> lines.mean, lines.max, lines.spread  # doctest: +SKIP

    Cost: one attack (or forward pass) over all images for each point: trials * points, or points ** 2 on a plane.

    Args:
        loss: "robust", "clean" or "frozen".
        attack: `None`: PGD-10, L-infinity 8/255 (the released commands'); not used for the clean loss.
        normalisation: "layer", "filter", "relative", "global", "layer_max_abs", "filter_max_abs" (released under the
            names layer_l2, filter_l2) or "none"; see `directions.NORMALISATIONS`.
        length: the largest step, in the normalisation's units (paper: 0.5 for random, 0.025 for adversarial ones).
        points: S >= 2, evenly spaced in [-length, length]; an odd number includes w itself.
        trials: random directions, >= 1.
        norm_layers: displace the parameters of normalisation layers too.
        biases: displace biases too.
        seed: of directions and attacks, >= 0.

    Raises:
        UserError: if an option is unknown or out of range, or an attack is given for the clean loss.
    """

    def __init__(
        self,
        *,
        loss: str = "robust",
        attack: Attack | None = None,
        normalisation: str = "layer",
        length: float = 0.5,
        points: int = 51,
        trials: int = 10,
        norm_layers: bool = False,
        biases: bool = True,
        seed: int = 0,
    ) -> None:
        require_one_of("loss", loss, LOSSES)
        require_one_of("normalisation", normalisation, normalisation_names())
        require_range("length", length, low=0, low_open=True)
        require_range("points", points, low=2)
        require_range("trials", trials, low=1)
        require_range("seed", seed, low=0)
        if loss == "clean" and attack is not None:
            raise UserError("loss='clean' uses no attack: leave attack out, or use loss='robust'.")
        self.loss, self.normalisation, self.length = loss, normalisation, length
        self.points, self.trials, self.seed = points, trials, seed
        self.norm_layers, self.biases = norm_layers, biases
        self.attack = attack
        if loss != "clean" and attack is None:
            self.attack = Pgd(LinfBall(8 / 255), steps=10, step_size=0.007)

    def __call__(
        self,
        model: nn.Module,
        images: Array,
        labels: Array,
        *,
        directions: Sequence[Weights] | None = None,
        batch_size: int = 128,
    ) -> LandscapeResult:
        """Lines through w, one per direction.

        Args:
            model: images in [0, 1] -> logits; left as found.
            images: (N, C, H, W), floating point in [0, 1] or uint8.
            labels: integers (N,).
            directions: name -> tensor for each line, such as those of `HessianSpectrum` or `ascent_direction`; they are
                normalised here. `None`: random ones.
            batch_size: bounds memory.

        Raises:
            UserError: if model, images or labels cannot be measured, or directions do not fit the weights.
        """
        found = self._subject(model, images, labels, batch_size)
        ready = self._directions(found, directions, self.trials)
        steps = self._steps()
        measured = self._images(found)
        rows = [self._heights(found, measured, ({n: float(s) * d[n] for n in d} for s in steps)) for d in ready]
        return self._result(found, "lines", steps, rows, ready, "random" if directions is None else "given")

    def plane(
        self,
        model: nn.Module,
        images: Array,
        labels: Array,
        *,
        directions: tuple[Weights, Weights] | None = None,
        batch_size: int = 128,
    ) -> LandscapeResult:
        """The plane through w along two directions; arguments as for lines.

        Losses (S, S): entry (i, j) is at w + steps[i] * first + steps[j] * second.

        Raises:
            UserError: as for lines.
        """
        found = self._subject(model, images, labels, batch_size)
        first, second = self._directions(found, directions, 2)
        steps, measured = self._steps(), self._images(found)
        rows = [
            self._heights(found, measured, ({n: a * first[n] + b * second[n] for n in first} for b in steps.tolist()))
            for a in steps.tolist()
        ]
        source = "random" if directions is None else "given"
        return self._result(found, "plane", steps, rows, [first, second], source)

    def path(
        self,
        model: nn.Module,
        target: Mapping[str, Tensor],
        images: Array,
        labels: Array,
        *,
        batch_norm: str = "interpolate",
        batch_size: int = 128,
    ) -> LandscapeResult:
        """The straight path from the model (s = 0) to another state dict of the same network (s = 1).

        All parameters move, whatever `norm_layers` and `biases`; length and normalisation do not apply.

        Args:
            model: left as found.
            target: the other network's state dict.
            images, labels: as for lines.
            batch_norm: running statistics on the way: "interpolate" with the weights, or "recalibrate" on the clean
                images, as an average of weights needs them.
            batch_size: bounds memory.

        Raises:
            UserError: if the state dict does not fit, or `batch_norm` is unknown or cannot be applied.
        """
        require_one_of("batch_norm", batch_norm, ("interpolate", "recalibrate"))
        batches = batches_for(model, images, labels, batch_size=batch_size)
        found = subject(model, batches, norm_layers=True, biases=True)
        whole = direction_to(found.weights, target)
        buffers = {n: b for n, b in model.named_buffers() if n in target and b.is_floating_point()}
        before = {name: b.clone() for name, b in buffers.items()}
        ends = {name: target[name].to(b) for name, b in buffers.items()}
        steps = torch.linspace(0, 1, self.points, dtype=torch.float64)
        measured = self._images(found)
        row = []
        try:
            for s in steps.tolist():
                for name, b in buffers.items():
                    b.copy_(torch.lerp(before[name], ends[name], s))
                with ExitStack() as stack:
                    stack.enter_context(displaced(model, {name: s * d for name, d in whole.items()}))
                    if batch_norm == "recalibrate" and statistic_layers(model):
                        stack.enter_context(held_still(model))
                        stack.enter_context(recalibrated(model, found.batches))
                    row.append(self._height(model, measured))
        finally:
            for name, b in buffers.items():
                b.copy_(before[name])
        return self._result(found, "path", steps, [row], [whole], f"to another network, statistics {batch_norm}")

    def _subject(self, model: nn.Module, images: Array, labels: Array, batch_size: int) -> Subject:
        batches = batches_for(model, images, labels, batch_size=batch_size)
        return subject(model, batches, norm_layers=self.norm_layers, biases=self.biases)

    def _steps(self) -> Tensor:
        return torch.linspace(-1, 1, self.points, dtype=torch.float64)

    def _directions(self, found: Subject, given: Sequence[Weights] | None, count: int) -> list[Weights]:
        if given is not None and not given:
            raise UserError("directions is empty: give at least one, or None for random ones.")
        if given is None:
            draws = (generator_for(self.seed, "direction", i, device=found.device) for i in range(count))
            given = [random_direction(found.weights, draw) for draw in draws]
        return [
            normalised({n: t.to(found.device) for n, t in d.items()}, found.weights, self.normalisation, self.length)
            for d in given
        ]

    def _images(self, found: Subject) -> list[Batch]:
        """Images to measure on: adversarial ones of w if frozen."""
        if self.loss != "frozen":
            return found.batches
        assert self.attack is not None, "set by the constructor"
        return frozen_batches(found, self.attack, self.seed)

    def _heights(self, found: Subject, measured: Sequence[Batch], displacements: Iterable[Weights]) -> list[_Height]:
        heights = []
        for nu in displacements:
            with displaced(found.model, nu):
                heights.append(self._height(found.model, measured))
        return heights

    def _height(self, model: nn.Module, batches: Sequence[Batch]) -> _Height:
        """Mean loss and error at the weights as they are."""
        losses, wrong = [], []
        for index, (x, y) in enumerate(batches):
            logits = self._logits(model, x, y, index)
            losses.append(cross_entropy(logits, y).double())
            wrong.append(predicted_wrong(logits, y))
        return _Height(float(torch.cat(losses).mean()), float(torch.cat(wrong).double().mean()))

    def _logits(self, model: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
        if self.loss != "robust":
            return judged_logits(model, x)
        assert self.attack is not None, "set by the constructor"
        # The same draws at all points: differences are then those of the weights alone.
        generator = generator_for(self.seed, "attack", index, device=x.device)
        return strongest(model, x, y, self.attack, generator=generator).logits

    def _result(
        self,
        found: Subject,
        kind: str,
        steps: Tensor,
        rows: Sequence[Sequence[_Height]],
        directions: Sequence[Weights],
        source: str,
    ) -> LandscapeResult:
        norms = [torch.stack([t.double().square().sum() for t in d.values()]).sum().sqrt() for d in directions]
        scale = 1.0 if kind == "path" else self.length
        return LandscapeResult(
            steps=steps * scale,
            losses=torch.tensor([[h.loss for h in row] for row in rows], dtype=torch.float64),
            errors=torch.tensor([[h.error for h in row] for row in rows], dtype=torch.float64),
            factors=torch.stack(norms).cpu() / scale,
            kind=kind,
            settings={
                "loss": self.loss,
                "attack": "none" if self.loss == "clean" else describe(self.attack),
                "directions": source,
                "normalisation": "none" if kind == "path" else self.normalisation,
                "length": scale,
                "examples": found.size,
                "parameters": found.described(self.norm_layers or kind == "path", self.biases or kind == "path"),
                "precision": precision_of(found.model),
                "seed": self.seed,
            },
        )
