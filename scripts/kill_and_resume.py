"""Kill a training run at random moments, start it again each time, and compare it with an uninterrupted one.

    python scripts/kill_and_resume.py --kills 10 [-- trainer=trades seed=3 ...]

Compares checkpoints (weights, optimizer, schedule, averaged weights, random streams, history) and the metrics file
bit for bit, prints every difference, and exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

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
        try:
            differences = kill_and_resume(Path(folder), arguments.kills, arguments.seed, arguments.overrides)
        except subprocess.CalledProcessError as error:  # train.py has said why
            sys.exit(error.returncode)
    print("\n".join(differences) or f"{arguments.kills} kills: equal bit for bit")
    sys.exit(1 if differences else 0)


def kill_and_resume(folder: Path, kills: int, seed: int, overrides: list[str]) -> list[str]:
    """Differences between runs killed `kills` times in all and an uninterrupted one; empty if there are none.

    Every kill meets a run that is not done: where a run ends before its turn, it is compared, and the kills go on
    in a fresh one.
    """
    start = time.monotonic()
    whole = run(folder / "whole", overrides)
    seconds = time.monotonic() - start
    moments, left, differences = random.Random(seed), kills, []
    for number in itertools.count():
        outputs = folder / f"killed-{number}"
        while left and killed(outputs, overrides, moments.uniform(0, seconds)):
            left -= 1
            print(f"kill {kills - left}: {progress(outputs)}", flush=True)
        differences += compare_runs(whole, run(outputs, overrides))
        if not left:
            return differences
    raise AssertionError("itertools.count never ends")


def run(outputs: Path, overrides: list[str]) -> Path:
    """Train to the end; returns the run folder."""
    subprocess.run(command(outputs, overrides), check=True, stdout=subprocess.DEVNULL)
    (folder,) = outputs.glob("*/*")
    return folder


def killed(outputs: Path, overrides: list[str], seconds: float) -> bool:
    """Start the run and kill it after `seconds`; whether that met it before it was done."""
    process = subprocess.Popen(command(outputs, overrides), stdout=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return not list(outputs.glob("*/*/DONE"))


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
