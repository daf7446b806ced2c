"""Run folders as records: what reports, lists and cards are made from. A damaged folder becomes a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from robustflat.apps.collect import RESULTS, origin_of, rows_of_run
from robustflat.apps.compute import ledger_of
from robustflat.apps.weight_space import curvature_of, landscapes_of
from robustflat.errors import UserError
from robustflat.evaluation.rows import Row
from robustflat.loggers.jsonl import read_jsonl
from robustflat.reporting.records import LEDGER_COLUMNS, RunRecord
from robustflat.store.results import ResultStore
from robustflat.store.tables import tidy

NOTE = "study.json"
"""What a study calls the run: label, family, part; and what went wrong the last time, if anything did."""

STOPPED = "early_stopped"

_NOT_SHOWN = ("seed=", "outputs=", "device=", "threads=", "logger", "evaluation", "flatness", "force=", "data_root=")
"""Beginnings of overrides that do not tell configurations apart."""

_FAMILIES = {"Trades": "TRADES", "Mart": "MART", "Rotation": "self-supervision", "AdversarialWeights": "AWP"} | {
    "EntropySgd": "Entropy-SGD", "Sam": "SAM", "RandomWeights": "random weights", "WeightAverage": "averaging",
    "ClipWeights": "clipping", "NoAttack": "standard",
}  # fmt: skip
"""Classes that a method is told by, and its name."""

_LAST_WEIGHTS = (
    "averages its weights, but these are numbers of the last ones, as if it did not: a study with part: average reads "
    "those of the average."
)


def read_record(
    folder: Path, *, label: str | None = None, family: str | None = None, part: str | None = None, problem: str = ""
) -> RunRecord:
    """All that a run folder says, however far the run got.

    Args:
        folder: the run folder.
        label, family: what to call the run; None: as the study that made it does, else its command and its method.
        part: which network counts: "model" or "average". Results and learning curves of the averaged weights are
            then read under the names of the others: "last", "early_stopped", "epoch_0005", "test/robust_loss". None:
            as the study says, else "model".
        problem: what is known to have gone wrong; "": what the folder itself says of it.

    Returns:
        A record with status "done" (trained and measured), "partial" (something is missing) or "failed", and a
        sentence on what is missing.
    """
    noted, config = _json(folder / NOTE), _yaml(folder / "config.yaml")
    provenance = _json(folder / "provenance.json")
    problem = problem or str(noted.get("problem") or "")
    origin, complaints = origin_of(folder), []
    part = str(part or noted.get("part") or "model")
    rows, complaint = _rows(folder, part)
    complaints += [complaint] if complaint else []
    history, complaint = _history(folder, part)
    complaints += [complaint] if complaint else []
    complaints = complaints if is_complete(folder) else [_unfinished(folder, config), *complaints]
    if not rows and not complaints:
        complaints.append(
            f"trained, but not evaluated: python evaluate.py run={folder}"
            if (folder / "DONE").exists()
            else "not evaluated: give the command with checkpoint=<file> again"
        )
    status = "failed" if problem else "partial" if complaints else "done"
    return RunRecord(
        run_id=origin.run_id,
        experiment=origin.experiment,
        label=label or str(noted.get("label") or _label(origin.experiment, provenance)),
        family=family or str(noted.get("family") or _family(config)),
        seed=origin.seed,
        status=status,
        table=tidy(rows),
        problem=problem or "; ".join(complaints),
        folder=folder,
        history=history,
        ledger=ledger_of(folder),
        provenance=provenance,
        warnings=(*warnings_of(rows), *([_LAST_WEIGHTS] if rows and part == "model" and _averages(config) else [])),
        early_stopped=STOPPED if any(row["checkpoint"] == STOPPED for row in rows) else "",
        curvature=curvature_of(rows, "last"),
        landscapes=landscapes_of(folder, "last" if part == "model" else part),
        part=part,
    )


def read_records(folders: Iterable[Path]) -> list[RunRecord]:
    """A record of each folder that is a run folder, in the order given.

    Raises:
        UserError: if none is.
    """
    listed = list(folders)
    runs = [folder for folder in listed if is_run(folder)]
    if not runs:
        raise UserError(f"None of {len(listed)} folders is a run of train.py: outputs/<name>/<id>.")
    return [read_record(folder) for folder in runs]


def is_run(folder: Path) -> bool:
    """Whether a folder was made by `train.py`, or for a checkpoint from elsewhere by `evaluate.py`."""
    return (folder / "identity.yaml").is_file()


def is_complete(folder: Path) -> bool:
    """Whether training has ended here, or elsewhere: folders of `evaluate.py checkpoint=<file>` train nothing."""
    return (folder / "DONE").exists() or "weights" in _yaml(folder / "identity.yaml")


def failed_record(folder: Path, label: str, family: str, seed: int | None, problem: str) -> RunRecord:
    """Record of a run that left nothing."""
    return RunRecord(
        run_id=folder.name,
        experiment=folder.parent.name,
        label=label,
        family=family,
        seed=seed,
        status="failed",
        table=tidy([]),
        problem=problem,
        ledger=pd.DataFrame(columns=list(LEDGER_COLUMNS)),
    )


def warnings_of(rows: Sequence[Row]) -> Iterator[str]:
    """What in the numbers of a run cannot be believed, or needs care, one sentence each."""
    for row in rows:
        if row["metric"] in ("robust_loss", "loss", "flatness") and row["value"] != row["value"]:
            yield f"{row['checkpoint']}, {row['split']}: {row['metric']} by {row['measure']} is not a number."
        spread = row.get("stderr")
        spread = float("nan") if spread is None else spread  # of a single draw
        if row["metric"] == "flatness" and row["measure"].startswith("average") and row["value"] < -2 * spread:
            yield (
                f"{row['checkpoint']}, {row['split']}: {row['measure']} is negative ({row['value']:.3f}): "
                "the attack at the weights themselves may be too weak."
            )
    errors = {
        (r["checkpoint"], r["split"], r["measure"], r.get("norm"), r.get("epsilon")): r["value"]
        for r in rows
        if r["metric"] == "robust_error"
    }
    for (checkpoint, split, measure, *threat), value in errors.items():
        strongest = errors.get((checkpoint, split, "autoattack", *threat))
        if strongest is not None and value > strongest + 1e-9:
            yield (
                f"{checkpoint}, {split}: {measure} finds more errors ({value:.1%}) than AutoAttack ({strongest:.1%}), "
                "which is then no lower bound of the robust accuracy."
            )


def headline(record: RunRecord) -> dict[str, str]:
    """The figures of a run that lists show, as text: clean error, RErr, RLoss, gap, flatness, on most test examples."""
    table = record.table
    found: dict[str, str] = {}
    last = table[table["checkpoint"].isin(("last", STOPPED))]
    tests = last[last["split"].str.startswith("test").fillna(False)]
    for row in tests.sort_values("count", kind="stable", na_position="first").to_dict("records"):
        name = _headline_name(row)
        if name:
            found[name] = f"{100 * row['value']:.1f} %" if "error" in row["metric"] else f"{row['value']:.3f}"
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> int:
    """Errors first, then losses, then flatness."""
    return next(n for n, beginning in enumerate(("Err", "RErr", "RLoss", "flatness")) if name.startswith(beginning))


_SHOWN = {"error": "Err", "robust_error": "RErr", "robust_loss": "RLoss", "robust_loss_gap": "RLoss gap"}


def _headline_name(row: Mapping[Any, Any]) -> str:
    metric, stopped = row["metric"], row["checkpoint"] == STOPPED
    if stopped and metric != "robust_error":
        return ""
    if metric == "flatness":
        return f"flatness {row['measure']}"
    if metric not in _SHOWN:
        return ""
    measure = "" if row["measure"] in ("clean", "pgd20") else f" {row['measure']}"
    return f"{_SHOWN[metric]}{measure}{' early stopped' if stopped else ''}"


def _rows(folder: Path, part: str) -> tuple[list[Row], str]:
    """Rows of results.h5, and those of results.json where it has no errors and losses; and what is wrong with them."""
    try:
        stored = rows_of_run(folder) if (folder / RESULTS).is_file() else []
    except UserError as error:
        return [], str(error)
    if stored:
        rows = [renamed for row in stored if (renamed := _of_part(row, part)) is not None]
        if not rows:
            return [], f"no results of the part '{part}': python evaluate.py run={folder} part={part}"
        if any(row["kind"] in ("clean", "attack", "flatness") for row in rows):
            return rows, ""
        stored = rows  # of `robustflat hessian` or `measure` alone
    origin = origin_of(folder)._asdict()
    summary = [{**origin, **row} for row in rows_of_summary(_json(folder / "results.json"), part)]
    return [*summary, *stored], ""


def _of_part(row: Row, part: str) -> Row | None:
    """The row if it is about a network of that part, under the checkpoint name that such a network has."""
    name = str(row["checkpoint"])
    averaged = name == "average" or name.startswith("average_")
    if averaged != (part == "average"):
        return None
    if not averaged:
        return row
    return {**row, "checkpoint": "last" if name == "average" else name.removeprefix("average_")}


def rows_of_summary(results: Mapping[str, Any], part: str) -> list[Row]:
    """Tidy rows, apart from the run's own columns, of what `train.py` measured at its end (results.json).

    Args:
        results: content of the file: evaluation -> results; of several the last counts.
        part: "model" or "average".
    """
    measured: Mapping[str, Any] = {}
    for entry in results.values():
        if isinstance(entry, Mapping) and isinstance(entry.get("weights"), Mapping):
            measured = entry["weights"].get(part) or {}
    rows: list[Row] = []
    for role in ("test", "train"):
        values = measured.get(role)
        if isinstance(values, Mapping):
            base = {"checkpoint": "last", "split": values.get("split"), "count": values.get("count")}
            for measure, numbers in values.items():
                if isinstance(numbers, Mapping):
                    rows += [{**base, **row} for row in _summary_rows(measure, numbers)]
    flat = measured.get("flatness")
    if isinstance(flat, Mapping) and isinstance(flat.get("value"), int | float):
        measure = "average" if flat.get("reduction") == "mean" else "worst"
        rows.append(
            {"checkpoint": "last", "split": flat.get("split"), "count": flat.get("examples"), "kind": "flatness"}
            | {"measure": measure, "metric": "flatness", "value": flat["value"], "stderr": flat.get("standard_error")}
            | {"radius": flat.get("radius"), "loss": flat.get("loss"), "protocol": flat.get("protocol")}
        )
    return rows


def _summary_rows(measure: str, numbers: Mapping[str, Any]) -> Iterator[Row]:
    for metric in ("error", "loss", "robust_error", "robust_loss"):
        if isinstance(numbers.get(metric), int | float):
            yield {"kind": "clean" if measure == "clean" else "attack", "measure": measure, "metric": metric} | {
                "value": numbers[metric], "stderr": numbers.get(f"{metric}_standard_error"),
                "low": numbers.get(f"{metric}_low"), "high": numbers.get(f"{metric}_high"),
            }  # fmt: skip


def _history(folder: Path, part: str) -> tuple[pd.DataFrame, str]:
    """A line per epoch from metrics.jsonl, columns as `RunRecord.history` names them; and what is wrong."""
    try:
        lines = read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    except UserError as error:
        return pd.DataFrame(), str(error)
    epochs = {line.get("step"): line["epoch"] for line in lines if "epoch" in line}
    table: dict[float, dict[str, float]] = {}
    for line in lines:
        epoch = epochs.get(line.get("step"))
        if epoch is not None:
            entry = table.setdefault(epoch, {"epoch": epoch})
            named = ((_history_name(name, part), value) for name, value in line.items())
            entry |= {name: value for name, value in named if name}
    return pd.DataFrame([table[epoch] for epoch in sorted(table)]), ""


def _history_name(name: str, part: str) -> str:
    """Column of the history: "epoch/loss" -> "loss", "evaluation/test_loss" -> "test/loss", others -> "".

    For the part "average", "evaluation_average/test_loss" is "test/loss", and the other networks are left out.
    """
    group, _, rest = name.partition("/")
    if group == "epoch":
        return rest
    network = "model" if group == "evaluation" else group.removeprefix("evaluation_")
    if network == group or part not in ("model", network):
        return ""
    prefix = "" if network == part else f"{network}/"
    split, _, metric = rest.partition("_")
    return f"{prefix}{split}/{metric}" if split in ("test", "train") else f"{prefix}{rest}"


def _unfinished(folder: Path, config: Mapping[str, Any]) -> str:
    """How far training got."""
    trainer = config.get("trainer")
    total = trainer.get("epochs") if isinstance(trainer, Mapping) else None
    try:
        lines = read_jsonl(folder / "metrics.jsonl")
    except UserError:
        lines = []
    epoch = max((line["epoch"] for line in lines if "epoch" in line), default=0)
    return f"training ended after epoch {epoch:.0f}{f' of {total}' if total else ''}; the same command goes on"


def _label(experiment: str, provenance: Mapping[str, Any]) -> str:
    command = provenance.get("command")
    shown = [str(o) for o in command if not str(o).startswith(_NOT_SHOWN)] if isinstance(command, list) else []
    return " ".join([experiment, *(text for text in shown if not text.startswith(("+experiment", "trainer=")))])


def _family(config: Mapping[str, Any]) -> str:
    """Name of the method that a configuration trains with, by the classes that it plugs in."""
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping):
        return "unknown"
    callbacks = trainer.get("callbacks")
    nodes = [config.get("attack"), trainer.get("loss"), trainer.get("gradient")]
    nodes += list(callbacks.values()) if isinstance(callbacks, Mapping) else []
    names = [str(node.get("_target_", "")).rsplit(".", 1)[-1] for node in nodes if isinstance(node, Mapping)]
    return "-".join(_FAMILIES[name] for name in names if name in _FAMILIES) or "AT"


def _averages(config: Mapping[str, Any]) -> bool:
    """Whether a training keeps an average of its weights."""
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    nodes = callbacks.values() if isinstance(callbacks, Mapping) else ()
    return any(isinstance(node, Mapping) and str(node.get("_target_")).endswith(".WeightAverage") for node in nodes)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def store_names(folder: Path) -> list[str]:
    """Names of the results of a run; empty if there are none or they cannot be read."""
    try:
        return ResultStore(folder / RESULTS).names()
    except UserError:
        return []
