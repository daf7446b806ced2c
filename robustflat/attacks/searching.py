"""An attack that searches on a fast copy of the network it is called with, for networks that are being trained."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from robustflat.attacks.inputs import check_shapes
from robustflat.attacks.judging import is_targeted, own_objective
from robustflat.attacks.strongest import EXAMPLES, SEARCHES
from robustflat.errors import require_one_of
from robustflat.explanation import Explanation, explanation_of
from robustflat.models.mirror import Mirror
from robustflat.types import Attack, Forward, Found, Objective


class Searching:
    """Runs an attack on a copy of the network with batch norm folded, channels last, in fp32 or bf16.

    The copy is made at the first call and takes over weights and statistics at every later one. Only for a module
    in eval mode; a callable or a network in training mode (whose batch norm uses the batch) is attacked as it is.
    `value` and `fooled` of the result are the copy's: in fp32 the network's up to rounding, in bf16 up to 1 part in
    100. Where verdicts count, judge `x_adv` by the network (`strongest` does).

    Args:
        attack: any attack.
        search: "plain" (the network itself), "fp32" or "bf16".

    Raises:
        UserError: for another `search`.
    """

    def __init__(self, attack: Attack, search: str) -> None:
        require_one_of("search", search, SEARCHES)
        self.attack, self.search = attack, search
        self.objective, self.targeted = own_objective(attack), is_targeted(attack)
        self._mirrors: weakref.WeakKeyDictionary[nn.Module, Mirror] = weakref.WeakKeyDictionary()

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Attack images x (B, C, H, W) in [0, 1] with labels y; see `types.Attack`.

        Raises:
            UserError: if the network cannot be copied (search="plain" needs no copy), or as the attack does.
        """
        check_shapes(x, y)
        if self.search == "plain" or not isinstance(forward, nn.Module) or forward.training or not len(x):
            return self.attack(forward, x, y, objective, generator)
        mirror = self._mirrors.get(forward)
        if mirror is None:
            mirror = self._mirrors[forward] = Mirror(forward, x[:EXAMPLES], precision=self.search)
        return self.attack(mirror.refreshed(), x, y, objective, generator)

    def explain(self) -> Explanation:
        """The inner attack; a copy of the network changes what a pass takes, not their number."""
        return explanation_of(self.attack)
