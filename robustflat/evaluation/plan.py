"""What is measured of a trained network, on which examples, by which attacks: an evaluation as a value."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustflat.attacks.autoattack import AutoAttackSearch
from robustflat.attacks.ensemble_progress import Progress
from robustflat.attacks.nested import ball_of
from robustflat.attacks.sanity import Finding, check_network
from robustflat.attacks.strongest import SEARCHES, images_at_once
from robustflat.data.dataset import Dataset
from robustflat.data.splits import shared_examples
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.evaluation import metrics
from robustflat.evaluation.attacked import Attacked, attack_batches, autoattack_batches
from robustflat.evaluation.predict import Prediction, predict
from robustflat.evaluation.rows import any_wrong
from robustflat.evaluation.selection import EarlyStopping
from robustflat.flatness.measure import FlatnessMeasure
from robustflat.flatness.result import FlatnessResult
from robustflat.geometry.input_ball import input_ball
from robustflat.memory import MemoryBudget, require_memory_budget
from robustflat.models.precision import device_of
from robustflat.ranks import workers
from robustflat.rng import generator_for
from robustflat.types import Attack

Measured = dict[str, Any]

KINDS = ("clean", "sanity", "attacks", "flatness")
"""Kinds of pieces, in the order in which they are measured."""


class Piece(NamedTuple):
    """One part of an evaluation that is measured and stored by itself.

    Attributes:
        kind: one of `KINDS`.
        role: "test" or "train".
        split: the examples, such as "test[:1000]".
        name: of the attack or measure; "clean"; "sanity".
    """

    kind: str
    role: str
    split: str
    name: str


class EvaluationPlan:
    """Clean error, robust error and robust loss on test and training examples, and flatness.

    Args:
        norm: 'linf', 'l2' or 'l1': the threat model of this evaluation (its attacks carry the ball itself).
        epsilon: radius of the threat model in [0, 1] units.
        step_size: step of its PGD attacks.
        attacks: attacks by name; each is run on both splits. An entry `None` is left out.
        measures: flatness measures by name; an entry `None` is left out.
        restarts: attack name -> independent runs (default 1), all of which are kept: an example is wrong if any
            run fools it, and its loss is that of the run with the highest. (An attack with restarts of its own
            gives its strongest result only, and holds all of them in memory at once.)
        test, train: splits such as "test[:1000]"; None leaves one out.
        flatness: test examples on which flatness is measured; None leaves it out.
        flatness_train: training examples on which the measures are repeated; None: none.
        batch_size: examples per forward pass. Weight perturbations are drawn anew for every batch, so that it
            is part of the definition of flatness (the paper: 128).
        attack_batch: images attacked at once, restarts counted; None: one batch or, if that is more, 128 images of
            3 x 32 x 32 (as many numbers of another size), on an accelerator 2,560. Random starts depend on it.
        search: what attacks search on: "plain" (the network itself), or a copy rewritten for speed in "fp32" or
            "bf16"; the network itself judges. Flatness measures have an option of their own.
        memory_budget: of one pass of an attack and its gradient: MiB, "auto" (half of what is free) or `None`;
            beyond it the network takes the images in pieces, see `robustflat.attacks.searching`. PGD only.
        checkpoints: which checkpoints of a run this evaluation is about where the command does not say.
        selection: choose the best snapshot first, and evaluate that (early stopping).

    Raises:
        UserError: for a value outside its range, or no split at all.
    """

    def __init__(  # noqa: PLR0913  (the keys of one flat configuration node)
        self,
        *,
        norm: str,
        epsilon: float,
        step_size: float,
        attacks: Mapping[str, Attack | None],
        measures: Mapping[str, FlatnessMeasure | None] | None = None,
        restarts: Mapping[str, int] | None = None,
        test: str | None = "test[:1000]",
        train: str | None = "train[:1000]",
        flatness: str | None = "test[:1000]",
        flatness_train: str | None = None,
        batch_size: int = 128,
        attack_batch: int | None = None,
        search: str = "plain",
        memory_budget: MemoryBudget = "auto",
        checkpoints: str | int | None = None,
        selection: EarlyStopping | None = None,
    ) -> None:
        require_one_of("norm", norm, ("linf", "l2", "l1"))
        require_range("epsilon", epsilon, low=0, low_open=True)
        require_range("step_size", step_size, low=0, low_open=True)
        require_range("batch_size", batch_size, low=1)
        require_one_of("search", search, SEARCHES)
        require_memory_budget(memory_budget)
        if attack_batch is not None:
            require_range("attack_batch", attack_batch, low=1)
        if test is None and train is None and flatness is None:
            raise UserError(
                "An evaluation needs examples: give evaluation.test, evaluation.train or evaluation.flatness."
            )
        self.norm, self.epsilon, self.step_size = norm, float(epsilon), float(step_size)
        self.attacks = {name: attack for name, attack in attacks.items() if attack is not None}
        self.measures = {name: measure for name, measure in (measures or {}).items() if measure is not None}
        self.restarts = dict(restarts or {})
        for name, runs in self.restarts.items():
            require_one_of("An attack of restarts", name, attacks)
            require_range(f"restarts.{name}", runs, low=1)
            if runs > 1 and isinstance(attacks[name], AutoAttackSearch):
                raise UserError(f"restarts.{name}: AutoAttack has restarts of its own (version=plus: more of them).")
        self.splits = {"test": test, "train": train}
        self.flatness_split = flatness
        self.flatness_splits = {"test": flatness, "train": flatness_train}
        self.batch_size, self.attack_batch = batch_size, attack_batch
        self.search, self.memory_budget = search, memory_budget
        self.checkpoints, self.selection = checkpoints, selection

    def pieces(self) -> list[Piece]:
        """All parts in the order in which to measure them: the cheap ones first, flatness last."""
        splits = {role: split for role, split in self.splits.items() if split is not None}
        measured = {role: split for role, split in self.flatness_splits.items() if split is not None}
        return [
            *(Piece("clean", role, split, "clean") for role, split in splits.items()),
            *(Piece("sanity", role, split, "sanity") for role, split in [*splits.items(), *measured.items()][:1]),
            *(Piece("attacks", role, split, name) for name in self.attacks for role, split in splits.items()),
            *(Piece("flatness", role, split, name) for name in self.measures for role, split in measured.items()),
        ]

    def notes(self, dataset: Dataset) -> list[str]:
        """What stands out: training examples of this evaluation that the data set's training split leaves out."""
        lines = []
        for key, split in {"train": self.splits["train"], "flatness_train": self.flatness_splits["train"]}.items():
            if split is None:
                continue
            count = len(dataset.split(split))
            strange = count - shared_examples(dataset.sets, split, dataset.train_split)
            if strange:
                lines.append(
                    f"  NOTE    evaluation.{key}='{split}': {strange} of its {count} examples are not trained on "
                    f"(dataset.train='{dataset.train_split}'), so figures and gaps are not those of training examples."
                )
        return lines

    def attacked(
        self,
        model: nn.Module,
        dataset: Dataset,
        split: str,
        attack: Attack,
        *,
        runs: int,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> Attacked:
        """Independent runs of an attack on a split.

        Args:
            model: images in [0, 1] -> logits; left as found.
            dataset: where the examples come from.
            split: the examples, such as "test[:1000]".
            attack: run `runs` times on every image; AutoAttack, which has restarts of its own, once.
            runs: number of runs R, >= 1.
            generator: source of all draws, on the model's device.
            progress: finished batches of an interrupted call; they are not attacked again.

        Returns:
            Logits (R, N, K) judged by the network in full float32, and what was checked.

        Raises:
            UserError: if labels are not classes of the model, or logits are not finite.
        """
        batches = dataset.split(split).batches(self.batch_size)
        at_once = self._at_once(batches[0].x)
        if isinstance(attack, AutoAttackSearch):
            return autoattack_batches(model, batches, attack, at_once=at_once, generator=generator, progress=progress)
        return attack_batches(
            model,
            batches,
            attack,
            ball=ball_of(attack) or input_ball(self.norm, self.epsilon),
            runs=runs,
            at_once=at_once,
            search=self.search,
            memory_budget=self.memory_budget,
            generator=generator,
            progress=progress,
        )

    def _at_once(self, x: Tensor) -> int:
        """Images in one pass of an attack."""
        return images_at_once(x) if self.attack_batch is None else self.attack_batch

    def attack_piece(
        self, model: nn.Module, dataset: Dataset, piece: Piece, *, seed: int, progress: Progress | None = None
    ) -> Attacked:
        """One attack of this plan; draws depend on the seed, the role and the name alone."""
        generator = generator_for(seed, "evaluation", piece.role, piece.name, device=device_of(model))
        attack, runs = self.attacks[piece.name], self.restarts.get(piece.name, 1)
        return self.attacked(model, dataset, piece.split, attack, runs=runs, generator=generator, progress=progress)

    def sanity_piece(self, model: nn.Module, dataset: Dataset, split: str, *, seed: int) -> list[Finding]:
        """Checks of images, network and gradients on the first examples of a split, in this plan's threat model."""
        x, y = dataset.split(split).batches(self.batch_size)[0]
        device, ball = device_of(model), input_ball(self.norm, self.epsilon)
        generator = generator_for(seed, "sanity", device=device)
        return workers().on_first(lambda: check_network(model, x.to(device), y.to(device), ball, generator))

    def flatness_piece(
        self, model: nn.Module, dataset: Dataset, piece: Piece, *, seed: int, reference: Tensor | None = None
    ) -> FlatnessResult:
        """One flatness measure of this plan. All measures draw from the same seed, so radii are compared on the
        same directions and may share a reference.

        Args:
            model, dataset, piece: what to measure.
            seed: of all draws.
            reference: (N,) losses at the weights, from a measure of equal `reference_settings` and seed.
        """
        measure = self.measures[piece.name]
        batches = dataset.split(piece.split).batches(self.batch_size)
        generator = generator_for(seed, "flatness", device=dataset.device)
        result = measure.measure(model, batches, reference, generator=generator)
        if reference is None or measure.reference_settings is None:
            return result
        return dataclasses.replace(result, reference_attack=f"{measure.reference_settings} (shared)")

    def measure_split(self, model: nn.Module, dataset: Dataset, split: str, *, seed: int) -> Measured:
        """Errors and losses on the split "test" or "train" of this plan.

        Args:
            model: images in [0, 1] -> logits; evaluated in eval mode, left as found.
            dataset: where the examples come from.
            split: "test" or "train".
            seed: of the attacks' random starts; each attack and split has its own generator.

        Returns:
            Plain numbers: count, the clean values and, by attack, the robust ones with interval or standard error.
        """
        text = self.splits[split]
        assert text is not None
        batches = dataset.split(text).batches(self.batch_size)
        clean = predict(model, batches)
        values: Measured = {"split": text, "count": len(clean.labels), "clean": _clean(clean)}
        for name, attack in self.attacks.items():
            start = time.perf_counter()
            generator = generator_for(seed, "evaluation", split, name, device=dataset.device)
            runs = self.restarts.get(name, 1)
            logits = self.attacked(model, dataset, text, attack, runs=runs, generator=generator).logits
            values[name] = _robust(clean, logits) | {"seconds": time.perf_counter() - start}
        return values

    def measure_flatness(self, model: nn.Module, dataset: Dataset, measure: Any, *, seed: int) -> Measured:
        """Flatness by `measure` (for example `AverageFlatness`) on this plan's examples, as plain numbers."""
        assert self.flatness_split is not None
        images = dataset.split(self.flatness_split)
        batches = images.batches(self.batch_size)
        result: FlatnessResult = measure.measure(
            model, batches, generator=generator_for(seed, "flatness", device=dataset.device)
        )
        return {"split": self.flatness_split, **result.to_dict()}


def _clean(clean: Prediction) -> Measured:
    per_example = metrics.loss_per_example(clean.logits, clean.labels)
    return _proportion("error", metrics.wrong(clean.logits, clean.labels)) | {
        "loss": float(per_example.mean()),
        "loss_standard_error": metrics.standard_error(per_example),
    }


def _robust(clean: Prediction, runs: Tensor) -> Measured:
    strongest = metrics.worst_restart(runs, clean.labels)
    per_example = metrics.loss_per_example(strongest, clean.labels)
    return _proportion("robust_error", any_wrong(clean.logits, runs, clean.labels)) | {
        "robust_loss": float(per_example.mean()),
        "robust_loss_standard_error": metrics.standard_error(per_example),
        "robust_loss_on_correct": metrics.robust_loss_on_correct(clean.logits, strongest, clean.labels),
        "robust_loss_on_incorrect": metrics.robust_loss_on_incorrect(clean.logits, strongest, clean.labels),
    }


def _proportion(name: str, hits: torch.Tensor) -> Measured:
    low, high = metrics.wilson_interval(int(hits.sum()), hits.numel())
    return {name: float(hits.double().mean()), f"{name}_low": low, f"{name}_high": high}
