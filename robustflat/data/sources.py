"""Where images come from: each source, called, gives its sets by name ("train", "test")."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustflat.data import downloads
from robustflat.data.arrays import ArrayFiles
from robustflat.data.folders import ImageFolder
from robustflat.data.hdf5 import has_split, read_set, split_files, write_set
from robustflat.data.images import ImageSet
from robustflat.data.splits import round_robin_order
from robustflat.errors import DataError, require_range
from robustflat.rng import generator_for

__all__ = [
    "ArrayFiles",
    "Cifar10",
    "Cifar100",
    "Digits",
    "FashionMnist",
    "ImageFolder",
    "Mnist",
    "Source",
    "StoredSource",
    "Svhn",
    "Synthetic",
    "TinyImages500k",
]


class Source(Protocol):
    """Anything that gives image sets by name when it is called."""

    @property
    def name(self) -> str:
        """What the data set is called."""
        ...

    def __call__(self) -> Mapping[str, ImageSet]:
        """Load the sets, on the CPU."""
        ...


class Digits:
    """1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn: real images, nothing to download.

    The order is fixed, the same everywhere. "test" holds 50 examples of each digit (any multiple of ten from its
    start is balanced), "train" the other 1,297. Grey values 0..16 become uint8 by round(255 v / 16).
    Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998; scikit-learn has its test part, so writers
    occur in both of our splits.
    """

    name = "digits"
    classes = 10
    test_per_class = 50

    def __call__(self) -> Mapping[str, ImageSet]:
        """Sets "train" (1,297) and "test" (500), images (N, 1, 8, 8)."""
        from sklearn.datasets import load_digits

        values, targets = load_digits(return_X_y=True)
        grey = np.rint(np.asarray(values, dtype=np.float64) * (255 / 16)).astype(np.uint8)
        images, labels = torch.from_numpy(grey).view(-1, 1, 8, 8), torch.from_numpy(np.asarray(targets)).long()
        mixed = _mixed_order(self.name, len(labels))
        turns = mixed[round_robin_order(labels[mixed])]
        test = turns[: self.test_per_class * self.classes]
        train = mixed[~torch.isin(mixed, test)]
        return {
            split: ImageSet(images[rows], labels[rows], f"{self.name} {split}", self.classes)
            for split, rows in (("train", train), ("test", test))
        }


class Synthetic:
    """Made-up images: a smooth random pattern for each class, plus noise; for tests and trials of any size.

    Args:
        classes: number of classes, >= 1.
        size: height and width in pixels, >= 1.
        channels: number of channels, >= 1.
        count: training images, >= 1; classes are equally frequent (up to one).
        test_count: test images; default: as many as training images.
        noise: standard deviation of the noise of each pixel, in [0, 1] units, >= 0; near 0.3 classes overlap.
        seed: patterns and noise depend on it alone.

    Raises:
        UserError: for a number out of range.
    """

    name = "synthetic"

    def __init__(
        self,
        *,
        classes: int = 10,
        size: int = 16,
        channels: int = 3,
        count: int = 512,
        test_count: int | None = None,
        noise: float = 0.1,
        seed: int = 0,
    ) -> None:
        test_count = count if test_count is None else test_count
        sizes = {"classes": classes, "size": size, "channels": channels, "count": count, "test_count": test_count}
        for name, value in sizes.items():
            require_range(name, value, low=1)
        require_range("noise", noise, low=0, high=math.inf, high_open=True)
        self.classes, self.size, self.channels, self.noise, self.seed = classes, size, channels, noise, seed
        self.counts = {"train": count, "test": test_count}

    def __call__(self) -> Mapping[str, ImageSet]:
        """Sets "train" and "test", images uint8 (N, C, size, size)."""
        generator = generator_for(self.seed, self.name, "patterns")
        coarse = torch.rand(self.classes, self.channels, 4, 4, generator=generator)
        patterns = F.interpolate(coarse, (self.size, self.size), mode="bilinear", align_corners=False)
        return {split: self._drawn(split, count, patterns) for split, count in self.counts.items()}

    def _drawn(self, split: str, count: int, patterns: Tensor) -> ImageSet:
        generator = generator_for(self.seed, self.name, split)
        labels = torch.randperm(count, generator=generator) % self.classes
        images = patterns[labels]
        images += self.noise * torch.randn(images.shape, generator=generator)
        stored = images.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return ImageSet(stored, labels, f"{self.name} {split}", self.classes)


class StoredSource:
    """A data set in the HDF5 layout, `<root>/<name>/{train,test}_{images,labels}.h5`; base of the known ones.

    Args:
        root: folder that holds the data sets.
        download: whether to fetch the data (once) if it is not there.
    """

    name: ClassVar[str]
    classes: ClassVar[int]
    class_names: ClassVar[tuple[str, ...]] = ()
    other_folders: ClassVar[tuple[str, ...]] = ()
    """Names under which the released code of the paper has the folder."""
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def __init__(self, root: str = "data", download: bool = False) -> None:
        self.root = Path(root).expanduser()
        self.download = download

    def __call__(self) -> Mapping[str, ImageSet]:
        """Load the sets, downloading and converting first if that was asked for and is needed.

        Raises:
            DataError: if the data is missing (the message says how to get it) or damaged.
        """
        folder = self.folder()
        if folder is None:
            if not self.download:
                raise DataError(self._missing())
            self.prepare()
            folder = self.root / self.name
        return {split: self._read(folder, split) for split in self.splits}

    def _read(self, folder: Path, split: str) -> ImageSet:
        return read_set(folder, split, name=self.name, classes=self.classes, class_names=self.class_names)

    def folder(self) -> Path | None:
        """The folder with all files, under our name or that of the released code; `None` if there is none."""
        candidates = [self.root / name for name in (self.name, *self.other_folders)]
        complete = (c for c in candidates if all(has_split(c, split) for split in self.splits))
        return next(complete, None)

    def prepare(self) -> Path:
        """Download what is missing and convert it; finished files are kept, so it can be interrupted.

        Returns:
            The folder with the files.

        Raises:
            DataError: if this data set has no download, or the download fails.
        """
        folder = self.root / self.name
        for split in self.splits:
            if not has_split(folder, split):
                images, labels = self._fetch(self.root / "downloads", split)
                write_set(folder, split, ImageSet(images, labels, f"{self.name} {split}", self.classes))
        return folder

    def _fetch(self, folder: Path, split: str) -> tuple[Tensor, Tensor]:
        """Images uint8 (N, C, H, W) and labels int64 (N,) of a split, with `folder` for downloaded files."""
        raise DataError(f"{self.name} has no automatic download. {self._how_to_get()}")

    def _missing(self) -> str:
        tried = [self.root / name for name in (self.name, *self.other_folders)]
        started = [folder for folder in tried if folder.is_dir()]
        if started:
            absent = [f.name for split in self.splits for f in split_files(started[0], split) if not f.is_file()]
            problem = f"The folder {started[0]} lacks {', '.join(absent)}."
        else:
            problem = f"The data set {self.name} is not there: no folder {' or '.join(map(str, tried))}."
        return f"{problem} {self._how_to_get()}"

    def _how_to_get(self) -> str:
        return (
            f"Get it with: python scripts/prepare_data.py {self.name} --root {self.root} "
            "(or set dataset.source.download=true); if it lies elsewhere, set dataset.source.root."
        )


class Cifar10(StoredSource):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32 x 32 pixels in 10 classes."""

    name = "cifar10"
    classes = 10
    class_names = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    other_folders = ("Cifar10",)

    def _fetch(self, folder: Path, split: str) -> tuple[Tensor, Tensor]:
        return downloads.fetch_cifar10(folder, split)


class Cifar100(StoredSource):
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32 x 32 pixels in 100 (fine) classes."""

    name = "cifar100"
    classes = 100
    other_folders = ("Cifar100",)

    def _fetch(self, folder: Path, split: str) -> tuple[Tensor, Tensor]:
        return downloads.fetch_cifar100(folder, split)


class Svhn(StoredSource):
    """SVHN, cropped (Netzer 2011): 73,257 + 26,032 colour images of house digits, 32 x 32 pixels."""

    name = "svhn"
    classes = 10
    class_names = tuple("0123456789")

    def _fetch(self, folder: Path, split: str) -> tuple[Tensor, Tensor]:
        return downloads.fetch_svhn(folder, split)


class Mnist(StoredSource):
    """MNIST (LeCun 1998): 60,000 + 10,000 grey images of digits, 28 x 28 pixels."""

    name = "mnist"
    classes = 10
    class_names = tuple("0123456789")

    def _fetch(self, folder: Path, split: str) -> tuple[Tensor, Tensor]:
        return downloads.fetch_mnist(folder, split)


class FashionMnist(StoredSource):
    """Fashion-MNIST (Xiao 2017): 60,000 + 10,000 grey images of clothes, 28 x 28 pixels."""

    name = "fashion_mnist"
    classes = 10
    class_names = (
        "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip

    def _fetch(self, folder: Path, split: str) -> tuple[Tensor, Tensor]:
        return downloads.fetch_fashion_mnist(folder, split)


class TinyImages500k(StoredSource):
    """500,000 images with pseudo-labels of CIFAR-10's classes (Carmon 2019), as extra training data.

    They are published as a pickle, which `scripts/prepare_data.py` converts without executing it. There is no test
    set. See `robustflat.data.mixture`.
    """

    name = "tinyimages500k"
    classes = 10
    class_names = Cifar10.class_names
    splits = ("train",)

    def _how_to_get(self) -> str:
        return (
            "Download 500k_pseudolabeled.pickle from the authors of 'Unlabeled Data Improves Adversarial "
            f"Robustness', then: python scripts/prepare_data.py {self.name} --root {self.root} --pickle FILE"
        )


def _mixed_order(name: str, count: int) -> Tensor:
    """A fixed shuffled order (count,): sorted by a hash, which no version of a library can change."""
    keys = [hashlib.sha256(f"{name}/{i}".encode()).digest() for i in range(count)]
    return torch.tensor(sorted(range(count), key=keys.__getitem__), dtype=torch.int64)
