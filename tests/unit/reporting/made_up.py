"""Made-up studies for tests of reports: every kind of number that a run can have, without training anything."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustflat.reporting.records import LEDGER_COLUMNS, RunRecord, Study
from robustflat.store.tables import tidy

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked=2'>",
    "\"quoted\" 'twice' & {{ braces }} $x_1$ %{y} <!-- ]]>",
    "_under 日本 ξ=0.5",
)


class MadeUpLines(NamedTuple):
    """A landscape along lines."""

    steps: Tensor
    losses: Tensor
    errors: Tensor


def row(run: str, seed: int | None, kind: str, measure: str, metric: str, value: float, **more: Any) -> dict[str, Any]:
    """A tidy row of the last checkpoint on test examples, unless `more` says otherwise."""
    about = {"run_id": run, "experiment": "made-up", "seed": seed, "checkpoint": "last", "split": "test[:1000]"}
    measured = {"kind": kind, "measure": measure, "metric": metric, "value": value, "stderr": 0.02, "count": 1000}
    threat = {"norm": "linf", "epsilon": 8 / 255, "precision": "fp32", "version": "0.1.0", "key": f"{run}-{measure}"}
    return {**about, **measured, **threat, **more}


def rows(run: str, seed: int | None, average: float, loss: float, *, snapshots: bool = True) -> list[dict[str, Any]]:
    """Rows of one run: errors, losses, flatness, the early-stopped network, snapshots."""
    made = [
        row(run, seed, "clean", "clean", "error", 0.2, norm=None, epsilon=None),
        row(run, seed, "clean", "clean", "error_class_9", 0.2),
        row(run, seed, "attack", "pgd20", "robust_error", min(0.9, 0.45 + 0.05 * loss)),
        row(run, seed, "attack", "pgd20", "robust_error", 0.3, split="train[:1000]"),
        row(run, seed, "attack", "pgd20", "robust_loss", loss),
        row(run, seed, "attack", "pgd20", "robust_loss", 0.4 * loss, split="train[:1000]"),
        row(run, seed, "attack", "pgd20", "robust_loss", min(loss, 1.5), checkpoint="early_stopped"),
    ]
    for name, value, kind in (("average", average, "robust"), ("worst", 4 * average, "robust"),
                              ("average_clean", 0.3 + 0.01 * average, "clean")):  # fmt: skip
        made.append(row(run, seed, "flatness", name, "flatness", value, radius=0.5, loss=kind, protocol="paper"))
    made.append(row(run, seed, "flatness", "average", "flatness", 0.5 * average, radius=0.5, loss="robust",
                    checkpoint="early_stopped"))  # fmt: skip
    for epoch in (5, 10, 15) if snapshots else ():
        at = {"checkpoint": f"epoch_{epoch:04}", "epoch": epoch}
        made.append(row(run, seed, "flatness", "average_3", "flatness", average * epoch / 15, loss="robust", **at))
        made.append(row(run, seed, "attack", "pgd20_once", "robust_loss", loss * (0.6 + epoch / 40), **at))
    return made


def record(label: str, family: str, seed: int | None, average: float, loss: float, **more: Any) -> RunRecord:
    """A finished run with everything that there is."""
    run = more.pop("run_id", "0a1b2c3d")
    epochs = np.arange(1, 21)
    curve = loss - 0.5 + 0.004 * (epochs - 10.0) ** 2
    history = pd.DataFrame({"epoch": epochs, "loss": 2 / epochs, "test/robust_loss": curve,
                            "train/robust_loss": 2 / epochs, "test/robust_error": 0.5 + 0.001 * epochs})  # fmt: skip
    ledger = pd.DataFrame([("training", 2000, 1000, 128000, 12.5, 10240.0, 512.0)], columns=list(LEDGER_COLUMNS))
    steps = torch.linspace(-1, 1, 9)
    lines = MadeUpLines(steps, torch.stack([loss + steps**2 * k for k in (1, 2)]), torch.zeros(2, 9))
    fields: dict[str, Any] = {
        "table": tidy(rows(run, seed, average, loss)), "history": history, "ledger": ledger,
        "provenance": {"commit": "0123456789abcdef"}, "early_stopped": "early_stopped",
        "curvature": {"value": 100 * average, "non_convexity": 0.05, "curvature": "hessian", "examples": 1000},
        "landscapes": {"random directions": lines}, "status": "done",
    }  # fmt: skip
    return RunRecord(run, "made-up", label, family, seed, **{**fields, **more})


def study(models: int = 12, seeds: int = 2, *, hostile: bool = True, full: bool = True, **more: Any) -> Study:
    """Models whose robust loss rises with average-case flatness; with `hostile` the first have nasty names."""
    draw = np.random.default_rng(0)
    runs = []
    for index in range(models):
        label = HOSTILE[index] if hostile and index < len(HOSTILE) else f"Method {index // 3} {index % 3 + 1}"
        for seed in range(seeds):
            average = float(0.2 + 0.1 * index / max(models / 12, 1) + 0.02 * draw.normal())
            loss = 1.3 + 1.4 * average + 0.1 * float(draw.normal())
            extra: dict[str, Any] = (
                {} if full else {"history": pd.DataFrame(), "ledger": pd.DataFrame(), "landscapes": {}}
            )
            runs.append(record(label, f"Method {index // 3}", seed, average, loss,
                               run_id=f"{index * 16 + seed:08x}", **extra))  # fmt: skip
    fields: dict[str, Any] = {
        "title": "Made-up study",
        "question": "Does it go together?",
        "dataset": "nothing",
        **more,
    }
    return Study(runs=runs, **fields)


def failed(label: str = "TRADES 6") -> RunRecord:
    """A run that did not finish."""
    return RunRecord("deadbeef", "made-up", label, "TRADES", 0, "failed", tidy([]), problem="The loss became NaN.")
