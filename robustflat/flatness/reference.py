"""The loss at the undisplaced weights, which every flatness is a rise above."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustflat.attacks.describe import describe
from robustflat.attacks.strongest import judged_logits, strongest
from robustflat.errors import UserError
from robustflat.flatness.protocol import REFERENCE_RESTARTS, Protocol
from robustflat.flatness.subject import Subject
from robustflat.ranks import workers
from robustflat.rng import generator_for
from robustflat.types import Attack, Batch


class Reference(NamedTuple):
    """Losses (N,) at the undisplaced weights, the images they belong to, and how those were found."""

    losses: Tensor
    batches: list[Batch]
    description: str


def drawn_seed(generator: torch.Generator) -> int:
    """A seed drawn from a generator, in [0, 2**63)."""
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))


def reference_at(
    found: Subject,
    *,
    loss: str,
    attack: Attack | None,
    once: Attack | None,
    protocol: Protocol,
    seed: int,
    given: Tensor | None,
    search: str = "plain",
) -> Reference:
    """Losses of the subject at its present weights.

    Args:
        found: model and batches.
        loss: "robust", "clean" or "frozen".
        attack: run ten times, the strongest run kept per example, unless `once` is given.
        once: an attack that is run once instead.
        protocol: says which run is the strongest and how losses are computed from logits.
        seed: of the attack's draws.
        given: (N,) losses that the caller knows already, a tensor or array; they are returned after a check.
        search: what the attack searches on, see `robustflat.attacks.strongest.SEARCHES`.

    Raises:
        UserError: if `given` has the wrong shape or is not finite, or is given for the frozen loss.
    """
    if given is not None:
        return Reference(_checked(given, found, loss), found.batches, "given by the caller")
    if loss == "clean":
        clean = workers().map(
            lambda batch: protocol.losses(judged_logits(found.model, batch.x), batch.y), found.batches
        )
        return Reference(torch.cat(clean).to(found.device), found.batches, "none")
    chosen, runs = (once, 1) if once is not None else (attack, REFERENCE_RESTARTS)
    assert chosen is not None, "robust and frozen losses have an attack"

    def attacked(index: int) -> tuple[Tensor, Tensor]:
        x, y = found.batches[index]
        generator = generator_for(seed, "reference", index, device=found.device)
        best = strongest(
            found.model, x, y, chosen, restarts=runs, select=protocol.select, generator=generator, search=search
        )
        return protocol.losses(best.logits, y), best.x_adv

    losses, images = zip(*workers().map(attacked, range(len(found.batches))), strict=True)
    batches = [Batch(x.to(found.device), y) for x, (_, y) in zip(images, found.batches, strict=True)]
    return Reference(torch.cat(losses).to(found.device), batches, _attack_words(attack, once))


def reference_words(loss: str, attack: Attack | None, once: Attack | None, settings: str) -> str:
    """All that decides the losses of `reference_at` for one network, batches and seed, in words.

    Args:
        loss, attack, once: as there.
        settings: the rest: protocol, batch-norm policy and search.
    """
    return f"{loss} loss, {'no attack' if loss == 'clean' else _attack_words(attack, once)}, {settings}"


def settings_of_runs(attack: Attack, runs: int, *, search: str) -> str | None:
    """The `reference_settings` of a measure whose reference loss these runs of an attack give: worst loss of all runs.

    That of the paper's protocol, which takes the run with the highest cross-entropy; so the losses are equal up to
    the random starts. `None` for another number of runs than `REFERENCE_RESTARTS`.

    Args:
        attack: run `runs` times at the undisplaced weights, on the same examples and network.
        runs: number of independent runs.
        search: see `robustflat.attacks.strongest.SEARCHES`.
    """
    if runs != REFERENCE_RESTARTS:
        return None
    return reference_words("robust", attack, None, f"paper protocol, batch norm running, search {search}")


def _attack_words(attack: Attack | None, once: Attack | None) -> str:
    return describe(once) if once is not None else f"worst of {REFERENCE_RESTARTS} runs of {describe(attack)}"


def require_finite(losses: Tensor, radius: float) -> None:
    """Refuse losses (T, N) at displaced weights that are not finite.

    Raises:
        UserError: with the number of trials concerned.
    """
    broken = int((~losses.isfinite()).any(dim=1).sum())
    if broken:
        raise UserError(
            f"The loss is not finite at {broken} of {len(losses)} displaced weights. Is radius {radius:g} too large "
            f"for this network, or does it overflow in half precision?"
        )


def _checked(given: Tensor, found: Subject, loss: str) -> Tensor:
    if loss == "frozen":
        raise UserError("loss='frozen' finds its adversarial examples itself: leave reference out.")
    given = torch.as_tensor(given)
    if given.shape != (found.size,) or not bool(given.isfinite().all()):
        raise UserError(
            f"reference must be one finite loss per example, shape ({found.size},), got shape {tuple(given.shape)}."
        )
    return given.detach().to(found.device)
