"""Learning-rate schedules in closed form, one value per optimizer step.

Every schedule is `make_schedule(optimizer, total_steps, *, ...) -> Schedule`; positions in time are fractions
of the whole training, so a run of another length keeps the shape. In a config:
`{_target_: robustflat.training.schedules.multistep, _partial_: true, fractions: [0.4, 0.6, 0.8], factor: 0.1}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch.optim import Optimizer

from robustflat.errors import CheckpointError, UserError, require_range


class Schedule:
    """Sets the learning rate of every parameter group before each optimizer step.

    Args:
        optimizer: its groups' learning rates at construction are the initial ones.
        total_steps: optimizer steps of the whole training, >= 1; later steps keep the last value.
        rate: (steps done, initial learning rate) -> learning rate of the next step.
        momentum: (steps done, initial momentum) -> momentum of the next step; `None` leaves it.

    Raises:
        UserError: if total_steps < 1, or the optimizer has no momentum to set.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        rate: Callable[[int, float], float],
        momentum: Callable[[int, float], float] | None = None,
    ) -> None:
        require_range("total_steps", total_steps, low=1)
        if momentum is not None and any("momentum" not in group for group in optimizer.param_groups):
            raise UserError(f"momentum cannot follow a schedule in {type(optimizer).__name__}: use optimizer=sgd.")
        self.optimizer = optimizer
        self.total_steps = total_steps
        self._rate, self._momentum = rate, momentum
        self._initial = [float(group["lr"]) for group in optimizer.param_groups]
        self._momenta = [float(group.get("momentum", 0.0)) for group in optimizer.param_groups]
        self._done = 0
        self._scale = 1.0
        self._apply()

    def rescale(self, scale: float) -> None:
        """Multiply every learning rate of the schedule by `scale` > 0 from now on; a later scale replaces it."""
        self._scale = scale
        self._apply()

    def step(self) -> None:
        """Go on by one optimizer step."""
        self._done += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """Learning rate of the next optimizer step, by parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, object]:
        """Position in the schedule; the shape comes from the config."""
        return {"done": self._done, "total_steps": self.total_steps, "scale": self._scale}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue at a saved position.

        Raises:
            CheckpointError: if the saved schedule had another length, so that its shape differs.
        """
        if state.get("total_steps") != self.total_steps:
            raise CheckpointError(
                f"the checkpoint's schedule has {state.get('total_steps')} steps, ours {self.total_steps}: "
                "epochs, batch size and size of the training set must be those of the interrupted run."
            )
        self._done, self._scale = int(str(state["done"])), float(str(state.get("scale", 1.0)))
        self._apply()

    def _apply(self) -> None:
        position = min(self._done, self.total_steps - 1)
        for group, initial in zip(self.optimizer.param_groups, self._initial, strict=True):
            group["lr"] = self._scale * self._rate(position, initial)
        if self._momentum is not None:
            for group, initial in zip(self.optimizer.param_groups, self._momenta, strict=True):
                group["momentum"] = self._momentum(position, initial)


def constant(optimizer: Optimizer, total_steps: int) -> Schedule:
    """The optimizer's own learning rate throughout."""
    return Schedule(optimizer, total_steps, lambda step, initial: initial)


def multistep(
    optimizer: Optimizer,
    total_steps: int,
    *,
    fractions: Sequence[float] = (0.4, 0.6, 0.8),
    factor: float = 0.1,
) -> Schedule:
    """Multiply the learning rate by `factor` after each fraction of training (paper: 0.4, 0.6, 0.8; x0.1).

    Args:
        optimizer, total_steps: see `Schedule`.
        fractions: increasing, each in (0, 1); the drop comes after round(fraction * total_steps) steps.
        factor: in (0, 1].

    Raises:
        UserError: for a milestone at or after the end, milestones out of order, or a factor outside (0, 1].
    """
    require_range("factor", factor, low=0, high=1, low_open=True)
    for fraction in fractions:
        require_range(
            "fractions",
            fraction,
            low=0,
            high=1,
            low_open=True,
            high_open=True,
            hint="Milestones are fractions of training, not epochs: 60 of 150 epochs is 0.4.",
        )
    if any(late <= early for early, late in pairwise(fractions)):
        raise UserError(f"fractions must increase, got {list(fractions)}.")
    milestones = [round(fraction * total_steps) for fraction in fractions]
    return Schedule(
        optimizer, total_steps, lambda step, initial: initial * factor ** sum(step >= m for m in milestones)
    )


def late(
    optimizer: Optimizer,
    total_steps: int,
    *,
    fractions: Sequence[float] = (14 / 15, 29 / 30),
    factor: float = 0.1,
) -> Schedule:
    """The paper's "late" multi-step schedule: drops after 140 and 145 of 150 epochs. See `multistep`."""
    return multistep(optimizer, total_steps, fractions=fractions, factor=factor)


def cyclic(
    optimizer: Optimizer,
    total_steps: int,
    *,
    peak: float = 0.2,
    cycles: int = 1,
    start: float = 0.0,
    end: float = 0.0,
    rise: float = 0.5,
    momentum_at_peak: float | None = None,
) -> Schedule:
    """Triangles from `start` over `peak` to `end` (paper: 0, 0.2, 0; 30 epochs each, 1-4 cycles).

    Replaces the optimizer's learning rate.

    Args:
        optimizer, total_steps: see `Schedule`.
        peak: highest learning rate, > 0.
        cycles: number of triangles, >= 1.
        start, end: learning rates at the ends of a triangle, in [0, peak].
        rise: share of a cycle in which the rate rises, in (0, 1).
        momentum_at_peak: in [0, 1); momentum falls to it where the rate rises, and returns (the paper's released
            code: 0.9 to 0.8, through a default of its library). `None` leaves it as it is.

    Raises:
        UserError: for values outside these ranges, or fewer than two steps per cycle.
    """
    require_range("peak", peak, low=0, low_open=True)
    require_range("cycles", cycles, low=1)
    require_range("start", start, low=0, high=peak)
    require_range("end", end, low=0, high=peak)
    require_range("rise", rise, low=0, high=1, low_open=True, high_open=True)
    if total_steps < 2 * cycles:
        raise UserError(f"cycles must leave at least two steps each, got {cycles} cycles in {total_steps} steps.")

    def rate(step: int, initial: float) -> float:
        position = (step * cycles) % total_steps / total_steps  # exact at the turn from one cycle to the next
        if position < rise:
            return start + (peak - start) * position / rise
        return end + (peak - end) * (1 - position) / (1 - rise)

    if momentum_at_peak is None:
        return Schedule(optimizer, total_steps, rate)
    require_range("momentum_at_peak", momentum_at_peak, low=0, high=1, high_open=True)

    def momentum(step: int, initial: float) -> float:
        position = (step * cycles) % total_steps / total_steps
        height = position / rise if position < rise else (1 - position) / (1 - rise)
        return initial + (momentum_at_peak - initial) * height

    return Schedule(optimizer, total_steps, rate, momentum)


def cosine(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.0, final: float = 0.0) -> Schedule:
    """Half a cosine from the optimizer's learning rate to `final` times it, after a linear warm-up.

    Args:
        optimizer, total_steps: see `Schedule`.
        warmup: fraction of training in [0, 1) in which the rate rises linearly from near zero.
        final: share of the initial rate at the end, in [0, 1].

    Raises:
        UserError: for values outside these ranges.
    """
    require_range("warmup", warmup, low=0, high=1, high_open=True, hint="It is a fraction of training.")
    require_range("final", final, low=0, high=1)
    rising = round(warmup * total_steps)

    def rate(step: int, initial: float) -> float:
        if step < rising:
            return initial * (step + 1) / rising
        position = (step - rising) / (total_steps - rising)
        return initial * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * position)))

    return Schedule(optimizer, total_steps, rate)
