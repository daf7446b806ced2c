"""What an evaluation says of itself: its sanity checks, and whether searches for the worst case have converged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console

from robustflat.attacks.sanity import Finding, check_others
from robustflat.errors import DataError
from robustflat.store.results import ResultStore


class Checked(NamedTuple):
    """Findings about one stored result: its checkpoint, what it is about in words, and the checks."""

    checkpoint: str
    about: str
    findings: tuple[Finding, ...]


def sanity_of(store: ResultStore, names: Sequence[str]) -> list[Checked]:
    """All findings of stored results, and the comparison of attacks with and without gradients.

    Args:
        store: the results of a run.
        names: of results in it.

    Raises:
        DataError: if findings are not what an evaluation writes.
    """
    found = []
    for name in names:
        attrs = store.attributes(name)
        if "sanity" in attrs:
            about = f"{attrs['split']}" if attrs["kind"] == "sanity" else f"{attrs['name']} on {attrs['split']}"
            found.append(Checked(str(attrs["checkpoint"]), about, _findings(store, name, attrs["sanity"])))
        if str(attrs.get("convergence", "")):
            level = "ok" if attrs.get("converged", True) else "warning"  # absent: cannot be told
            finding = Finding("convergence", level, str(attrs["convergence"]))
            found.append(Checked(str(attrs["checkpoint"]), f"{attrs['name']} on {attrs['split']}", (finding,)))
    return [*found, *_without_gradients(store, names)]


def _findings(store: ResultStore, name: str, text: str) -> tuple[Finding, ...]:
    try:
        return tuple(Finding(**entry) for entry in json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataError(f"{store.path}: the findings of '{name}' are not what an evaluation writes.") from error


def _without_gradients(store: ResultStore, names: Sequence[str]) -> Iterator[Checked]:
    """On each split: what transfer, noise and random search break of the examples that the other attacks left."""
    threats: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        attrs = store.attributes(name)
        if attrs.get("kind") == "attacks" and not str(attrs["attack"]).startswith("NoAttack"):
            threat = f"{attrs['norm']} {attrs['epsilon']}"
            threats.setdefault((str(attrs["checkpoint"]), str(attrs["split"]), threat), []).append(name)
    for (checkpoint, split, _), attacks in threats.items():
        black = [name for name in attacks if store.attributes(name).get("black_box")]
        white = [name for name in attacks if name not in black]
        if black and white:
            left = ~np.any([_wrong(store, name) for name in white], axis=0)
            counts = {name.rsplit("/", 1)[1]: int((_wrong(store, name) & left).sum()) for name in black}
            yield Checked(checkpoint, f"attacks on {split}", tuple(check_others(int(left.sum()), counts)))


def _wrong(store: ResultStore, name: str) -> np.ndarray:
    """Which examples are wrong clean or in any run of an attack, bool (N,)."""
    split = name.rsplit("/", 2)[0]
    labels, clean = store.read(split).arrays["labels"], store.read(f"{split}/clean").arrays["logits"]
    runs = store.read(name).arrays["logits"]
    wrong: np.ndarray = (clean.argmax(1) != labels) | (runs.argmax(2) != labels).any(0)
    return wrong


def print_sanity(console: Console, checked: Iterable[Checked], *, brief: bool = False) -> None:
    """Print warnings in full and the checks that found nothing by name.

    Args:
        console: where to print.
        checked: from `sanity_of`.
        brief: warnings only, each with its checkpoint.
    """
    for checkpoint, about, findings in checked:
        good = [finding for finding in findings if finding.level == "ok"]
        where = f"{checkpoint}, {about}" if brief else about
        if good and not brief:
            single = good[0].message if len(good) == 1 else f"{len(good)} ok: {', '.join(f.check for f in good)}"
            console.print(f"sanity       {where}: {single}", markup=False)
        for finding in findings:
            if finding.level != "ok":
                console.print(f"WARNING      {where}: {finding.check}: {finding.message}", style="yellow", markup=False)
