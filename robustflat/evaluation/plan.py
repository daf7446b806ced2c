"""What is measured of a trained network, on which examples, by which attacks: an evaluation as a value."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from robustflat.data.dataset import Dataset
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.evaluation import metrics
from robustflat.evaluation.predict import Prediction, predict
from robustflat.flatness.result import FlatnessResult
from robustflat.rng import generator_for
from robustflat.types import Attack

Measured = dict[str, Any]


class EvaluationPlan:
    """Clean error, robust error and robust loss on test and training examples, and flatness.

    Args:
        norm: 'linf', 'l2' or 'l1': the threat model of this evaluation (its attacks carry the ball itself).
        epsilon: radius of the threat model in [0, 1] units.
        step_size: step of its PGD attacks.
        attacks: attacks by name; each is run on both splits.
        test, train: splits such as "test[:1000]"; None leaves one out.
        flatness: split on which flatness is measured; None leaves it out.
        batch_size: examples per forward pass. Weight perturbations are drawn anew for every batch, so that it
            is part of the definition of flatness (the paper: 128).

    Raises:
        UserError: for a value outside its range, or no split at all.
    """

    def __init__(
        self,
        *,
        norm: str,
        epsilon: float,
        step_size: float,
        attacks: Mapping[str, Attack],
        test: str | None = "test[:1000]",
        train: str | None = "train[:1000]",
        flatness: str | None = "test[:1000]",
        batch_size: int = 128,
    ) -> None:
        require_one_of("norm", norm, ("linf", "l2", "l1"))
        require_range("epsilon", epsilon, low=0, low_open=True)
        require_range("step_size", step_size, low=0, low_open=True)
        require_range("batch_size", batch_size, low=1)
        if test is None and train is None and flatness is None:
            raise UserError(
                "An evaluation needs examples: give evaluation.test, evaluation.train or evaluation.flatness."
            )
        self.norm, self.epsilon, self.step_size = norm, float(epsilon), float(step_size)
        self.attacks = dict(attacks)
        self.splits = {"test": test, "train": train}
        self.flatness_split = flatness
        self.batch_size = batch_size

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
            found = predict(model, batches, attack=attack, generator=generator)
            values[name] = _robust(clean, found) | {"seconds": time.perf_counter() - start}
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


def _robust(clean: Prediction, found: Prediction) -> Measured:
    wrong = metrics.robustly_wrong(clean.logits, found.logits, clean.labels)
    per_example = metrics.loss_per_example(found.logits, clean.labels)
    return _proportion("robust_error", wrong) | {
        "robust_loss": float(per_example.mean()),
        "robust_loss_standard_error": metrics.standard_error(per_example),
        "robust_loss_on_correct": metrics.robust_loss_on_correct(clean.logits, found.logits, clean.labels),
        "robust_loss_on_incorrect": metrics.robust_loss_on_incorrect(clean.logits, found.logits, clean.labels),
    }


def _proportion(name: str, hits: torch.Tensor) -> Measured:
    low, high = metrics.wilson_interval(int(hits.sum()), hits.numel())
    return {name: float(hits.double().mean()), f"{name}_low": low, f"{name}_high": high}
