"""Two evaluated networks of run folders, compared example by example on all that was measured of both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustflat.apps.collect import RESULTS, STOPS_EARLY
from robustflat.errors import DataError, UserError
from robustflat.evaluation.paired import Comparison, Difference, compare_attacks, compare_clean, compare_values
from robustflat.flatness.result import rise_per_example
from robustflat.store.results import ResultStore, Stored


class Network(NamedTuple):
    """A network in the results of a run: its store and the name of its checkpoint there."""

    store: ResultStore
    checkpoint: str

    def read(self, place: str) -> Stored:
        """The result at "<split>/..."."""
        return self.store.read(f"{self.checkpoint}/{place}")


def network_in(run: Path, checkpoint: str) -> Network:
    """A checkpoint that was evaluated.

    Raises:
        UserError: if the run has no results, or none of this checkpoint.
    """
    if not (run / RESULTS).is_file():
        raise DataError(f"{run} has no {RESULTS}: evaluate it first, python evaluate.py run={run}")
    store = ResultStore(run / RESULTS)
    there = sorted({name.split("/")[0] for name in store.names()})
    if checkpoint not in there:
        raise UserError(f"{run} has no results of '{checkpoint}'; it has those of {', '.join(there) or 'nothing'}.")
    return Network(store, checkpoint)


def compare_networks(first: Network, second: Network, *, seed: int = 0) -> dict[str, Comparison]:
    """Paired tests on every split, attack and flatness measure that both were measured by, with equal settings.

    Args:
        first, second: two networks; of one run or of two.
        seed: of the bootstrap.

    Returns:
        Split -> differences, first minus second.

    Raises:
        UserError: if they have no split in common, or its examples differ.
    """
    found = {}
    for split in _splits(first):
        if split in _splits(second):
            labels = [network.read(split).arrays["labels"] for network in (first, second)]
            if not np.array_equal(labels[0], labels[1]):
                raise UserError(f"{split} holds other examples in {second.store.path} than in {first.store.path}.")
            found[split] = Comparison(tuple(_differences(first, second, split, torch.from_numpy(labels[0]), seed)))
    if not found:
        raise UserError(
            "The networks have no examples in common: "
            f"{' and '.join(', '.join(_splits(network)) or 'none evaluated' for network in (first, second))}. "
            "Evaluate both alike."
        )
    return found


def _splits(network: Network) -> list[str]:
    """Splits with clean logits, without which nothing can be compared."""
    parts = [name.split("/") for name in network.store.names()]
    return [split for checkpoint, split, *rest in (p for p in parts if len(p) > 2)
            if checkpoint == network.checkpoint and rest == ["clean"]]  # fmt: skip


def _differences(first: Network, second: Network, split: str, labels: Tensor, seed: int) -> Iterator[Difference]:
    clean = [_array(network.read(f"{split}/clean"), "logits") for network in (first, second)]
    yield from compare_clean(clean[0], clean[1], labels, seed=seed)
    for kind in ("attacks", "flatness"):
        for name in _common(first, second, f"{split}/{kind}"):
            one, other = (network.read(f"{split}/{kind}/{name}") for network in (first, second))
            if kind == "flatness":
                yield compare_values(name, "flatness", _rises(one), _rises(other), seed=seed)
                continue
            losses = not str(one.attrs.get("attack")).startswith(STOPS_EARLY)
            runs = [_array(stored, "logits") for stored in (one, other)]
            pairs = (clean[0], runs[0]), (clean[1], runs[1])
            yield from compare_attacks(name, *pairs, labels, losses=losses, seed=seed)


def _common(first: Network, second: Network, place: str) -> list[str]:
    """Results below a place that both have, measured with the same settings."""
    names = []
    for network in (first, second):
        beginning = f"{network.checkpoint}/{place}/"
        names.append([n.removeprefix(beginning) for n in network.store.names() if n.startswith(beginning)])
    both = [name for name in names[0] if name in names[1]]
    return [n for n in both if _settings(first.read(f"{place}/{n}")) == _settings(second.read(f"{place}/{n}"))]


def _settings(stored: Stored) -> dict[str, Any]:
    """Settings that must be equal for a comparison; seeds may differ."""
    settings: dict[str, Any] = json.loads(stored.attrs.get("config", "{}"))
    return {key: value for key, value in settings.items() if key != "seed"}


def _rises(stored: Stored) -> Tensor:
    attrs = stored.attrs
    groups = [int(size) for size in json.loads(attrs["groups"])]
    losses, reference = (_array(stored, name) for name in ("losses", "reference"))
    return rise_per_example(losses, reference, reduction=str(attrs["reduction"]), groups=groups)


def _array(stored: Stored, name: str) -> Tensor:
    return torch.from_numpy(stored.arrays[name])
