"""Average-case flatness: how much the loss rises on average at random weights nearby."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustflat.attacks.describe import describe
from robustflat.attacks.examples import Array, batches_for
from robustflat.attacks.judging import held_still
from robustflat.attacks.strongest import SEARCHES, SearchCopy, judged_logits, strongest
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.batch_norm import recalibrated
from robustflat.flatness.protocol import protocol_by_name
from robustflat.flatness.reference import Reference, drawn_seed, reference_at, reference_words, require_finite
from robustflat.flatness.result import FlatnessResult
from robustflat.flatness.subject import Subject, subject
from robustflat.geometry.weight_ball import WeightBall
from robustflat.models.modes import displaced
from robustflat.models.precision import precision_of
from robustflat.ranks import workers
from robustflat.rng import generator_for
from robustflat.types import Attack, Batch, Weights

LOSSES = ("robust", "clean", "frozen")
DRAWS = ("per_batch", "per_set")
SAMPLING = ("ball", "sphere")
BATCH_NORM = ("running", "recalibrate")


class AverageFlatness:
    """E_nu[L(w + nu)] - L(w) with nu random in a ball around the weights w (Stutz et al., ICCV 2021).

    >>> result = AverageFlatness(trials=3)(model, images, labels)  # doctest: +SKIP
    >>> print(result)  # doctest: +SKIP

    For the robust loss L the images are attacked again at every w + nu. The reference L(w) is the worst of ten
    runs of the same attack, the displaced losses are from one: at tiny radii the value can be slightly
    negative. Pass the same attack as `reference_attack` for a matched comparison.

    The default, `protocol="paper"`, draws uniformly in the ball, anew for every batch (so the batch size
    belongs to the definition; the paper: 128). `protocol="released"` follows the released code: one nu per
    trial for all examples, on the sphere; attack epsilon 0.0314 from a uniform-norm start; reference chosen
    among its restarts by the most confident wrong class; losses capped at 27.6. In a tensor of d weights the
    two samplings differ by a factor u^(1/d), which matters for small tensors such as biases only.

    Each draw depends on the seed, its trial and its batch alone, so more trials leave the first ones as they
    are. Cost: trials * (attack + forward pass), plus ten attacks for the reference.

    Args:
        ball: in weight space; `None` is radius 0.5, L2, relative to each layer.
        trials: number of draws, >= 1.
        attack: attack at displaced weights; `None` is the protocol's PGD-20, L-infinity 8/255 (paper). Not
            used for the clean loss.
        reference_attack: attack at the undisplaced weights, run once; `None` runs `attack` ten times.
        loss: "robust"; "clean"; or "frozen": adversarial examples found once, at w, by the reference attack.
        protocol: "paper" or "released".
        draws: "per_batch" or "per_set"; `None`: the protocol's.
        sampling: "ball" or "sphere"; `None`: the protocol's.
        norm_layers: displace the parameters of normalisation layers too.
        biases: displace biases too.
        batch_norm: "running": statistics of w (paper); "recalibrate": those of the measured clean images at w
            + nu, and at w for the reference (one more pass over all images for every displacement).
        search: what attacks search on: "plain" (the network itself), or a copy rewritten for speed at every
            displacement in "fp32" or "bf16" (see `robustflat.models.inference`). The plain network judges.
        seed: of all draws, >= 0.

    Raises:
        UserError: if an option is unknown or out of range, or attacks are given that the loss does not use.
    """

    def __init__(  # noqa: PLR0913  (the keys of one flat configuration node)
        self,
        ball: WeightBall | None = None,
        *,
        trials: int = 10,
        attack: Attack | None = None,
        reference_attack: Attack | None = None,
        loss: str = "robust",
        protocol: str = "paper",
        draws: str | None = None,
        sampling: str | None = None,
        norm_layers: bool = False,
        biases: bool = True,
        batch_norm: str = "running",
        search: str = "plain",
        seed: int = 0,
    ) -> None:
        require_range("trials", trials, low=1)
        require_range("seed", seed, low=0)
        require_one_of("loss", loss, LOSSES)
        require_one_of("search", search, SEARCHES)
        require_one_of("batch_norm", batch_norm, BATCH_NORM)
        self.protocol = protocol_by_name(protocol)
        self.draws = draws or self.protocol.draws
        self.sampling = sampling or self.protocol.sampling
        require_one_of("draws", self.draws, DRAWS)
        require_one_of("sampling", self.sampling, SAMPLING)
        self.ball = WeightBall(0.5) if ball is None else ball
        require_range("radius", self.ball.radius, low=0.0, low_open=True, hint="At radius 0 flatness is 0.")
        self.trials, self.loss, self.seed = trials, loss, seed
        self.attack = attack or (None if loss == "clean" else self.protocol.attack())
        self.reference_attack = reference_attack
        self.norm_layers, self.biases, self.batch_norm, self.search = norm_layers, biases, batch_norm, search
        if loss == "clean" and (attack is not None or reference_attack is not None):
            raise UserError("loss='clean' uses no attack: leave attack and reference_attack out, or loss='robust'.")

    @property
    def reference_settings(self) -> str | None:
        """All that decides the reference loss, in words; `None` for the frozen loss, which keeps its images."""
        if self.loss == "frozen":
            return None
        rest = f"{self.protocol.name} protocol, batch norm {self.batch_norm}, search {self.search}"
        return reference_words(self.loss, self.attack, self.reference_attack, rest)

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
            batch_size: examples that share a displacement when draws are per batch.

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
            model: images in [0, 1] -> logits; in eval mode inside, left as found (mode, weights, statistics).
            batches: un-augmented, with class labels.
            reference: (N,) losses at w; `None` computes them. Not for the frozen loss, which needs the images.
            generator: takes the seed of this measurement from here instead of `seed`.

        Raises:
            UserError: if the model is not finite, not deterministic or has nothing to displace, images or
                labels are out of range, or the loss at displaced weights overflows.
        """
        start = time.perf_counter()
        seed = self.seed if generator is None else drawn_seed(generator)
        found = subject(model, batches, norm_layers=self.norm_layers, biases=self.biases)
        with held_still(model), self._statistics(found):
            at_w = reference_at(
                found,
                loss=self.loss,
                attack=self.attack,
                once=self.reference_attack,
                protocol=self.protocol,
                seed=seed,
                given=reference,
                search=self.search,
            )
        images = at_w.batches if self.loss == "frozen" else found.batches
        search = SearchCopy(model, self.search)
        with held_still(model):
            losses = self._displaced_losses(found, images, search, seed)
        return self._result(found, losses, at_w, seed=seed, seconds=time.perf_counter() - start)

    def _displaced_losses(self, found: Subject, images: list[Batch], search: SearchCopy, seed: int) -> Tensor:
        """Losses (T, N) of all trials on `images`: the subject's own, or adversarial ones found at w."""
        groups = found.groups(self.draws)

        def at(place: tuple[int, int]) -> Tensor:
            trial, number = place
            losses = []
            with displaced(found.model, self._draw(found, trial, number, seed)), self._statistics(found):
                for index in groups[number]:
                    generator = generator_for(seed, "attack", trial, index, device=found.device)
                    losses.append(self._losses(found.model, images[index], search, generator))
            return torch.cat(losses)

        places = [(trial, number) for trial in range(self.trials) for number in range(len(groups))]
        return torch.cat(workers().map(at, places)).to(found.device).view(self.trials, found.size)

    def _draw(self, found: Subject, trial: int, group: int, seed: int) -> Weights:
        """One displacement; weights must not be displaced yet, as the ball's size is relative to them."""
        generator = generator_for(seed, "weights", trial, group, device=found.device)
        return self.ball.sample(found.weights, generator, sampling=self.sampling)

    def _losses(self, model: nn.Module, batch: Batch, search: SearchCopy, generator: torch.Generator) -> Tensor:
        """Losses (B,) of a batch at the weights as they are."""
        x, y = batch
        if self.loss == "robust":
            assert self.attack is not None
            logits = strongest(model, x, y, self.attack, generator=generator, search=search).logits
        else:
            logits = judged_logits(model, x)
        return self.protocol.losses(logits, y)

    @contextmanager
    def _statistics(self, found: Subject) -> Iterator[None]:
        """Batch-norm statistics by the chosen policy."""
        if self.batch_norm == "running":
            yield
        else:
            with recalibrated(found.model, found.batches):
                yield

    def _result(self, found: Subject, losses: Tensor, at_w: Reference, *, seed: int, seconds: float) -> FlatnessResult:
        require_finite(losses, self.ball.radius)
        return FlatnessResult(
            losses=losses.cpu(),
            reference=at_w.losses.cpu(),
            reduction="mean",
            groups=found.group_sizes(self.draws),
            loss=self.loss,
            radius=self.ball.radius,
            ball=describe(self.ball),
            protocol=self.protocol.name,
            sampling=self.sampling,
            parameters=found.described(self.norm_layers, self.biases),
            tensors=len(found.weights),
            weights=sum(w.numel() for w in found.weights.values()),
            attack="none" if self.loss == "clean" else describe(self.attack),
            reference_attack=at_w.description,
            batch_norm=self.batch_norm,
            precision=precision_of(found.model),
            seed=seed,
            seconds=seconds,
            search=self.search,
        )
