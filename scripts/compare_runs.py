"""Compare two run folders: checkpoints and metrics, bit for bit, and where they come from.

    python scripts/compare_runs.py outputs/digits-at/3f2a9c1d other/digits-at/3f2a9c1d --assert-equal

Prints every difference. With --assert-equal the exit code is 1 if weights, training state or metrics differ.
Differences of origin (machine, versions, commit) are shown, but are none of the result.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from robustflat.apps.compare import main

if __name__ == "__main__":
    sys.exit(main())
