"""Early stopping: which snapshot of a run is the best by robust error or robust loss on examples kept for that.

The paper chooses on the last 500 test examples (`split="test[-500:]"`). That uses test labels; for new work train
on "train[:-500]" and choose on "train[-500:]", which `split=None` finds by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from robustflat.data.dataset import Dataset
from robustflat.data.splits import parse_split, shared_examples
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.evaluation import metrics
from robustflat.evaluation.rows import any_wrong
from robustflat.types import Attack

CRITERIA = ("robust_error", "robust_loss")


class Score(NamedTuple):
    """Robust error and robust loss of one snapshot on the selection examples."""

    robust_error: float
    robust_loss: float


class EarlyStopping:
    """How the best snapshot is chosen.

    Args:
        attack: run `restarts` times on every snapshot (paper: PGD-7).
        restarts: independent runs (paper: 5), >= 1.
        split: examples to choose on; `None`: those that the run held out of training, as "train[-500:]" for a
            run with dataset.train="train[:-500]".
        criterion: "robust_error" (paper) or "robust_loss", smoother for few examples.

    Raises:
        UserError: for a number out of range, or an unknown criterion or split.
    """

    def __init__(
        self,
        *,
        attack: Attack,
        restarts: int = 5,
        split: str | None = None,
        criterion: str = "robust_error",
    ) -> None:
        require_range("restarts", restarts, low=1)
        require_one_of("criterion", criterion, CRITERIA)
        if split is not None:
            parse_split(split)
        self.attack, self.restarts, self.split, self.criterion = attack, restarts, split, criterion

    def examples(self, dataset: Dataset) -> str:
        """The split to choose on, checked against what was trained on.

        Raises:
            UserError: if nothing was held out, or selection examples were trained on.
        """
        split = held_out_split(dataset.train_split) if self.split is None else self.split
        trained = shared_examples(dataset.sets, split, dataset.train_split)
        if trained:
            raise UserError(
                f"{trained} of the examples of {split} were trained on (dataset.train='{dataset.train_split}'): the "
                f"most overfitted snapshot would win. {_ADVICE}"
            )
        return split

    def best(self, scores: Mapping[int, Score]) -> int:
        """Epoch with the lowest value of the criterion; the earliest of several equals.

        Raises:
            UserError: if there is no snapshot, or a value is not finite.
        """
        if not scores:
            raise UserError("There is no snapshot to choose from: train with trainer.callbacks.snapshots.every=5.")
        values = {epoch: getattr(score, self.criterion) for epoch, score in sorted(scores.items())}
        broken = [epoch for epoch, value in values.items() if not math.isfinite(value)]
        if broken:
            raise UserError(f"The {self.criterion} of the snapshot of epoch {broken[0]} is not a finite number.")
        return min(values, key=lambda epoch: values[epoch])


_ADVICE = (
    "Train with dataset.train='train[:-500]' to hold examples out, or choose on test examples as the paper does: "
    "evaluation.selection.split='test[-500:]'"
)


def held_out_split(train: str) -> str:
    """The examples that "train[:-500]" leaves out, "train[-500:]"; likewise for "train[500:]" and percentages.

    Raises:
        UserError: if the split leaves none out, or in a way that has no such form.
    """
    split = parse_split(train)
    if split.step == 1 and not split.balanced:
        if split.start is None and split.stop is not None:
            return f"{split.source}[{split.stop}:]"
        if split.stop is None and split.start is not None:
            return f"{split.source}[:{split.start}]"
    raise UserError(f"This run trained on '{train}', which leaves no examples to choose a snapshot on. {_ADVICE}")


def score(clean: Tensor, runs: Tensor, labels: Tensor) -> Score:
    """Robust error (wrong clean or in any run) and robust loss (highest of the runs per example).

    Args:
        clean: logits (N, K).
        runs: logits (R, N, K).
        labels: (N,).
    """
    strongest = metrics.worst_restart(runs, labels)
    return Score(float(any_wrong(clean, runs, labels).double().mean()), metrics.robust_loss(strongest, labels))


def epoch_of(name: str) -> int | None:
    """Epoch in the name of a snapshot such as "epoch_0005.pt"; `None` for other names.

    >>> epoch_of("epoch_0005.pt"), epoch_of("last.pt")
    (5, None)
    """
    match = re.fullmatch(r"epoch_(\d+)(\.pt)?", name)
    return int(match[1]) if match else None
