"""Seconds of a whole study by one command, in a temporary folder; of two checkouts in turn, if wanted.

    python benchmarks/studies.py                                 digits_quick, on all cores: minutes
    git worktree add ../before v0.9 && python benchmarks/studies.py --against ../before

Processor seconds are those of all processes of the study. How many cells of its table of runs differ from the first
checkout's stands beside.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import pandas as pd

from benchmarks.harness import Report, Way, parser

GOAL = 1.5
HERE = Path(__file__).resolve().parent.parent
COMMAND = "from robustflat.apps.main import main; main()"


def options() -> argparse.ArgumentParser:
    result = parser(__doc__, rounds=1)
    result.add_argument("--study", default="digits_quick", help="a file of conf/study (default: digits_quick)")
    result.add_argument("--against", type=Path, help="folder of another checkout, timed before this one")
    result.add_argument("--jobs", type=int, help="runs at a time (default: the study's)")
    result.add_argument("--config-dir", type=Path, help="folder with study/ of your own")
    result.add_argument("overrides", nargs="*", help="for all runs, such as trainer.epochs=2")
    return result


def main() -> None:
    given = options().parse_args()
    report = Report(given)
    report.memory = False  # of many processes
    ways = {} if given.against is None else {"before": Way(functools.partial(study, given.against.resolve(), given))}
    goal = GOAL if ways and given.study == "digits_quick" else None
    ways["this checkout"] = Way(functools.partial(study, HERE, given), goal=goal)
    what = f"{os.cpu_count()} cores, jobs {given.jobs or 'auto'}"
    title = " ".join([f"Study {given.study}, {what}", *given.overrides])
    report.compare(title, ways, judge=differences, warm=False)


def study(checkout: Path, given: argparse.Namespace) -> pd.DataFrame:
    """Run the study with the code of a checkout; its table of runs.

    Raises:
        SystemExit: if it fails; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["study", *(["--config-dir", str(given.config_dir.resolve())] if given.config_dir else [])]
        arguments += [f"study={given.study}", f"outputs={folder}"]
        arguments += [f"jobs={given.jobs}"] if given.jobs else []
        quoted = ['"{}"'.format(text.replace('"', '\\"')) for text in given.overrides]
        arguments += [f"overrides=[{','.join(quoted)}]"] if quoted else []
        command = [sys.executable, "-c", COMMAND, *arguments]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            sys.exit(f"the study failed in {checkout}")
        return pd.read_csv(Path(folder) / "studies" / given.study / "runs.csv")


def differences(found: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, str]]:
    tables = {name: table.drop(columns=["folder", "problem"]).astype(str) for name, table in found.items()}
    first = next(iter(tables.values()))
    return {
        name: {
            "runs done": f"{int((table['status'] == 'done').sum())}/{len(table)}",
            "cells that differ": str(int((table != first).sum().sum())) if table.shape == first.shape else "all",
        }
        for name, table in tables.items()
    }


if __name__ == "__main__":
    main()
