"""Results of one run in one HDF5 file: arrays by name, and how each was made.

    <checkpoint>/<split>/labels                  int64 (N,)
    <checkpoint>/<split>/clean/logits            float32 (N, K)
    <checkpoint>/<split>/attacks/<name>/logits   float32 (R, N, K), R runs of the attack
    <checkpoint>/<split>/flatness/<name>/losses  float32 (T, N), and reference (N,)

Every write goes to a copy of the file that then takes its place, so a process killed at any moment leaves the file
as it was before or as it is after, and a reader never meets half a result. Files come from anywhere: links to other
places are refused, and sizes are checked before memory is taken. docs/results.md describes the layout for readers.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from robustflat.errors import DataError, UserError

FORMAT = 1
KEY = "key"
"""Attribute that every finished result has: a digest of all that decides its values."""

MAX_BYTES = 8 * 2**30
_MAX_TEXT = 60_000  # HDF5 keeps up to 64 KiB in an attribute
_MAX_COMPRESSION = 2000  # deflate cannot pack more than about 1,030 : 1
_MIN_DECLARED = 16 * 2**20
_COMPRESS_FROM = 4096
_FAILURES = (OSError, RuntimeError, KeyError, ValueError, TypeError)


class Stored(NamedTuple):
    """Arrays of a group by name, and its attributes (text, numbers)."""

    arrays: dict[str, NDArray[Any]]
    attrs: dict[str, Any]


def group_name(*parts: str) -> str:
    """Path of a group from its parts; a slash inside a part (as in "test[:10]/balanced") becomes "-".

    >>> group_name("last", "test[:10]/balanced", "clean")
    'last/test[:10]-balanced/clean'

    Raises:
        UserError: for a part that is empty, "." or "..", or not printable.
    """
    cleaned = [part.strip().replace("/", "-") for part in parts]
    for part in cleaned:
        if part in ("", ".", "..") or not part.isprintable():
            raise UserError(f"{part!r} cannot be the name of a result: use letters, digits and signs such as _ or -.")
    return "/".join(cleaned)


class ResultStore:
    """The results file of a run, by convention `results.h5` in its folder. One writer at a time.

    >>> store = ResultStore("results.h5")  # doctest: +SKIP
    >>> store.read("last/test[:1000]/attacks/pgd20").arrays["logits"].shape  # doctest: +SKIP
    (10, 1000, 10)

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def names(self) -> list[str]:
        """Paths of all finished results, sorted.

        Raises:
            DataError: if the file is damaged or holds links to other places.
        """
        if not self.path.exists():
            return []
        with self._reading() as file:
            return sorted(path for path, group in self._groups(file, "", set()) if KEY in group.attrs)

    def marked(self, attribute: str) -> dict[str, Any]:
        """Value of an attribute of every finished result that has it, by path, sorted: one look into the file.

        Raises:
            DataError: as for `names`.
        """
        if not self.path.exists():
            return {}
        with self._reading() as file:
            groups = [(path, group) for path, group in self._groups(file, "", set()) if KEY in group.attrs]
            found = {path: _plain(group.attrs[attribute]) for path, group in groups if attribute in group.attrs}
        return {path: value for path, value in sorted(found.items()) if value is not None}

    def has(self, name: str, key: str | None = None) -> bool:
        """Whether there is a finished result of this name and, if a key is given, with that key."""
        found = self.attributes(name)
        return KEY in found and key in (None, found[KEY])

    def attributes(self, name: str) -> dict[str, Any]:
        """How a result was made; empty if there is none of this name."""
        if not self.path.exists():
            return {}
        with self._reading() as file:
            group = self._find(file, name)
            return {} if group is None else _plain_attributes(group)

    def read(self, name: str) -> Stored:
        """Arrays and attributes of one group, without those of its sub-groups.

        Raises:
            DataError: if there is no such group, the file is damaged, or refers to other files.
        """
        with self._reading() as file:
            group = self._find(file, name)
            if group is None:
                raise DataError(f"{self.path} has no result '{name}'.")
            arrays = {key: self._array(group[key]) for key in group if self._is_array(group, key)}
            return Stored(arrays, _plain_attributes(group))

    def write(self, name: str, arrays: Mapping[str, NDArray[Any]], attrs: Mapping[str, object]) -> None:
        """Put a result into the file, replacing arrays and attributes of that name; sub-groups stay.

        Args:
            name: see `group_name`.
            arrays: numbers.
            attrs: text and numbers; nested values are stored as JSON; `None` is left out. "key" marks it finished.

        Raises:
            UserError: if the file cannot be written; what it held before is intact.
        """
        with self._rewriting() as file:
            group = self._made(file, name)
            for key in [key for key in group if self._is_array(group, key)]:
                del group[key]
            for key, array in arrays.items():
                options = {"compression": "gzip", "shuffle": True} if array.size >= _COMPRESS_FROM else {}
                group.create_dataset(key, data=array, **options)
            for key in list(group.attrs):
                del group.attrs[key]
            for key, value in attrs.items():
                if value is not None:
                    group.attrs[key] = _attribute(key, value)

    def remove(self, name: str) -> None:
        """Take a group and all below it out of the file, if it is there."""
        if not self.path.exists():
            return
        with self._reading() as file:
            if self._find(file, name) is None:
                return
        with self._rewriting() as file:
            del file[name]

    @contextmanager
    def _reading(self) -> Iterator[h5py.File]:
        with _explained(self.path), h5py.File(self.path, "r") as file:
            if file.attrs.get("format", FORMAT) != FORMAT:
                raise DataError(f"{self.path} has format {file.attrs['format']}; this version reads format {FORMAT}.")
            yield file

    @contextmanager
    def _rewriting(self) -> Iterator[h5py.File]:
        """A copy of the file, open for changes; it takes the file's place at the end, or is thrown away."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".tmp")
            os.close(handle)
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {error.strerror}.") from error
        temporary = Path(name)
        try:
            exists = self.path.exists()
            # in memory, as HDF5 crashes the process when it closes a file that the disk has no room for
            content = io.BytesIO(self.path.read_bytes() if exists else b"")
            with _explained(self.path, writing=True), h5py.File(content, "r+" if exists else "w") as file:
                file.attrs["format"] = FORMAT
                yield file
            with temporary.open("wb") as written:
                written.write(content.getbuffer())
                written.flush()
                os.fsync(written.fileno())
            os.chmod(temporary, self.path.stat().st_mode if exists else 0o644)
            os.replace(temporary, self.path)
        except OSError as error:
            raise UserError(
                f"Cannot write {self.path}: {error.strerror or error}. What it held before is intact."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _groups(self, group: h5py.Group, path: str, seen: set[int]) -> Iterator[tuple[str, h5py.Group]]:
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            raise DataError(f"{self.path}: '{path}' is the same group as another, as in no results file.")
        seen.add(address)
        for key in group:
            if not self._is_array(group, key):
                here = f"{path}/{key}" if path else key
                yield here, group[key]
                yield from self._groups(group[key], here, seen)

    def _made(self, file: h5py.File, name: str) -> h5py.Group:
        """The group of that name, created where it is not there; links are not followed."""
        group = file
        for part in name.split("/"):
            there = part in group.keys() and not self._is_array(group, part)  # noqa: SIM118
            group = group[part] if there else group.create_group(part)
        return group

    def _find(self, file: h5py.File, name: str) -> h5py.Group | None:
        group = file
        for part in name.split("/"):
            if part not in group.keys() or self._is_array(group, part):  # noqa: SIM118  (`in` would follow links)
                return None
            group = group[part]
        return group

    def _is_array(self, group: h5py.Group, key: str) -> bool:
        """Whether a member is an array (else a group); anything that leads elsewhere is refused."""
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise DataError(f"{self.path}: '{key}' is a link to another place, which is never followed.")
        kind = group.get(key, getclass=True)
        if kind not in (h5py.Group, h5py.Dataset):
            raise DataError(f"{self.path}: '{key}' is neither a group nor an array.")
        return kind is h5py.Dataset

    def _array(self, stored: h5py.Dataset) -> NDArray[Any]:
        if stored.is_virtual or stored.external:
            raise DataError(f"{self.path}: '{stored.name}' keeps its values in other files, which are never opened.")
        if stored.shape is None or stored.dtype.kind not in "biuf":
            raise DataError(f"{self.path}: '{stored.name}' must hold numbers, got {stored.dtype}.")
        size = int(np.prod(stored.shape, dtype=object)) * stored.dtype.itemsize
        packed = stored.id.get_storage_size()
        if size > MAX_BYTES or (size > _MIN_DECLARED and size > packed * _MAX_COMPRESSION):
            raise DataError(f"{self.path}: '{stored.name}' claims {size:,} bytes, which cannot be right.")
        values: NDArray[Any] = stored[()]
        return values


@contextmanager
def _explained(path: Path, *, writing: bool = False) -> Iterator[None]:
    """Turn what HDF5 says of a missing or damaged file into a sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"There is no results file {path}.") from error
    except UserError:
        raise
    except _FAILURES as error:
        if isinstance(error, OSError) and error.errno is not None and writing:
            raise  # a full disk
        reason = (str(error).splitlines() or [type(error).__name__])[0].strip("'\"")
        raise DataError(
            f"{path} is damaged, incomplete, or not a results file ({reason}). "
            "Move it away and evaluate again; the checkpoints are not concerned."
        ) from error


def _attribute(key: str, value: object) -> object:
    stored: object = value
    if isinstance(value, str):
        stored = str(value)  # HDF5 takes no subclasses, such as the type of torch.__version__
    elif not isinstance(value, bool | int | float):
        stored = json.dumps(value, sort_keys=True, default=str)
    if isinstance(stored, str) and len(stored.encode()) > _MAX_TEXT:
        raise UserError(f"The attribute '{key}' of a result has {len(stored):,} characters; at most {_MAX_TEXT:,}.")
    return stored


def _plain_attributes(group: h5py.Group) -> dict[str, Any]:
    """Text and numbers as Python's own; anything else (references, compound types) is left out."""
    found = {str(key): _plain(value) for key, value in group.attrs.items()}
    return {key: value for key, value in found.items() if value is not None}


def _plain(value: object) -> bool | int | float | str | None:
    """Text or number as Python's own; `None` for anything else."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, bool | int | float | str) else None
