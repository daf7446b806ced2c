"""Are two runs the same? Their checkpoints and metrics, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustflat.training.checkpoint import load


def compare_runs(a: Path, b: Path) -> list[str]:
    """Differences between two run folders, one line each; empty if weights, state and metrics are equal.

    Args:
        a, b: run folders with checkpoints/last.pt and metrics.jsonl.

    Raises:
        CheckpointError: if a checkpoint is missing or damaged.
    """
    found = list(_differences(load(a / "checkpoints" / "last.pt").parts, load(b / "checkpoints" / "last.pt").parts, ""))
    return [*found, *_different_lines(a / "metrics.jsonl", b / "metrics.jsonl")]


def _different_lines(a: Path, b: Path) -> Iterator[str]:
    one, other = a.read_bytes().splitlines(), b.read_bytes().splitlines()
    if one != other:
        differing = (n for n, (p, q) in enumerate(zip(one, other, strict=False), start=1) if p != q)
        first = next(differing, min(len(one), len(other)) + 1)
        yield f"{a.name}: {len(one)} against {len(other)} lines, first difference in line {first}"


def _differences(a: Any, b: Any, path: str) -> Iterator[str]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        yield from _different_tensors(a, b, path)
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}, key=str):
            if key not in a or key not in b:
                yield f"{path}.{key}: only in {'the first' if key in a else 'the second'}"
            else:
                yield from _differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            yield f"{path}: {len(a)} against {len(b)} entries"
        for index, (one, other) in enumerate(zip(a, b, strict=False)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif a != b and not (a != a and b != b):  # not-a-number equals itself here
        yield f"{path}: {a} against {b}"


def _different_tensors(a: Tensor, b: Tensor, path: str) -> Iterator[str]:
    if a.dtype != b.dtype or a.shape != b.shape:
        yield f"{path}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
    elif not torch.equal(a, b):
        yield f"{path}: differs in {int((a != b).sum())} of {a.numel()} entries"
