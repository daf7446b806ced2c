"""Learning curves of several runs in one picture: mean over the runs, standard deviation as a band.

    python train.py -m seed=0,1,2,3,4
    python scripts/plot_curves.py outputs/digits-at/* --output docs/robust_overfitting.png

Prints train and test RLoss and RErr at the first, the best and the last epoch, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from robustflat.errors import UserError
from robustflat.loggers.jsonl import read_jsonl
from robustflat.reporting.plots import training_curves

Rows = list[dict[str, float]]


def main() -> None:
    """Parse the command line, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; folders without evaluations are left out")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    try:
        histories = [rows for run in arguments.runs if (rows := evaluations(run))]
    except UserError as error:
        parser.error(str(error))
    if not histories:
        parser.error("none of these folders has a metrics.jsonl with evaluations")
    training_curves(histories, arguments.output, title=arguments.title or f"{len(histories)} runs, mean and spread")
    print(f"{arguments.output}: {len(histories)} runs")
    for epoch in sorted({histories[0][0]["epoch"], best_epoch(histories), histories[0][-1]["epoch"]}):
        print(f"epoch {epoch:.0f}: " + ", ".join(described(histories, epoch)))


def evaluations(run: Path) -> Rows:
    """The periodic evaluations in a run's metrics.jsonl, each with its epoch; empty if there are none."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    rows = read_jsonl(path)
    epochs = {row["step"]: row["epoch"] for row in rows if "epoch" in row}
    return [
        {"epoch": epochs[row["step"]], **{k.removeprefix("evaluation/"): v for k, v in row.items()}}
        for row in rows
        if "evaluation/test_robust_loss" in row and row["step"] in epochs
    ]


def values_at(histories: list[Rows], epoch: float, key: str) -> list[float]:
    """The value of every run that has it at an epoch."""
    return [row[key] for rows in histories for row in rows if row["epoch"] == epoch and key in row]


def best_epoch(histories: list[Rows]) -> float:
    """Epoch of the lowest mean robust loss on test examples."""
    epochs = [row["epoch"] for row in histories[0]]
    return min(epochs, key=lambda epoch: mean(values_at(histories, epoch, "test_robust_loss")))


def described(histories: list[Rows], epoch: float) -> list[str]:
    """Mean and standard deviation over runs of train and test RLoss and RErr at an epoch."""
    texts = []
    for key in ("train_robust_loss", "test_robust_loss", "train_robust_error", "test_robust_error"):
        found = values_at(histories, epoch, key)
        if not found:  # of training without evaluation.train
            continue
        spread = stdev(found) if len(found) > 1 else float("nan")
        texts.append(f"{key} {mean(found):.3f} +- {spread:.3f}")
    return texts


if __name__ == "__main__":
    main()
