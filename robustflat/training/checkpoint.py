"""Checkpoints: written whole or not at all, and read without running anything that is in them.

A checkpoint is one file in torch's own zip format that holds `{"format": 1, "meta": {...}, "parts": {...}}`
with nothing but tensors and plain values inside, so `torch.load(path, weights_only=True)` reads it anywhere.
Every member of the zip carries a checksum, which is verified before anything is loaded.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustflat.errors import CheckpointError, UserError

FORMAT = 1
LAST = "last.pt"
PREVIOUS = "previous.pt"


class Checkpoint(NamedTuple):
    """Named parts (model, optimizer, ...) and meta data (config, code version, ...)."""

    parts: dict[str, Any]
    meta: dict[str, Any]


class Newest(NamedTuple):
    """The newest readable checkpoint of a folder, and a message if it is not the one it should have been."""

    parts: dict[str, Any]
    path: Path
    message: str | None


def save(
    path: str | Path,
    parts: Mapping[str, object],
    meta: Mapping[str, object] | None = None,
    *,
    keep: str | Path | None = None,
) -> None:
    """Write a checkpoint atomically: at any moment the path holds the old file, the new one, or (new run) none.

    With `keep` there is a moment at which the old file has moved there and the new one is not yet at the path; then
    `load_newest` finds the old one.

    Args:
        path: file to write; its folder is made if needed.
        parts: part name -> tensors and plain values (numbers, text, None, lists, tuples, dictionaries), nested.
        meta: plain values about the run.
        keep: where to move the file that is now at `path`, once the new one is safely on disk.

    Raises:
        CheckpointError: if parts or meta hold anything else.
        UserError: if the disk is full or not writable; the earlier checkpoint is intact then.
    """
    path = Path(path)
    content = {"format": FORMAT, "meta": dict(meta or {}), "parts": dict(parts)}
    _require_plain(content, "checkpoint")
    buffer = io.BytesIO()
    torch.save(content, buffer)
    temporary = path.with_name(_temporary(path.name, str(os.getpid())))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"could not write the checkpoint {path}: {error.strerror or error}. An earlier one, if any, "
            "is intact. Free some space (or fix the permissions) and start the same command again."
        ) from error
    except BaseException:  # an interrupt must leave no half-written file either
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: str | Path, names: str) -> None:
    """Delete what `save` had only begun to write when its process was killed; while no other process saves there.

    Args:
        folder: where to look; it need not exist.
        names: of the files that were to be written, a pattern such as "epoch_*.pt".
    """
    for file in Path(folder).glob(_temporary(names, "*")):
        with suppress(OSError):
            file.unlink()


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in the file is ever executed.

    Raises:
        CheckpointError: if the file is missing, damaged, cut off, not a checkpoint, from a newer format, or
            holds anything but tensors and plain values.
    """
    path = Path(path)
    _require_sound_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects other than tensors and plain values. robustflat never unpickles "
            "them, since that could run any code; nothing was loaded. Convert the file where you trust it."
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}. {_DAMAGED_ADVICE}") from error
    if not isinstance(content, dict) or not {"format", "meta", "parts"} <= content.keys():
        raise CheckpointError(
            f"{path} is a torch file but not a checkpoint of robustflat. Foreign weights: model=external."
        )
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {content['format']}; this version reads format {FORMAT}. "
            "Use the version of robustflat that wrote it."
        )
    return Checkpoint(content["parts"], content["meta"])


def load_newest(folder: str | Path) -> Newest | None:
    """Read `last.pt` of a folder or, if that is missing or damaged, `previous.pt`, and say so.

    Returns:
        Parts, path and message (`None` if all is well), or `None` if the folder holds neither file.

    Raises:
        CheckpointError: if there are files but none is readable; the text tells about each.
    """
    last, previous = Path(folder) / LAST, Path(folder) / PREVIOUS
    if not last.exists() and not previous.exists():
        return None
    try:
        return Newest(load(last).parts, last, None)
    except CheckpointError as error:
        if not previous.exists():
            raise
        first = str(error)
    try:
        parts = load(previous).parts
    except CheckpointError as error:
        raise CheckpointError(f"neither checkpoint can be read. {first} {error}") from error
    return Newest(parts, previous, f"{first} Going back to {previous}.")


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights and buffers into a model, every name and shape matching.

    Args:
        model: changed in place, and only if everything matches.
        state: name -> tensor, as from `model.state_dict()`.

    Raises:
        CheckpointError: with the missing, unexpected and differently shaped names.
    """
    own = model.state_dict()
    problems = [
        _listed("missing", [name for name in own if name not in state]),
        _listed("unexpected", [name for name in state if name not in own]),
        _listed(
            "of another shape",
            [
                f"{name} (checkpoint {tuple(state[name].shape)}, model {tuple(value.shape)})"
                for name, value in own.items()
                if name in state and state[name].shape != value.shape
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(
            "the checkpoint does not fit the model; architecture, width and classes must be those it was "
            "trained with. " + " ".join(filter(None, problems))
        )
    model.load_state_dict(state, strict=True)


_DAMAGED_ADVICE = "Delete it, then start again from an earlier checkpoint or from the beginning."


def _require_sound_zip(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}.")
    try:
        with open(path, "rb") as file:
            head = file.read(2)
        if head != b"PK":
            what = "a bare pickle" if head[:1] == b"\x80" else "not a checkpoint"
            raise CheckpointError(
                f"{path} is {what}, or its beginning is damaged. robustflat reads only its own zip format and "
                "never unpickles files, since that could run any code."
            )
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise CheckpointError(f"{path} is a TorchScript archive, which could run code; nothing was loaded.")
            damaged = archive.testzip()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, NotImplementedError, LookupError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {_first_line(error)}. {_DAMAGED_ADVICE}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: wrong checksum of {damaged}. {_DAMAGED_ADVICE}")


def _require_plain(value: object, where: str) -> None:
    if value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, Tensor):
        return
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, dict)
        for key, inner in value.items():
            if type(key) not in (str, int):
                raise CheckpointError(f"{where} has the key {key!r}; only text and integers can be stored.")
            _require_plain(inner, f"{where}.{key}")
    elif type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        for index, inner in enumerate(value):
            _require_plain(inner, f"{where}[{index}]")
    else:
        raise CheckpointError(
            f"{where} is a {type(value).__name__}; only tensors, numbers, text, None, lists, tuples and "
            "dictionaries can be stored."
        )


def _temporary(name: str, process: str) -> str:
    return f".{name}.{process}.tmp"


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _listed(what: str, names: list[str], most: int = 8) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what}: {', '.join(names[:most])}{more}."
