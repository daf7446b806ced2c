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
from robustflat.memory import MIB, MemoryBudget, budget_bytes, require_memory_budget
from robustflat.models.chunks import bounded, bytes_per_image
from robustflat.models.mirror import Mirror
from robustflat.types import Attack, Forward, Found, Objective

# On a CPU pieces of 64 images take 2 % longer than 128 at once (ResNet-18 with 16 channels), and half the memory.
_PIECE, _LITTLE = 64, 32 * MIB


class Searching:
    """Runs an attack on a copy of the network with batch norm folded, channels last, in fp32 or bf16.

    The copy is made at the first call and takes over weights and statistics at every later one. Only for a module
    in eval mode; a callable or a network in training mode (whose batch norm uses the batch) is attacked as it is.
    `value` and `fooled` of the result are the copy's: in fp32 the network's up to rounding, in bf16 up to 1 part in
    100. Where verdicts count, judge `x_adv` by the network (`strongest` does).

    Args:
        attack: any attack.
        search: "plain" (the network itself), "fp32" or "bf16".
        memory_budget: of one pass and its gradient: MiB, "auto" (half of what is free at the first call; on a CPU
            no more than 32 MiB, or than 64 images need) or `None` (no bound); see `robustflat.memory`. Beyond it
            the network takes the batch in pieces. Random starts are those of the whole batch, results the same up
            to rounding. PGD needs no more than that; other attacks keep all pieces' graphs.

    Raises:
        UserError: for another `search` or what is no memory budget.
    """

    def __init__(self, attack: Attack, search: str, *, memory_budget: MemoryBudget = "auto") -> None:
        require_one_of("search", search, SEARCHES)
        require_memory_budget(memory_budget)
        self.attack, self.search, self.memory_budget = attack, search, memory_budget
        self.objective, self.targeted = own_objective(attack), is_targeted(attack)
        self._mirrors: weakref.WeakKeyDictionary[nn.Module, Mirror] = weakref.WeakKeyDictionary()
        self._bounds: weakref.WeakKeyDictionary[nn.Module, tuple[float, float]] = weakref.WeakKeyDictionary()

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
        if not isinstance(forward, nn.Module) or forward.training or not len(x):
            return self.attack(forward, x, y, objective, generator)
        searched = forward if self.search == "plain" else self._copy(forward, x)
        return self.attack(self._bounded(searched, x), x, y, objective, generator)

    def _copy(self, model: nn.Module, x: Tensor) -> nn.Module:
        mirror = self._mirrors.get(model)
        if mirror is None:
            mirror = self._mirrors[model] = Mirror(model, x[:EXAMPLES], precision=self.search)
        return mirror.refreshed()

    def _bounded(self, searched: nn.Module, x: Tensor) -> nn.Module:
        if self.memory_budget is None:
            return searched
        if searched not in self._bounds:  # once: asking the system takes as long as a step of a small network
            need = bytes_per_image(searched, x)
            self._bounds[searched] = need, self._limit(need, x.device)
        need, limit = self._bounds[searched]
        return bounded(searched, x, need=need, limit=limit)

    def _limit(self, need: float, device: torch.device) -> float:
        limit = budget_bytes(self.memory_budget, device)
        chosen_here = self.memory_budget == "auto" and device.type == "cpu"
        return min(limit, max(_LITTLE, _PIECE * need)) if chosen_here else limit

    def explain(self) -> Explanation:
        """The inner attack; a copy of the network changes what a pass takes, not their number."""
        return explanation_of(self.attack)
