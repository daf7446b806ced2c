"""What AutoAttack consists of: its attacks by name, one of them on one batch, and how passes are counted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from robustflat.attacks.autopgd import AutoPgd
from robustflat.attacks.ensemble_progress import Piece
from robustflat.attacks.examples import answer
from robustflat.attacks.fab import Fab
from robustflat.attacks.hunt import Confirm, Hunted, PlainJudge
from robustflat.attacks.judging import succeeded
from robustflat.attacks.objectives import cross_entropy, margin
from robustflat.attacks.sanity import verify
from robustflat.attacks.square import Square
from robustflat.errors import UserError, require_one_of
from robustflat.geometry.input_ball import InputBall
from robustflat.models.inference import PRECISIONS
from robustflat.models.precision import exact_float32
from robustflat.types import Forward, Objective

VERSIONS: Mapping[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
"""Attacks of each version, in order; "custom" takes a list of their names."""

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
PREVIEW = ("apgd-ce", "apgd-t")
BUDGETS = ("full", "preview")
SEARCHES = ("plain", *PRECISIONS)
EOT = 20
"""Passes that the version "rand" averages."""

_RESTARTS = 5
_L1_TARGETS = 5


class Hunter(Protocol):
    """An attack that can say what each example cost and be told how to confirm a success."""

    def hunt(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
        *,
        confirm: Confirm | None = None,
    ) -> Hunted:
        """Search around x."""
        ...


def attack_names(version: str, attacks: Sequence[str] | None, budget: str) -> tuple[str, ...]:
    """Names of the attacks that run, in order.

    Raises:
        UserError: if a name is unknown, or two options contradict each other.
    """
    require_one_of("version", version, (*VERSIONS, "custom"))
    require_one_of("budget", budget, BUDGETS)
    if version != "custom":
        if attacks is not None:
            raise UserError(f"attacks are for version='custom'; version='{version}' has its own list.")
        if budget == "preview" and version == "rand":
            raise UserError("budget='preview' has no average over random models: use the full budget.")
        return PREVIEW if budget == "preview" else VERSIONS[version]
    if not attacks or isinstance(attacks, str):
        raise UserError(f"version='custom' needs attacks, a list of names among {', '.join(ATTACKS)}.")
    if budget == "preview":
        raise UserError("budget='preview' chooses the attacks itself: use version='standard' with it.")
    for name in attacks:
        require_one_of("attacks", name, ATTACKS)
    if len(set(attacks)) < len(attacks):
        raise UserError(f"attacks must differ from each other, got {', '.join(attacks)}.")
    return tuple(attacks)


def member(name: str, ball: InputBall, *, version: str = "standard") -> Hunter:
    """The attack called `name`, one of `ATTACKS`, with the settings that the version gives it."""
    wide = ball.norm == "l1"
    published_l1 = wide and version == "standard"  # the one norm in which "standard" has other numbers
    restarts = _RESTARTS if version == "plus" or published_l1 else 1
    eot = EOT if version == "rand" else 1
    if name == "square":
        return Square(ball, stop_when_fooled=True)
    if name in ("fab", "fab-t"):
        targets = 9 if name == "fab-t" else None
        return Fab(ball, targets=targets, restarts=1 if targets else restarts, stop_when_fooled=True)
    objective = {"apgd-ce": "cross_entropy", "apgd-dlr": "dlr", "apgd-t": "dlr_targeted"}[name]
    return AutoPgd(
        ball,
        objective=objective,
        targets=_L1_TARGETS if published_l1 else 9,
        restarts=1 if name == "apgd-t" else restarts,
        eot=eot,
        wide_start=wide,
        stop_when_fooled=True,
    )


def attack_piece(
    attack: Hunter,
    searched: Forward,
    plain: Forward,
    ball: InputBall,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
) -> Piece:
    """One attack on one batch, judged by the plain model; tensors on the CPU, ready to be saved."""
    counted, judged = Counted(searched), Counted(plain)
    start = time.perf_counter()
    hunted = attack.hunt(counted, x, y, generator=generator, confirm=PlainJudge(judged))
    x_adv = hunted.found.x_adv
    with torch.no_grad(), exact_float32(x.device):
        logits = judged(x_adv)
    wrong = succeeded(logits, y)
    checked = verify(x_adv, x, ball)
    tensors = {
        "x_adv": x_adv,
        "wrong": wrong,
        "broken": wrong & checked.allowed,
        "loss": cross_entropy(logits, y),
        "margin": margin(logits, y),
        "size": checked.size,
        "queries": hunted.queries,
    }
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    counts = {
        "seconds": time.perf_counter() - start,
        "forwards": counted.forwards + judged.forwards,
        "backwards": counted.backwards,
    }
    return on_cpu | counts


class Counted:
    """A model that counts the images that pass it, forward and backward, without asking the device.

    Args:
        forward: images -> logits.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.forwards = 0
        self.backwards = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of images x (B, C, H, W)."""
        self.forwards += len(x)
        logits = self.forward(x)
        if logits.requires_grad:
            logits.register_hook(self._note)  # type: ignore[no-untyped-call]
        return logits

    def _note(self, grad: Tensor) -> None:
        self.backwards += len(grad)


class MeanOf:
    """Log of the mean probabilities over several passes of a model that draws random numbers.

    Args:
        forward: images -> logits.
        passes: number of passes.
    """

    def __init__(self, forward: Forward, passes: int) -> None:
        self.forward = forward
        self.passes = passes

    def __call__(self, x: Tensor) -> Tensor:
        """Log probabilities of images x (B, C, H, W), finite unless the model's logits are not."""
        mean = torch.stack([answer(self.forward, x) for _ in range(self.passes)]).softmax(dim=2).mean(dim=0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
