"""The last screen of a run: its figures, how sure they are, and where its files are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Measured = Mapping[str, Any]


def print_summary(console: Console, results: Measured, folder: Path, *, facts: str) -> None:
    """Print the table of errors and losses, the flatness, and the files of a run.

    Args:
        console: where to print.
        results: as written to results.json (see `apps.train.measure`).
        folder: the run folder.
        facts: one line that says what was trained: data, model, method, seed.
    """
    console.print(f"\n[bold]{facts}[/bold]")
    for weights, measured in results["weights"].items():
        if len(results["weights"]) > 1:
            console.print(f"\nweights: {weights}")
        console.print(_error_table(measured))
        _print_flatness(console, measured)
    console.print(f"\n{results['description']}")
    for label, name in _FILES.items():
        if (folder / name).exists():
            console.print(f"{label:<13}{folder / name}", markup=False, soft_wrap=True)


_FILES = {
    "figures": "results.json",
    "curves": "curves.png",
    "metrics": "metrics.jsonl",
    "config": "config.yaml",
    "checkpoint": "checkpoints/last.pt",
}


def _error_table(measured: Measured) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    splits = [s for s in ("test", "train") if s in measured]
    for split in splits:
        table.add_column(f"{measured[split]['split']} ({measured[split]['count']})", justify="right")
    table.add_row("clean error", *(_percent(measured[s]["clean"], "error") for s in splits))
    table.add_row("clean loss", *(_loss(measured[s]["clean"], "loss") for s in splits))
    attacks = [k for k, v in measured[splits[0]].items() if isinstance(v, Mapping) and k != "clean"] if splits else []
    for attack in attacks:
        table.add_row(f"RErr  ({attack})", *(_percent(measured[s][attack], "robust_error") for s in splits))
        table.add_row(f"RLoss ({attack})", *(_loss(measured[s][attack], "robust_loss") for s in splits))
    return table


def _percent(values: Measured, key: str) -> str:
    low, high = values[f"{key}_low"], values[f"{key}_high"]
    return f"{100 * values[key]:.1f} % [dim]\\[{100 * low:.1f}, {100 * high:.1f}][/dim]"


def _loss(values: Measured, key: str) -> str:
    return f"{_number(values[key])} [dim]+- {_number(values[f'{key}_standard_error'])}[/dim]"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _print_flatness(console: Console, measured: Measured) -> None:
    flat = measured.get("flatness")
    if not flat:
        return
    average = flat["reduction"] == "mean"
    case, drawn = ("average", "draws") if average else ("worst", "restarts")
    # How far restarts differ is no error of their maximum.
    error = f" +- {_number(flat['standard_error'])}" if average else ""
    console.print(
        f"{case}-case flatness of the {flat['loss']} loss: [bold]{_number(flat['value'])}[/bold]{error} "
        f"[dim](xi {flat['radius']:g}, {flat['split']}: {flat['examples']} examples, {len(flat['trials'])} {drawn}, "
        f"{flat['tensors']} tensors, protocol {flat['protocol']})[/dim]"
    )
