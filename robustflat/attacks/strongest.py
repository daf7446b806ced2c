"""Several runs of an attack, the strongest result kept per example, judged in full float32."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustflat.attacks.examples import answer
from robustflat.attacks.inputs import check_shapes
from robustflat.attacks.judging import choose, held_still
from robustflat.attacks.objectives import cross_entropy
from robustflat.attacks.pgd import Pgd, copies
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.memory import MemoryBudget, budget_bytes, require_memory_budget
from robustflat.models.chunks import bounded, bytes_per_image
from robustflat.models.fused import fast_copy, fused
from robustflat.models.inference import PRECISIONS
from robustflat.models.mirror import Mirror
from robustflat.models.precision import exact_float32
from robustflat.types import Attack

SEARCHES = ("plain", *PRECISIONS)
"""What an attack searches on: the model itself, or a rewritten copy (see `robustflat.models.inference`)."""

EXAMPLES = 8
"""Images on which a rewritten copy is compared with the model."""

SELECT = ("cross_entropy", "confident_wrong")
"""Which restart is the strongest: highest cross-entropy (paper), or most confident wrong class (released)."""


NUMBERS_AT_ONCE = 128 * 3 * 32 * 32
"""Numbers in the images attacked at once on a CPU unless the caller says otherwise: small images share a pass with
their restarts."""

ACCELERATED = 20
"""Times as many on an accelerator, where launching the kernels of a small batch takes longer than their work."""


class Strongest(NamedTuple):
    """Strongest adversarial images x_adv (B, C, H, W) and the model's logits (B, K) on them."""

    x_adv: Tensor
    logits: Tensor


def strength(logits: Tensor, y: Tensor, select: str = "cross_entropy") -> Tensor:
    """How strong a restart is, (B,): cross-entropy, or max_{k != y} p_k.

    Raises:
        UserError: for another `select`.
    """
    require_one_of("select", select, SELECT)
    if select == "cross_entropy":
        return cross_entropy(logits, y)
    return logits.softmax(dim=1).scatter(1, y[:, None], -1.0).amax(dim=1)


@torch.no_grad()
def judged_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (B, K) of images in eval mode, without graph, autocast or TF32, in float32 or better.

    Raises:
        UserError: if the model fails on these images or returns no tensor.
    """
    with held_still(model), exact_float32(x.device):
        logits = answer(model, x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def strongest(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    restarts: int = 1,
    select: str = "cross_entropy",
    generator: torch.Generator | None = None,
    search: str | SearchCopy = "plain",
    memory_budget: MemoryBudget = "auto",
    at_once: int | None = None,
) -> Strongest:
    """Run an attack `restarts` times and keep, per example, the strongest result; ties keep the earlier one.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K); left as it was found.
        x, y: images and int64 labels (B,).
        attack: any attack; one with restarts of its own has already chosen among them.
        restarts: number of runs, >= 1.
        select: one of `SELECT`.
        generator: source of the attack's draws, on the images' device.
        search: one of `SEARCHES`, or a `SearchCopy` of the model for many calls; a rewritten copy is faster, and the
            plain model judges in every case.
        memory_budget: of one pass of the search and its gradient, see `Searching`.
        at_once: images that the attack is called on, runs counted, and one run at least. `None`: `images_at_once` for
            PGD, which takes memory for one piece of them at a time; one run for other attacks.

    Returns:
        Images and logits; the logits are the plain network's, whatever precision the attack searched in.

    Raises:
        UserError: for another `select` or `search`, restarts < 1, what is no memory budget or no attack; or as the
            attack does.
    """
    best: Strongest | None = None
    require_range("restarts", restarts, low=1)
    require_memory_budget(memory_budget)
    check_shapes(x, y)
    _require_attack(attack)
    searched, judged = search_model(model, x, search) if isinstance(search, str) else search(x), model
    if at_once is None:
        at_once = images_at_once(x) if isinstance(attack, Pgd) else 1
    passes = runs_by_pass(len(x), restarts, at_once)
    if memory_budget is not None and len(x):
        with held_still(model):
            need = bytes_per_image(searched, x)
        limit = budget_bytes(memory_budget, x.device)
        most = copies(x, passes[0])
        searched, judged = (bounded(network, most, need=need, limit=limit) for network in (searched, model))
    for now in passes:
        x_adv = attack(searched, copies(x, now), copies(y, now), generator=generator).x_adv.detach()
        logits = judged_logits(judged, x_adv)
        for new in map(Strongest, *(torch.split(t, len(x) or 1) for t in (x_adv, logits))):
            if best is None:
                best = new
                continue
            take = strength(new.logits, y, select) > strength(best.logits, y, select)
            best = Strongest(choose(take, new.x_adv, best.x_adv), choose(take, new.logits, best.logits))
    assert best is not None, "restarts is at least 1"
    return best


def images_at_once(x: Tensor) -> int:
    """How many images like those of x (B, C, H, W) an attack is best called on at once: `NUMBERS_AT_ONCE`."""
    numbers = NUMBERS_AT_ONCE * (1 if x.device.type == "cpu" else ACCELERATED)
    return max(1, numbers // max(x.shape[1:].numel(), 1))


def runs_by_pass(count: int, runs: int, at_once: int) -> list[int]:
    """How many of `runs` runs on a batch of `count` images share each pass of at most `at_once` images."""
    together = max(1, at_once // max(count, 1))
    return [min(together, runs - done) for done in range(0, runs, together)]


def _require_attack(attack: object) -> None:
    """Refuse names, classes and the evaluation `AutoAttack`, which is called with a model instead."""
    if callable(attack) and not isinstance(attack, type):
        takes = inspect.signature(attack).parameters
        if "generator" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            return
    raise UserError(
        f"attack must be an attack such as Pgd(LinfBall(8 / 255), steps=20, step_size=0.007), got "
        f"{type(attack).__name__}. AutoAttack is an evaluation: AutoAttack(...)(model, images, labels)."
    )


class SearchCopy:
    """`search_model` again and again for one model whose weights move in between: an fp32 copy is made only once.

    What it finds is to the bit what a copy made anew finds, but for models that some weights keep from being folded.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits; the copy takes over weights and statistics at every call.
        search: one of `SEARCHES`.

    Raises:
        UserError: for another `search`.
    """

    def __init__(self, model: nn.Module, search: str) -> None:
        require_one_of("search", search, SEARCHES)
        self._model, self._search = model, search
        self._mirror: Mirror | None = None
        self._fast = model

    def __call__(self, x: Tensor) -> nn.Module:
        """The model itself, or its copy for searching around images like x, at the weights of now.

        Raises:
            UserError: for a model that cannot be copied.
        """
        # Whether bf16 is accurate enough is another question at every displacement.
        if self._search != "fp32" or not len(x):
            return search_model(self._model, x, self._search)
        with held_still(self._model):
            if self._mirror is None or not self._mirror.follows(self._model):
                self._mirror = Mirror(self._model, x[:EXAMPLES], double=True)
                self._fast = fused(self._mirror.copy, x[:EXAMPLES])
            self._mirror.refreshed()
            return self._fast


def search_model(model: nn.Module, x: Tensor, search: str) -> nn.Module:
    """The model itself, or a copy rewritten for searching around images like x (B, C, H, W).

    Where bf16 would change the logits beyond use, as it may far from the trained weights, the copy is in float32.

    Raises:
        UserError: for another `search`, or a model that cannot be copied.
    """
    require_one_of("search", search, SEARCHES)
    if search == "plain" or not len(x):
        return model
    with held_still(model):
        if search == "bf16":
            with suppress(UserError):
                return fast_copy(model, x[:EXAMPLES], search)
        return fast_copy(model, x[:EXAMPLES], "fp32")
