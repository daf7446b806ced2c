"""Check an installation and say what to do: the job behind `robustflat doctor`.

Imports nothing heavy at its top: it must run where torch cannot even be imported.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

OK, WARN, FAIL = "ok", "warn", "fail"
COLOURS = {OK: "green", WARN: "yellow", FAIL: "bold red"}

PYTHON = (3, 11)
REQUIRED = ("hydra-core", "omegaconf", "numpy", "scipy", "h5py", "pillow", "scikit-learn", "matplotlib", "pandas",
            "pyarrow", "plotly", "jinja2", "itables", "rich", "pyyaml")  # fmt: skip
"""The dependencies of pyproject.toml without those that have lines of their own: torch, W&B, the joblib launcher."""
OPTIONAL = {
    "hydra-joblib-launcher": "sweeps on the cores of one machine: pip install robustflat[joblib]",
    "hydra-submitit-launcher": "sweeps on a SLURM cluster: pip install robustflat[slurm]",
    "hydra-ray-launcher": "sweeps on a Ray cluster: pip install robustflat[ray]",
    "hydra-optuna-sweeper": "searching hyper-parameters: pip install hydra-optuna-sweeper",
    "tensorboard": "logger=tensorboard: pip install robustflat[tensorboard]",
    "robustbench": "networks of RobustBench: pip install robustflat[robustbench]",
    "timm": "networks of timm: pip install timm",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FEW_BYTES, TOO_FEW_BYTES = 10 * 2**30, 2**28
"""Below the first a long study may fill the disk; below the second one run may."""


class Finding(NamedTuple):
    """One line: "ok", "warn" or "fail", what was looked at, and what was found or is to be done."""

    level: str
    what: str
    text: str


@dataclass
class DoctorRoot:
    """Root of the configuration: the places and the device that training would use."""

    outputs: str = "outputs"
    data_root: str = "${oc.env:ROBUSTFLAT_DATA,data}"
    device: str = "auto"


ConfigStore.instance().store(name="doctor_root", node=DoctorRoot)


def job(config: DictConfig) -> None:
    """Hydra's task function: print every finding; exit code 1 if there is a failure.

    Args:
        config: keys `outputs`, `data_root`, `device`.
    """
    findings = examine(Path(config.outputs), Path(config.data_root), str(config.device))
    console = Console(highlight=False, soft_wrap=True)
    for level, what, text in findings:
        console.print(f"{level:<5}", style=COLOURS[level], end="")
        console.print(f"{what:<24} {text}", markup=False)
    failures, warnings = (sum(f.level == level for f in findings) for level in (FAIL, WARN))
    console.print(f"\n{failures} failures, {warnings} warnings")
    if failures:
        sys.exit(1)


def examine(outputs: Path, data_root: Path, device: str = "auto") -> list[Finding]:
    """All findings, in the order of what depends on what.

    Args:
        outputs: folder of the runs; need not exist.
        data_root: folder of the data sets; need not exist.
        device: as in the configuration of training.
    """
    findings = [_python(), *_packages(), *_torch(device)]
    findings += [*_folder("outputs", outputs), *_data(data_root), _wandb(), *_optional(), _browser()]
    return findings


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info < PYTHON:
        return Finding(FAIL, "Python", f"{found}; {'.'.join(map(str, PYTHON))} or newer is needed")
    return Finding(OK, "Python", f"{found} at {sys.executable}")


def version_of(package: str) -> str | None:
    """Installed version of a distribution, or `None`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    absent = [name for name in REQUIRED if version_of(name) is None]
    if absent:
        yield Finding(FAIL, "packages", f"not installed: {', '.join(absent)}; pip install {' '.join(absent)}")
    else:
        yield Finding(OK, "packages", ", ".join(f"{name} {version_of(name)}" for name in REQUIRED))


def _torch(device: str) -> Iterator[Finding]:
    versions = f"torch {version_of('torch')}, torchvision {version_of('torchvision')}"
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        yield Finding(
            FAIL, "torch", f"cannot be imported ({_first_line(error)}); pip install --upgrade torch torchvision"
        )
        return
    yield Finding(OK, "torch", versions)
    try:
        boxes = importlib.import_module("torchvision.ops").nms  # its compiled part refuses another torch
        boxes(torch.zeros(1, 4), torch.zeros(1), 0.5)
        yield Finding(OK, "torchvision", "fits torch")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        advice = "install them as a pair: pip install --upgrade torch torchvision"
        yield Finding(FAIL, "torchvision", f"{versions} do not work together ({_first_line(error)}); {advice}")
    yield _device(torch, device)


def _device(torch: ModuleType, device: str) -> Finding:
    from robustflat.apps.build import choose_device
    from robustflat.errors import UserError

    cuda = torch.cuda
    try:
        chosen = choose_device(device)
    except UserError as error:
        return Finding(FAIL, "device", str(error))
    if not chosen.startswith("cuda"):
        built = torch.version.cuda
        advice = "" if device != "auto" else "; no GPU found, training is slow on large networks"
        if built and device == "auto":
            advice += f" (torch is built for CUDA {built}: does nvidia-smi work?)"
        return Finding(WARN if advice else OK, "device", f"{chosen}{advice}")
    try:
        probe = torch.ones(2, 2, device=chosen)
        assert float((probe @ probe).sum()) == 8
        free, total = cuda.mem_get_info(chosen)
    except RuntimeError as error:
        return Finding(FAIL, "device", f"{chosen} is there but cannot compute: {_first_line(error)}; check the driver")
    name = cuda.get_device_name(chosen)
    return Finding(OK, "device", f"{chosen}: {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def _folder(name: str, folder: Path) -> Iterator[Finding]:
    """Whether files can be made below a folder, and how much room its disk has; leaves nothing behind."""
    place = nearest_existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".robustflat-doctor-"):
            pass
    except OSError as error:
        advice = f"choose another with {name}=FOLDER"
        yield Finding(FAIL, name, f"cannot write into {place.resolve()}: {error.strerror}; {advice}")
        return
    yield Finding(OK, name, f"{folder.resolve()} can be written")
    free = shutil.disk_usage(place).free
    level = FAIL if free < TOO_FEW_BYTES else WARN if free < FEW_BYTES else OK
    advice = "" if level == OK else f"; free some, or choose another disk with {name}=FOLDER"
    yield Finding(level, "disk space", f"{free / 2**30:.1f} GiB free{advice}")


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the nearest of its parents that exists."""
    return next(place for place in (folder, *folder.resolve().parents) if place.exists())


def _data(root: Path) -> Iterator[Finding]:
    place = nearest_existing(root)
    if not os.access(place, os.R_OK | os.X_OK):
        yield Finding(FAIL, "data_root", f"{place} cannot be read; choose another with data_root=FOLDER")
        return
    if not os.access(place, os.W_OK):
        yield Finding(WARN, "data_root", f"{root.resolve()} is read-only: downloads and conversions cannot go there")
    else:
        yield Finding(OK, "data_root", f"{root.resolve()} can be written")
    try:
        sources = importlib.import_module("robustflat.data.sources")
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding(FAIL, "data sets", f"robustflat cannot be imported: {_first_line(error)}")
        return
    known = [source(root=str(root)) for source in sources.StoredSource.__subclasses__()]
    present = [source.name for source in known if source.folder()]
    absent = [source.name for source in known if not source.folder()]
    yield Finding(OK, "data sets", f"here: {', '.join(['digits (built in)', *present])}")
    if absent:
        how = "to get one: dataset=NAME dataset.source.download=true"
        yield Finding(WARN, "data sets", f"not here: {', '.join(absent)}; {how}")


def _wandb() -> Finding:
    from robustflat.loggers.wandb import account

    state = account()
    if state is None:
        return Finding(WARN, "W&B", "not installed; logger=wandb then logs to metrics.jsonl only: pip install wandb")
    if not state:
        return Finding(WARN, "W&B", "no account here; logger=wandb keeps runs offline. To log in: wandb login")
    return Finding(OK, "W&B", f"account found; WANDB_MODE={os.environ.get('WANDB_MODE', 'online')}")


def _optional() -> Iterator[Finding]:
    for name, purpose in OPTIONAL.items():
        found = version_of(name)
        yield Finding(OK, name, found) if found else Finding(WARN, name, f"not installed; {purpose}")


def _browser() -> Finding:
    path = next((where for name in BROWSERS if (where := shutil.which(name))), None)
    if path is None:
        return Finding(WARN, "browser", "no chromium; only the test of the report page needs it: install chromium")
    return Finding(OK, "browser", path)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
