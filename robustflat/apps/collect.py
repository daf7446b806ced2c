"""Rows of tables from the results files of runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustflat.errors import DataError
from robustflat.evaluation.curvature_rows import sharpness_rows, spectrum_rows
from robustflat.evaluation.rows import Row, attack_rows, clean_rows, flatness_rows, gap_rows, sanity_rows
from robustflat.store.results import ResultStore, Stored

RESULTS = "results.h5"
CARRIED = ("norm", "epsilon", "loss", "protocol", "precision", "version", "key", "epoch", "role", "checkpoint", "split")

STOPS_EARLY = "AutoAttack"
"""Attacks that end at the first misclassified image: their losses say nothing."""


class Origin(NamedTuple):
    """Which run a row belongs to."""

    run_id: str
    experiment: str
    seed: int | None


def origin_of(run: Path) -> Origin:
    """Run id and experiment are the names of the folders; the seed comes from the run's configuration."""
    seed = None
    for line in _lines(run / "config.yaml"):
        name, _, value = line.partition(":")
        if name == "seed" and value.strip().isdigit():
            seed = int(value)
    return Origin(run.resolve().name, run.resolve().parent.name, seed)


def rows_of_run(run: Path) -> list[Row]:
    """All rows of a run folder, without the role that only printing needs.

    Raises:
        DataError: if its results file is missing or damaged.
    """
    if not (run / RESULTS).is_file():
        raise DataError(f"{run} has no {RESULTS}: evaluate it first, python evaluate.py run={run}")
    rows = rows_of(ResultStore(run / RESULTS), origin_of(run))
    # Where a number was measured on more and on fewer examples, that of the most comes last, which counts in reports.
    rows.sort(key=lambda row: (str(row["checkpoint"]), row["count"] or 0))
    return [{key: value for key, value in row.items() if key != "role"} for row in rows]


def rows_of(store: ResultStore, origin: Origin, *, names: Sequence[str] | None = None) -> list[Row]:
    """Rows of the results of a store, and the gaps between test and train.

    Args:
        store: the results of a run.
        origin: what to write into the columns run_id, experiment and seed.
        names: results such as "last/test/clean"; None: all.

    Raises:
        DataError: if the file is damaged, or arrays do not have the shapes that they should.
    """
    rows: list[Row] = []
    by_role: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for name in store.names() if names is None else names:
        checkpoint, stored = name.split("/")[0], store.read(name)
        made = [_placed(row, stored, origin) for row in _rows_of_result(store, name, stored)]
        rows += made
        by_role[checkpoint, str(stored.attrs.get("role"))] += made
    for checkpoint in dict.fromkeys(checkpoint for checkpoint, _ in by_role):
        rows += _gaps(by_role[checkpoint, "test"], by_role[checkpoint, "train"])
    return rows


def _gaps(test: Sequence[Row], train: Sequence[Row]) -> Iterator[Row]:
    """One gap for every number that was measured on test and training examples of the same data.

    Of several subsets those count that are cut alike, such as test[:1000] and train[:1000], else the largest.
    """
    for measured in dict.fromkeys(map(_measured, test)):
        mine, others = ([row for row in rows if _measured(row) == measured] for rows in (test, train))
        if others:
            splits = ({row["split"]: row for row in reversed(rows)}.values() for rows in (mine, others))
            one, other = max(product(*splits), key=_belonging)
            same = [row for row in mine if row["split"] == one["split"]]
            for row in gap_rows(same, [row for row in others if row["split"] == other["split"]]):
                yield {**same[0], **row, "split": "test - train", "role": "gap", "key": ""}


def _measured(row: Row) -> tuple[Any, ...]:
    """What a row is about, apart from the examples: kind, measure, threat model, and which data."""
    return row["kind"], row["measure"], row["norm"], row["epsilon"], str(row["split"]).rpartition(" ")[0]


def _belonging(pair: tuple[Row, ...]) -> tuple[bool, int, int]:
    one, other = pair
    return _cut(one) == _cut(other), one["count"] or 0, other["count"] or 0


def _cut(row: Row) -> str:
    """How a split is cut out of its set: "test[:10]" -> "[:10]"."""
    return str(row["split"].rpartition(" ")[2].removeprefix("test").removeprefix("train"))


def _rows_of_result(store: ResultStore, name: str, stored: Stored) -> list[Row]:
    kind, split = stored.attrs.get("kind"), "/".join(name.split("/")[:2])
    if stored.attrs.get("role") == "selection" or kind == "landscape":
        return []  # not a number of a network
    try:
        if kind == "flatness":
            return _flatness_rows(store, split, name, stored)
        if kind in _WITHOUT_LABELS:
            return _WITHOUT_LABELS[str(kind)](name.rsplit("/", 1)[1], stored)
        if kind == "sanity":
            return sanity_rows("sanity", "sanity", json.loads(stored.attrs["sanity"]))
        labels = _tensor(store, split, "labels")
        if kind == "clean":
            return clean_rows(torch.from_numpy(stored.arrays["logits"]), labels)
        clean = _tensor(store, f"{split}/clean", "logits")
        runs = torch.from_numpy(stored.arrays["logits"])
        losses = not str(stored.attrs.get("attack")).startswith(STOPS_EARLY)
        attack = name.rsplit("/", 1)[1]
        rows = attack_rows(attack, clean, runs, labels, losses=losses)
        return [*rows, *sanity_rows("attack", attack, json.loads(stored.attrs.get("sanity", "[]")))]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{store.path}: the result '{name}' is not what it should be ({error}).") from error


def _flatness_rows(store: ResultStore, split: str, name: str, stored: Stored) -> list[Row]:
    losses, reference = (torch.from_numpy(stored.arrays[part]) for part in ("losses", "reference"))
    known = store.has(f"{split}/clean")
    return flatness_rows(
        name.rsplit("/", 1)[1],
        losses,
        reference,
        reduction=str(stored.attrs["reduction"]),
        groups=[int(size) for size in json.loads(stored.attrs["groups"])],
        radius=float(stored.attrs["radius"]),
        labels=_tensor(store, split, "labels") if known else None,
        classes=_tensor(store, f"{split}/clean", "logits").shape[1] if known else 0,
    )


def _spectrum_rows(name: str, stored: Stored) -> list[Row]:
    arrays = stored.arrays
    ends = [float(arrays[f"{end}_residuals"][0]) if len(arrays[end]) else float("nan") for end in ("top", "bottom")]
    return spectrum_rows(
        name, arrays["top"].tolist(), arrays["bottom"].tolist(), stored.attrs, residuals=(ends[0], ends[1])
    )


_WITHOUT_LABELS: Mapping[str, Callable[[str, Stored], list[Row]]] = {
    "hessian": _spectrum_rows,
    "sharpness": lambda name, stored: sharpness_rows(name, stored.attrs),
    "audit": lambda name, stored: [],  # compares a network with copies of it: nothing for a table over runs
}
"""Kinds of results whose numbers are stored as such."""


def _tensor(store: ResultStore, name: str, array: str) -> Tensor:
    return torch.from_numpy(store.read(name).arrays[array])


def _placed(row: Row, stored: Stored, origin: Origin) -> Row:
    carried: Mapping[str, Any] = {key: stored.attrs.get(key) for key in CARRIED}
    if stored.attrs.get("kind") == "clean":
        carried = {**carried, "norm": None, "epsilon": None}
    return {**origin._asdict(), **carried, **row}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
