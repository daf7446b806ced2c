"""Are two runs the same? Their checkpoints and metrics, bit for bit."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustflat.apps.config import differences
from robustflat.apps.messages import complain
from robustflat.errors import UserError
from robustflat.training.checkpoint import load


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `scripts/compare_runs.py`.

    Args:
        arguments: default: those of the process.

    Returns:
        Exit code: 0; 1 if the runs differ and `--assert-equal` is given; 2 if they cannot be compared.
    """
    parser = argparse.ArgumentParser(description="Compare two run folders, bit for bit.")
    parser.add_argument("a", type=Path, help="a run folder")
    parser.add_argument("b", type=Path, help="another run folder")
    parser.add_argument("--assert-equal", action="store_true", help="exit code 1 if weights, state or metrics differ")
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        found = compare_runs(given.a, given.b)
    except UserError as error:
        complain(str(error))
        return 2
    for line in compare_origins(given.a, given.b):
        print(f"origin  {line}")
    print("\n".join(f"result  {line}" for line in found) or "equal bit for bit")
    return 1 if found and given.assert_equal else 0


def compare_origins(a: Path, b: Path) -> list[str]:
    """Differences between the provenance of two runs, one line each; data, versions, commit, machine, command."""
    return list(differences(_provenance(a), _provenance(b)))


def _provenance(run: Path) -> dict[str, Any]:
    try:
        content = json.loads((run / "provenance.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def compare_runs(a: Path, b: Path) -> list[str]:
    """Differences between two run folders, one line each; empty if weights, state and metrics are equal.

    Args:
        a, b: run folders with checkpoints/last.pt and metrics.jsonl.

    Raises:
        UserError: if a checkpoint or a metrics file is missing or damaged.
    """
    found = list(_differences(load(a / "checkpoints" / "last.pt").parts, load(b / "checkpoints" / "last.pt").parts, ""))
    return [*found, *_different_lines(a / "metrics.jsonl", b / "metrics.jsonl")]


def _different_lines(a: Path, b: Path) -> Iterator[str]:
    for path in (a, b):
        if not path.is_file():
            raise UserError(f"there is no metrics file {path}: is {path.parent} a run folder?")
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
