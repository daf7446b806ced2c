"""Evaluate and measure trained networks: `python evaluate.py --help`."""

from robustflat.apps.main import run_application

if __name__ == "__main__":
    run_application("evaluate")
