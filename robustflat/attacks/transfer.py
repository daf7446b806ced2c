"""Transfer attacks: images searched on one network, judged by another."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robustflat.attacks.describe import describe
from robustflat.attacks.inputs import check_shapes
from robustflat.attacks.judging import is_targeted, judge, own_objective
from robustflat.attacks.rehearsal import rehearse
from robustflat.errors import UserError
from robustflat.explanation import FORWARD, Explanation, explanation_of
from robustflat.types import Attack, Forward, Found, Objective


class Transfer:
    """Searches on a surrogate network and judges the result on the network of the call.

    The surrogate's gradients stand in for those of the network (Papernot et al., 2017), which an attacker may not
    have, or which may mislead: an honest network falls to few examples that a search on itself does not break. The
    value may be lower than for the clean image, as the search never sees the network under attack.

    Args:
        attack: the search.
        surrogate: the network searched on, images (B, C, H, W) in [0, 1] -> logits (B, K) of the same classes, on
            the device of the images. A text is the name of a network that `give` has still to supply: configurations
            name a run.

    Raises:
        UserError: if the surrogate is neither.
    """

    def __init__(self, attack: Attack, surrogate: Forward | str) -> None:
        if not callable(surrogate) and not isinstance(surrogate, str):
            raise UserError(f"surrogate must be a network, or the name of a run, got {type(surrogate).__name__}.")
        self.attack = attack
        self.surrogate = surrogate
        self.objective = own_objective(attack)
        self.targeted = is_targeted(attack)
        self._network: Forward | None = None if isinstance(surrogate, str) else surrogate

    def give(self, network: Forward) -> None:
        """Supply the network that `surrogate` names.

        Args:
            network: images -> logits, on the device of the images to be attacked.
        """
        self._network = network

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Images x (B, C, H, W) attacked on the surrogate, judged by `forward`; see `types.Attack`.

        Raises:
            UserError: if the surrogate is only a name so far.
        """
        check_shapes(x, y)
        if self._network is None:
            raise UserError(
                f"The surrogate '{self.surrogate}' is a name. Give Transfer the network itself; evaluate.py and "
                "train.py load the run of that name."
            )
        found = self.attack(self._network, x, y, objective, generator)
        return judge(forward, found.x_adv, y, objective or self.objective, targeted=self.targeted)

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw what the inner attack draws; see `attacks.rehearsal`."""
        return rehearse(self.attack, x, generator)

    def explain(self) -> Explanation:
        """One pass that judges; the search's passes go through the surrogate."""
        inner = explanation_of(self.attack)
        note = f"besides, through the surrogate: {inner.cost}"
        return replace(inner, formula=f"{inner.formula}, with f the surrogate", cost=FORWARD, note=note)

    def __repr__(self) -> str:
        name = self.surrogate if isinstance(self.surrogate, str) else type(self.surrogate).__name__
        return f"Transfer(attack={describe(self.attack)}, surrogate={name})"
