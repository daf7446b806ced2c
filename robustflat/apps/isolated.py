"""A run of a sweep in a process of its own: if it is killed, or memory runs out, the others go on.

Joblib's pool does not outlive the death of one of its workers, so no worker trains itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import robustflat
from robustflat.errors import UserError


def run_isolated(config: DictConfig, path: Path, command: list[str]) -> Mapping[str, Any]:
    """`apps.train.run` in a new process.

    Args:
        config: composed configuration.
        path: the run folder.
        command: the overrides that the user gave, for the record.

    Returns:
        The measured values, as in results.json.

    Raises:
        UserError: if the process fails or is killed.
    """
    from robustflat.apps.train import evaluation_key

    order = {"config": OmegaConf.to_yaml(config, resolve=True), "path": str(path), "command": command}
    package = str(Path(robustflat.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, *_python_path()])}
    ended = subprocess.run(
        [sys.executable, "-m", "robustflat.apps.isolated"], input=json.dumps(order), text=True, env=environment
    )
    if ended.returncode:
        raise UserError(
            f"The run in {path} ({' '.join(command)}) {_how(ended.returncode)}. The other runs go on; "
            "the same command completes this one."
        )
    results: Mapping[str, Any] = json.loads((path / "results.json").read_text())[evaluation_key(config)]
    return results


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (by hand, by the scheduler, or because memory ran out)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def main() -> None:
    """The new process: reads its order from standard input, runs it, and ends as a run on its own would."""
    from robustflat.apps.config import register
    from robustflat.apps.messages import complain, explained
    from robustflat.apps.train import STOPPED, run
    from robustflat.training.trainer import TrainingStopped

    order = json.load(sys.stdin)
    register()
    config = OmegaConf.create(order["config"])
    assert isinstance(config, DictConfig)
    console = Console(highlight=False, soft_wrap=True)
    try:
        run(config, Path(order["path"]), command=order["command"], console=console)
    except Exception as error:
        message = explained(error)
        if message is None:
            raise
        complain(message)
        sys.exit(STOPPED if isinstance(error, TrainingStopped) else 1)


if __name__ == "__main__":
    main()
