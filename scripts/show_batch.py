"""Draw what the network sees, clean and attacked; `python scripts/show_batch.py --help` explains it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from robustflat.apps.main import run_application

if __name__ == "__main__":
    run_application("show_batch")
