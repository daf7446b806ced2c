"""Arrays out of a pickle file, without running anything that the file asks for.

Some public data (CIFAR's archives, the 500,000 pseudo-labelled extra images) comes as pickles. An ordinary unpickler
calls whatever function the file names. Here the few names that NumPy arrays need lead to functions of this module,
which only build arrays of numbers from bytes of the right length; every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from robustflat.errors import DataError

_MALFORMED = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
    OverflowError, MemoryError, RecursionError,
)  # fmt: skip


def load_arrays(source: Path | BinaryIO, *, name: str | None = None) -> dict[str, object]:
    """Read a pickled dictionary of arrays, numbers, texts and lists of these.

    Args:
        source: a file, or its name. Pickles of Python 2 are read too (texts as Latin-1).
        name: what to call the file in messages; default: its path.

    Returns:
        The dictionary; NumPy arrays in it are real arrays of numbers, texts as keys.

    Raises:
        DataError: if the file is missing or damaged, is no dictionary, or asks for anything but arrays.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise DataError(f"There is no file {source}.")
        with source.open("rb") as file:
            return load_arrays(file, name=name or str(source))
    name = name or "The pickle"
    try:
        content = _finished(_ArrayUnpickler(source, encoding="latin1").load())
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except _MALFORMED as error:
        raise DataError(f"{name} is damaged or no pickle of arrays ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise DataError(f"{name} must hold a dictionary with texts as keys, got {type(content).__name__}.")
    return content


def loads_arrays(content: bytes, *, name: str) -> dict[str, object]:
    """`load_arrays` of bytes in memory; arrays share memory with `content` and cannot be written to."""
    return load_arrays(io.BytesIO(content), name=name)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, global_name: str) -> Any:
        replacement = _REPLACEMENTS.get((module, global_name))
        if replacement is None:
            raise DataError(
                f"asks for {module}.{global_name}, which is not part of an array. "
                "Nothing was run; do not open this file with an ordinary unpickler unless you trust who made it."
            )
        return replacement


class _PendingType:
    """A dtype while it is being unpickled; stands for `numpy.dtype`."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = _text(code)
        self.order = "="

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and _text(state[1]) in ("<", ">", "|", "="):
            self.order = _text(state[1])

    def build(self) -> np.dtype[Any]:
        # The letter and width only: no structured, object or date types, so bytes can mean nothing but numbers.
        if self.code not in _TYPE_CODES:
            raise DataError(f"holds an array of type {self.code!r}; only plain numbers are read.")
        return np.dtype(self.code).newbyteorder("=" if self.order == "|" else self.order)  # type: ignore[arg-type]


class _PendingArray:
    """An array while it is being unpickled."""

    value: NDArray[Any] | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise DataError("holds an array in an unknown form.")
        _, shape, kind, fortran, content = state
        self.value = _array(content, kind, shape, "F" if fortran else "C")


class _Stand:
    """What a file gets for one of its names: it can be called with plain values, but not altered."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., object]) -> None:
        self._make = make

    def __call__(self, *args: object) -> object:
        return self._make(*args)

    def __setstate__(self, state: object) -> None:
        raise DataError("tries to alter a function.")


def _array_class(*_: object) -> object:
    raise DataError("calls numpy.ndarray, which files may only name.")


def _reconstruct(*_: object) -> _PendingArray:
    return _PendingArray()


def _from_buffer(content: object, kind: object, shape: object, order: object) -> NDArray[Any]:
    return _array(content, kind, shape, _text(order))


def _scalar(kind: object, content: object) -> object:
    return _array(content, kind, (), "C").item()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if _text(encoding).lower().replace("-", "") not in ("latin1", "latin", "iso88591"):
        raise DataError(f"uses the encoding {encoding!r}; only latin1 is read.")
    return _text(text).encode("latin1")


def _array(content: object, kind: object, shape: object, order: str) -> NDArray[Any]:
    if not isinstance(kind, _PendingType) or order not in ("C", "F"):
        raise DataError("holds an array in an unknown form.")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise DataError(f"holds an array of shape {shape!r}.")
    data = content.encode("latin1") if isinstance(content, str) else content  # a text of Python 2
    if not isinstance(data, bytes | bytearray):
        raise DataError("holds an array whose content is not bytes.")
    dtype = kind.build()
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise DataError(f"holds an array of shape {shape} {dtype} with {len(data)} bytes.")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _finished(value: object) -> object:
    """Put real arrays in the place of `_PendingArray`, in nested dictionaries, lists and tuples."""
    if isinstance(value, _PendingArray):
        if value.value is None:
            raise DataError("holds an array without content.")
        return value.value
    if isinstance(value, dict):
        return {key: _finished(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_finished(entry) for entry in value)
    if isinstance(value, _PendingType | _Stand):
        raise DataError("holds something that is neither an array nor a plain value.")
    return value


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise DataError(f"expected a text, found {type(value).__name__}.")
    return value


_TYPE_CODES = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])

_REPLACEMENTS: Mapping[tuple[str, str], _Stand] = {
    ("numpy", "ndarray"): _Stand(_array_class),
    ("numpy", "dtype"): _Stand(_PendingType),
    ("_codecs", "encode"): _Stand(_encode),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Stand(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Stand(_scalar) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Stand(_from_buffer) for core in ("core", "_core")},
}
