"""A folder of images in class sub-folders, decoded once and kept as uint8."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from robustflat.data.hdf5 import MAX_BYTES, has_split, read_set, write_set
from robustflat.data.images import ImageSet
from robustflat.errors import DataError, require_one_of, require_range

RESIZE = ("crop", "squash", "none")
ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"})
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF")  # no format that starts another program to be read
_MODES = {1: "L", 3: "RGB"}
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})


class _File(NamedTuple):
    path: Path
    label: int


class ImageFolder:
    """Images in class sub-folders: `root/train/<class>/*` and `root/test/<class>/*` (or `val`), or `root/<class>/*`.

    With both `test` and `val` the latter is a set of its own, to stop early on (`evaluation.selection.split=val`).
    With one level only, a fixed part of each class becomes the test set. Classes are numbered in alphabetical
    order; the images of a set are in a fixed mixed order, so a split such as "test[:100]" has all classes. Hidden
    files and folders are left out. Images are turned upright (EXIF), converted to grey or RGB, and resized (bicubic,
    antialiased).

    Args:
        root: the folder.
        size: height and width of the images that come out, in pixels.
        channels: 3 for RGB, 1 for grey.
        resize: "crop" (shorter side to `size`, then the centre), "squash" (both sides, aspect ratio lost), or
            "none" (images must have that size).
        test_fraction: part of each class that becomes the test set if there is one level only, in (0, 1).
        cache: folder for the decoded images (HDF5); a change of any file or setting makes a new entry.
            Default: decode anew each time.
        max_pixels: a larger image is refused before it is decoded.

    Raises:
        UserError: for a setting out of range.
    """

    name = "image_folder"

    def __init__(
        self,
        root: str,
        *,
        size: int,
        channels: int = 3,
        resize: str = "crop",
        test_fraction: float = 0.2,
        cache: str | None = None,
        max_pixels: int = 50_000_000,
    ) -> None:
        require_range("size", size, low=1)
        require_one_of("channels", str(channels), ("1", "3"))
        require_one_of("resize", resize, RESIZE)
        require_range("test_fraction", test_fraction, low=0, high=1, low_open=True, high_open=True)
        require_range("max_pixels", max_pixels, low=1)
        self.root = Path(root).expanduser()
        self.size, self.channels, self.resize, self.max_pixels = size, channels, resize, max_pixels
        self.test_fraction = test_fraction
        self.cache = None if cache is None else Path(cache).expanduser()

    def __call__(self) -> Mapping[str, ImageSet]:
        """Sets "train" and "test" (only "train" if there is a train folder and no test folder), and "val" beside both.

        Raises:
            DataError: for a missing folder, no images, an image that cannot be read, is too large or has more than
                8 bits, a symbolic link that leaves the folder, a test class that training does not have, or class
                folders for testing and none for training.
        """
        class_names, files = self._listed()
        folder = self._cache_folder(files)
        name = self.root.resolve().name or self.name
        if folder is not None and all(has_split(folder, split) for split in files):
            return {
                split: read_set(folder, split, name=name, classes=len(class_names), class_names=class_names)
                for split in files
            }
        sets = {
            split: ImageSet(
                torch.from_numpy(self._decoded(found)),
                torch.tensor([file.label for file in found]),
                f"{name} {split}",
                len(class_names),
                class_names,
            )
            for split, found in files.items()
        }
        if folder is not None:
            for split, data in sets.items():
                write_set(folder, split, data)
        return sets

    def _listed(self) -> tuple[tuple[str, ...], dict[str, list[_File]]]:
        if not self.root.is_dir():
            raise DataError(f"There is no folder {self.root}. Set dataset.source.root to the folder of your images.")
        test_name = next((name for name in ("test", "val") if (self.root / name).is_dir()), None)
        if not (self.root / "train").is_dir():
            if test_name is not None and any(path.is_dir() for path in (self.root / test_name).iterdir()):
                raise DataError(f"{self.root} has class folders in {test_name}, but no folder train.")
            class_names = _class_names(self.root)
            return class_names, self._divided(self._found(self.root, class_names))
        class_names = _class_names(self.root / "train")
        files = {"train": _mixed(self._found(self.root / "train", class_names))}
        folders = {} if test_name is None else {"test": self.root / test_name}
        val = self.root / "val"
        if test_name == "test" and val.is_dir() and any(path.is_dir() for path in val.iterdir()):
            folders["val"] = val
        for split, folder in folders.items():
            unknown = set(_class_names(folder)) - set(class_names)
            if unknown:
                raise DataError(f"{folder} has classes that train lacks: {_some(sorted(unknown))}.")
            files[split] = _mixed(self._found(folder, class_names))
        return class_names, files

    def _found(self, folder: Path, class_names: tuple[str, ...]) -> list[_File]:
        inside, files, skipped = self.root.resolve(), [], []
        for label, class_name in enumerate(class_names):
            for path in sorted((folder / class_name).rglob("*")):
                if not path.resolve().is_relative_to(inside):
                    raise DataError(f"{path} is a link that leaves {self.root}; such links are never followed.")
                hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
                if hidden or not path.is_file():
                    continue
                if path.suffix.lower() in ENDINGS:
                    files.append(_File(path, label))
                else:
                    skipped.append(path.relative_to(self.root).as_posix())
        if skipped:
            warnings.warn(f"{folder}: skipped {len(skipped)} files that are no images: {_some(skipped)}", stacklevel=4)
        if not files:
            raise DataError(f"{folder} has no images ({', '.join(sorted(ENDINGS))}) in its class folders.")
        return files

    def _divided(self, files: list[_File]) -> dict[str, list[_File]]:
        """The first part of each class, in a mixed order that depends on the file names only, is for testing."""
        by_class: dict[int, list[_File]] = {}
        for file in _mixed(files):
            by_class.setdefault(file.label, []).append(file)
        divided: dict[str, list[_File]] = {"train": [], "test": []}
        for members in by_class.values():
            count = min(max(1, round(self.test_fraction * len(members))), len(members) - 1)
            divided["test"] += members[:count]
            divided["train"] += members[count:]
        if not divided["test"]:
            raise DataError(f"{self.root}: one image per class leaves nothing to test on.")
        return {split: _mixed(found) for split, found in divided.items()}

    def _cache_folder(self, files: Mapping[str, list[_File]]) -> Path | None:
        if self.cache is None:
            return None
        stats = [
            (split, str(f.path.relative_to(self.root)), f.label, f.path.stat().st_size, f.path.stat().st_mtime_ns)
            for split, found in files.items()
            for f in found
        ]
        key = json.dumps([self.size, self.channels, self.resize, stats])
        return self.cache / f"{self.root.resolve().name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def _decoded(self, files: list[_File]) -> NDArray[np.uint8]:
        shape = (len(files), self.channels, self.size, self.size)
        if int(np.prod(shape, dtype=object)) > MAX_BYTES:
            raise DataError(f"{self.root}: {len(files)} images of {self.size} pixels are too many; lower size.")
        images = np.empty(shape, dtype=np.uint8)
        Image.init()
        formats = [name for name in _FORMATS if name in Image.OPEN]

        def fill(row: int) -> None:
            images[row] = self._decode(files[row].path, formats)

        with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            warnings.simplefilter("ignore")  # of PIL about large images and odd metadata; our own limit decides
            for _ in pool.map(fill, range(len(files))):
                pass
        return images

    def _decode(self, path: Path, formats: list[str]) -> NDArray[np.uint8]:
        """One image, uint8 (C, size, size)."""
        try:
            with Image.open(path, formats=formats) as image:
                if image.width * image.height > self.max_pixels:
                    raise DataError(
                        f"{path} has {image.width} x {image.height} pixels, more than max_pixels={self.max_pixels}."
                    )
                if image.mode not in _EIGHT_BIT_MODES:
                    raise DataError(f"{path} has more than 8 bits per channel ({image.mode}); convert it first.")
                upright = ImageOps.exif_transpose(image).convert(_MODES[self.channels])
                pixels = np.asarray(self._resized(upright, path), dtype=np.uint8)
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} cannot be read as an image ({error}). Remove or repair it.") from error
        return pixels.reshape(self.size, self.size, self.channels).transpose(2, 0, 1)

    def _resized(self, image: Image.Image, path: Path) -> Image.Image:
        target = (self.size, self.size)
        if image.size == target:
            return image
        if self.resize == "none":
            raise DataError(
                f"{path} has {image.width} x {image.height} pixels, not {self.size} x {self.size}; "
                "set resize=crop or resize=squash."
            )
        if self.resize == "squash":
            return image.resize(target, Image.Resampling.BICUBIC)
        return ImageOps.fit(image, target, Image.Resampling.BICUBIC)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders: put each class's images into a folder of its own.")
    return tuple(names)


def _mixed(files: Iterable[_File]) -> list[_File]:
    """A fixed order that mixes the classes: by a hash of the number of the class and the file name."""
    return sorted(files, key=lambda f: hashlib.sha256(f"{f.label}/{f.path.name}".encode()).digest())


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
