"""The two protocols of a flatness measure: what the paper says, and what its released code does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from robustflat.attacks.objectives import cross_entropy
from robustflat.attacks.pgd import Pgd
from robustflat.errors import require_one_of
from robustflat.geometry.input_ball import LinfBall

REFERENCE_RESTARTS = 10
"""Runs of the attack at the undisplaced weights, in both protocols (PGD-20 x 10 of Stutz et al.)."""

PGD_STEPS = 20
"""Steps of those attacks."""

INPUT_STEP = 0.007
"""Step of the attacks on inputs, in both protocols."""


@dataclass(frozen=True)
class Protocol:
    """Where paper and released code differ (see `PROTOCOLS`).

    Attributes:
        name: "paper" or "released".
        epsilon: L-infinity radius of the default attack.
        random_start: where that attack starts.
        select: how the strongest of several restarts is recognised, see `robustflat.attacks.strongest`.
        draws: "per_batch": fresh displacement for every batch; "per_set": one for all examples.
        sampling: average case: displacements drawn in the "ball" or on the "sphere".
        capped: losses are -log(p + 1e-12) of float32 probabilities, hence at most 27.6.
        keep: worst case: the "best" or the "last" point of an ascent counts.
        worst_start: worst case: how its first displacement is drawn, a `sampling` of `WeightBall.sample`.
        weight_step: worst case: default step in weight space; `None` is a third of the radius.
    """

    name: str
    epsilon: float
    random_start: str
    select: str
    draws: str
    sampling: str
    capped: bool
    keep: str
    worst_start: str
    weight_step: float | None

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy (B,) from logits (B, K) and labels (B,), capped where the released code's is."""
        if not self.capped:
            return cross_entropy(logits, y)
        probabilities = logits.to(torch.float32).softmax(dim=1)
        return -(probabilities.gather(1, y[:, None]).squeeze(1) + 1e-12).log()

    def attack(self) -> Pgd:
        """PGD-20 with sign gradients: the attack of this protocol."""
        return Pgd(LinfBall(self.epsilon), steps=PGD_STEPS, step_size=INPUT_STEP, random_start=self.random_start)


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "paper": Protocol(
            name="paper",
            epsilon=8 / 255,
            random_start="uniform",
            select="cross_entropy",
            draws="per_batch",
            sampling="ball",
            capped=False,
            keep="best",
            worst_start="ball",
            weight_step=None,
        ),
        "released": Protocol(
            name="released",
            epsilon=0.0314,
            random_start="uniform_norm",
            select="confident_wrong",
            draws="per_set",
            sampling="sphere",
            capped=True,
            keep="last",
            worst_start="uniform_norm",
            weight_step=0.01,
        ),
    }
)
"""Name -> protocol."""


def protocol_by_name(name: str) -> Protocol:
    """The protocol called `name`.

    Raises:
        UserError: with the allowed names.
    """
    require_one_of("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
