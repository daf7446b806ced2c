"""Kill a training run at random moments, start it again each time, and compare it with an uninterrupted one.

    python scripts/kill_and_resume.py --kills 10 [-- trainer=trades seed=3 ...]

Compares checkpoints (weights, optimizer, schedule, averaged weights, random streams, history) and the metrics file
bit for bit, prints every difference, and exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from robustflat.apps.compare import compare_runs

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def main() -> None:
    """Parse the command line, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how often the run is killed (SIGKILL)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("overrides", nargs="*", help="configuration of the run, after --")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        differences = kill_and_resume(Path(folder), arguments.kills, arguments.seed, arguments.overrides)
    print("\n".join(differences) or f"{arguments.kills} kills: equal bit for bit")
    sys.exit(1 if differences else 0)


def kill_and_resume(folder: Path, kills: int, seed: int, overrides: list[str]) -> list[str]:
    """Differences between a run killed `kills` times in `folder` and an uninterrupted one; empty if there are none."""
    start = time.monotonic()
    subprocess.run(command(folder / "whole", overrides), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    moments = random.Random(seed)
    for number in range(kills):
        process = subprocess.Popen(command(folder / "killed", overrides), stdout=subprocess.DEVNULL)
        wait = moments.uniform(0, seconds)
        try:
            process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        print(f"kill {number + 1} after {wait:.1f} s: {progress(folder / 'killed')}", flush=True)
    subprocess.run(command(folder / "killed", overrides), check=True, stdout=subprocess.DEVNULL)
    (whole,), (killed,) = ((folder / side).glob("*/*") for side in ("whole", "killed"))
    return compare_runs(whole, killed)


def command(outputs: Path, overrides: list[str]) -> list[str]:
    """The training command with its run folder below `outputs`."""
    return [sys.executable, str(TRAIN), f"outputs={outputs}", "device=cpu", *overrides]


def progress(outputs: Path) -> str:
    """How far the run below `outputs` has come, for people."""
    runs = list(outputs.glob("*/*"))
    if not runs:
        return "nothing written yet"
    lines = runs[0] / "metrics.jsonl"
    written = len(lines.read_text().splitlines()) if lines.exists() else 0
    return f"{written} lines of metrics, {'done' if (runs[0] / 'DONE').exists() else 'not done'}"


if __name__ == "__main__":
    main()
