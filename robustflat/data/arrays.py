"""Arrays of the user's own (.npy, .npz, .h5): opened without pickle, memory-mapped where the file allows it."""

from __future__ import annotations

import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustflat.data.hdf5 import (
    KEY,
    as_eight_bit,
    nhwc_to_nchw,
    read_images,
    read_labels,
    require_not_truncated,
    require_plausible_size,
    require_unit_range,
)
from robustflat.data.images import ImageSet
from robustflat.errors import DataError, require_one_of, require_range

LAYOUTS = ("auto", "nhwc", "nchw")
SUFFIXES = (".npy", ".npz", ".h5", ".hdf5")
_MALFORMED = (
    OSError, ValueError, EOFError, SyntaxError, RuntimeError, struct.error, zlib.error, lzma.LZMAError,
    zipfile.BadZipFile,
)  # fmt: skip
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field


class ArrayFiles:
    """A data set in array files: images uint8 or float in [0, 1], labels whole numbers, one entry per image.

    An .npz file may hold several arrays; without a key, customary names are tried (images, x, x_train, labels, y,
    ...). A split without images is left out.

    Args:
        train_images, train_labels: files of the training set; labels may be left out if the .npz has both.
        test_images, test_labels: the same for the test set.
        classes: number of classes; default: the largest label plus one.
        name: what the data set is called.
        layout: "nhwc", "nchw", or "auto" (the axis of length 1 or 3); HDF5 files are always N x H x W x C.
        images_key, labels_key: names of the arrays inside .npz and .h5 files.

    Raises:
        UserError: for an unknown layout, labels without images, or if no images are given at all.
    """

    def __init__(
        self,
        *,
        train_images: str | None = None,
        train_labels: str | None = None,
        test_images: str | None = None,
        test_labels: str | None = None,
        classes: int | None = None,
        name: str = "arrays",
        layout: str = "auto",
        images_key: str | None = None,
        labels_key: str | None = None,
    ) -> None:
        require_one_of("layout", layout, LAYOUTS)
        if classes is not None:
            require_range("classes", classes, low=1)
        given = {"train": (train_images, train_labels), "test": (test_images, test_labels)}
        for split, (images, labels) in given.items():
            if images is None and labels is not None:
                raise DataError(f"{split}_labels={labels} without {split}_images: give both, or none.")
        self.files = {
            split: (Path(images).expanduser(), Path(labels or images).expanduser())
            for split, (images, labels) in given.items()
            if images is not None
        }
        if not self.files:
            raise DataError("Give train_images or test_images (a .npy, .npz or .h5 file).")
        self.classes, self.name, self.layout = classes, name, layout
        self.images_key, self.labels_key = images_key, labels_key

    def __call__(self) -> Mapping[str, ImageSet]:
        """Load the given sets.

        Raises:
            DataError: for a missing or damaged file, or one that is not a set of images or labels.
        """
        labels = {split: self._labels(files[1], split) for split, files in self.files.items()}
        largest = max((int(values.max()) for values in labels.values() if len(values)), default=0)
        classes = self.classes or largest + 1
        return {
            split: ImageSet(self._images(files[0], split), labels[split], f"{self.name} {split}", classes)
            for split, files in self.files.items()
        }

    def _images(self, path: Path, split: str) -> Tensor:
        if _is_hdf5(path):
            nhwc = read_images(path, self.images_key or KEY)
            return nhwc_to_nchw(nhwc)
        stored = open_array(path, _keys(self.images_key, image_keys(split)))
        channels_first = np.moveaxis(
            with_channels(path, stored, self.layout), channel_axis(path, stored, self.layout), 1
        )
        return torch.from_numpy(np.array(storable(path, channels_first), order="C"))  # a copy: files are read-only

    def _labels(self, path: Path, split: str) -> Tensor:
        if _is_hdf5(path):
            return torch.from_numpy(read_labels(path, self.classes or 2**31, self.labels_key or KEY))
        return open_labels(path, _keys(self.labels_key, label_keys(split)))


def image_keys(split: str) -> tuple[str, ...]:
    """Customary names of the images in an .npz file."""
    return "images", "image", "x", "data", f"x_{split}", f"{split}_images", "tensor"


def label_keys(split: str) -> tuple[str, ...]:
    """Customary names of the labels in an .npz file."""
    return "labels", "label", "y", "targets", f"y_{split}", f"{split}_labels", "tensor"


def open_array(path: Path, keys: Sequence[str]) -> NDArray[Any]:
    """An array of numbers of a .npy or .npz file; read from disk when used (memory-mapped) unless compressed.

    Args:
        path: the file.
        keys: names of the array inside an .npz, the first present is taken; a .npz with one array needs none.

    Raises:
        DataError: for a missing or damaged file, no such array, or an array of anything but numbers.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    require_one_of(f"{path}: the ending", path.suffix, SUFFIXES)
    try:
        if path.suffix == ".npz":
            return _open_npz(path, keys)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise DataError(f"{path} must hold an array of numbers.")
        return array
    except DataError:
        raise
    except _MALFORMED as error:
        raise DataError(f"{path} is damaged or not a {path.suffix} file of numbers ({error}).") from error


def open_labels(path: Path, keys: Sequence[str]) -> Tensor:
    """Labels int64 (N,) of a .npy or .npz file that stores N or N x 1 whole numbers.

    Raises:
        DataError: as `open_array`, and for another shape or type.
    """
    stored = open_array(path, keys)
    if stored.ndim == 2 and stored.shape[1] == 1:
        stored = stored[:, 0]
    if stored.ndim != 1 or stored.dtype.kind not in "iu":
        raise DataError(f"{path}: labels must be whole numbers of shape N or N x 1, got {stored.dtype} {stored.shape}.")
    return torch.from_numpy(stored.astype(np.int64))


def with_channels(path: Path, images: NDArray[Any], layout: str) -> NDArray[Any]:
    """Images with four axes: grey images (N, H, W) get a channel axis where `layout` has it.

    Raises:
        DataError: for another number of axes.
    """
    if images.ndim == 3:
        return images[:, None] if layout == "nchw" else images[..., None]
    if images.ndim != 4:
        raise DataError(f"{path}: images must be N x H x W x C or N x C x H x W, got {images.shape}.")
    return images


def channel_axis(path: Path, images: NDArray[Any], layout: str) -> int:
    """Which axis of the four holds the channels: 1 or 3; "auto" takes the one of length 1 or 3.

    Raises:
        DataError: if "auto" finds both or neither.
    """
    if layout != "auto":
        return 1 if layout == "nchw" else 3
    if images.ndim == 3:
        return 3
    first, last = images.shape[1] in (1, 3), images.shape[-1] in (1, 3)
    if first == last:
        raise DataError(f"{path}: cannot tell the channels of {images.shape}; set layout=nhwc or layout=nchw.")
    return 1 if first else 3


def storable(path: Path, images: NDArray[Any]) -> NDArray[Any]:
    """Images as uint8 where nothing is lost, else as float32 in [0, 1].

    Raises:
        DataError: for whole numbers outside 0..255 or none above 1, or floats outside [0, 1].
    """
    if images.dtype == np.uint8:
        return require_not_truncated(path, images)
    if images.dtype.kind == "f":
        require_unit_range(path, images)
        eight_bit = as_eight_bit(images)
        return np.clip(images, 0, 1).astype(np.float32) if eight_bit is None else eight_bit
    if images.size and (images.min() < 0 or images.max() > 255):
        raise DataError(f"{path}: whole-number images must lie in 0..255, got {images.min()} to {images.max()}.")
    return require_not_truncated(path, images.astype(np.uint8))


def _open_npz(path: Path, keys: Sequence[str]) -> NDArray[Any]:
    with zipfile.ZipFile(path) as archive:
        present = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        chosen = [key for key in keys if key in present] or (present if len(present) == 1 else [])
        if not chosen:
            raise DataError(
                f"{path} has no array {' or '.join(keys)}; it holds {', '.join(present) or 'none'}. "
                "Name it by images_key or labels_key."
            )
        info = archive.getinfo(f"{chosen[0]}.npy")
        with archive.open(info) as member:
            shape, fortran, dtype = _read_header(member)
            header = member.tell()
            if dtype.kind not in "biuf":
                raise DataError(f"{path}: '{chosen[0]}' must hold numbers, got {dtype}.")
            require_plausible_size(path, shape, dtype.itemsize)
            if info.file_size - header != math.prod(shape) * dtype.itemsize:
                raise DataError(f"{path}: '{chosen[0]}' is damaged: its size does not fit its shape {shape}.")
            if info.compress_type != zipfile.ZIP_STORED:
                return np.frombuffer(member.read(), dtype).reshape(shape, order="F" if fortran else "C")
    start = _content_offset(path, info.header_offset) + header
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order="F" if fortran else "C")


def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    return shape, fortran, dtype


def _content_offset(path: Path, header_offset: int) -> int:
    """Where a stored member of a zip file begins: behind its local header, whose lengths vary."""
    with path.open("rb") as file:
        file.seek(header_offset)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise DataError(f"{path} is damaged: a member of the archive is not where it should be.")
    return header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _keys(chosen: str | None, customary: tuple[str, ...]) -> tuple[str, ...]:
    return customary if chosen is None else (chosen,)


def _is_hdf5(path: Path) -> bool:
    return path.suffix in (".h5", ".hdf5")
