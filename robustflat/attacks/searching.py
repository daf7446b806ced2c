"""An attack that searches on a fast copy of the network it is called with, for networks that are being trained."""

from __future__ import annotations

import weakref
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from robustflat.attacks.captured import Captured
from robustflat.attacks.inputs import check_shapes
from robustflat.attacks.judging import is_targeted, own_objective
from robustflat.attacks.nested import nested
from robustflat.attacks.noise import RandomNoise
from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.attacks.strongest import EXAMPLES, SEARCHES
from robustflat.errors import UserError, require_one_of
from robustflat.explanation import Explanation, explanation_of
from robustflat.memory import MIB, MemoryBudget, budget_bytes, require_memory_budget
from robustflat.models.chunks import bounded, bytes_per_image
from robustflat.models.compiled import MODES, Compiled
from robustflat.models.fused import fused
from robustflat.models.inference import InferenceModel
from robustflat.models.mirror import Mirror
from robustflat.types import Attack, Forward, Found, Objective

COMPILES = ("none", *MODES, "graph")
"""How a search runs its copy: as it is, by `torch.compile`, or with PGD's passes captured as CUDA graphs."""

# On a CPU pieces of 64 images take 2 % longer than 128 at once (ResNet-18 with 16 channels), and half the memory; those
# of a bf16 search are half as large (5 %): who asks for bf16 there asks for little memory.
_PIECE, _LITTLE = 64, 32 * MIB
_HALF = 0.5


_Bounds: TypeAlias = dict[tuple[torch.Size, torch.dtype], tuple[float, float]]
"""By shape and type of an image: bytes that it needs, and the most that a pass may need."""


class Searching:
    """Runs an attack on a copy of the network with batch norm folded, channels last, in fp32 or bf16.

    The copy is made at the first call and takes over weights and statistics at every later one; it is made anew where
    more than these has changed (layers, their numbers, hooks). Only for a module
    in eval mode; a callable or a network in training mode (whose batch norm uses the batch) is attacked as it is.
    `value` and `fooled` of the result are the copy's: in fp32 the network's up to rounding, in bf16 up to 1 part in
    100. Where verdicts count, judge `x_adv` by the network (`strongest` does).

    Args:
        attack: any attack.
        search: "plain" (the network itself), "fp32" or "bf16".
        memory_budget: of one pass and its gradient: MiB, "auto" (half of what is free at the first call; on a CPU
            no more than 32 MiB, or than 64 images need, half of that in bf16) or `None` (no bound); see
            `robustflat.memory`. Beyond it the network takes the batch in pieces. Random starts are those of the whole
            batch, results the same up to rounding. PGD needs no more than that; other attacks keep all pieces' graphs.
        compile: one of `COMPILES`, for PGD; changes rounding alone. "default" and "reduce-overhead" compile the copy
            for the first shape of its passes and take some time for it (see `Compiled`); a batch of another size runs
            as without. "graph" needs CUDA and captures whole passes (see `Captured`), up to four kinds of them.

    Raises:
        UserError: for another `search` or `compile`, what is no memory budget, or a `compile` that does not go with
            the search or the attack.
    """

    def __init__(
        self, attack: Attack, search: str, *, memory_budget: MemoryBudget = "auto", compile: str = "none"
    ) -> None:
        require_one_of("search", search, SEARCHES)
        require_memory_budget(memory_budget)
        require_compile(compile, search, attack)
        self.attack, self.search, self.memory_budget, self.compile = attack, search, memory_budget, compile
        self.objective, self.targeted = own_objective(attack), is_targeted(attack)
        self._mirrors: weakref.WeakKeyDictionary[nn.Module, _Copy] = weakref.WeakKeyDictionary()
        self._bounds: weakref.WeakKeyDictionary[nn.Module, _Bounds] = weakref.WeakKeyDictionary()

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
        if self.search == "plain":
            return self.attack(self._bounded(forward, forward, x), x, y, objective, generator)
        copy = self._copy(forward, x)
        fast = self._bounded(copy.mirror.refreshed(), copy.fast, x)
        return self.attack(fast, x, y, objective, generator)

    def __getstate__(self) -> dict[str, object]:
        """Without the copies of networks, which follow these and no copies of them."""
        return {**vars(self), "_mirrors": None, "_bounds": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """As pickled, with no network known yet."""
        vars(self).update(state, _mirrors=weakref.WeakKeyDictionary(), _bounds=weakref.WeakKeyDictionary())

    def _copy(self, model: nn.Module, x: Tensor) -> _Copy:
        copy = self._mirrors.get(model)
        if copy is None or not copy.mirror.follows(model):
            require_device(self.compile, x.device)
            mirror = Mirror(model, x[:EXAMPLES], precision=self.search)
            copy = self._mirrors[model] = _Copy(mirror, _fast(mirror.copy, self.compile, x[:EXAMPLES]))
        return copy

    def _bounded(self, measured: nn.Module, fast: nn.Module, x: Tensor) -> nn.Module:
        """`fast`, in pieces where `measured`, the same network without compilation, needs too much memory."""
        if self.memory_budget is None:
            return fast
        kind = (x.shape[1:], x.dtype)
        bounds = self._bounds.setdefault(measured, {})
        if kind not in bounds:  # once: asking the system takes as long as a step of a small network
            need = bytes_per_image(measured, x)
            bounds[kind] = need, self._limit(need, x.device)
        need, limit = bounds[kind]
        return bounded(fast, x, need=need, limit=limit)

    def _limit(self, need: float, device: torch.device) -> float:
        limit = budget_bytes(self.memory_budget, device)
        chosen_here = self.memory_budget == "auto" and device.type == "cpu"
        enough = max(_LITTLE, _PIECE * need) * (_HALF if self.search == "bf16" else 1)
        return min(limit, enough) if chosen_here else limit

    def explain(self) -> Explanation:
        """The inner attack; a copy of the network changes what a pass takes, not their number."""
        return explanation_of(self.attack)


class _Copy(NamedTuple):
    """What is searched on: the copy that follows the weights, and the same copy as it is called."""

    mirror: Mirror
    fast: nn.Module


def _fast(copy: InferenceModel, compile: str, few: Tensor) -> nn.Module:
    if compile == "none":
        return fused(copy, few)
    return Captured(copy) if compile == "graph" else Compiled(copy, mode=compile, backend="inductor")


def require_compile(compile: str, search: str, attack: Attack) -> None:
    """Refuse another `compile` than those of `COMPILES`, one without effect, and one that the attack cannot stand.

    Compiled passes give their memory away: their gradient may be taken once, before the next pass. PGD does that.

    Raises:
        UserError: without a copy to compile, or if another attack than PGD takes gradients.
    """
    require_one_of("compile", compile, COMPILES)
    if compile != "none" and search == "plain":
        raise UserError(f"compile={compile} compiles the copy that is searched on: set search=fp32, or compile=none.")
    leaves = [part for part in nested(attack) if len(list(nested(part))) == 1]
    others = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Pgd | NoAttack | RandomNoise)]
    if compile != "none" and others:
        raise UserError(f"compile={compile} is for PGD, and this attack is {', '.join(others)}: set compile=none.")


def require_device(compile: str, device: torch.device) -> None:
    """Refuse CUDA graphs on another device.

    Raises:
        UserError: naming the device.
    """
    if compile == "graph" and device.type != "cuda":
        raise UserError(
            f"compile=graph needs a CUDA device, and this is {device.type}: set compile=default (fuses operations, on "
            "any device), or none."
        )
