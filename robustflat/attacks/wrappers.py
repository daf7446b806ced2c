"""Variations of an attack, as attacks: restarts, the worst of several, part of a batch, other labels.

In every result `value` and `fooled` refer to the labels of the *call*, whatever labels the search itself has used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from robustflat.attacks.inputs import check_shapes
from robustflat.attacks.judging import (
    KEEP,
    held_still,
    improves,
    is_targeted,
    judge,
    judge_as_is,
    nothing_found,
    own_objective,
    select,
)
from robustflat.attacks.rehearsal import rehearse
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.explanation import FORWARD, NOTHING, Explanation, explanation_of
from robustflat.models.modes import frozen, training
from robustflat.rng import held, holding
from robustflat.types import Attack, Forward, Found, Objective

MODES = ("eval", "train")
"""Mode of the model while it predicts for a wrapper."""


class Restarts:
    """Runs an attack n times, one after the other, and keeps the best result per example.

    `Pgd(restarts=n)` does the same in one batch: faster on a GPU, at n times the memory.

    Args:
        attack: an attack with random parts; its draws differ from run to run.
        n: number of runs, >= 1.
        keep: "best": largest value; "fooled": fooled results first, then the largest value.

    Raises:
        UserError: if n or keep is not allowed.
    """

    def __init__(self, attack: Attack, n: int, keep: str = "best") -> None:
        require_range("n", n, low=1)
        require_one_of("keep", keep, KEEP[:2])
        self.attack = attack
        self.n = n
        self.keep = keep
        self.objective = own_objective(attack)
        self.targeted = is_targeted(attack)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Best of n runs on images x (B, C, H, W); see `types.Attack`."""
        best = self.attack(forward, x, y, objective, generator)
        for _ in range(self.n - 1):
            new = self.attack(forward, x, y, objective, generator)
            best = select(improves(new, best, self.keep), new, best)
        return best

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw what the inner attacks draw; see `attacks.rehearsal`."""
        return all(rehearse(self.attack, x, generator) for _ in range(self.n))

    def explain(self) -> Explanation:
        """The inner attack, n times."""
        inner = explanation_of(self.attack)
        return replace(
            inner, formula=f"{inner.formula}; best of R = {self.n} runs", cost=inner.cost.times(self.n, "R", R=self.n)
        )


class WorstOf:
    """Runs several attacks and keeps per example a fooled result if there is one, then the largest value.

    Values of attacks that maximise different objectives cannot be compared. Where the call names no objective
    and the attacks differ, each result is judged again, by the objective of the first attack.

    Args:
        attacks: name -> attack, run in this order; a later one replaces an earlier one only if it is better.

    Raises:
        UserError: if there is no attack, or targeted and untargeted ones are mixed.
    """

    def __init__(self, attacks: Mapping[str, Attack]) -> None:
        if not attacks:
            raise UserError("attacks is empty: WorstOf needs at least one attack.")
        self.attacks = dict(attacks)
        members = list(self.attacks.values())
        if len({is_targeted(attack) for attack in members}) > 1:
            kinds = ", ".join(f"{n}: {'' if is_targeted(a) else 'un'}targeted" for n, a in self.attacks.items())
            raise UserError(f"targeted and untargeted attacks read labels differently and cannot mix ({kinds}).")
        self.objective = own_objective(members[0])
        self.targeted = is_targeted(members[0])
        self._comparable = all(own_objective(attack) is self.objective for attack in members)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Worst case of all attacks on images x (B, C, H, W); see `types.Attack`."""
        best: Found | None = None
        for attack in self.attacks.values():
            new = attack(forward, x, y, objective, generator)
            if objective is None and not self._comparable:
                new = judge(forward, new.x_adv, y, self.objective, targeted=self.targeted)
            best = new if best is None else select(improves(new, best, "fooled"), new, best)
        assert best is not None
        return best

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw what the inner attacks draw; see `attacks.rehearsal`."""
        return all(rehearse(attack, x, generator) for attack in self.attacks.values())

    def explain(self) -> Explanation:
        """All inner attacks, one after the other; the upper bound has a judging pass for each."""
        inner = [explanation_of(attack) for attack in self.attacks.values()]
        cost = NOTHING
        for part in inner:
            cost = cost + part.cost
            if not self._comparable:
                cost = replace(cost + FORWARD, at_most=True)  # none where the call names an objective
        sources = dict.fromkeys(part.source for part in inner if part.source)
        return Explanation(f"x' = worst of {', '.join(self.attacks)}", "; ".join(sources), cost)


class Fraction:
    """Attacks a part of the batch: the first int((1 - fraction) * B) images stay clean, the rest is attacked.

    With fraction 0.5 this is adversarial training on half of each batch (Stutz et al., ICCV 2021). One more
    forward pass on the clean part tells its value.

    Args:
        attack: what the rest of the batch undergoes.
        fraction: share of images attacked, in (0, 1].

    Raises:
        UserError: if fraction lies outside (0, 1].
    """

    def __init__(self, attack: Attack, fraction: float) -> None:
        require_range("fraction", fraction, low=0.0, high=1.0, low_open=True, hint="Use attack=none for 0.")
        self.attack = attack
        self.fraction = fraction
        self.objective = own_objective(attack)
        self.targeted = is_targeted(attack)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Clean images first, attacked ones after, in the order of x (B, C, H, W); see `types.Attack`."""
        check_shapes(x, y)
        rows = held(len(x))
        # (1 - 0.9) * 10 is a hair below 1 in floating point; that image is meant to stay clean.
        start = math.floor((1 - self.fraction) * rows.total + 1e-9)
        rows = rows.after(start)
        clean = len(x) - len(rows.numbers)
        if (start and not clean) or (rows.total and not rows.numbers):
            raise UserError(
                f"fraction={self.fraction:g} leaves a process without clean or without attacked images: choose a "
                "larger dataset.batch_size, or fewer processes."
            )
        first = judge(forward, x[:clean], y[:clean], objective or self.objective, targeted=self.targeted)
        with holding(rows):
            rest = self.attack(forward, x[clean:], y[clean:], objective, generator)
        return Found(*(torch.cat(parts) for parts in zip(first, rest, strict=True)))

    def explain(self) -> Explanation:
        """The inner attack on a share q of the batch, and a pass over the clean rest."""
        inner, q = explanation_of(self.attack), self.fraction
        cost = inner.cost.times(q, "q", q=q)
        if q < 1:
            cost = FORWARD.times(1 - q, "(1 - q)", q=q) + cost
        formula = f"x' = x for the first (1 - q) B images, q = {q:g}; for the rest {inner.formula}"
        return Explanation(formula, "Goodfellow et al., ICLR 2015; Stutz et al., ICCV 2021", cost)


class PredictedLabels:
    """Attacks the label that the model predicts, so that the true label cannot leak into the perturbation.

    Label leaking: Kurakin et al., ICLR 2017. The prediction is made in eval mode (a module) before the attack.
    An image that is misclassified is moved away from its wrong class, maybe onto the right one; `value` and
    `fooled` are about the true labels, judged by one more forward pass, and may be lower than for clean images.

    Args:
        attack: an untargeted attack.
        mode: of the model while it predicts: "eval", or "train" as in the paper's released code: by the statistics
            of the clean batch, which then also enter the running ones.

    Raises:
        UserError: if the attack is targeted, or for another mode; on a call, if "train" gets no module.
    """

    def __init__(self, attack: Attack, *, mode: str = "eval") -> None:
        if is_targeted(attack):
            raise UserError("a targeted attack on the predicted label would look for no change: use an untargeted one.")
        require_one_of("mode", mode, MODES)
        self.attack = attack
        self.mode = mode
        self.objective = own_objective(attack)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Attack images x (B, C, H, W) on predicted labels; see `types.Attack`."""
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_found(x)
        with torch.no_grad(), _in_mode(forward, self.mode):
            predicted = forward(x).argmax(dim=1)
        found = self.attack(forward, x, predicted, objective, generator)
        return judge(forward, found.x_adv, y, objective or self.objective)

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw what the inner attacks draw; see `attacks.rehearsal`."""
        return rehearse(self.attack, x, generator)

    def explain(self) -> Explanation:
        """A prediction, the inner attack on it, and a pass that judges the result by the true labels."""
        inner = explanation_of(self.attack)
        formula = f"{inner.formula}, with y <- argmax f(x)"
        return Explanation(formula, "Kurakin et al., ICLR 2017", FORWARD + inner.cost + FORWARD)


class OnlyCorrect:
    """Leaves images clean that the model already has wrong (right, for a targeted attack: where it is reached).

    All images are attacked and the results for the wrong ones dropped: picking them out beforehand would wait
    for the device.

    Args:
        attack: what the other images undergo.
        mode: of the model while it classifies the clean images, see `PredictedLabels`.

    Raises:
        UserError: for another mode; on a call, if "train" gets no module.
    """

    def __init__(self, attack: Attack, *, mode: str = "eval") -> None:
        require_one_of("mode", mode, MODES)
        self.attack = attack
        self.mode = mode
        self.objective = own_objective(attack)
        self.targeted = is_targeted(attack)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Attack the correctly classified among images x (B, C, H, W); see `types.Attack`."""
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_found(x)
        with _in_mode(forward, self.mode):
            clean = judge_as_is(forward, x, y, objective or self.objective, targeted=self.targeted)
        return select(clean.fooled, clean, self.attack(forward, x, y, objective, generator))

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw what the inner attacks draw; see `attacks.rehearsal`."""
        return rehearse(self.attack, x, generator)

    def explain(self) -> Explanation:
        """A pass over the clean images, and the inner attack."""
        inner = explanation_of(self.attack)
        formula = f"x' = x where argmax f(x) != y; elsewhere {inner.formula}"
        return Explanation(formula, 'Stutz et al., ICCV 2021 ("ignore incorrect")', FORWARD + inner.cost)


@contextmanager
def _in_mode(forward: Forward, mode: str) -> Iterator[None]:
    """A model held still in eval mode, or, frozen, in train mode in which its running statistics do change."""
    if mode == "eval":
        with held_still(forward):
            yield
        return
    if not isinstance(forward, nn.Module):
        raise UserError("mode=train needs the model itself: trainer.loss.attack_mode=eval, and no self-supervision.")
    with frozen(forward), training(forward):
        yield
