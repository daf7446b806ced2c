"""A run's folder: who may write into it, which configuration it belongs to, and how its files are written."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import robustflat
from robustflat.apps.config import decisive, differences
from robustflat.errors import UserError
from robustflat.loggers.jsonl import replace_file
from robustflat.ranks import current

try:
    import fcntl
except ImportError:  # not on Windows: no lock there
    fcntl = None  # type: ignore[assignment]


class RunFolder:
    """Folder of one run: config.yaml, provenance.json, metrics.jsonl, checkpoints/, results.json, DONE.

    Opening takes a lock that ends with the process, so that two processes never write one run.

    Args:
        path: the folder; created if it is not there.
        identity: the part of the configuration that decides the result (see `apps.config.identity`); `None`: whatever
            the folder holds.

    Raises:
        UserError: if the folder belongs to another configuration, is in use, or cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any] | None) -> None:
        self.path = path
        if identity is not None:
            self._refuse_other_run(identity)
        self._new = not path.exists() or not any(path.iterdir())
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")  # noqa: SIM115  # held until close()
        except OSError as error:
            raise UserError(
                f"Cannot write into {path}: {error.strerror}. Choose another with outputs=<folder>."
            ) from error
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._lock.close()
                raise UserError(f"Another process is working in {path}; wait for it or stop it first.") from error
        if identity is not None and not (path / "identity.yaml").exists():
            try:
                write_text(path / "identity.yaml", yaml.safe_dump(dict(identity), sort_keys=True))
            except BaseException:
                self.abandon()
                self.close()
                raise

    def _refuse_other_run(self, identity: Mapping[str, Any]) -> None:
        stored = self.path / "identity.yaml"
        if not stored.exists():
            return
        try:
            there = yaml.safe_load(stored.read_text()) or {}
            if not isinstance(there, dict):
                raise yaml.YAMLError("not a mapping")
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{stored} is damaged; remove the folder {self.path} to start that run anew.") from error
        lines = list(differences(decisive(there), decisive(json.loads(json.dumps(identity, default=str)))))
        if lines:
            text = "\n".join(f"  - {line}" for line in lines[:8])
            raise UserError(
                f"{self.path} holds a run with another configuration, which is left as it is:\n{text}\n"
                "Choose another folder, or leave hydra.run.dir alone: each configuration then finds its own."
            )

    @property
    def checkpoints(self) -> Path:
        """Folder of last.pt, previous.pt and the snapshots."""
        return self.path / "checkpoints"

    @property
    def done(self) -> bool:
        """Whether training has finished."""
        return (self.path / "DONE").exists()

    def mark_done(self) -> None:
        """Say that training has finished; the last thing that training writes."""
        write_text(self.path / "DONE", "training finished\n")

    def refuse_to_begin_again(self) -> None:
        """Where no checkpoint is found: measure no untrained network under the name of a run that is done.

        Raises:
            UserError: if training has finished.
        """
        if self.done:
            raise UserError(
                f"{self.path} is a finished run, but {self.checkpoints} holds no checkpoint, so that nothing more can "
                f"be measured of it. Put last.pt back, or remove {self.path / 'DONE'} to train it again."
            )

    def read_json(self, name: str) -> dict[str, Any]:
        """Content of a JSON file of the folder; empty if it is not there or damaged (it can be made again)."""
        try:
            value = json.loads((self.path / name).read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace a JSON file of the folder in one step; not-a-number becomes null."""
        write_text(self.path / name, json.dumps(_json_ready(value), indent=1, default=str) + "\n")

    def abandon(self) -> None:
        """Remove the folder if this process made it and nothing was trained in it."""
        if self._new and not any(self.checkpoints.glob("*.pt")):
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()


class FollowedFolder(RunFolder):
    """The folder as seen by a process that shares a run with the one that has opened it: it writes nothing.

    Args:
        path: the folder.
        done: whether training has finished, as the process that has opened the folder says.
    """

    def __init__(self, path: Path, *, done: bool) -> None:
        self.path = path
        self._done = done

    @property
    def done(self) -> bool:
        """Whether training had finished when the folder was opened."""
        return self._done

    def mark_done(self) -> None:
        """Leave that to the process that has opened the folder; so with the other methods."""

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write nothing."""

    def abandon(self) -> None:
        """Remove nothing."""

    def close(self) -> None:
        """There is no lock to give back."""


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part; UTF-8, permissions by umask.

    Raises:
        UserError: if it cannot be written (a full disk, for example); the old file is intact.
    """
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}. What was there before is intact.") from error


def provenance(command: list[str]) -> dict[str, Any]:
    """Where a result comes from: code version, package versions, machine and command (no time: see timings)."""
    packages = ("torch", "torchvision", "hydra-core", "omegaconf", "numpy", "scipy", "h5py")
    return {
        "robustflat": robustflat.__version__,
        **_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "processor": platform.machine(),
        **_hardware(),
        "threads": torch.get_num_threads(),
        "processes": current().size,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": _tf32() if torch.cuda.is_available() else [],
        "command": command,
        "executable": Path(sys.argv[0]).name,
    }


def _hardware() -> dict[str, Any]:
    """Processor, cores and, where there is one, GPU with driver libraries."""
    model = None
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": model or platform.processor() or None,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "cudnn": torch.backends.cudnn.version() if gpus else None,  # type: ignore[no-untyped-call]
    }


def _tf32() -> list[str]:
    """What a card may compute with 10 bits of mantissa where passes need not be exact: training, searches of attacks.

    Convolutions, unless torch is told otherwise; values that are reported are computed without (`exact_float32`).
    """
    switches = {"convolutions": torch.backends.cudnn.conv, "matrix products": torch.backends.cuda.matmul}  # type: ignore[attr-defined]
    return [name for name, switch in switches.items() if switch.fp32_precision == "tf32"]


@functools.cache  # of the code that runs, whatever is edited in the meantime
def _commit() -> dict[str, Any]:
    """Commit of the checkout that this package was imported from, and a hash of what differs: new files count too."""
    folder = Path(robustflat.__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout

    if git("ls-files", "--error-unmatch", "robustflat/__init__.py") is None:
        return {"commit": None, "dirty": None}
    commit, changed = git("rev-parse", "HEAD"), (git("diff", "HEAD") or "").encode()
    new = git("ls-files", "-z", "--others", "--exclude-standard", "--", "robustflat", "conf") or ""
    for name in filter(None, new.split("\0")):
        with suppress(OSError):  # gone in the meantime
            changed += name.encode() + (folder / name).read_bytes()
    return {
        "commit": commit.strip() if commit else None,
        "dirty": hashlib.sha256(changed).hexdigest()[:8] if changed else None,
    }
