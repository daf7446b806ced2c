"""All benchmarks by one command: prints Markdown, and keeps figures in results.json for `make bench-compare`.

    python benchmarks/run.py                       about an hour on a quiet core
    python benchmarks/run.py --quick               two minutes: does everything run, roughly how fast
    python benchmarks/run.py --only training data

Every benchmark runs in a process of its own, one after the other. The study is not among them: benchmarks/studies.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

import torch

from benchmarks.harness import RESULTS, commit, limits, machine

FULL = {
    "training": "",
    "flatness": "--rounds 2",
    "landscape": "--rounds 2",
    "curvature": "",
    "attacks": "--rounds 2 --norms linf --searches fp32 bf16",
    "data": "",
}
QUICK = {
    "training": "--rounds 1 --images 32 --pgd 7",
    "flatness": "--rounds 1 --images 32 --trials 2 --steps 5",
    "landscape": "--rounds 1 --images 32 --points 3 --steps 5",
    "curvature": "--rounds 1 --images 16",
    "attacks": "--rounds 1 --networks small --norms linf --images 8 --searches fp32",
    "data": "--rounds 1 --images 5000 --batches 5 --extra 10000",
}
"""Arguments by benchmark."""

QUICK_RESULTS = RESULTS.with_name("results_quick.json")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="small sizes, one round, into results_quick.json")
    options.add_argument("--only", nargs="+", default=list(FULL), choices=list(FULL), help="these benchmarks")
    options.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    options.add_argument("--device", default="cpu")
    options.add_argument("--results", type=Path, help="JSON file that takes the results")
    given = options.parse_args()
    results = given.results or (QUICK_RESULTS if given.quick else RESULTS)
    torch.set_num_threads(given.threads)
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, commit {commit()}, {machine(given.device)}, load {load()}\n")
    print(", ".join(f"{name} {value:.4g}" for name, value in limits(given.device).items()), flush=True)
    failed = [name for name in given.only if not ran(name, given, results)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def ran(name: str, given: argparse.Namespace, results: Path) -> bool:
    """Run one benchmark to its end, output passed through; whether it succeeded."""
    start = time.perf_counter()
    arguments = (QUICK if given.quick else FULL)[name].split()
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *arguments, "--results", str(results)]
    code = subprocess.run([*command, "--threads", str(given.threads), "--device", given.device], check=False).returncode
    print(f"\n({name}: {time.perf_counter() - start:.0f} s, load {load()})", flush=True)
    return code == 0


def load() -> str:
    """How busy the machine is: figures of a busy one are rough."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


if __name__ == "__main__":
    main()
