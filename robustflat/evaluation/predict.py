"""A model (and an attack) applied to a data set: logits, from which every metric is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustflat.attacks.examples import require_answers
from robustflat.attacks.rehearsal import rehearse
from robustflat.attacks.strongest import judged_logits, strongest
from robustflat.errors import UserError, require_range
from robustflat.evaluation.turns import in_turn
from robustflat.memory import MemoryBudget
from robustflat.models.precision import device_of
from robustflat.types import Attack, Batch


class Prediction(NamedTuple):
    """Logits float32 (N, K) and labels int64 (N,), both on the CPU, in the order of the data set."""

    logits: Tensor
    labels: Tensor


def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    attack: Attack | None = None,
    generator: torch.Generator | None = None,
    restarts: int = 1,
    select: str = "cross_entropy",
    search: str = "plain",
    memory_budget: MemoryBudget = "auto",
) -> Prediction:
    """Logits of a model on clean images or, with an attack, on the adversarial images it finds.

    The model is evaluated in eval mode, without graph, in full float32; its mode, gradients and statistics are
    left as they were. Batches are moved to the model's device.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K).
        batches: batches with int64 labels (B,).
        attack: `None` for clean logits.
        generator: source of the attack's draws, on the model's device.
        restarts: independent runs of the attack, of which the strongest is kept per example.
        select: what "strongest" means, see `robustflat.attacks.strongest.SELECT`; the default, highest
            cross-entropy, is the paper's.
        search: what the attack searches on, see `robustflat.attacks.strongest.SEARCHES`; the network itself judges.
        memory_budget: of one pass of the attack and its gradient, see `robustflat.attacks.searching.Searching`.

    Raises:
        UserError: if there are no batches, labels are not classes of the model, or logits are not finite.
    """
    require_range("restarts", restarts, low=1)
    device, several = device_of(model), list(batches)
    if not several:
        raise UserError("There is nothing to predict: the data set has no batch.")

    def logits(number: int) -> Tensor:
        x, y = several[number].x.to(device), several[number].y.to(device)
        if y.ndim != 1 or y.is_floating_point():
            raise UserError(f"predict needs one class per image, got labels {y.dtype} of shape {tuple(y.shape)}.")
        if attack is None:
            return judged_logits(model, x).float()
        found = strongest(
            model,
            x,
            y,
            attack,
            restarts=restarts,
            select=select,
            generator=generator,
            search=search,
            memory_budget=memory_budget,
        )
        return found.logits.float()

    def rehearsal(number: int, stand_in: torch.Generator) -> bool:
        x = several[number].x.to(device)
        return all(rehearse(attack, x, stand_in) for _ in range(restarts))

    if attack is None:
        found = in_turn(logits, len(several), None, None)
    else:
        found = in_turn(logits, len(several), generator, rehearsal)
    prediction = Prediction(torch.cat(found).cpu(), torch.cat([batch.y.cpu() for batch in several]))
    require_answers(*prediction)
    return prediction
