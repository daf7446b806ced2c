"""Which networks an evaluation is about: those of a run folder, or a checkpoint from elsewhere."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from robustflat.errors import CheckpointError, UserError
from robustflat.evaluation.selection import epoch_of
from robustflat.training.checkpoint import LAST, load

NESTED = ("model", "state_dict", "model_state_dict", "net", "network")
"""Where files of other programs keep the weights, if not at the top."""


class NetworkFile(NamedTuple):
    """One set of weights to evaluate.

    Attributes:
        name: what its results are stored under: "last", "epoch_0005", "average", "early_stopped", ...
        path: the checkpoint file.
        part: which network of it: "model", or "average".
        epoch: of a snapshot; None for others.
    """

    name: str
    path: Path
    part: str
    epoch: int | None


def find_run(text: str, outputs: Path) -> Path:
    """The run folder that a path or an id names; ids are looked up below `outputs`.

    Raises:
        UserError: if there is none, or several.
    """
    folder = Path(text).expanduser()
    if (folder / "identity.yaml").is_file():
        return folder
    if folder.is_dir():
        raise UserError(f"{folder} is no run folder: it has no identity.yaml. Runs are made by train.py.")
    runs = {path.parent for path in outputs.glob("*/*/identity.yaml")}
    found = sorted(run for run in runs if run.name == text)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"Several runs are called {text}: {', '.join(map(str, found))}. Give the folder.")
    close = get_close_matches(text, [run.name for run in runs], n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UserError(f"There is no run '{text}': neither a folder, nor one of {len(runs)} runs below {outputs}.{hint}")


def stored_config(run: Path) -> DictConfig:
    """The configuration that a run was trained with.

    Raises:
        UserError: if it is missing or damaged, or holds interpolations, which a run never writes.
    """
    path = run / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        config = OmegaConf.create(text)
    except FileNotFoundError as error:
        raise UserError(f"{run} has no config.yaml, so its network is not known. Is it a run folder?") from error
    except (OSError, UnicodeDecodeError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}).") from error
    except Exception as error:  # the YAML library's own, which OmegaConf passes on
        raise UserError(f"{path} is no YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(config, DictConfig) or "${" in text:
        raise UserError(f"{path} is not the resolved configuration of a run.")
    missing = [key for key in ("dataset", "model", "seed") if key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it is not the configuration of a run.")
    return config


def snapshots(run: Path) -> dict[int, Path]:
    """Snapshots of a run by epoch, in order."""
    files = {epoch_of(path.name): path for path in (run / "checkpoints").glob("epoch_*.pt")}
    return {epoch: files[epoch] for epoch in sorted(e for e in files if e is not None)}


def choose(run: Path, which: str, part: str) -> list[NetworkFile]:
    """The networks of a run that `checkpoints=` names.

    Args:
        run: the run folder.
        which: "last", "all" (every snapshot, and the last weights), "average", or epochs such as "5" or "5,10".
        part: "model" or the name of another network in the checkpoints, such as "average".

    Raises:
        UserError: for another word, or an epoch without snapshot.
    """
    if which == "average":
        which, part = "last", "average"
    last = NetworkFile("last" if part == "model" else part, run / "checkpoints" / LAST, part, None)
    if which == "last":
        return [last]
    there = snapshots(run)
    if which == "all":
        kept = [snapshot(there, epoch, part) for epoch in there if epoch != epoch_in(last.path)]
        return [*kept, last]
    epochs = [word.strip() for word in which.split(",")]
    if not all(word.isdigit() for word in epochs):
        raise UserError(f"checkpoints must be last, all, average, or epochs such as 5 or '5,10'; got {which!r}.")
    return [snapshot(there, int(word), part) for word in epochs]


def snapshot(there: Mapping[int, Path], epoch: int, part: str) -> NetworkFile:
    """The snapshot of an epoch.

    Raises:
        UserError: if there is none, with the epochs that have one.
    """
    if epoch not in there:
        raise UserError(f"There is no snapshot of epoch {epoch}; there are {', '.join(map(str, there)) or 'none'}.")
    prefix = "" if part == "model" else f"{part}_"
    return NetworkFile(f"{prefix}epoch_{epoch:04d}", there[epoch], part, epoch)


def epoch_in(path: Path) -> int | None:
    """Epoch that a checkpoint of ours was saved after."""
    epoch = load(path).meta.get("epoch")
    return epoch if isinstance(epoch, int) else None


def weights_of(file: NetworkFile) -> dict[str, Tensor]:
    """Weights and buffers by name from a checkpoint of ours, or from a plain state dict of another program.

    Raises:
        CheckpointError: if the file is missing, damaged or unsafe to load, or has no such part.
    """
    if not _is_foreign(file.path):
        parts = load(file.path).parts
        return _tensors(parts.get(file.part, _average_in(parts) if file.part == "average" else None), file, parts)
    content = torch.load(file.path, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        content = next((content[key] for key in NESTED if isinstance(content.get(key), dict)), content)
    weights = _tensors(content, file, {})
    prefix = "module."  # of a network wrapped for several GPUs
    return {k.removeprefix(prefix): v for k, v in weights.items()} if all(map(_wrapped, weights)) else weights


def described(path: Path) -> tuple[DictConfig | None, dict[str, Any]]:
    """What a checkpoint of ours says of its network: the `model` node, and the record of its conversion if it has one.

    Args:
        path: any file; one that is missing or of another program says nothing.

    Returns:
        Node or `None`, and the record or {}.

    Raises:
        CheckpointError: if the file is damaged or unsafe to load, or the node is no configuration.
    """
    if not path.is_file() or _is_foreign(path):
        return None, {}
    meta = load(path).meta
    text = meta.get("config")
    record = meta.get("converted")
    if not isinstance(text, str):
        return None, record if isinstance(record, dict) else {}
    try:
        config = OmegaConf.create(text)
    except Exception as error:  # the YAML library's own, which OmegaConf passes on
        raise CheckpointError(f"{path} holds a configuration that is no YAML.") from error
    node = config.get("model") if isinstance(config, DictConfig) else None
    if "${" in text or not isinstance(node, DictConfig):
        raise CheckpointError(f"{path} does not say which network it holds. Give model=<choice>.")
    return node, record if isinstance(record, dict) else {}


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits of names, shapes, types and values: equal weights, equal digest."""
    total = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def _is_foreign(path: Path) -> bool:
    """Whether a file is a torch file of tensors that is not a checkpoint of ours; refuses pickles.

    Raises:
        CheckpointError: if the file cannot be loaded without running what is in it.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is a bare pickle or no checkpoint at all. {CONVERT}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects other than tensors and plain values, which are never unpickled, since "
            f"that could run any code. {CONVERT}"
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError):
        return False  # damaged: `load` says how
    return not (isinstance(content, dict) and "format" in content and "parts" in content)


CONVERT = (
    "Nothing was loaded. Take the tensors out without running anything: "
    "python scripts/convert_checkpoint.py <file> <new file>"
)


def _wrapped(name: str) -> bool:
    return name.startswith("module.")


def _average_in(parts: Mapping[str, Any]) -> object:
    """The weight average in the callbacks' states of a `last.pt`."""
    states = parts.get("callbacks", {})
    found = [s["average"] for s in states.values() if isinstance(s, dict) and isinstance(s.get("average"), dict)]
    return found[0] if found else None


def _tensors(content: object, file: NetworkFile, parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """`content` as named tensors.

    Raises:
        CheckpointError: if it is anything else.
    """
    if content is None:
        networks = [name for name in ("model", "average") if name in parts]
        raise CheckpointError(
            f"{file.path} has no part '{file.part}'; networks in it: {', '.join(networks) or 'none'}."
        )
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{file.path} holds no named tensors (a state dict), at the top or under {', '.join(NESTED)}."
        )
    return {str(name): value for name, value in content.items()}
