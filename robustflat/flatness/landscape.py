"""Clean or robust loss and error along lines, on a plane, and between two networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustflat.attacks.describe import brief, describe
from robustflat.attacks.examples import Array, batches_for
from robustflat.attacks.judging import held_still
from robustflat.attacks.objectives import cross_entropy
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.strongest import SEARCHES, judged_logits, strongest
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.batch_norm import recalibrated
from robustflat.flatness.direction_sources import DirectionSource, RandomDirections
from robustflat.flatness.directions import direction_to, normalisation_names, normalised
from robustflat.flatness.hessian import frozen_batches
from robustflat.flatness.landscape_result import LandscapeResult
from robustflat.flatness.subject import Subject, misclassified, subject
from robustflat.geometry.input_ball import LinfBall
from robustflat.models.modes import displaced
from robustflat.models.precision import precision_of
from robustflat.ranks import workers
from robustflat.rng import generator_for
from robustflat.types import Attack, Batch, Weights

LOSSES = ("robust", "clean", "frozen")
REDUCTIONS = ("mean", "max")

Place = tuple[int, int]
Done = MutableMapping[Place, tuple[float, ...]]
"""(row, column) of a point -> (loss, error); points in it are not measured, new ones are put into it."""


class Height(NamedTuple):
    """Mean loss in nats and fraction misclassified at one point; logits that are not finite are wrong."""

    loss: float
    error: float


class Landscape:
    """Loss and error at w + s * d for directions d (Li et al., NeurIPS 2018; robust: Stutz et al., ICCV 2021).

    The robust loss attacks the images afresh at every point, with the same random draws at all points, so that
    curves are comparable; "frozen" keeps the adversarial examples of w. Random directions depend on the seed and the
    layout of the network alone: networks of one architecture are shown along the same ones, each normalised by its own
    weights.

    >>> lines = Landscape(trials=3)(model, images, labels)  # doctest: +SKIP
    >>> print(lines, lines.mean, lines.max, lines.spread)  # doctest: +SKIP
    >>> lines.picture("landscape.png", "my network")  # writes .png, .svg and .html  # doctest: +SKIP

    Cost: one attack (or forward pass) over all images for each point: trials * (points - 1) + 1 along lines,
    points ** 2 on a plane.

    Args:
        loss: "robust", "clean" or "frozen".
        attack: `None`: PGD-10, L-infinity 8/255 (the released commands'); not used for the clean loss.
        normalisation: "layer", "filter", "relative", "global", "layer_max_abs", "filter_max_abs" (released under the
            names layer_l2, filter_l2) or "none"; see `directions.NORMALISATIONS`.
        length: the largest step, in the normalisation's units (paper: 0.5 for random, 0.025 for adversarial ones).
        points: S, evenly spaced in [-length, length]; odd and >= 3, so that w itself is among them (any S >= 2 for
            paths).
        trials: directions, >= 1.
        directions: where they come from; `None`: random.
        reduction: what counts over directions, "mean" (paper: random ones) or "max" (paper: adversarial ones).
        norm_layers: displace the parameters of normalisation layers too.
        biases: displace biases too.
        search: what attacks search on: "plain" (the network itself), or a copy rewritten for speed in "fp32" or "bf16"
            (see `robustflat.models.inference`). The plain network judges.
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
        directions: DirectionSource | None = None,
        reduction: str = "mean",
        norm_layers: bool = False,
        biases: bool = True,
        search: str = "plain",
        seed: int = 0,
    ) -> None:
        require_one_of("loss", loss, LOSSES)
        require_one_of("normalisation", normalisation, normalisation_names())
        require_range("length", length, low=0, low_open=True)
        require_range("points", points, low=2)
        require_one_of("reduction", reduction, REDUCTIONS)
        require_one_of("search", search, SEARCHES)
        require_range("trials", trials, low=1)
        require_range("seed", seed, low=0)
        if loss == "clean" and attack is not None:
            raise UserError("loss='clean' uses no attack: leave attack out, or use loss='robust'.")
        self.loss, self.normalisation, self.length = loss, normalisation, length
        self.points, self.trials, self.seed = points, trials, seed
        self.norm_layers, self.biases, self.search, self.reduction = norm_layers, biases, search, reduction
        self.directions = RandomDirections() if directions is None else directions
        self.attack = attack
        if loss != "clean" and attack is None:
            self.attack = Pgd(LinfBall(8 / 255), steps=10, step_size=0.007)

    @torch.inference_mode(False)
    def __call__(
        self,
        model: nn.Module,
        images: Array,
        labels: Array,
        *,
        directions: Sequence[Weights] | None = None,
        done: Done | None = None,
        batch_size: int = 128,
    ) -> LandscapeResult:
        """Lines through w, one per direction.

        Args:
            model: images in [0, 1] -> logits; left as found.
            images: (N, C, H, W), floating point in [0, 1] or uint8.
            labels: integers (N,).
            directions: name -> tensor for each line, such as those of `SpectrumResult`; they are normalised here.
                `None`: those of the source.
            done: points measured before, by (line, step): they are not measured again. New ones are put into it. It
                must belong to the same network, images and settings.
            batch_size: bounds memory; attacks draw by batch.

        Raises:
            UserError: if model, images or labels cannot be measured, directions do not fit the weights, or `points` is
                even.
        """
        steps, known = self._steps(), {} if done is None else done
        found = self._subject(model, images, labels, batch_size)
        ready, source = self._ready(found, directions, self.trials)
        measured, middle = self._images(found), self.points // 2

        def height(place: Place) -> Height:
            s = float(steps[place[1]])
            return self._height(found, measured, {n: s * d for n, d in ready[place[0]].items()})

        # All lines meet at w, with the same attack: one measurement serves them all.
        columns = range(self.points)
        places = [[(0 if column == middle else row, column) for column in columns] for row in range(len(ready))]
        return self._result(found, "lines", steps, _heights(places, known, height), ready, source)

    @torch.inference_mode(False)
    def plane(
        self,
        model: nn.Module,
        images: Array,
        labels: Array,
        *,
        directions: tuple[Weights, Weights] | None = None,
        done: Done | None = None,
        batch_size: int = 128,
    ) -> LandscapeResult:
        """The plane through w along two directions; arguments as for lines.

        Losses (S, S): entry (i, j) is at w + steps[i] * first + steps[j] * second.

        Raises:
            UserError: as for lines; or if other than two directions are given.
        """
        if directions is not None and len(directions) != 2:
            raise UserError(f"A plane has two directions, got {len(directions)}.")
        steps, known = self._steps(), {} if done is None else done
        found = self._subject(model, images, labels, batch_size)
        (first, second), source = self._ready(found, directions, 2)
        measured = self._images(found)

        def height(place: Place) -> Height:
            a, b = (float(steps[i]) for i in place)
            return self._height(found, measured, {n: a * first[n] + b * second[n] for n in first})

        places = [[(i, j) for j in range(self.points)] for i in range(self.points)]
        return self._result(found, "plane", steps, _heights(places, known, height), [first, second], source)

    @torch.inference_mode(False)
    def path(
        self,
        model: nn.Module,
        target: Mapping[str, Tensor],
        images: Array,
        labels: Array,
        *,
        batch_norm: str = "interpolate",
        done: Done | None = None,
        batch_size: int = 128,
    ) -> LandscapeResult:
        """The straight path from the model (s = 0) to another state dict of the same network (s = 1).

        All parameters move, whatever `norm_layers` and `biases`; length and normalisation do not apply. Frozen
        adversarial examples are those of the model, s = 0.

        Args:
            model: left as found.
            target: the other network's state dict.
            images, labels, done, batch_size: as for lines.
            batch_norm: running statistics on the way: "interpolate" with the weights, or "recalibrate" on the clean
                images, as an average of weights needs them.

        Raises:
            UserError: if the state dict does not fit, or `batch_norm` is unknown or cannot be applied.
        """
        require_one_of("batch_norm", batch_norm, ("interpolate", "recalibrate"))
        batches, known = batches_for(model, images, labels, batch_size=batch_size), {} if done is None else done
        found = subject(model, batches, norm_layers=True, biases=True)
        ends = _path_ends(model, target)
        whole = direction_to(found.weights, target)
        recalibrate = batch_norm == "recalibrate"
        steps, measured = torch.linspace(0, 1, self.points, dtype=torch.float64), self._images(found)

        def height(place: Place) -> Height:
            with _moved_towards(ends, float(steps[place[1]])):
                return self._height(found, measured, {}, recalibrate=recalibrate)

        rows = _heights([[(0, column) for column in range(self.points)]], known, height)
        return self._result(found, "path", steps, rows, [whole], f"to another network, statistics {batch_norm}")

    @torch.inference_mode(False)
    def find_directions(
        self, model: nn.Module, images: Array, labels: Array, *, batch_size: int = 128
    ) -> list[Weights]:
        """The source's directions for this network, not normalised: for `save_directions`, and for other networks.

        Raises:
            UserError: as for lines.
        """
        found = self._subject(model, images, labels, batch_size)
        return self.directions(found, lambda: self._fixed(found), count=self.trials, seed=self.seed)

    def _subject(self, model: nn.Module, images: Array, labels: Array, batch_size: int) -> Subject:
        batches = batches_for(model, images, labels, batch_size=batch_size)
        return subject(model, batches, norm_layers=self.norm_layers, biases=self.biases)

    def _steps(self) -> Tensor:
        """Positions (S,) in [-1, 1], symmetric to the last bit, with an exact 0 in the middle."""
        if self.points % 2 == 0:
            raise UserError(
                f"points must be odd, so that the network itself (s = 0) is among them, got {self.points}: write "
                f"{self.points + 1}."
            )
        steps = torch.linspace(-1, 1, self.points, dtype=torch.float64)
        return (steps - steps.flip(0)) / 2

    def _ready(self, found: Subject, given: Sequence[Weights] | None, count: int) -> tuple[list[Weights], str]:
        """Normalised directions, and what they are."""
        if given is not None and not given:
            raise UserError("directions is empty: give at least one, or None for those of the source.")
        source = "given directions" if given is not None else str(self.directions)
        if given is None:
            given = self.directions(found, lambda: self._fixed(found), count=count, seed=self.seed)
        moved = ({n: t.to(found.device) for n, t in d.items()} for d in given)
        return [normalised(d, found.weights, self.normalisation, self.length) for d in moved], source

    def _images(self, found: Subject) -> list[Batch]:
        """Images to measure on: adversarial ones of w if frozen."""
        return self._fixed(found) if self.loss == "frozen" else found.batches

    def _fixed(self, found: Subject) -> list[Batch]:
        """Images that do not change with the weights: adversarial ones of w, or clean ones for the clean loss."""
        return found.batches if self.attack is None else frozen_batches(found, self.attack, self.seed)

    def _height(
        self,
        found: Subject,
        batches: Sequence[Batch],
        nu: Weights,
        *,
        recalibrate: bool = False,
    ) -> Height:
        """Mean loss and error at w + nu."""
        with ExitStack() as stack:
            stack.enter_context(displaced(found.model, nu))
            if recalibrate:
                stack.enter_context(held_still(found.model))
                stack.enter_context(recalibrated(found.model, found.batches))
            logits = [self._logits(found.model, x, y, index) for index, (x, y) in enumerate(batches)]
        losses = [cross_entropy(z, y).double() for z, (_, y) in zip(logits, batches, strict=True)]
        wrong = [misclassified(z, y) for z, (_, y) in zip(logits, batches, strict=True)]
        return Height(float(torch.cat(losses).mean()), float(torch.cat(wrong).double().mean()))

    def _logits(self, model: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
        if self.loss != "robust":
            return judged_logits(model, x)
        assert self.attack is not None, "set by the constructor"
        # The same draws at all points: differences are then those of the weights alone.
        generator = generator_for(self.seed, "attack", index, device=x.device)
        return strongest(model, x, y, self.attack, generator=generator, search=self.search).logits

    def _result(
        self,
        found: Subject,
        kind: str,
        steps: Tensor,
        rows: Sequence[Sequence[Height]],
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
                "attack_name": "none" if self.loss == "clean" else brief(self.attack),
                "images": _IMAGES[self.loss],
                "directions": source,
                "cosine": _cosine(directions) if kind == "plane" else None,
                "reduction": self.reduction,
                "normalisation": "none" if kind == "path" else self.normalisation,
                "length": scale,
                "examples": found.size,
                "parameters": found.described(self.norm_layers or kind == "path", self.biases or kind == "path"),
                "precision": precision_of(found.model),
                "search": self.search,
                "seed": self.seed,
            },
        )


def _heights(places: Sequence[Sequence[Place]], known: Done, height: Callable[[Place], Height]) -> list[list[Height]]:
    """Heights at all places; those that are not known are measured, one by each rank at a time, and put into `known`.

    So an interruption loses one point of every rank.
    """
    ranks = workers()
    missing = [place for place in dict.fromkeys(place for row in places for place in row) if place not in known]
    for begin in range(0, len(missing), ranks.size):
        now = missing[begin : begin + ranks.size]
        for place, found in zip(now, ranks.map(height, now), strict=True):
            known[place] = tuple(found)
    return [[Height(*known[place]) for place in row] for row in places]


_IMAGES = {
    "robust": "attacked anew at every point",
    "frozen": "attacked once, at s = 0, and frozen",
    "clean": "clean",
}


def _path_ends(model: nn.Module, target: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Every parameter and statistic of the model with its value in the target.

    Raises:
        UserError: if names or shapes differ, or a value of the target is not finite.
    """
    state = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    direction_to(state, target)  # refuses other architectures
    bad = [name for name in state if not bool(target[name].isfinite().all())]
    if bad:
        raise UserError(f"The network at the end of the path has values that are NaN or infinite in {bad[0]}.")
    return [(own, target[name].to(own)) for name, own in state.items()]


@contextmanager
def _moved_towards(ends: Sequence[tuple[Tensor, Tensor]], s: float) -> Iterator[None]:
    """Inside, tensors of the model are (1 - s) times their own value plus s times the target's, exact at the ends."""
    before = [own.clone() for own, _ in ends]
    try:
        for (own, other), kept in zip(ends, before, strict=True):
            own.copy_(torch.lerp(kept, other, s))  # from the copy: two names may mean one tensor
        yield
    finally:
        for (own, _), kept in zip(ends, before, strict=True):
            own.copy_(kept)


def _cosine(directions: Sequence[Weights]) -> float:
    """Cosine of the angle between the two directions of a plane."""
    one, other = (torch.cat([t.double().flatten() for t in d.values()]) for d in directions)
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))
