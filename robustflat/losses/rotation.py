"""Self-supervised adversarial training: half of each batch is rotated, and its rotation is to be predicted."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.pgd import NoAttack
from robustflat.errors import UserError, require_range
from robustflat.explanation import Explanation
from robustflat.losses.base import ONE_SCORING, TrainingLoss, at_least_float32
from robustflat.models.classifier import ROTATIONS
from robustflat.models.modes import evaluating, frozen, frozen_statistics
from robustflat.rng import Rows, drawn_for_batch, held, holding
from robustflat.types import AdvBatch, Attack, Batch, Forward, LossTerms


class Rotation(TrainingLoss):
    """CE of the class on one half of the batch + weight * CE of the rotation on the other half.

    Hendrycks et al., NeurIPS 2019, as in Stutz et al., ICCV 2021: every second image of a batch is turned by 0,
    90, 180 or 270 degrees, and the rotation head of the model predicts by how many, from the same features and
    in the same forward pass. An epoch thus sees the label of half of its images. All images are attacked, the
    rotated ones through the rotation head. (The paper's released code leaves the first half of a batch clean;
    the wrapper `Fraction` with 0.5 leaves half of each kind clean, as that code does.)

    In a crafted batch a label y < 0 means: rotated by -1 - y quarter turns.

    Args:
        weight: of the rotation loss, >= 0 (paper: 0.5, 1, 2, 4, 8).
        attack_mode: see `TrainingLoss`.

    Raises:
        UserError: if weight is negative.
    """

    def __init__(self, *, weight: float = 1.0, attack_mode: str = "eval") -> None:
        super().__init__(attack_mode=attack_mode)
        require_range("weight", weight, low=0)
        self.weight = weight
        self._views: tuple[_Head, _Head] | None = None

    def explain(self) -> Explanation:
        """One pass of both halves of the batch, through both heads."""
        turned = "r in {0, 1, 2, 3} quarter turns of every second image, g the rotation head"
        formula = (
            f"L = CE(f(x'), y) + {self.weight:g} CE(g(rot_r(x)'), r), {turned}; each half is attacked through its head"
        )
        return Explanation(formula, "Hendrycks et al., NeurIPS 2019; Stutz et al., ICCV 2021", ONE_SCORING)

    def craft(
        self, model: nn.Module, attack: Attack, batch: Batch, generator: torch.Generator | None = None
    ) -> AdvBatch:
        """Turn every second image and attack all, each through its own head; see `TrainingLoss.craft`.

        Args:
            model: a `Classifier` with a rotation head.
            attack: searches x_adv.
            batch: square images x (B, C, H, H), B >= 2, and labels y, int64 (B,).
            generator: source of the rotations and of the attack's random draws.

        Returns:
            x (partly rotated), x_adv and y as above.

        Raises:
            UserError: for mixed labels, images that are not square, fewer than two images, or a model without
                rotation head.
        """
        _require_usable(model, batch)
        x, y = batch.x.clone(), batch.y.clone()
        kept, turned = _halves(len(y))
        draw = partial(torch.randint, ROTATIONS, generator=generator, device=y.device)
        with holding(turned):
            turns = drawn_for_batch(draw, y[1::2].shape)
        x[1::2], y[1::2] = rotated(x[1::2], turns), -1 - turns
        x_adv = x
        if not isinstance(attack, NoAttack):
            with ExitStack() as state:
                state.enter_context(frozen(model))
                state.enter_context(evaluating(model) if self.attack_mode == "eval" else frozen_statistics(model))
                classify, predict_turns = self._heads(model)
                x_adv = x.clone()
                with holding(kept):
                    x_adv[0::2] = _attacked(attack, classify, x[0::2], y[0::2], generator)
                with holding(turned):
                    x_adv[1::2] = _attacked(attack, predict_turns, x[1::2], turns, generator)
        return AdvBatch(x, x_adv, y)

    def _heads(self, model: nn.Module) -> tuple[Forward, Forward]:
        """The network as seen through each head: modules in eval mode, else callables, whose mode attacks leave."""
        if self.attack_mode != "eval":
            return partial(_logits, model, 0), partial(_logits, model, 1)
        if self._views is None or self._views[0].model is not model:
            self._views = _Head(model, 0), _Head(model, 1)  # kept, as attacks keep what they prepare for a module
        for view in self._views:
            view.eval()
        return self._views

    def __call__(self, model: nn.Module, batch: AdvBatch, generator: torch.Generator | None = None) -> LossTerms:
        """Loss of a batch of `craft`; parts: loss, error (of unrotated x_adv), class_loss, rotation_loss, ..._error.

        Raises:
            UserError: for an odd number of images, of which one kind would weigh more than the other.
        """
        if len(batch.y) % 2:
            raise UserError(
                f"self-supervision trains on an even number of images at once, got {len(batch.y)}: choose another "
                "dataset.batch_size, or another number of micro_batches."
            )
        pair = model(batch.x_adv, auxiliary=True)
        logits, turn_logits = at_least_float32(pair[0]), at_least_float32(pair[1])
        supervised = batch.y >= 0
        labels = torch.where(supervised, batch.y, 0)
        turns = torch.where(supervised, 0, -1 - batch.y)
        class_loss = _mean_over(supervised, F.cross_entropy(logits, labels, reduction="none"))
        rotation_loss = _mean_over(~supervised, F.cross_entropy(turn_logits, turns, reduction="none"))
        total = class_loss + self.weight * rotation_loss
        parts = {
            "loss": total.detach(),
            "error": _mean_over(supervised, (logits.detach().argmax(dim=1) != labels).to(logits.dtype)),
            "class_loss": class_loss.detach(),
            "rotation_loss": rotation_loss.detach(),
            "rotation_error": _mean_over(~supervised, (turn_logits.detach().argmax(dim=1) != turns).to(logits.dtype)),
        }
        return LossTerms(total, parts)


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Images x (B, C, H, H), each turned counter-clockwise by its number (B,) in 0..3 of quarter turns."""
    result = x
    for quarter in range(1, ROTATIONS):
        turned = x.rot90(quarter, dims=(2, 3))
        result = torch.where((turns == quarter)[:, None, None, None], turned, result)
    return result


class _Head(nn.Module):
    """A network with two heads as one that returns the logits of head 0 (class) or 1 (rotation)."""

    def __init__(self, model: nn.Module, which: int) -> None:
        super().__init__()
        self.model, self.which = model, which

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images x."""
        return _logits(self.model, self.which, x)


def _logits(model: nn.Module, which: int, x: Tensor) -> Tensor:
    """Class logits (0) or rotation logits (1) of images x."""
    logits: Tensor = model(x, auxiliary=True)[which]
    return logits


def _attacked(attack: Attack, forward: Forward, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    return attack(forward, x, y, None, generator).x_adv.detach()


def _halves(count: int) -> tuple[Rows, Rows]:
    """Every second row of a batch, and the others; also where this process holds `count` rows of a shared batch.

    Raises:
        UserError: if its rows are not by turns of the one and the other kind; the kinds would weigh unequally then.
    """
    rows = held(count)
    if any(n % 2 != i % 2 for i, n in enumerate(rows.numbers)):
        raise UserError(
            f"self-supervision needs an even number of images per process, got {count}: choose another "
            "dataset.batch_size, or another number of processes."
        )
    return rows.every_second(0), rows.every_second(1)


def _mean_over(chosen: Tensor, values: Tensor) -> Tensor:
    """Mean of the chosen among values (B,); 0 if there are none."""
    return torch.where(chosen, values, 0).sum() / chosen.sum().clamp(min=1)


def _require_usable(model: nn.Module, batch: Batch) -> None:
    if getattr(model, "auxiliary", None) is None:
        raise UserError("self-supervision needs a model with a rotation head: model.auxiliary=true.")
    if batch.y.is_floating_point():
        raise UserError("self-supervision needs one class per image; remove the augmentation that mixes labels.")
    if batch.x.shape[2] != batch.x.shape[3]:
        raise UserError(f"self-supervision turns images, which must be square, got {tuple(batch.x.shape[2:])}.")
    if len(batch.x) < 2:
        raise UserError("self-supervision needs at least two images per batch: one of them is rotated.")
