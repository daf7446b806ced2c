"""Public data sets from where they are published, through torchvision's addresses and checksums.

Files are fetched once into a folder of downloads; what arrives with another checksum is refused by torchvision.
Nothing is unpacked to disk, and CIFAR's pickles are read without executing them.
"""

from __future__ import annotations

import http.client
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustflat.data.images import ImageSet
from robustflat.data.safe_pickle import load_arrays, loads_arrays
from robustflat.errors import DataError

_MEMBER_BYTES = 2**28  # the largest member of the archives has 155 MB


def fetch_cifar10(downloads: Path, split: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10 (Krizhevsky 2009): images uint8 (N, 3, 32, 32) and labels int64 (N,) of "train" or "test".

    Raises:
        DataError: if it cannot be downloaded or what arrives is not what was published.
    """
    from torchvision import datasets

    return _fetch_cifar(datasets.CIFAR10, downloads, split, label_key="labels")


def fetch_cifar100(downloads: Path, split: str) -> tuple[Tensor, Tensor]:
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine classes; otherwise as `fetch_cifar10`."""
    from torchvision import datasets

    return _fetch_cifar(datasets.CIFAR100, downloads, split, label_key="fine_labels")


def fetch_svhn(downloads: Path, split: str) -> tuple[Tensor, Tensor]:
    """SVHN, cropped digits (Netzer 2011): images uint8 (N, 3, 32, 32), labels are the digits 0..9."""
    from torchvision import datasets

    with _reported("svhn", downloads):
        data = datasets.SVHN(str(downloads), split=split, download=True)
    return torch.from_numpy(np.ascontiguousarray(data.data)), torch.from_numpy(data.labels).long()


def fetch_mnist(downloads: Path, split: str) -> tuple[Tensor, Tensor]:
    """MNIST (LeCun 1998): images uint8 (N, 1, 28, 28) and labels int64 (N,)."""
    from torchvision import datasets

    return _fetch_mnist(datasets.MNIST, "mnist", downloads, split)


def fetch_fashion_mnist(downloads: Path, split: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST (Xiao 2017): images uint8 (N, 1, 28, 28) and labels int64 (N,)."""
    from torchvision import datasets

    return _fetch_mnist(datasets.FashionMNIST, "fashion_mnist", downloads, split)


def convert_pseudo_labelled(pickled: Path, *, classes: int = 10) -> ImageSet:
    """The 500,000 pseudo-labelled images (Carmon et al. 2019) from their pickle, which is not executed.

    Args:
        pickled: file with `data` (uint8, N x 32 x 32 x 3) and `extrapolated_targets` (whole numbers, N).
        classes: number of classes.

    Raises:
        DataError: if the file is missing, damaged, or holds something else.
    """
    content = load_arrays(pickled)
    absent = {"data", "extrapolated_targets"} - content.keys()
    if absent:
        raise DataError(f"{pickled} has no {' and no '.join(sorted(absent))}; it holds {', '.join(content)}.")
    images, targets = np.asarray(content["data"]), np.asarray(content["extrapolated_targets"])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or targets.dtype.kind not in "iu":
        raise DataError(
            f"{pickled}: expected uint8 images N x H x W x 3 and whole-number labels, got {images.dtype} "
            f"{images.shape} and {targets.dtype}."
        )
    channels_first = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(targets.astype(np.int64))
    return ImageSet(channels_first, labels, "tinyimages500k train", classes)


def _fetch_mnist(dataset: Any, name: str, downloads: Path, split: str) -> tuple[Tensor, Tensor]:
    with _reported(name, downloads):
        data = dataset(str(downloads), train=split == "train", download=True)
    return data.data[:, None].contiguous(), data.targets.long()


def _fetch_cifar(dataset: Any, downloads: Path, split: str, label_key: str) -> tuple[Tensor, Tensor]:
    from torchvision.datasets.utils import download_url

    with _reported(dataset.__name__.lower(), downloads):
        download_url(dataset.url, str(downloads), dataset.filename, dataset.tgz_md5)
    archive = downloads / dataset.filename
    members = [name for name, _ in (dataset.train_list if split == "train" else dataset.test_list)]
    images, labels = [], []
    for name, content in _members(archive, [f"{dataset.base_folder}/{member}" for member in members]):
        batch = loads_arrays(content, name=f"{archive}:{name}")
        images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
        labels.append(np.asarray(batch[label_key], dtype=np.int64))
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))


def _members(archive: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Content of the named files of a tar archive, in order, without writing any of them to disk."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in names:
                member = tar.extractfile(name)
                if member is None:
                    raise DataError(f"{archive} has no file {name}.")
                yield name, member.read(_MEMBER_BYTES)
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise DataError(f"{archive} is damaged ({error}). Delete it and try again.") from error


@contextmanager
def _reported(name: str, downloads: Path) -> Iterator[None]:
    """Turn what goes wrong while downloading into one message that says what can be done."""
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise DataError(
            f"Could not download {name} into {downloads}: {error}. Is this computer online? "
            "The files can also be put there by hand; their checksums are verified."
        ) from error
