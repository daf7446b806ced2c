"""The root of the configuration, its resolvers, and the identity of a run."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import robustflat
from robustflat.apps.data_source import deciding_source

NOT_IDENTITY = (
    "hydra", "logger", "device", "threads", "evaluation", "flatness", "outputs", "data_root", "name",
    "trusted_packages", "dataset.device", "dataset.eval_batch_size", "dataset.extra.root", "dataset.extra.download",
    "trainer.log_every", "force", "explain", "profile", "deterministic",
)  # fmt: skip
"""What may change without making another run. A forgotten entry here costs a needless run; an include list
would silently reuse the wrong one."""


@dataclass
class Root:
    """The top level of every configuration. Groups are checked against constructors, scalars here."""

    dataset: Any = None
    model: Any = None
    optimizer: Any = None
    schedule: Any = None
    attack: Any = None
    trainer: Any = None
    flatness: Any = None
    evaluation: Any = None
    logger: Any = None
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    name: str | None = None
    outputs: str = "outputs"
    data_root: str = "${oc.env:ROBUSTFLAT_DATA,data}"
    force: bool = False
    explain: bool = False
    profile: Any = False
    deterministic: bool = False
    trusted_packages: list[str] = field(default_factory=list)


@dataclass
class NetworkRoot:
    """Keys of every command about trained networks: a run or a checkpoint from elsewhere, and how it is looked at."""

    run: str | None = None
    checkpoint: str | None = None
    checkpoints: Any = None
    part: str = "model"
    attack: Any = None
    evaluation: Any = None
    dataset: Any = None
    model: Any = None
    seed: int | None = None
    device: str = "auto"
    threads: int = 0
    name: str | None = None
    outputs: str = "outputs"
    data_root: str | None = None
    force: bool = False
    trusted_packages: list[str] = field(default_factory=list)


def config_folder() -> Path:
    """Folder of the YAML groups: inside the installed package, or beside it in a checkout."""
    package = Path(robustflat.__file__).resolve().parent
    inside, beside = package / "conf", package.parent / "conf"
    return inside if inside.is_dir() else beside


def register() -> None:
    """Make the root schema and the resolvers known to Hydra and OmegaConf; may be called again."""
    store = ConfigStore.instance()
    store.store(name="root", node=Root)
    # Hydra copies the store, of which there is only one, at every composition and for every line of --help.
    store.__deepcopy__ = lambda memo: store  # type: ignore[attr-defined]
    _accept_launcher_files()
    OmegaConf.register_new_resolver("px", lambda value: float(value) / 255.0, replace=True)
    OmegaConf.register_new_resolver("times", lambda factor, value: float(factor) * float(value), replace=True)
    OmegaConf.register_new_resolver("training_norm", _training_norm, replace=True)
    OmegaConf.register_new_resolver("run_name", lambda _root_: run_name(_root_), replace=True)
    OmegaConf.register_new_resolver("run_id", lambda _root_: run_id(_root_), replace=True)


def _accept_launcher_files() -> None:
    """Our launcher files bear the names of their plugins' schemas on purpose, and may be checked against them."""
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated", category=UserWarning)


_accept_launcher_files()  # also in the workers of a launcher, which call no `register`


def _training_norm(_root_: DictConfig) -> str:
    """Norm of the training attack's ball: 'linf', 'l2' or 'l1'; 'linf' for training without attack."""
    ball = OmegaConf.select(_root_, "attack.ball", default=None)
    # As written: where the ball takes its norm from the evaluation, that is what asks here.
    written = OmegaConf.to_container(ball, resolve=False) if OmegaConf.is_dict(ball) else {}
    assert isinstance(written, dict)
    target, norm = str(written.get("_target_")).lower(), written.get("norm")
    return next((name for name in ("l2", "l1") if f".{name}ball" in target or norm == name), "linf")


def run_name(config: DictConfig) -> str:
    """Name of the experiment: `name` if given, else the chosen experiment file, else data set and trainer."""
    if OmegaConf.select(config, "name", default=None):
        return _safe_name(str(config.name))
    choices = OmegaConf.select(config, "hydra.runtime.choices", default=None) or {}
    chosen = [f"{group[10:]}{choice}" for group, choice in sorted(choices.items()) if _is_experiment(group, choice)]
    if chosen:
        return _safe_name("-".join(chosen))
    return _safe_name(f"{choices.get('dataset', 'data')}-{choices.get('trainer', 'train')}")


def _is_experiment(group: str, choice: object) -> bool:
    return bool(choice) and (group == "experiment" or group.startswith("experiment/"))


def _safe_name(text: str) -> str:
    """Letters, digits, '.', '_' and '-' only, so that no name can leave the outputs folder."""
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in text).strip(".-")
    return kept[:80] or "run"


def identity(config: DictConfig) -> dict[str, Any]:
    """The part of the configuration that decides a run's result, as plain values with interpolations resolved."""
    container = resolved(config)
    dataset = container.get("dataset")
    if isinstance(dataset, dict) and isinstance(dataset.get("source"), dict):
        container["dataset"] = {**dataset, "source": deciding_source(container)}
    for key in NOT_IDENTITY:
        _remove(container, key.split("."))
    if (container.get("trainer") or {}).get(
        "sync_batch_norm"
    ) is True:  # then a run is the same on any number of processes
        _remove(container, ["trainer", "sync_batch_norm"])
    return container


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, interpolations resolved where they can be, without Hydra's own node."""
    masked = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
    try:
        container = OmegaConf.to_container(masked, resolve=True)
    except OmegaConfBaseException:  # an unresolvable value: the check names it, the hash only has to exist
        container = OmegaConf.to_container(masked, resolve=False)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def _remove(container: dict[str, Any], path: list[str]) -> None:
    for key in path[:-1]:
        child = container.get(key)
        if not isinstance(child, dict):
            return
        container = child
    container.pop(path[-1], None)


def run_id(config: DictConfig) -> str:
    """Eight hexadecimal digits that name the configuration's identity: same command, same run."""
    return digest(identity(config))


MEMORY = "memory_budget"
"""Key of options that bound memory: they change speed alone."""

COMPILE = "compile"
"""Key of options that compile: a value but "none" changes rounding, as `search` does, and so makes another run."""

_NUMBER = re.compile(r"\d+(e\d+)?")


def digest(value: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of a JSON-able mapping, independent of the order of keys and of 1 being written 1.0.

    Bounds on memory (keys `memory_budget`) and `compile: none` do not count, see `decisive`.
    They never look like a number: Hydra reads run=823e4291 as infinity, and run=00123456 as 123456.
    """
    text = json.dumps(_canonical(decisive(value)), sort_keys=True, default=str)
    digits = hashlib.sha256(text.encode()).hexdigest()
    parts = (digits[start : start + 8] for start in range(len(digits) - 7))
    return next(part for part in parts if not _NUMBER.fullmatch(part))


def decisive(value: Any) -> Any:
    """A configuration without what decides no result, at any depth: bounds on memory, and `compile: none`.

    So runs from before these options existed keep their names and folders.
    """
    if isinstance(value, Mapping):
        return {k: decisive(v) for k, v in value.items() if k != MEMORY and not (k == COMPILE and v == "none")}
    return [decisive(v) for v in value] if isinstance(value, list | tuple) else value


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines 'key: value in a, value in b' for every leaf in which two nested mappings differ."""
    for key in sorted({*a, *b}):
        left, right = a.get(key, "absent"), b.get(key, "absent")
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}: {left} there, {right} here"
