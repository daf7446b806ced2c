"""Which attacks can search on a share of a batch, and find what they would find on the whole batch."""

from __future__ import annotations

from robustflat.attacks.autopgd import AutoPgd
from robustflat.attacks.fmn import Fmn
from robustflat.attacks.multi_targeted import MultiTargeted
from robustflat.attacks.nested import nested
from robustflat.attacks.noise import NFgsm, RandomNoise
from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.attacks.searching import Searching
from robustflat.attacks.transfer import Transfer
from robustflat.attacks.wrappers import Fraction, OnlyCorrect, PredictedLabels, Restarts, WorstOf
from robustflat.errors import UserError

_BY_EXAMPLE = (
    NoAttack, Pgd, NFgsm, RandomNoise, Fmn, MultiTargeted, Searching, Transfer, Restarts, WorstOf, Fraction,
    PredictedLabels, OnlyCorrect,
)  # fmt: skip


def require_shareable(attack: object) -> None:
    """Refuse an attack whose random draws depend on what it finds, in a training that several processes share.

    An attack that treats every example by itself and draws for all of them finds the same on a share of a batch as on
    the whole. Square, FAB, AutoAttack and attacks of other libraries draw for the examples that still resist.

    Raises:
        UserError: naming it.
    """
    for part in nested(attack):
        stops = isinstance(part, AutoPgd) and part.stop_when_fooled
        if stops or not isinstance(part, (*_BY_EXAMPLE, AutoPgd)):
            what = f"{type(part).__name__} with stop_when_fooled" if stops else type(part).__name__
            raise UserError(
                f"{what} draws its random numbers for a part of the batch only, so several processes cannot share it. "
                "Train with it in one process, or with another attack, such as attack=pgd_linf."
            )
