"""A training that several processes share (`torchrun`): who opens the folder, who loads first, what is on record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from robustflat.apps.run_folder import FollowedFolder, RunFolder
from robustflat.errors import UserError
from robustflat.ranks import current

NO_SWEEP = (
    "torchrun starts the processes of one command, and a sweep (-m) is many. Start torchrun once for each, or the "
    "sweep without torchrun: hydra/launcher=joblib gives every run a process of its own."
)
"""A run that failed on one process only would leave the others behind with the next run."""


def own_device(name: str) -> str:
    """The device of this rank, for a device that was chosen for all.

    Raises:
        UserError: if several ranks would share one card, or the device cannot be used by several.
    """
    if current().size == 1 or name == "cpu":
        return name
    if name != "cuda":
        raise UserError(f"device={name} is one device for several processes. Write device=auto, cuda or cpu.")
    return f"cuda:{torch.cuda.current_device()}"


def open_folder(path: Path, identity: Mapping[str, Any]) -> RunFolder:
    """The run folder, locked by the first rank; the others see it but write nothing.

    Raises:
        UserError: see `RunFolder`; on the first rank, which takes the others with it.
    """
    ranks = current()
    if ranks.first:
        folder = RunFolder(path, identity)
        ranks.agreed(folder.done)
        return folder
    return FollowedFolder(path, done=ranks.agreed(False))


def one_after_the_other(load: Callable[[], object]) -> None:
    """Let the first rank load (and maybe download) before the others do."""
    ranks = current()
    if ranks.first:
        load()
    ranks.wait()
    if not ranks.first:
        load()


def sharing(config: DictConfig) -> dict[str, Any]:
    """For the record: number of processes, and what batch norm's statistics are those of."""
    synchronised = current().size == 1 or bool(config.trainer.get("sync_batch_norm", True))
    return {"processes": current().size, "batch_norm": "whole batch" if synchronised else "share of each process"}


def described(provenance: Mapping[str, Any]) -> str:
    """Clause on how many processes have trained or measured a run, from its record; "" if it was always one."""
    entries = [*provenance.get("earlier", []), provenance]
    shared = [entry for entry in entries if entry.get("processes", 1) > 1]
    if not shared:
        return ""
    counts = sorted({entry.get("processes", 1) for entry in entries})
    kinds = sorted({entry["batch_norm"] for entry in shared})
    return f", {' and '.join(map(str, counts))} processes, batch norm over the {' and '.join(kinds)}"
