"""The pieces of an evaluation, each measured once and stored: a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

import robustflat
from robustflat.apps.collect import Origin, rows_of
from robustflat.apps.config import digest
from robustflat.apps.data_source import deciding_source
from robustflat.apps.networks import NetworkFile, snapshot, snapshots
from robustflat.apps.profiling import Parts
from robustflat.apps.shared_reference import shared_reference
from robustflat.attacks.describe import describe
from robustflat.attacks.ensemble_progress import Progress
from robustflat.attacks.nested import ball_of, is_black_box
from robustflat.data.dataset import Dataset
from robustflat.errors import UserError
from robustflat.evaluation.attacked import Attacked
from robustflat.evaluation.plan import EvaluationPlan, Piece
from robustflat.evaluation.predict import predict
from robustflat.evaluation.rows import Row
from robustflat.evaluation.selection import Score, score
from robustflat.flatness.result import FlatnessResult
from robustflat.flatness.subject import require_deterministic, require_finite_weights, require_own_statistics
from robustflat.memory import peak_memory_mib
from robustflat.models.passes import PassCounter, Passes
from robustflat.models.precision import precision_of
from robustflat.ranks import workers
from robustflat.rng import generator_for
from robustflat.store.results import KEY, ResultStore, group_name
from robustflat.types import Attack

Arrays = dict[str, NDArray[Any]]
SELECTION = "early_stopping"
"""Name under which the attack that chooses a snapshot is stored."""

PROGRESS = "unfinished"
"""Folder, beside the results, of the finished batches of attacks that are under way or were interrupted."""


@dataclass(frozen=True)
class Bench:
    """What all networks of one evaluation share.

    Attributes:
        plan: what is measured.
        dataset: on what.
        store: where results go.
        settings: the resolved configuration, plain values.
        console: where progress goes.
        facts: provenance that is stored with every result.
        prefix: put before names of splits in the store: tells other data from the run's own.
        parts: what times and records each piece; `None`: nothing does.
    """

    plan: EvaluationPlan
    dataset: Dataset
    store: ResultStore
    settings: Mapping[str, Any]
    console: Console
    facts: Mapping[str, object]
    prefix: str = ""
    parts: Parts | None = None

    def profiled(self, label: str) -> AbstractContextManager[None]:
        """Inside is a part of the profile, if one is wanted."""
        return nullcontext() if self.parts is None else self.parts.part(label)

    @property
    def seed(self) -> int:
        """Of all draws."""
        return int(self.settings["seed"])

    def pieces(self) -> list[Piece]:
        """Those that the command asks for; clean logits and sanity checks belong to everything."""
        only = self.settings["only"]
        return [p for p in self.plan.pieces() if not only or p.kind in ("clean", "sanity") or p.name in only]

    def progress(self, key: str) -> Progress:
        """Where finished batches of a piece wait until the piece is stored."""
        return workers().on_first(lambda: Progress(self.store.path.parent / PROGRESS / key, key))

    def rows(self, names: Sequence[str]) -> list[Row]:
        """Rows of stored results by name."""
        path = self.store.path.resolve()
        return rows_of(self.store, Origin(path.parent.name, path.parent.parent.name, self.seed), names=names)

    def examples(self, split: str) -> str:
        """Name of a split in the store: data other than the run's own carry their name."""
        return f"{self.prefix}{split}"

    def key(self, piece: Piece, weights: str) -> str:
        """Digest of all that decides the values of a piece: weights, examples, settings, seed."""
        source = deciding_source(self.settings)
        where = {"weights": weights, "split": piece.split, "role": piece.role, "source": source}
        return digest({**where, "kind": piece.kind, "settings": self.decisive(piece)})

    def decisive(self, piece: Piece) -> dict[str, Any]:
        """Settings that decide the values of a piece on given weights and examples, as plain values."""
        if piece.kind == "clean":
            return {}
        base: dict[str, Any] = {"seed": self.seed, "batch_size": self.plan.batch_size}
        if piece.kind == "sanity":
            return {**base, "norm": self.plan.norm, "epsilon": self.plan.epsilon}
        if piece.kind == "flatness":
            return {**base, "measure": self.settings["evaluation"]["measures"][piece.name]}
        base |= {"runs": self.plan.restarts.get(piece.name, 1), "attack_batch": self.plan.attack_batch}
        base |= {"search": self.plan.search}
        return {**base, "name": piece.name, "attack": self.settings["evaluation"]["attacks"][piece.name]}

    def config(self, piece: Piece) -> str:
        """The same as one line of JSON, as it is stored with the result."""
        return json.dumps(self.decisive(piece), sort_keys=True, default=str)


def measure_network(bench: Bench, file: NetworkFile, model: nn.Module, weights: str) -> list[str]:
    """Measure every piece of one network that is not stored yet.

    Args:
        bench: plan, data and store.
        file: where the network comes from.
        model: in eval mode, on the data's device.
        weights: digest of its weights.

    Returns:
        Names of the results in the store.

    Raises:
        UserError: if the network is not finite, not deterministic, or the data do not fit it.
    """
    require_sound_network(bench, file, model)
    forget_other_weights(bench.store, bench.console, file, weights)
    pieces, names = bench.pieces(), []
    for number, piece in enumerate(pieces, start=1):
        key = bench.key(piece, weights)
        name = _place(bench, file, piece, key)
        names.append(name)
        if bench.store.has(name, key) and not bench.settings["force"]:
            continue
        twin = None if bench.settings["force"] else _twin(bench, key)
        if twin is not None:
            _copy(bench, twin, name, file)
            continue
        label = f"{file.name}: {piece.name} on {piece.split}"
        with bench.console.status(f"{label} (piece {number} of {len(pieces)})"), bench.profiled(label):
            (arrays, details), spent = _counted(bench, model, partial(_measure, bench, file, model, key, piece))
        seconds = spent["seconds"]
        made = {**_attributes(bench, file, model, piece), KEY: key, "weights": weights, **spent}
        _write(bench, name, arrays, {**made, **details})
        _remove_progress(bench, key)
        if seconds > 1:
            bench.console.print(f"{label}: {seconds:.1f} s", markup=False)
    return names


def _remove_progress(bench: Bench, key: str) -> None:
    if not workers().first:
        return
    folder = bench.store.path.parent / PROGRESS
    shutil.rmtree(folder / key, ignore_errors=True)
    with suppress(OSError):  # others wait there
        folder.rmdir()


def _write(bench: Bench, name: str, arrays: Arrays, attrs: Mapping[str, object]) -> None:
    """Store a result; labels go one level up, where all results on these examples find them."""
    if "labels" in arrays:
        arrays = dict(arrays)
        labels = {"labels": arrays.pop("labels")}
        bench.store.write(name.rsplit("/", 1)[0], labels, {"split": attrs["split"]})
    bench.store.write(name, arrays, attrs)


def _copy(bench: Bench, source: str, name: str, file: NetworkFile) -> None:
    """Give a result the name of another checkpoint with the same weights."""
    arrays, attrs = bench.store.read(source)
    if attrs["kind"] == "clean":
        arrays |= bench.store.read(source.rsplit("/", 1)[0]).arrays
    attrs |= {"checkpoint": file.name, "file": file.path.name, "copied_from": source}
    _write(bench, name, arrays, attrs if file.epoch is None else {**attrs, "epoch": file.epoch})


def require_sound_network(bench: Bench, file: NetworkFile, model: nn.Module) -> None:
    """Refuse weights that are not finite, and networks whose answers are random or depend on the batch.

    Raises:
        UserError: naming the checkpoint and the layer.
    """
    split = next(s for s in (*bench.plan.splits.values(), *bench.plan.flatness_splits.values()) if s is not None)
    x = bench.dataset.split(split).batches(bench.plan.batch_size)[0].x
    try:
        require_finite_weights(model)
        require_own_statistics(model)
        require_deterministic(model, x)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from error


def select_snapshot(
    bench: Bench, run: Path, part: str, load: Callable[[NetworkFile], tuple[nn.Module, str]]
) -> NetworkFile:
    """Attack every snapshot of a run on the selection examples, and choose one.

    Args:
        bench: its plan has a selection.
        run: the run folder.
        part: which network of the snapshots.
        load: file -> network and digest of its weights.

    Returns:
        The chosen snapshot.

    Raises:
        UserError: if the examples were trained on, or there is no snapshot.
    """
    rule = bench.plan.selection
    assert rule is not None
    split = rule.examples(bench.dataset)
    there = snapshots(run)
    files = {epoch: snapshot(there, epoch, part) for epoch in there}
    scores = {epoch: _score(bench, file, split, load) for epoch, file in files.items()}
    best = rule.best(scores)
    prefix = "" if part == "model" else f"{part}_"
    bench.store.write(
        f"{prefix}early_stopped",
        {"epochs": np.array(list(scores)), "scores": np.array(list(scores.values()))},
        {"epoch": best, "criterion": rule.criterion, "split": split, "attack": describe(rule.attack)},
    )
    bench.console.print(
        f"early stopping on {split}: epoch {best} of {', '.join(map(str, scores))} has the lowest {rule.criterion} "
        f"({getattr(scores[best], rule.criterion):.4g})",
        markup=False,
    )
    return files[best]


def _score(bench: Bench, file: NetworkFile, split: str, load: Callable[[NetworkFile], tuple[nn.Module, str]]) -> Score:
    """Score of one snapshot, from the store if it is there for these weights."""
    rule = bench.plan.selection
    assert rule is not None
    name = group_name(file.name, bench.examples(split), "attacks", SELECTION)
    model, weights = load(file)
    settings = {"weights": weights, "split": split, "attack": describe(rule.attack), "runs": rule.restarts}
    searched = {"search": bench.plan.search, "attack_batch": bench.plan.attack_batch}
    key = digest({**settings, **searched, "seed": bench.seed, "batch_size": bench.plan.batch_size})
    if bench.settings["force"] or not bench.store.has(name, key):
        require_sound_network(bench, file, model)
        forget_other_weights(bench.store, bench.console, file, weights)
        label = f"{file.name}: {SELECTION} on {split}"
        with bench.console.status(label), bench.profiled(label):
            arrays, spent = _counted(bench, model, partial(_selection_arrays, bench, model, split))
        piece = Piece("attacks", "selection", split, SELECTION)
        attrs = {**_attributes(bench, file, model, piece), KEY: key, "weights": weights, **spent}
        bench.store.write(name, arrays, {**attrs, "attack": settings["attack"], "runs": rule.restarts})
    arrays = bench.store.read(name).arrays
    return score(*(torch.from_numpy(arrays[part]) for part in ("clean", "logits", "labels")))


def _selection_arrays(bench: Bench, model: nn.Module, split: str) -> Arrays:
    plan = bench.plan
    assert plan.selection is not None
    clean = predict(model, bench.dataset.split(split).batches(plan.batch_size))
    runs = plan.attacked(
        model,
        bench.dataset,
        split,
        plan.selection.attack,
        runs=plan.selection.restarts,
        generator=generator_for(bench.seed, "selection", device=bench.dataset.device),
    ).logits
    return {"clean": clean.logits.numpy(), "logits": runs.numpy(), "labels": clean.labels.numpy()}


Result = TypeVar("Result")


def _counted(bench: Bench, model: nn.Module, work: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """Do something, and what it cost: batches forward and backward, images forward, seconds, memory.

    Passes are those of all ranks, checks that each makes for itself included; memory is that of the rank with the most.
    """
    device = bench.dataset.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with PassCounter().counting(model) as counter:
        result = work()
    seconds, ranks = time.perf_counter() - start, workers()
    passes = Passes(*(sum(parts) for parts in zip(*ranks.collect([counter.passes]), strict=True)))
    memory = max(ranks.collect([peak_memory_mib(device)]))
    return result, {**passes._asdict(), "seconds": seconds, "peak_memory_mib": memory}


def _measure(
    bench: Bench, file: NetworkFile, model: nn.Module, key: str, piece: Piece
) -> tuple[Arrays, dict[str, object]]:
    """Arrays of a piece, and what else to say of it."""
    plan, dataset = bench.plan, bench.dataset
    if piece.kind == "clean":
        found = predict(model, dataset.split(piece.split).batches(plan.batch_size))
        return {"logits": found.logits.numpy(), "labels": found.labels.numpy()}, {}
    if piece.kind == "sanity":
        findings = plan.sanity_piece(model, dataset, piece.split, seed=bench.seed)
        return {}, {"sanity": [finding._asdict() for finding in findings]}
    if piece.kind == "attacks":
        attacked = plan.attack_piece(model, dataset, piece, seed=bench.seed, progress=bench.progress(key))
        return _attack_arrays(attacked), _attack_details(plan.attacks[piece.name], attacked)
    reference, words = shared_reference(bench, file, piece)
    result = plan.flatness_piece(model, dataset, piece, seed=bench.seed, reference=reference)
    return _flatness_arrays(result), {"reference_settings": words, **_flatness_details(result)}


def _attack_arrays(found: Attacked) -> Arrays:
    return {"logits": found.logits.numpy(), **{name: value.numpy() for name, value in found.verdicts.items()}}


def _attack_details(attack: Attack | None, found: Attacked) -> dict[str, object]:
    details: dict[str, object] = {"attack": describe(attack), "runs": len(found.logits)}
    ball = ball_of(attack)
    if ball is not None:  # the evaluation's threat model does not hold for an attack with a ball of its own
        details |= {"norm": ball.norm, "epsilon": ball.epsilon}
    details |= {"sanity": [finding._asdict() for finding in found.findings], "black_box": is_black_box(attack)}
    return details if not found.costs else {**details, "members": list(found.costs), "costs": found.costs}


def _flatness_arrays(result: FlatnessResult) -> Arrays:
    arrays = {"losses": result.losses.numpy(), "reference": result.reference.numpy()}
    return arrays if result.trace is None else {**arrays, "trace": result.trace.numpy()}


def _flatness_details(result: FlatnessResult) -> dict[str, object]:
    details = {k: v for k, v in result.to_dict().items() if k not in ("seed", "seconds", "weights")}
    return {**details, "displaced": result.weights, "draw_seed": str(result.seed)}


def _attributes(bench: Bench, file: NetworkFile, model: nn.Module, piece: Piece) -> dict[str, object]:
    """What every result says of how it was made."""
    plan = bench.plan
    return {
        "kind": piece.kind,
        "name": piece.name,
        "role": piece.role,
        "split": bench.examples(piece.split),
        "checkpoint": file.name,
        "file": file.path.name,
        "epoch": file.epoch,
        "norm": plan.norm,
        "epsilon": plan.epsilon,
        "precision": precision_of(model),
        "device": str(bench.dataset.device),
        "seed": bench.seed,
        "config": "{}" if piece.role == "selection" else bench.config(piece),
        "version": robustflat.__version__,
        "torch": torch.__version__,
        **bench.facts,
    }


def _place(bench: Bench, file: NetworkFile, piece: Piece, key: str) -> str:
    """Where a piece is stored: under its name, or name~digest if other settings took that."""
    where = (file.name, bench.examples(piece.split), piece.kind)
    name = group_name(*where) if piece.kind in ("clean", "sanity") else group_name(*where, piece.name)
    taken = bench.store.attributes(name).get(KEY)
    return name if taken in (None, key) else f"{name}~{digest(bench.decisive(piece))}"


def _twin(bench: Bench, key: str) -> str | None:
    """A stored result with the same key: the same weights under the name of another checkpoint."""
    return next((name for name, found in bench.store.marked(KEY).items() if found == key), None)


def forget_other_weights(store: ResultStore, console: Console, file: NetworkFile, weights: str) -> None:
    """Remove results of a checkpoint that has been written anew since (training went on, say)."""
    made_of = store.marked("weights")
    for name in store.names():
        if name.startswith(f"{file.name}/") and made_of.get(name) != weights:
            console.print(f"{file.name} has other weights than when it was evaluated last: starting anew.")
            for split in {n.split("/")[1] for n in store.names() if n.startswith(f"{file.name}/")}:
                store.remove(group_name(file.name, split))
            return
