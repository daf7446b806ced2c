"""What AutoAttack found: every verdict by example and attack, what it cost, and the accuracy that remains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustflat.attacks.ensemble_progress import Piece
from robustflat.attacks.judging import choose
from robustflat.attacks.objectives import cross_entropy, margin
from robustflat.attacks.sanity import SanityReport

_Z_95 = 1.959964


@dataclass(frozen=True)
class AttackRecord:
    """What one attack did. Tensors are (N,), on the CPU; not-a-number or 0 for examples that it was not given.

    Attributes:
        name: of the attack, such as "apgd-ce".
        tried, broken: bool; broken as judged by the plain model, inside ball and box.
        loss, margin, size: cross-entropy, max_{k != y} z_k - z_y and distance (float64) of its final image,
            also where that breaks nothing.
        queries: forward passes the example took part in, of the searched model.
        seconds: wall time.
        forwards, backwards: images that went forward and backward through the network, judging included.
    """

    name: str
    tried: Tensor
    broken: Tensor
    loss: Tensor
    margin: Tensor
    size: Tensor
    queries: Tensor
    seconds: float
    forwards: int
    backwards: int


@dataclass(frozen=True)
class AutoAttackResult:
    """All verdicts of one evaluation. Tensors are on the CPU.

    Attributes:
        title: version, threat model and search, in words.
        correct: bool (N,), whether the clean image is classified correctly.
        robust: bool (N,), correct and broken by no attack.
        broken_by: name of the attack that broke each example, "clean" for those wrong from the start, or "".
        adversarial: float (N, C, H, W); the adversarial example where broken, else the final image with the
            highest loss, or the clean image where that is wrong already.
        loss, margin, size: of `adversarial` under the plain model, (N,).
        attacks: one record per attack, in order.
        sanity: the checks that ran along.
        upper_bound: whether only part of the attacks ran, so that the true robust accuracy may be lower.
    """

    title: str
    correct: Tensor
    robust: Tensor
    broken_by: tuple[str, ...]
    adversarial: Tensor
    loss: Tensor
    margin: Tensor
    size: Tensor
    attacks: tuple[AttackRecord, ...]
    sanity: SanityReport
    upper_bound: bool

    @property
    def clean_accuracy(self) -> float:
        """Share of correctly classified examples."""
        return float(self.correct.double().mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of examples that no attack broke."""
        return float(self.robust.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the robust accuracy over draws of the examples."""
        return wilson(int(self.robust.sum()), len(self.robust))

    @property
    def seconds(self) -> float:
        """Wall time of all attacks."""
        return sum(attack.seconds for attack in self.attacks)

    def __str__(self) -> str:
        low, high = self.interval
        count = len(self.robust)
        lines = [
            f"{self.title}, {count} examples",
            f"clean accuracy  {100 * self.clean_accuracy:.2f} %",
            f"robust accuracy {100 * self.robust_accuracy:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f})",
        ]
        if self.upper_bound:
            lines.append("Only part of the attacks ran: this is an upper bound of the robust accuracy.")
        lines.append(f"{'attack':<10}{'tried':>7}{'broken':>8}{'seconds':>10}{'forwards':>11}{'backwards':>11}")
        lines += [
            f"{a.name:<10}{int(a.tried.sum()):>7}{int(a.broken.sum()):>8}{a.seconds:>10.1f}"
            f"{a.forwards:>11}{a.backwards:>11}"
            for a in self.attacks
        ]
        return "\n".join([*lines, str(self.sanity)])


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share: `hits` of `count` >= 1."""
    share, square = hits / count, _Z_95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = _Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(centre - half, 0.0), min(centre + half, 1.0)


class Tally:
    """Verdicts as they come in, piece by piece.

    Args:
        x, y: all images (N, C, H, W) and labels.
        logits: of the clean images, (N, K).
        correct: bool (N,), which of them count as correct.
    """

    def __init__(self, x: Tensor, y: Tensor, logits: Tensor, correct: Tensor) -> None:
        self.x = x
        self.y = y
        self.correct = correct.cpu()
        self.robust = self.correct.clone()
        self.broken_by = ["" if ok else "clean" for ok in self.correct.tolist()]
        self.adversarial = x.detach().cpu().clone()
        self.loss = cross_entropy(logits, y).cpu()
        self.margin = margin(logits, y).cpu()
        self.size = torch.zeros(len(y), dtype=torch.float64)
        self.records: list[AttackRecord] = []
        self.refused = 0
        self.misclassified = 0
        self._open: list[tuple[Tensor, Piece]] = []

    def survivors(self) -> Tensor:
        """Rows of the examples not broken yet, int64 (M,), on the images' device."""
        return self.robust.nonzero().flatten().to(self.x.device)

    def add(self, name: str, rows: Tensor, piece: Piece) -> None:
        """Take in what an attack did to the examples `rows`."""
        rows, broken = rows.cpu(), piece["broken"]
        take = broken | (piece["loss"] > self.loss[rows])
        self.adversarial[rows] = choose(take, piece["x_adv"].to(self.adversarial.dtype), self.adversarial[rows])
        for mine, new in ((self.loss, "loss"), (self.margin, "margin"), (self.size, "size")):
            mine[rows] = torch.where(take, piece[new].to(mine.dtype), mine[rows])
        self.refused += int((piece["wrong"] & ~broken).sum())
        self.misclassified += int(piece["wrong"].sum())
        for row in rows[broken].tolist():
            self.broken_by[row] = name
        self._open.append((rows, piece))

    def close(self, name: str) -> None:
        """The attack is over: its broken examples are no longer survivors."""
        count = len(self.y)
        columns = {
            "broken": torch.zeros(count, dtype=torch.bool),
            "loss": torch.full((count,), torch.nan, dtype=self.loss.dtype),
            "margin": torch.full((count,), torch.nan, dtype=self.margin.dtype),
            "size": torch.full((count,), torch.nan, dtype=torch.float64),
            "queries": torch.zeros(count, dtype=torch.int64),
        }
        tried = torch.zeros(count, dtype=torch.bool)
        for rows, piece in self._open:
            tried[rows] = True
            for column, values in columns.items():
                values[rows] = piece[column].to(values.dtype)
        seconds = sum(piece["seconds"] for _, piece in self._open)
        forwards, backwards = (sum(piece[part] for _, piece in self._open) for part in ("forwards", "backwards"))
        self.records.append(
            AttackRecord(name, tried, **columns, seconds=seconds, forwards=forwards, backwards=backwards)
        )
        self.robust &= ~columns["broken"]
        self._open = []

    def result(self, title: str, sanity: SanityReport, *, upper_bound: bool) -> AutoAttackResult:
        """Everything, in the form that is handed out."""
        return AutoAttackResult(
            title=title,
            correct=self.correct,
            robust=self.robust,
            broken_by=tuple(self.broken_by),
            adversarial=self.adversarial,
            loss=self.loss,
            margin=self.margin,
            size=self.size,
            attacks=tuple(self.records),
            sanity=sanity,
            upper_bound=upper_bound,
        )
