"""Weights out of pickled checkpoints, with every class and function that the file names replaced by an empty shell."""

from __future__ import annotations

import collections
import importlib
import pickle
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustflat.errors import CheckpointError

MAX_DEPTH = 40
"""Deepest nesting of dictionaries and modules that is looked into."""


class Shell:
    """Stands for an object of a class named in a file; keeps what the file says of it and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Entries of dictionary-like classes are dropped."""

    def append(self, value: object) -> None:
        """Entries of list-like classes are dropped."""

    def extend(self, values: object) -> None:
        """Entries of list-like classes are dropped."""


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return _rebuild_tensor_v2(storage, offset, size, stride)


def _rebuild_tensor_v2(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """Part of a storage, whose values may be read from the file only later.

    Raises:
        CheckpointError: if the part is not inside.
    """
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else offset
    if offset < 0 or any(n < 0 for n in size) or any(s < 0 for s in stride) or last >= max(flat.numel(), 1):
        raise CheckpointError("a tensor in the file lies outside of its data.")
    return flat.as_strided(size, stride, offset)


_ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


class _Unpickler(pickle.Unpickler):
    """Knows tensors and containers; everything else becomes a `Shell`."""

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        return type(name, (Shell,), {}) if found is None else found


def _module() -> types.ModuleType:
    """What `torch.load` takes as the pickle module."""
    made = types.ModuleType("robustflat_pickle")
    made.Unpickler = _Unpickler  # type: ignore[attr-defined]
    made.load = lambda file, **options: _Unpickler(file, **options).load()  # type: ignore[attr-defined]
    return made


def state_dict_of(path: str | Path, *, part: str | None = None) -> dict[str, Tensor]:
    """Named tensors of the network in a checkpoint of another program: parameters and buffers.

    Args:
        path: file of `torch.save`, of any version: a module, a state dict, or a dictionary that holds one of them; or
            a .safetensors file.
        part: key of the file's dictionary under which the network is, such as "state_dict" or "last"; `None`: the
            largest set of named tensors in the file.

    Raises:
        CheckpointError: if the file is missing or damaged, holds no named tensors or has no such part, or holds
            several networks with different weights, of which `part` must name one.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    content = content_of(path)
    if part is not None:
        keys = [str(key) for key in content] if isinstance(content, Mapping) else []
        if part not in keys:
            raise CheckpointError(f"{path} has no part '{part}'; there are {', '.join(keys[:20]) or 'none'}.")
        assert isinstance(content, Mapping)
        content = content[part]
    candidates = list(_candidates(content, 0))
    found = max(candidates, key=len, default={})
    if not found:
        raise CheckpointError(f"{path} holds no network: no module and no dictionary of named tensors.")
    rivals = [other for other in candidates if other.keys() == found.keys() and not _equal(other, found)]
    if rivals:
        keys = [str(key) for key in content] if isinstance(content, Mapping) else []
        raise CheckpointError(
            f"{path} holds {len(rivals) + 1} networks with equal names and different weights. Say which one by its "
            f"key (--part): {', '.join(keys[:20])}."
        )
    return {name: value.clone() for name, value in found.items()}


def content_of(path: str | Path) -> object:
    """Everything in a pickled file of `torch.save`; objects of classes that the file names are `Shell`s.

    Raises:
        CheckpointError: if the file is missing or damaged, or is a TorchScript program.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    try:
        if zipfile.is_zipfile(path) and any(n.endswith("constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            raise CheckpointError("it is a TorchScript program, which is never loaded. Save its state_dict instead.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats and classes whose source changed
            content: object = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_module())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # torch and pickle raise nearly anything on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged or no torch file ({reason}).") from error
    return content


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file in the format of the package safetensors, which holds nothing else."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    try:
        reader = importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise CheckpointError(f"{path} needs the package safetensors: pip install safetensors.") from error
    try:
        state: dict[str, Tensor] = reader.load_file(path)
    except Exception as error:  # the package's own error type and whatever a damaged header leads to
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}).") from error
    return state


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether tensors of the same names have the same numbers, not-a-number counting as one."""
    pairs = [(one[name], other[name]) for name in one]
    return all(a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs)


def _candidates(value: object, depth: int) -> Iterator[dict[str, Tensor]]:
    """State dicts that are somewhere in a loaded file; the largest is taken to be the network."""
    if depth > MAX_DEPTH:
        return
    if isinstance(value, Shell):
        state = value.state
        if isinstance(state, Mapping) and {"_parameters", "_modules"} <= state.keys():
            yield dict(_tensors_of(state, "", depth))
        elif isinstance(state, Mapping):
            yield from _candidates(state, depth + 1)
    elif isinstance(value, Mapping):
        tensors = {str(k): v.detach() for k, v in value.items() if isinstance(v, Tensor) and isinstance(k, str)}
        if tensors:
            yield tensors
        for inner in value.values():
            yield from _candidates(inner, depth + 1)


def _tensors_of(state: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a pickled module and those in it, named as torch names them."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"modules are nested deeper than {MAX_DEPTH}.")
    passing = state.get("_non_persistent_buffers_set")
    for group in ("_parameters", "_buffers"):
        for name, value in (state.get(group) or {}).items():
            if isinstance(value, Tensor) and not (isinstance(passing, set) and name in passing):
                yield f"{prefix}{name}", value.detach()
    for name, module in (state.get("_modules") or {}).items():
        if isinstance(module, Shell) and isinstance(module.state, Mapping):
            yield from _tensors_of(module.state, f"{prefix}{name}.", depth + 1)
