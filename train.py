"""Train, evaluate and measure one network: `python train.py --help`."""

from robustflat.apps.main import run_application

if __name__ == "__main__":
    run_application("train")
