"""From stored arrays to tidy rows: one number each, with its uncertainty and what it belongs to.

A row has the keys kind ("clean", "attack", "flatness" or "sanity"), measure (the name of attack or flatness measure),
metric, value and count (examples), and where they exist stderr, low and high (95 %), and radius.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.evaluation import metrics
from robustflat.flatness.result import rise_per_example

Row = dict[str, Any]

TPR = 0.99
"""Share of correctly classified examples that the confidence threshold of `*_at_99tpr` keeps."""


def clean_rows(logits: Tensor, labels: Tensor, *, classes: bool = True) -> list[Row]:
    """Error, loss, confidence and calibration without attack.

    Args:
        logits: (N, K).
        labels: (N,).
        classes: add the error of each class.
    """
    made = _Rows("clean", "clean", labels.numel())
    mistakes, losses = metrics.wrong(logits, labels), metrics.loss_per_example(logits, labels)
    made.proportion("error", mistakes)
    made.mean("loss", losses)
    made.mean("confidence", metrics.confidences(logits))
    made.add("calibration_error", metrics.expected_calibration_error(logits, labels))
    confidence = metrics.confidences(logits)
    made.add("roc_auc", metrics.roc_auc(confidence[~mistakes], confidence[mistakes]))
    if not bool(mistakes.all()):
        threshold = metrics.threshold_at_tpr(logits, labels, TPR)
        made.add("error_at_99tpr", metrics.error_at_confidence(logits, labels, threshold))
    if classes:
        made.by_class("error", mistakes, labels, logits.shape[1])
    return made.rows


def attack_rows(
    name: str, clean: Tensor, runs: Tensor, labels: Tensor, *, losses: bool = True, classes: bool = True
) -> list[Row]:
    """Robust error and robust loss by one attack.

    An example counts as an error if it is wrong clean or in any run; its loss is that of the run with the highest.

    Args:
        name: of the attack.
        clean: logits (N, K).
        runs: logits (R, N, K) of R independent runs.
        labels: (N,).
        losses: add robust losses; not for an attack that stops at the first misclassified image (AutoAttack).
        classes: add the robust error of each class.

    Raises:
        UserError: if the shapes do not fit together.
    """
    if runs.ndim != 3 or runs.shape[1:] != clean.shape:
        raise UserError(
            f"attack_rows takes logits (N, K) and (R, N, K), got {tuple(clean.shape)} and {tuple(runs.shape)}."
        )
    made = _Rows("attack", name, labels.numel())
    mistakes, strongest = any_wrong(clean, runs, labels), metrics.worst_restart(runs, labels)
    correct = ~metrics.wrong(clean, labels)
    made.proportion("robust_error", mistakes)
    if losses:
        made.robust_losses(runs, labels, correct)
    made.proportion("success_rate", mistakes[correct])
    made.add("adversarial_calibration_error", metrics.expected_calibration_error(strongest, labels))
    fooled = mistakes & correct
    made.add("roc_auc", metrics.roc_auc(metrics.confidences(clean), metrics.confidences(strongest)[fooled]))
    if bool(correct.any()):
        threshold = metrics.threshold_at_tpr(clean, labels, TPR)
        value = metrics.robust_error_at_confidence(clean, strongest, labels, threshold)
        made.add("robust_error_at_99tpr", value)
    if classes:
        made.by_class("robust_error", mistakes, labels, clean.shape[1])
    return made.rows


def sanity_rows(kind: str, measure: str, findings: Sequence[Mapping[str, str]]) -> list[Row]:
    """How many checks gave a warning; none where nothing was checked.

    Args:
        kind, measure: what was checked.
        findings: with the keys check, level ("ok" or "warning") and message.
    """
    made = _Rows(kind, measure, None)
    if findings:
        made.add("sanity_warnings", float(sum(finding["level"] != "ok" for finding in findings)))
    return made.rows


def any_wrong(clean: Tensor, runs: Tensor, labels: Tensor) -> Tensor:
    """Which examples are wrong clean or in any of the runs (R, N, K), bool (N,)."""
    return torch.stack([metrics.wrong(logits, labels) for logits in (clean, *runs)]).any(dim=0)


def gap_rows(test: Sequence[Row], train: Sequence[Row]) -> list[Row]:
    """Robust generalisation gap: test minus train of errors and losses, independent errors added in squares."""
    there = {(row["kind"], row["measure"], row["metric"]): row for row in train}
    rows = []
    for row in test:
        other = there.get((row["kind"], row["measure"], row["metric"]))
        if other is None or row["metric"] not in ("error", "loss", "robust_error", "robust_loss"):
            continue
        stderr = (row["stderr"] ** 2 + other["stderr"] ** 2) ** 0.5
        value = metrics.generalization_gap(row["value"], other["value"])
        rows.append({**_empty(row), "metric": f"{row['metric']}_gap", "value": value, "stderr": stderr}
                    | {"low": value - 1.96 * stderr, "high": value + 1.96 * stderr})  # fmt: skip
    return rows


class _Rows:
    """Rows of one measure, filled metric by metric."""

    def __init__(self, kind: str, measure: str, count: int | None, radius: float | None = None) -> None:
        self.base: Row = {"kind": kind, "measure": measure, "count": count, "radius": radius}
        self.rows: list[Row] = []

    def add(self, metric: str, value: float, **uncertainty: float) -> None:
        """A number, with stderr, low and high where they are known."""
        self.rows.append({**_empty(self.base), "metric": metric, "value": value, **uncertainty})

    def proportion(self, metric: str, hits: Tensor) -> None:
        """A fraction of examples with Wilson interval; left out for an empty set."""
        if hits.numel():
            low, high = metrics.wilson_interval(int(hits.sum()), hits.numel())
            stderr = metrics.standard_error(hits.double())
            self.add(metric, float(hits.double().mean()), stderr=stderr, low=low, high=high)

    def mean(self, metric: str, values: Tensor) -> None:
        """A mean over examples with bootstrap interval; left out for an empty set."""
        if values.numel():
            low, high = metrics.bootstrap_interval(values)
            self.add(metric, float(values.mean()), stderr=metrics.standard_error(values), low=low, high=high)

    def robust_losses(self, runs: Tensor, labels: Tensor, correct: Tensor) -> None:
        """Loss of the strongest run per example, on all, on the correct and on the incorrect examples."""
        each = torch.stack([metrics.loss_per_example(run, labels) for run in runs])
        worst = each.amax(dim=0)
        self.mean("robust_loss", worst)
        self.mean("robust_loss_on_correct", worst[correct])
        self.mean("robust_loss_on_incorrect", worst[~correct])
        if len(runs) > 1:
            means = each.mean(dim=1)
            self.add("robust_loss_of_one_run", float(means.mean()), stderr=metrics.standard_error(means))

    def by_class(self, metric: str, values: Tensor, labels: Tensor, classes: int) -> None:
        """One row for each class that has examples."""
        for index, value in enumerate(metrics.classwise(values, labels, classes).tolist()):
            if value == value:
                self.add(f"{metric}_class_{index}", value)


def flatness_rows(
    name: str,
    losses: Tensor,
    reference: Tensor,
    *,
    reduction: str,
    groups: Sequence[int],
    radius: float,
    labels: Tensor | None = None,
    classes: int = 0,
) -> list[Row]:
    """Flatness with its spread over trials and over examples.

    Args:
        name: of the measure.
        losses: (T, N) at the weights of each trial.
        reference: (N,) at the weights themselves.
        reduction, groups: see `robustflat.flatness.result.FlatnessResult`.
        radius: of the ball in weight space.
        labels: (N,), to add the flatness of each of `classes` classes.
        classes: number of classes K.

    Raises:
        UserError: if the shapes or groups do not fit together.
    """
    if losses.ndim != 2 or losses.shape[1:] != reference.shape or sum(groups) != reference.numel():
        raise UserError(
            f"flatness_rows takes losses (T, N), reference (N,) and groups that sum to N, got {tuple(losses.shape)}, "
            f"{tuple(reference.shape)} and {list(groups)}."
        )
    made = _Rows("flatness", name, reference.numel(), radius)
    rises = losses.double() - reference.double()
    per_example = rise_per_example(losses, reference, reduction=reduction, groups=groups)
    trials = rises.mean(dim=1)
    low, high = metrics.bootstrap_interval(per_example)
    made.add("flatness", float(per_example.mean()), stderr=metrics.standard_error(trials))
    made.add("flatness_over_examples", float(per_example.mean()), stderr=metrics.standard_error(per_example),
             low=low, high=high)  # fmt: skip
    made.add("flatness_max_of_trials", float(trials.max()))
    if len(trials) > 1:
        made.add("flatness_sd_of_trials", float(trials.std(correction=1)))
    made.mean("reference_loss", reference.double())
    if labels is not None:
        made.by_class("flatness", per_example, labels, classes)
    return made.rows


def _empty(row: Row) -> Row:
    """The row without its number."""
    kept = {key: row.get(key) for key in ("kind", "measure", "count", "radius")}
    return {**kept, "metric": "", "value": float("nan"), "stderr": float("nan"), "low": float("nan")} | {
        "high": float("nan")
    }
