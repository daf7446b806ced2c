"""Paired tests between two evaluated networks on the same examples: do they really differ?

    python scripts/compare_networks.py outputs/digits-at/3f2a9c1d outputs/digits-trades/77b0e4f2
    python scripts/compare_networks.py 3f2a9c1d 3f2a9c1d --checkpoints last early_stopped

Errors by McNemar's exact test; losses and flatness by a bootstrap over pairs. First minus second; both networks must
have been evaluated on the same examples with the same settings (evaluate.py), and only what both have is compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from robustflat.apps.networks import find_run
from robustflat.apps.paired_runs import compare_networks, network_in
from robustflat.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, compare, print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="run folder or id")
    parser.add_argument("second", help="run folder or id, may be the same run")
    parser.add_argument("--checkpoints", nargs=2, default=["last", "last"], metavar=("FIRST", "SECOND"))
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs are looked up by their id")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    given = parser.parse_args(arguments)
    try:
        runs = [find_run(text, given.outputs) for text in (given.first, given.second)]
        networks = [network_in(run, name) for run, name in zip(runs, given.checkpoints, strict=True)]
        for split, comparison in compare_networks(networks[0], networks[1], seed=given.seed).items():
            print(f"{split} ({comparison.differences[0].examples} examples)\n{comparison}\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
