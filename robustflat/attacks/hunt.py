"""A search that drops examples as soon as they are fooled, and the record of what became of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from robustflat.attacks.inputs import check_box_on_cpu
from robustflat.attacks.judging import choose, held_still, improves, judge, nothing_found, select, succeeded
from robustflat.geometry.input_ball import InputBall
from robustflat.models.precision import exact_float32
from robustflat.types import Forward, Found, Objective

LOOK_EVERY = 5
"""Steps between two looks at who is fooled: each look waits for the device."""

FILL = 64
"""Images that a forward pass is filled to where few examples are left: smaller passes cost nearly as much."""

Confirm = Callable[[Tensor, Tensor], Tensor]
"""(images (B, C, H, W), labels) -> bool (B,): whether the plain model is fooled by them."""


class Hunted(NamedTuple):
    """Result of a search: what was found (B examples), and the forward passes each example took, int64 (B,)."""

    found: Found
    queries: Tensor


class PlainJudge:
    """Whether a model misclassifies images, in eval mode and full float32; not-a-number never counts.

    Args:
        model: the plain model; a callable that is no module is taken as it is.
    """

    def __init__(self, model: Forward) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, x_adv: Tensor, y: Tensor) -> Tensor:
        """Bool (B,) for images (B, C, H, W) and labels y."""
        with held_still(self.model), exact_float32(x_adv.device):
            logits = self.model(x_adv)
        return succeeded(logits, y)


@dataclass
class Pack:
    """The examples still searched for, packed without gaps; subclasses add the state of their search.

    Every field has one row per example: `rows` says which row of the whole batch it is; `caught` is the last
    point that fooled the model in the search, if `fooled`. An example that is searched towards several targets at
    once has a row for each, and all leave together.
    """

    rows: Tensor
    x: Tensor
    y: Tensor
    caught: Tensor
    fooled: Tensor

    def take(self, index: Tensor) -> Self:
        """The examples of `index`, int64 (M,), with all that belongs to them."""
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def catch(self, point: Tensor, fooled: Tensor) -> None:
        """Remember `point` where it fools the model, bool (B,)."""
        self.caught = choose(fooled, point, self.caught)
        self.fooled = self.fooled | fooled


AnyPack = TypeVar("AnyPack", bound=Pack)


class Record:
    """What became of each example of a batch: best result so far, and passes used.

    Args:
        clean: the clean images, judged: what an example ends as if nothing better turns up.
        y: labels.
        ball: where results must lie.
        confirm: judges images that fooled the searched model; `None`: the search's own judgement stands.
    """

    def __init__(self, clean: Found, y: Tensor, ball: InputBall, confirm: Confirm | None) -> None:
        self.found = clean
        self.y = y
        self.ball = ball
        self.confirm = confirm
        self.queries = torch.ones_like(clean.fooled, dtype=torch.int64)

    def open(self) -> Tensor:
        """Rows of the examples not fooled yet, int64 (M,). Waits for the device."""
        return (~self.found.fooled).nonzero().flatten()

    def spend(self, pack: Pack, passes: int) -> None:
        """Count `passes` forward passes for every example of the pack."""
        self.queries.index_add_(0, pack.rows, torch.full_like(pack.rows, passes))

    def claims(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Places in the pack, int64 (M,), of those really fooled, and the images; all are searched for as before."""
        claimed = pack.fooled.nonzero().flatten()
        # The search may keep to the ball only up to rounding; the result keeps to it strictly.
        caught = self.ball.project(pack.caught[claimed], pack.x[claimed])
        if len(claimed) and self.confirm is not None:
            real = self.confirm(caught, pack.y[claimed])
            claimed, caught = claimed[real], caught[real]
            pack.fooled = torch.zeros_like(pack.fooled)
        return claimed, caught

    def write(self, rows: Tensor, caught: Tensor) -> None:
        """Take images (M, C, H, W) that fool the model for `rows`; the first one for an example that has several."""
        first = first_of_each(rows)
        self.found.x_adv[rows[first]] = caught[first]
        self.found.fooled[rows] = True

    def settle(self, pack: AnyPack) -> AnyPack:
        """Write down who is fooled and return the others; those not confirmed are searched on."""
        claimed, caught = self.claims(pack)
        if len(claimed) == 0:
            return pack
        self.write(pack.rows[claimed], caught)
        return pack.take((~self.found.fooled[pack.rows]).nonzero().flatten())

    def result(self, forward: Forward, objective: Objective) -> Hunted:
        """All results, with the objective's value computed at the points that the search stopped at."""
        value = judge(forward, self.found.x_adv, self.y, objective).value
        return Hunted(self.found._replace(value=value), self.queries)

    def offer(self, rows: Tensor, new: Found, keep: str) -> None:
        """Take results for some rows, (M,), where they are better by the rule `keep` of `judging`."""
        old = Found(*(part[rows] for part in self.found))
        better = select(improves(new, old, keep), new, old)
        for part, value in zip(self.found, better, strict=True):
            part[rows] = value


def begin(
    forward: Forward, x: Tensor, y: Tensor, ball: InputBall, objective: Objective, confirm: Confirm | None
) -> Record:
    """Record of a search that starts at x: one forward pass.

    Raises:
        UserError: on the CPU, for images outside the box and labels that are no class.
    """
    check_box_on_cpu(x, ball.low, ball.high)
    clean = judge(forward, x, y, objective)
    fooled = clean.fooled.clone() if confirm is None else clean.fooled & confirm(x, y)
    return Record(Found(x.clone(), clean.value, fooled), y, ball, confirm)


def first_of_each(rows: Tensor) -> Tensor:
    """Where each value of `rows`, int64 (M,), stands for the first time; ordered by value."""
    values, inverse = torch.unique(rows, return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    return torch.full_like(values, len(rows)).scatter_reduce(0, inverse, places, "amin")


def nothing_hunted(x: Tensor) -> Hunted:
    """Result for an empty batch; the model is not asked."""
    return Hunted(nothing_found(x), torch.zeros(0, dtype=torch.int64, device=x.device))
