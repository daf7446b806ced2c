"""How much memory a device has left, how much was used, and options that bound what a computation may take of it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import torch

from robustflat.errors import UserError

if sys.platform != "win32":
    import resource

MIB = 2**20

MemoryBudget: TypeAlias = float | str | None
"""MiB as a number >= 0; "auto": half of what is free when it is asked for; `None`: no bound."""

_SHARE = 0.5
"""Of the free memory for "auto": the rest is for what a computation takes besides, and for other processes."""

_UNKNOWN = 2**30
"""Taken to be free where a system tells nothing."""


def require_memory_budget(budget: MemoryBudget) -> None:
    """Refuse what is no memory budget.

    Raises:
        UserError: with the value and what is allowed.
    """
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if budget is None or budget == "auto" or (number and float(budget) >= 0):
        return
    raise UserError(
        "memory_budget must be a number of MiB >= 0, 'auto' (half of the free memory) or null (no bound), "
        f"got {budget!r}."
    )


def budget_bytes(budget: MemoryBudget, device: torch.device | str = "cpu") -> float:
    """Bytes that a budget allows on a device at this moment; infinite for `None`.

    >>> budget_bytes(1.5), budget_bytes(None)
    (1572864.0, inf)

    Raises:
        UserError: if it is no budget.
    """
    require_memory_budget(budget)
    if budget is None:
        return math.inf
    return _SHARE * free_memory(device) if budget == "auto" else MIB * float(budget)


def free_memory(device: torch.device | str = "cpu", *, root: Path = Path("/")) -> int:
    """Bytes that this process could still take on a device without swapping or failing.

    CUDA: free on the card, and what PyTorch's allocator holds but does not use. CPU, Linux: the kernel's estimate of
    available memory, and what the limits of the control groups (containers, batch systems) leave if that is less; page
    cache counts as free. Elsewhere: a quarter of the installed memory, or 1 GiB if that is unknown too.

    Args:
        device: any PyTorch device; those other than CUDA are taken to share the processor's memory.
        root: of the file tree that the kernel's figures are read from.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _fields(root / "proc/meminfo").get("MemAvailable:")
    left = _installed() // 4 if available is None else 1024 * available
    return max(min([left, *_left_in_groups(root)]), 0)


def _installed() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system, or one that does not say
        return 4 * _UNKNOWN


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group around this process leaves, in version 2 and 1 of the interface."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's, and the container's own group the mount point.
        group = PurePosixPath(path.lstrip("/"))
        for part in {group, *group.parents}:
            limit, used = _number(mount / part / names[0]), _number(mount / part / names[1])
            if limit is not None and used is not None:
                yield limit - used + _fields(mount / part / "memory.stat").get(names[2], 0)


def _fields(path: Path) -> dict[str, int]:
    """Lines "name number ..." of a file."""
    words = [line.split() for line in _text(path).splitlines()]
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdecimal()}


def _number(path: Path) -> int | None:
    """The number that a file holds; `None` for "max" (no limit), or no file."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # another system, or a group that this process may not read
        return ""


def peak_memory_mib(device: str | torch.device) -> float:
    """Largest memory so far in MiB: allocated on a CUDA device, resident of this process elsewhere; NaN if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
