"""Train, evaluate and report a whole study: `python scripts/study.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from robustflat.apps.main import run_application

if __name__ == "__main__":
    run_application("study")
