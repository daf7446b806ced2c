"""Image sets on disk: `<folder>/{train,test}_{images,labels}.h5`, one array called `tensor` in each file.

Images are N x H x W x C, uint8 or floating point in [0, 1]; labels are whole numbers, N x 1 or N. Files come
from anywhere, so nothing in them is believed: links out of the file are refused, and sizes are checked before
memory is taken.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustflat.data.images import ImageSet
from robustflat.errors import DataError, UserError

KEY = "tensor"
MAX_BYTES = 64 * 2**30
"""Largest array that is read: 64 GiB, ten times the 500,000 extra images as float32."""

_CHUNK_BYTES = 64 * 2**20
_HEADER_BYTES = 2**14
_REARRANGED_BYTES = 2**22
_MAX_COMPRESSION = 2000  # deflate cannot pack more than about 1,030 : 1
_MIN_DECLARED = 16 * 2**20  # below this a wrong declaration does no harm
_EIGHT_BIT_TOLERANCE = 1e-4
_RANGE_TOLERANCE = 1e-5


def split_files(folder: Path, split: str) -> tuple[Path, Path]:
    """Paths of the images and the labels of a split."""
    return folder / f"{split}_images.h5", folder / f"{split}_labels.h5"


def has_split(folder: Path, split: str) -> bool:
    """Whether both files of a split are there (complete, as each is written under another name and renamed)."""
    return all(path.is_file() for path in split_files(folder, split))


def read_set(folder: Path, split: str, *, name: str, classes: int, class_names: tuple[str, ...] = ()) -> ImageSet:
    """Read one split of a folder as an image set on the CPU.

    Floating-point images that are multiples of 1/255 (to 1e-4) become uint8, others stay float32.

    Args:
        folder: where the four files lie.
        split: "train" or "test".
        name: name of the data set; the set is called "<name> <split>".
        classes: number of classes K.
        class_names: K names, or empty.

    Raises:
        DataError: if a file is missing, damaged, or not what the layout says; the message names the file.
    """
    image_file, label_file = split_files(folder, split)
    images, labels = read_images(image_file), read_labels(label_file, classes)
    if len(images) != len(labels):
        raise DataError(f"{image_file} has {len(images)} images, but {label_file} has {len(labels)} labels.")
    return ImageSet(nhwc_to_nchw(images), torch.from_numpy(labels), f"{name} {split}", classes, class_names)


def nhwc_to_nchw(images: NDArray[np.uint8] | NDArray[np.float32]) -> Tensor:
    """Rearrange N x H x W x C to N x C x H x W in the array's own memory, some rows at a time.

    Args:
        images: contiguous; its content is rearranged, so the array itself is of no use afterwards.

    Returns:
        (N, C, H, W), sharing the memory of `images`: a data set is never in memory twice.
    """
    count, height, width, channels = images.shape
    flat = images.reshape(count, -1)
    rows = max(1, _REARRANGED_BYTES // max(1, flat[:1].nbytes))
    for start in range(0, count, rows):
        part = images[start : start + rows].transpose(0, 3, 1, 2).reshape(-1, flat.shape[1])
        flat[start : start + rows] = part
    return torch.from_numpy(flat.reshape(count, channels, height, width))


def write_set(folder: Path, split: str, data: ImageSet) -> None:
    """Write an image set into a folder (made if missing), each file whole or not at all, labels last."""
    image_file, label_file = split_files(folder, split)
    write_array(image_file, data.images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    write_array(label_file, data.labels[:, None].cpu().numpy())


def write_array(path: Path, array: NDArray[np.generic]) -> None:
    """Write `array` as the array `tensor` of a new HDF5 file at `path`, replacing what was there.

    The file is written beside `path` under another name and renamed: a killed process or a full disk leaves the old
    file.

    Raises:
        DataError: if the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _written_beside(path, array.nbytes) as temporary, h5py.File(temporary, "w") as file:
            file.create_dataset(KEY, data=array)
    except (OSError, RuntimeError) as error:  # the latter of h5py, where the disk is full
        raise DataError(f"Cannot write {path}: {error}") from error


def read_images(path: Path, key: str = KEY) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Images N x H x W x C of an HDF5 file, as uint8 where nothing is lost, else as float32 in [0, 1].

    Raises:
        DataError: for a missing or damaged file, another key, shape, type or range.
    """
    with _opened_array(path, key) as stored:
        _require_image_shape(path, stored.shape)
        if stored.dtype == np.uint8:
            return require_not_truncated(path, _read_all(path, stored))
        if stored.dtype.kind != "f":
            raise DataError(
                f"{path}: images must be uint8 or floating point, got {stored.dtype}. "
                "Store them as uint8 0..255 or as float32 in [0, 1]."
            )
        eight_bit = _read_as_eight_bit(path, stored)
        return _read_as_float(path, stored) if eight_bit is None else eight_bit


def read_labels(path: Path, classes: int, key: str = KEY) -> NDArray[np.int64]:
    """Labels (N,) of an HDF5 file that stores N x 1 or N whole numbers in 0..classes-1.

    Raises:
        DataError: for a missing or damaged file, another key, shape or type, or a label out of range.
    """
    with _opened_array(path, key) as stored:
        if stored.ndim not in (1, 2) or (stored.ndim == 2 and stored.shape[1] != 1):
            raise DataError(f"{path}: labels must have shape N x 1 or N, got {_shape(stored.shape)}.")
        if stored.dtype.kind not in "iu":
            raise DataError(f"{path}: labels must be whole numbers, got {stored.dtype}.")
        labels = np.asarray(_read_all(path, stored)).reshape(-1)
    for wrong in labels[(labels < 0) | (labels >= classes)][:1]:
        raise DataError(f"{path}: found label {wrong}, but {classes} classes allow only 0..{classes - 1}.")
    return labels.astype(np.int64)


def require_plausible_size(path: Path, shape: tuple[int, ...], item_size: int) -> None:
    """Refuse an array that no file of this size can hold, or that is larger than `MAX_BYTES`.

    Raises:
        DataError: with the size the file declares.
    """
    declared, on_disk = item_size, path.stat().st_size
    for length in shape:
        declared *= int(length)
    if declared > MAX_BYTES:
        raise DataError(
            f"{path} declares an array of {_shape(shape)} ({declared / 2**30:.0f} GiB); "
            f"at most {MAX_BYTES / 2**30:.0f} GiB are read."
        )
    if declared > max(_MIN_DECLARED, on_disk * _MAX_COMPRESSION):
        raise DataError(
            f"{path} declares an array of {_shape(shape)} ({declared / 2**20:.0f} MiB), but the file has only "
            f"{on_disk / 2**20:.1f} MiB: it is damaged or not meant well."
        )


def as_eight_bit(values: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Floats in [0, 1] as uint8 if every one lies within 1e-4 of a multiple of 1/255, else `None`."""
    scaled = values.astype(np.float32) * np.float32(255.0)
    rounded: NDArray[np.float32] = np.rint(scaled)
    if scaled.size and float(np.abs(scaled - rounded).max()) > 255 * _EIGHT_BIT_TOLERANCE:
        return None
    return rounded.astype(np.uint8)


def require_unit_range(path: Path, values: NDArray[Any]) -> None:
    """Refuse floats outside [0, 1] (beyond rounding) and not-a-number.

    Raises:
        DataError: with the range found.
    """
    if values.size == 0:
        return
    low, high = float(values.min()), float(values.max())
    if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):  # also for not-a-number
        raise DataError(
            f"{path}: floating-point images must lie in [0, 1], got values from {low:g} to {high:g}. "
            "Divide 0..255 images by 255, or store them as uint8; do not standardise them."
        )


def require_not_truncated(path: Path, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same images; 0..1 images that were cast to uint8, which leaves zeros and a few ones, are refused.

    Raises:
        DataError: if no value is above 1.
    """
    if images.size and int(images.max()) <= 1:
        raise DataError(
            f"{path}: no value of these whole-number images is above 1. Were images in [0, 1] cast? "
            "Store round(255 * image) as uint8, or float32."
        )
    return images


@contextmanager
def _opened_array(path: Path, key: str) -> Iterator[h5py.Dataset]:
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    try:
        with h5py.File(path, "r") as file:
            yield _find_array(path, file, key)
    except UserError:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0].strip("'\"") if str(error) else type(error).__name__
        raise DataError(
            f"{path} is damaged, incomplete, or not an HDF5 file ({reason}). Delete it and make it again."
        ) from error


def _find_array(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    if key not in file.keys():  # noqa: SIM118  (a file's `in` would follow links and paths)
        found = ", ".join(map(repr, file.keys())) or "nothing"
        raise DataError(f"{path} has no array '{key}'; it holds {found}.")
    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise DataError(f"{path}: '{key}' is a link to another place, which is never followed.")
    stored = file[key]
    if not isinstance(stored, h5py.Dataset):
        raise DataError(f"{path}: '{key}' is a group, not an array.")
    if stored.is_virtual or stored.external:
        raise DataError(f"{path}: '{key}' keeps its values in other files, which are never opened.")
    if stored.shape is None or stored.dtype.kind not in "iuf":
        raise DataError(f"{path}: '{key}' must hold numbers, got {stored.dtype}.")
    require_plausible_size(path, stored.shape, stored.dtype.itemsize)
    return stored


def _require_image_shape(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) != 4 or 0 in shape[1:]:
        raise DataError(f"{path}: images must have shape N x H x W x C, got {_shape(shape)}.")
    if shape[3] > 4 and shape[1] <= 4:
        raise DataError(
            f"{path}: images must have shape N x H x W x C (channels last), got {_shape(shape)}, "
            "which looks like channels first. Transpose the array with (0, 2, 3, 1)."
        )


def _row_chunks(stored: h5py.Dataset) -> Iterator[slice]:
    """Slices of rows of about 64 MiB, whole storage chunks at a time."""
    row_bytes = max(1, stored.dtype.itemsize * int(np.prod(stored.shape[1:], dtype=np.int64)))
    step = stored.chunks[0] if stored.chunks else 1
    rows = max(1, _CHUNK_BYTES // row_bytes // step) * step
    for start in range(0, len(stored), rows):
        yield slice(start, min(start + rows, len(stored)))


def _read_all(path: Path, stored: h5py.Dataset) -> NDArray[Any]:
    values = _allocate(path, stored.shape, stored.dtype)
    if values.size:
        stored.read_direct(values)
    return values


def _read_as_eight_bit(path: Path, stored: h5py.Dataset) -> NDArray[np.uint8] | None:
    images: NDArray[np.uint8] = _allocate(path, stored.shape, np.dtype(np.uint8))
    for rows in _row_chunks(stored):
        values = stored[rows]
        require_unit_range(path, values)
        eight_bit = as_eight_bit(values)
        if eight_bit is None:
            return None
        images[rows] = eight_bit
    return images


def _read_as_float(path: Path, stored: h5py.Dataset) -> NDArray[np.float32]:
    images: NDArray[np.float32] = _allocate(path, stored.shape, np.dtype(np.float32))
    for rows in _row_chunks(stored):
        values = stored[rows]
        require_unit_range(path, values)
        images[rows] = np.clip(values, 0.0, 1.0)
    return images


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        return np.empty(shape, dtype=dtype)
    except MemoryError as error:
        raise DataError(f"{path}: not enough memory for an array of {_shape(shape)} {dtype}.") from error


@contextmanager
def _written_beside(path: Path, size: int) -> Iterator[Path]:
    """A file to write about `size` bytes into, which takes the place of `path` at the end."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle) as file:
            _require_room(file.fileno(), size + _HEADER_BYTES)
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _require_room(handle: int, size: int) -> None:
    """Raise OSError where the system refuses a file of that size: HDF5 may crash on writes that fail half-way."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):  # any other: the file system cannot tell
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "no dimensions"
