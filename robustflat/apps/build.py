"""From checked configuration nodes to objects; errors come back as sentences that name the node."""

from __future__ import annotations

import re
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from robustflat.apps.messages import user_error_in
from robustflat.errors import UserError


def build(node: DictConfig, **supplied: Any) -> Any:
    """Build what a node's `_target_` names, with plain containers as arguments and `supplied` on top.

    Raises:
        UserError: if a constructor refuses its arguments, with the key of the node.
    """
    try:
        return instantiate(node, _convert_="all", **supplied)
    except InstantiationException as error:
        cause = user_error_in(error)
        if cause is None:
            raise
        where = re.search(r"full_key: (\S+)", str(error))
        raise UserError(f"{where.group(1)}: {cause}" if where else str(cause)) from error


def named_nodes(config: DictConfig, key: str) -> dict[str, DictConfig]:
    """Callbacks or wrappers of the trainer by name; an entry that is null, or no such key at all, is left out."""
    entries = config.trainer.get(key) or {}
    return {str(name): node for name, node in entries.items() if node is not None}


def choose_device(name: str) -> str:
    """'auto' -> 'cuda' where one is present, else 'cpu'; any other name is checked, and a card made the current one.

    Raises:
        UserError: for a device that PyTorch does not know or that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is not a device: write auto, cpu, cuda or cuda:<number>.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"device={name} is not there: {count} CUDA devices found. device=auto takes what there is.")
        if device.index is not None:  # what asks for no card by number (records, waiting, Triton) means this one
            torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps is not there. device=auto takes what there is.")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"device={name} is not supported: write auto, cpu, cuda or cuda:<number>.")
    return name
