"""Two networks on the same examples: differences with intervals, and how likely chance alone would make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.evaluation import metrics
from robustflat.evaluation.rows import any_wrong


class Difference(NamedTuple):
    """One figure of two networks on the same examples.

    Attributes:
        measure: "clean", or the name of the attack or flatness measure.
        metric: such as "robust_error".
        first, second: the figure of each network.
        difference: first minus second.
        low, high: 95 % bootstrap interval of the difference, over draws of the examples.
        p_value: of the hypothesis that the networks do not differ.
        test: how it was found, in words.
        examples: their number.
    """

    measure: str
    metric: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    test: str
    examples: int


@dataclass(frozen=True)
class Comparison:
    """Differences between two networks; print it."""

    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        """One line per figure."""
        head = f"{'first - second':<34}{'first':>9}{'second':>9}{'difference':>12}"
        lines = [f"{head}  {'95 % interval':<22}{'p':>8}  test"]
        for d in self.differences:
            scale, unit = (100, " %") if "error" in d.metric else (1, "")
            name = d.metric if d.measure == "clean" else f"{d.metric} ({d.measure})"
            interval = f"[{scale * d.low:+.3f}, {scale * d.high:+.3f}]{unit}"
            lines.append(
                f"{name:<34}{scale * d.first:>9.3f}{scale * d.second:>9.3f}{scale * d.difference:>+12.3f}  "
                f"{interval:<22}{d.p_value:>8.2g}  {d.test}"
            )
        return "\n".join(lines)


def compare_clean(first: Tensor, second: Tensor, labels: Tensor, *, seed: int = 0) -> list[Difference]:
    """Error (exact McNemar test) and loss (paired bootstrap) without attack.

    Args:
        first, second: logits (N, K) of the two networks.
        labels: (N,).
        seed: of the bootstrap.

    Raises:
        UserError: if the shapes do not fit together.
    """
    wrong = [metrics.wrong(logits, labels) for logits in (first, second)]
    losses = [metrics.loss_per_example(logits, labels) for logits in (first, second)]
    return [
        compare_errors("clean", "error", wrong[0], wrong[1], seed=seed),
        compare_values("clean", "loss", losses[0], losses[1], seed=seed),
    ]


def compare_attacks(
    name: str,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    labels: Tensor,
    *,
    losses: bool = True,
    seed: int = 0,
) -> list[Difference]:
    """Robust error (wrong clean or in any run) and robust loss (highest of the runs) under one attack.

    Args:
        name: of the attack.
        first, second: clean logits (N, K) and those of the attack's runs (R, N, K) of each network.
        labels: (N,).
        losses: compare the robust losses; not for an attack that stops at the first success.
        seed: of the bootstrap.

    Raises:
        UserError: if the shapes do not fit together.
    """
    wrong = [any_wrong(clean, runs, labels) for clean, runs in (first, second)]
    found = [compare_errors(name, "robust_error", wrong[0], wrong[1], seed=seed)]
    if losses:
        worst = [metrics.loss_per_example(metrics.worst_restart(runs, labels), labels) for _, runs in (first, second)]
        found.append(compare_values(name, "robust_loss", worst[0], worst[1], seed=seed))
    return found


def compare_errors(measure: str, metric: str, first: Tensor, second: Tensor, *, seed: int = 0) -> Difference:
    """Mistakes bool (N,) of two networks: exact McNemar test, bootstrap interval.

    Raises:
        UserError: if the two are not of one length.
    """
    test = metrics.mcnemar_test(first, second)
    words = f"McNemar, {test.first_only_wrong} and {test.second_only_wrong} wrong in one only"
    values = compare_values(measure, metric, first.double(), second.double(), seed=seed)
    return values._replace(p_value=test.p_value, test=words)


def compare_values(measure: str, metric: str, first: Tensor, second: Tensor, *, seed: int = 0) -> Difference:
    """Per-example values (N,) of two networks, such as losses or flatness: paired bootstrap.

    Raises:
        UserError: if the two are not of one length.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise UserError(
            f"{metric} ({measure}): the networks were not measured on the same examples, got values of shape "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    found = metrics.paired_bootstrap(first, second, generator=torch.Generator().manual_seed(seed))
    return Difference(
        measure, metric, float(first.double().mean()), float(second.double().mean()), *found, "paired bootstrap",
        first.numel(),
    )  # fmt: skip
