"""The last screen of an evaluation: its figures, how sure they are, and where they are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from robustflat.apps.sanity_report import print_sanity, sanity_of
from robustflat.evaluation.rows import Row

if TYPE_CHECKING:
    from robustflat.apps.bench import Bench
    from robustflat.apps.networks import NetworkFile

SHOWN = {
    "error": "clean error",
    "loss": "clean loss",
    "robust_error": "RErr",
    "robust_loss": "RLoss",
    "robust_loss_on_correct": "RLoss on correct",
    "robust_loss_on_incorrect": "RLoss on incorrect",
    "robust_error_at_99tpr": "RErr at 99 % TPR",
    "flatness": "flatness",
}
"""Metrics of the screen, in its order; the table over runs has all."""

MANY = 3
"""From this number of networks on, one line each."""


def print_evaluation(
    console: Console, rows: Sequence[Row], bench: Bench, files: Sequence[NetworkFile], names: Sequence[str]
) -> None:
    """Print a table for every network, or one line each for many, and where the results are.

    Args:
        console: where to print.
        rows: of the networks evaluated.
        bench: plan and store.
        files: the networks, in order.
        names: of their results in the store.
    """
    checked = sanity_of(bench.store, names)
    if len(files) >= MANY:
        console.print(_overview(rows, [file.name for file in files]))
        print_sanity(console, checked, brief=True)
    else:
        for file in files:
            console.print(f"\n[bold]{file.name}[/bold] ({file.path.name})")
            console.print(_details([row for row in rows if row["checkpoint"] == file.name]))
            print_sanity(console, [found for found in checked if found.checkpoint == file.name])
    plan = bench.plan
    console.print(
        f"\nThreat model {plan.norm}, epsilon {plan.epsilon:.5g}, seed {bench.seed}; [..] 95 % interval; flatness +- "
        f"standard error over draws (average case), or over restarts (worst case: how far these differ).",
        markup=False,
    )
    console.print(f"results      {bench.store.path}", markup=False)
    console.print(f"as a table   python scripts/export.py {bench.store.path.parent}", markup=False)


def _details(rows: Sequence[Row]) -> Table:
    """Metrics by split."""
    shown = [row for row in rows if row["role"] in ("test", "train") and row["metric"] in SHOWN]
    splits = list(dict.fromkeys((row["split"], row["count"]) for row in shown))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for split, count in splits:
        table.add_column(f"{split} ({count})".replace("[", "\\["), justify="right")
    for metric, label in SHOWN.items():
        found = [row for row in rows if row["metric"] == metric]
        for measure in dict.fromkeys(row["measure"] for row in found):
            cells = {row["split"]: _cell(row) for row in found if row["measure"] == measure}
            radius = next(row["radius"] for row in found if row["measure"] == measure)
            where = measure if radius is None else f"{measure}, xi {radius:g}"
            name = label if measure == "clean" else f"{label} ({where})"
            table.add_row(name, *(cells.get(split, "") for split, _ in splits))
    return table


def _overview(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """One line per network with its figures on test examples."""
    test = [row for row in rows if row["role"] == "test" and row["metric"] in SHOWN and "_on_" not in row["metric"]]
    columns = list(dict.fromkeys((row["measure"], row["metric"]) for row in test if "99tpr" not in row["metric"]))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for measure, metric in columns:
        table.add_column(SHOWN[metric] if measure == "clean" else f"{SHOWN[metric]} ({measure})", justify="right")
    values = {(row["checkpoint"], row["measure"], row["metric"]): row for row in test}
    for name in names:
        cells = [values.get((name, *column)) for column in columns]
        table.add_row(name, *("" if cell is None else _number(cell) for cell in cells))
    return table


def _number(row: Row) -> str:
    if "error" in row["metric"]:
        return f"{100 * row['value']:.1f} %"
    return f"{row['value']:.3f}"


def _cell(row: Row) -> str:
    text = _number(row)
    if row["kind"] == "flatness":
        return f"{text} [dim]+- {row['stderr']:.3f}[/dim]" if math.isfinite(row["stderr"]) else text
    if not math.isfinite(row["low"]):
        return text
    scale, digits = (100, 1) if "error" in row["metric"] else (1, 3)
    return f"{text} [dim]\\[{scale * row['low']:.{digits}f}, {scale * row['high']:.{digits}f}][/dim]"
