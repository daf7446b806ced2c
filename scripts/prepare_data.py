"""Download public data sets and convert them; `python scripts/prepare_data.py --help` explains it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from robustflat.data.prepare import main

if __name__ == "__main__":
    sys.exit(main())
