"""The reference loss of a flatness measure where the same evaluation has found it already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustflat.attacks.objectives import cross_entropy
from robustflat.evaluation.plan import Piece
from robustflat.flatness.reference import settings_of_runs
from robustflat.store.results import group_name

if TYPE_CHECKING:
    from robustflat.apps.bench import Bench
    from robustflat.apps.networks import NetworkFile


def shared_reference(bench: Bench, file: NetworkFile, piece: Piece) -> tuple[Tensor | None, str | None]:
    """What another measure, or an attack with enough runs, has found for the same network, examples, settings, seed.

    Args:
        bench: plan, data and store.
        file: the network.
        piece: a flatness measure of the plan on some examples.

    Returns:
        Losses (N,), `None` if there are none to share; and all that decides them in words, `None` for a measure that
        cannot share.
    """
    settings = bench.plan.measures[piece.name].reference_settings
    if settings is None:
        return None, None
    words = f"{settings}, seed {bench.seed}, batch size {bench.plan.batch_size}"
    beginning = group_name(file.name, bench.examples(piece.split), "flatness") + "/"
    measured = {} if bench.settings["force"] else bench.store.marked("reference_settings")
    for name, found in measured.items():
        if name.startswith(beginning) and found == words:
            return torch.from_numpy(bench.store.read(name).arrays["reference"]), words
    return _losses_of_runs(bench, file, piece, settings), words


def _losses_of_runs(bench: Bench, file: NetworkFile, piece: Piece, settings: str) -> Tensor | None:
    """Per example the highest loss of the stored runs of an attack that is the measure's own."""
    plan = bench.plan
    for name, attack in plan.attacks.items():
        if settings_of_runs(attack, plan.restarts.get(name, 1), search=plan.search) != settings:
            continue
        place = group_name(file.name, bench.examples(piece.split), "attacks", name)
        made = Piece("attacks", piece.role, piece.split, name)
        if bench.store.attributes(place).get("config") != bench.config(made):
            continue
        logits = torch.from_numpy(bench.store.read(place).arrays["logits"])
        batches = bench.dataset.split(piece.split).batches(plan.batch_size)
        labels = torch.cat([batch.y for batch in batches]).cpu()
        return torch.stack([cross_entropy(run, labels) for run in logits]).amax(dim=0)
    return None
