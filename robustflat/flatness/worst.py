"""Worst-case flatness: how much the loss can rise at weights nearby."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustflat.attacks.describe import describe
from robustflat.attacks.examples import Array, batches_for
from robustflat.attacks.judging import held_still
from robustflat.attacks.objectives import cross_entropy
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.strongest import EXAMPLES, SEARCHES, judged_logits
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.protocol import INPUT_STEP, PGD_STEPS, protocol_by_name
from robustflat.flatness.reference import Reference, drawn_seed, reference_at, reference_words, require_finite
from robustflat.flatness.result import FlatnessResult
from robustflat.flatness.subject import Subject, subject
from robustflat.geometry.input_ball import InputBall, LinfBall
from robustflat.geometry.weight_ascent import WeightAscent
from robustflat.geometry.weight_ball import WeightBall
from robustflat.models.folded import FoldedForward, WeightsForward, folded_forward, plain_forward
from robustflat.models.modes import displaced
from robustflat.models.precision import precision_of
from robustflat.ranks import workers
from robustflat.rng import generator_for
from robustflat.types import Attack, Batch, Weights

LOSSES = ("robust", "clean")


class Point(NamedTuple):
    """Where an ascent stands: a displacement of the weights, and images for each batch of the group."""

    nu: Weights
    images: list[Tensor]


class Climb(NamedTuple):
    """What all ascents share: the function that is climbed, the weights it starts from, and how these move."""

    forward: WeightsForward
    weights: Weights
    ascent: WeightAscent


class WorstFlatness:
    """max over nu in a ball of L(w + nu), minus L(w), by gradient ascent (Stutz et al., ICCV 2021).

    For the robust loss, nu and the images ascend jointly: each step takes the gradient of the mean loss with
    respect to both, moves nu by `weight_step` along the ball's steepest direction (for the default ball: that
    share of each layer's norm) and each image by `input_step` along the sign of its gradient, and projects
    both. Several random restarts; the largest mean loss counts. It is a lower bound of the maximum: whether
    steps and restarts suffice, the result's `value_against_steps` and `value_against_trials` tell.

    The default, `protocol="paper"`, searches one nu for every batch (the batch size belongs to the definition; the
    paper: 128) and keeps the best point of an ascent, the last one included. `protocol="released"` follows the
    released code: one nu for all examples, updated batch by batch, `steps` sweeps over the batches, the last point
    counts; starts of uniform norm; epsilon 0.0314; losses capped at 27.6. (There, steps on the weights are 0.01 and
    so longer than the radius: every point is on the surface.)

    >>> result = WorstFlatness(restarts=2)(model, images, labels)  # doctest: +SKIP

    Args:
        ball: in weight space; `None` is radius 0.003, L2, relative to each layer.
        restarts: number of ascents, >= 1.
        steps: steps of each, >= 1.
        weight_step: length of a step in the ball's own units, > 0. `None`: a third of the radius (the paper's
            0.001 at 0.003), or 0.01 in the released protocol.
        input_ball: allowed images; `None`: L-infinity 8/255 (paper).
        input_step: length of a step of the images, > 0.
        loss: "robust" or "clean"; for the clean loss the images stay.
        reference_attack: attack at the undisplaced weights, run once; `None` runs PGD-20 in `input_ball` ten
            times.
        protocol: "paper" or "released".
        norm_layers: displace the parameters of normalisation layers too.
        biases: displace biases too.
        search: what is searched on: "plain" (the network itself), or "fp32" or "bf16": a copy rewritten for speed
            (see `robustflat.models.inference`). The ascent itself stays in fp32 in both, since bf16 cannot tell
            such small displacements from none. The plain network judges.
        seed: of all starts, >= 0.

    Raises:
        UserError: if an option is unknown or out of range, or attack options are given for the clean loss.
    """

    def __init__(  # noqa: PLR0913  (the keys of one flat configuration node)
        self,
        ball: WeightBall | None = None,
        *,
        restarts: int = 10,
        steps: int = 20,
        weight_step: float | None = None,
        input_ball: InputBall | None = None,
        input_step: float = INPUT_STEP,
        loss: str = "robust",
        reference_attack: Attack | None = None,
        protocol: str = "paper",
        norm_layers: bool = False,
        biases: bool = True,
        search: str = "plain",
        seed: int = 0,
    ) -> None:
        require_range("restarts", restarts, low=1)
        require_range("steps", steps, low=1)
        require_range("input_step", input_step, low=0.0, low_open=True)
        require_range("seed", seed, low=0)
        require_one_of("loss", loss, LOSSES)
        require_one_of("search", search, SEARCHES)
        self.protocol = protocol_by_name(protocol)
        self.ball = WeightBall(0.003) if ball is None else ball
        require_range("radius", self.ball.radius, low=0.0, low_open=True, hint="At radius 0 flatness is 0.")
        share = self.ball.radius / 3 if self.protocol.weight_step is None else self.protocol.weight_step
        self.weight_step = share if weight_step is None else weight_step
        require_range("weight_step", self.weight_step, low=0.0, low_open=True)
        if loss == "clean" and (input_ball is not None or reference_attack is not None):
            raise UserError(
                "loss='clean' uses no attack: leave input_ball and reference_attack out, or use loss='robust'."
            )
        self.restarts, self.steps, self.input_step = restarts, steps, input_step
        self.loss, self.seed = loss, seed
        self.input_ball = LinfBall(self.protocol.epsilon) if input_ball is None else input_ball
        self.reference_attack = reference_attack
        self.norm_layers, self.biases, self.search = norm_layers, biases, search

    @property
    def reference_settings(self) -> str | None:
        """All that decides the reference loss, in words."""
        attack = None if self.loss == "clean" else self._reference_attack()
        rest = f"{self.protocol.name} protocol, batch norm running, search {self.search}"
        return reference_words(self.loss, attack, self.reference_attack, rest)

    def __call__(
        self,
        model: nn.Module,
        images: Array,
        labels: Array,
        *,
        reference: Tensor | None = None,
        batch_size: int = 128,
    ) -> FlatnessResult:
        """Measure on images (N, C, H, W) and labels (N,); see `measure`.

        Args:
            model: images in [0, 1] -> logits; any `nn.Module`, left as found.
            images: floating point in [0, 1], or uint8.
            labels: integers.
            reference: (N,) losses at w, if known.
            batch_size: examples that share a displacement in the paper's protocol.

        Raises:
            UserError: see `measure`.
        """
        return self.measure(model, batches_for(model, images, labels, batch_size=batch_size), reference)

    @torch.inference_mode(False)
    def measure(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        reference: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> FlatnessResult:
        """Measure on batches in a fixed order.

        Args:
            model: images in [0, 1] -> logits; in eval mode inside, left as found.
            batches: un-augmented, with class labels.
            reference: (N,) losses at w; `None` computes them.
            generator: takes the seed of this measurement from here instead of `seed`.

        Raises:
            UserError: if the model is not finite, not deterministic or has nothing to displace, images or
                labels are out of range, or the loss at displaced weights overflows.
        """
        start = time.perf_counter()
        seed = self.seed if generator is None else drawn_seed(generator)
        found = subject(model, batches, norm_layers=self.norm_layers, biases=self.biases)
        with held_still(model):
            at_w = reference_at(
                found,
                loss=self.loss,
                attack=None if self.loss == "clean" else self._reference_attack(),
                once=self.reference_attack,
                protocol=self.protocol,
                seed=seed,
                given=reference,
                search=self.search,
            )
            losses, trace = self._ascents(found, self._climb(found), seed)
        require_finite(losses, self.ball.radius)
        rises = trace.double().cpu() - float(at_w.losses.double().mean())
        return self._result(found, losses, rises, at_w, seed=seed, seconds=time.perf_counter() - start)

    def _reference_attack(self) -> Pgd:
        return Pgd(
            self.input_ball,
            steps=PGD_STEPS,
            step_size=self.input_step,
            random_start=self.protocol.random_start,
        )

    def _climb(self, found: Subject) -> Climb:
        """What the ascent climbs on. Folded batch norms could not be displaced."""
        forward, weights = plain_forward(found.model), found.weights
        if self.search != "plain" and not self.norm_layers:
            forward = folded_forward(found.model, found.batches[0].x[:EXAMPLES], first_order=True)
        if isinstance(forward, FoldedForward):
            # Else every step would reorder all weights and gradients. A copy: `displaced` moves the views.
            weights = {n: w.clone(memory_format=_order(w)) for n, w in weights.items()}
        return Climb(forward, weights, WeightAscent(self.ball, self.weight_step, weights))

    def _ascents(self, found: Subject, climb: Climb, seed: int) -> tuple[Tensor, Tensor]:
        """Losses (T, N) at the end of each restart, and its mean loss after 0..S steps, (T, S+1)."""
        groups = [[found.batches[i] for i in indices] for indices in found.groups(self.protocol.draws)]

        def climbed(place: tuple[int, int]) -> tuple[Tensor, Tensor]:
            restart, number = place
            group = groups[number]
            generator = generator_for(seed, "ascent", restart, number, device=found.device)
            point, trace = self._ascend(found, climb, group, self._start(found, group, generator))
            with displaced(found.model, point.nu):
                pairs = zip(point.images, group, strict=True)
                losses = [self.protocol.losses(judged_logits(found.model, x), y) for x, (_, y) in pairs]
            return torch.cat(losses), trace * (sum(len(batch.y) for batch in group) / found.size)

        places = [(restart, number) for restart in range(self.restarts) for number in range(len(groups))]
        losses, traces = (torch.cat(parts) for parts in zip(*workers().map(climbed, places), strict=True))
        by_restart = traces.to(found.device).view(self.restarts, len(groups), self.steps + 1)
        trace = torch.stack([parts.sum(dim=0) for parts in by_restart])
        return losses.to(found.device).view(self.restarts, found.size), trace

    def _start(self, found: Subject, group: list[Batch], generator: torch.Generator) -> Point:
        nu = self.ball.sample(found.weights, generator, sampling=self.protocol.worst_start)
        if self.loss == "clean":
            return Point(nu, [batch.x for batch in group])
        near = self.input_ball.sample
        if self.protocol.random_start == "uniform_norm":
            near = self.input_ball.sample_uniform_norm
        return Point(nu, [near(batch.x, generator) for batch in group])

    def _ascend(self, found: Subject, climb: Climb, group: list[Batch], start: Point) -> tuple[Point, Tensor]:
        """The point that counts, and mean losses (S+1,): of the best point so far, or of each if the last
        counts.

        In a group of several batches the loss of a sweep is summed up while nu moves, as in the released code.
        """
        count = sum(len(batch.y) for batch in group)
        now = kept = start
        if isinstance(climb.forward, FoldedForward):
            now = kept = start._replace(nu={n: s.contiguous(memory_format=_order(s)) for n, s in start.nu.items()})
        values: list[Tensor] = []
        for step in range(self.steps + 1):
            before, total = now, torch.zeros((), device=found.device)
            for index, batch in enumerate(group):
                mean, onward = self._step(climb, now, index, batch, last=step == self.steps)
                total = total + mean * (len(batch.y) / count)
                now = onward
            if self.protocol.keep == "best" and values:
                # A group holds one batch here, so `total` is the loss exactly at `before`.
                better = total > values[-1]
                kept = _choose(better, before, kept)
                total = torch.where(better, total, values[-1])
            elif self.protocol.keep == "last":
                kept = before
            values.append(total)
        return kept, torch.stack(values)

    def _step(self, climb: Climb, now: Point, index: int, batch: Batch, *, last: bool) -> tuple[Tensor, Point]:
        """Mean loss at a point for batch number `index` of the group, and the point after one step from there."""
        robust = self.loss == "robust"
        with torch.set_grad_enabled(not last):
            nu = {name: step.detach().requires_grad_(not last) for name, step in now.nu.items()}
            x = now.images[index].detach().requires_grad_(robust and not last)
            moved = {name: climb.weights[name] + step for name, step in nu.items()}
            mean = cross_entropy(climb.forward(moved, x), batch.y).mean()
            if last:
                return mean.detach(), now
            # Materialised: a weight that this forward pass does not use has gradient zero.
            inputs = [*nu.values(), x] if robust else list(nu.values())
            grads = torch.autograd.grad(mean, inputs, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            onward = climb.ascent.onward(now.nu, dict(zip(nu, grads, strict=False)))
            images = list(now.images)
            if robust:
                climbed = images[index] + self.input_step * self.input_ball.steepest(grads[-1])
                images[index] = self.input_ball.project(climbed, batch.x)
        return mean.detach(), Point(onward, images)

    def _result(
        self, found: Subject, losses: Tensor, trace: Tensor, at_w: Reference, *, seed: int, seconds: float
    ) -> FlatnessResult:
        inputs = "images fixed"
        if self.loss == "robust":
            inputs = f"joint ascent in {describe(self.input_ball)}, step {self.input_step:g}"
        return FlatnessResult(
            losses=losses.cpu(),
            reference=at_w.losses.cpu(),
            reduction="max",
            groups=found.group_sizes(self.protocol.draws),
            loss=self.loss,
            radius=self.ball.radius,
            ball=describe(self.ball),
            protocol=self.protocol.name,
            sampling=self.protocol.worst_start,
            parameters=found.described(self.norm_layers, self.biases),
            tensors=len(found.weights),
            weights=sum(w.numel() for w in found.weights.values()),
            attack=f"{inputs}, {self.steps} steps of {self.weight_step:g} in the weights",
            reference_attack=at_w.description,
            batch_norm="running",
            precision=precision_of(found.model),
            seed=seed,
            seconds=seconds,
            search=self.search,
            trace=trace,
        )


def _choose(take: Tensor, one: Point, other: Point) -> Point:
    """`one` if the 0-dim `take` holds, else `other`, without waiting for the device."""
    if take.device.type == "cpu":
        return one if bool(take) else other
    nu = {name: torch.where(take, one.nu[name], other.nu[name]) for name in one.nu}
    return Point(nu, [torch.where(take, a, b) for a, b in zip(one.images, other.images, strict=True)])


def _order(t: Tensor) -> torch.memory_format:
    """The order in which convolutions of a folded network take their weights."""
    return torch.channels_last if t.ndim == 4 else torch.contiguous_format
