"""MultiTargeted: one search per wrong class instead of one away from the right class."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robustflat.attacks.autopgd import wrong_classes
from robustflat.attacks.inputs import check_shapes
from robustflat.attacks.judging import held_still, improves, is_targeted, judge, nothing_found, select
from robustflat.attacks.objectives import margin, objective_by_name, with_target
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.explanation import FORWARD, Explanation, explanation_of
from robustflat.types import Attack, Forward, Found, Objective


class MultiTargeted:
    """Runs an attack toward each of the most likely wrong classes and keeps the worst case (Gowal et al., 2019).

    The wrong classes with the largest clean logits are taken one after the other. A fooled result wins over one
    that is not, then the larger value of the targeted objective. Costs `targets` runs of the attack and two
    forward passes. The objective of the call only judges the result (by default the margin): each search has the
    objective named here.

    Args:
        attack: the search for one target; an untargeted attack such as `Pgd`, whose objective is replaced.
        targets: number of wrong classes, >= 1; all K - 1 if there are fewer.
        objective: what each search maximises: "margin_to_target" (z_t - z_y) or "dlr_targeted".

    Raises:
        UserError: if the attack is targeted or an argument not allowed.
    """

    def __init__(self, attack: Attack, *, targets: int = 9, objective: str = "margin_to_target") -> None:
        require_range("targets", targets, low=1)
        require_one_of("objective", objective, ("margin_to_target", "dlr_targeted"))
        if is_targeted(attack):
            raise UserError("MultiTargeted chooses the targets itself: give it an attack with targeted=False.")
        self.attack = attack
        self.targets = targets
        self.search_objective = objective_by_name(objective)
        self.objective: Objective = margin

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Worst case over targets on images x (B, C, H, W); see `types.Attack`."""
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_found(x)
        with held_still(forward):
            targets = wrong_classes(forward, x, y, self.targets)
        best: Found | None = None
        for target in targets.unbind(dim=1):
            new = self.attack(forward, x, with_target(y, target), self.search_objective, generator)
            best = new if best is None else select(improves(new, best, "fooled"), new, best)
        assert best is not None
        return judge(forward, best.x_adv, y, objective or self.objective)

    def explain(self) -> Explanation:
        """The inner attack, once per target; fewer where there are fewer wrong classes."""
        inner = explanation_of(self.attack)
        cost = FORWARD + inner.cost.times(self.targets, "T", T=self.targets) + FORWARD
        formula = f"x' = worst of T = {self.targets} searches, each toward one of the likeliest wrong classes t"
        return Explanation(f"{formula}; {inner.formula}", "Gowal et al., 2019", replace(cost, at_most=True))
