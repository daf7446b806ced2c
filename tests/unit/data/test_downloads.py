"""Conversion of published files, with small files made here in their place: no network."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from robustflat.data import downloads
from robustflat.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)


def archive(path: Path, members: dict[str, object]) -> str:
    """A .tar.gz of pickled members; returns its checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, value in members.items():
            content = pickle.dumps(value, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: object) -> None:
    """CIFAR-10's archive with two training batches and one test batch, as torchvision would have fetched it."""
    folder = datasets.CIFAR10.base_folder
    names = ("data_batch_1", "data_batch_2", "test_batch")
    checksum = archive(tmp_path / datasets.CIFAR10.filename, {f"{folder}/{name}": batch for name in names})
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", checksum)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, ""] for name in names[:2]])


def test_cifar10_batches_are_read_in_order_without_unpacking_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar(tmp_path, monkeypatch, {"data": PIXELS, "labels": [0, 1, 2, 3, 4, 9], "batch_label": "one"})
    images, labels = downloads.fetch_cifar10(tmp_path, "train")
    assert np.array_equal(images[:6].numpy(), PIXELS.reshape(6, 3, 32, 32))
    assert labels.tolist() == [0, 1, 2, 3, 4, 9] * 2
    assert len(downloads.fetch_cifar10(tmp_path, "test")[0]) == 6
    assert [p.name for p in tmp_path.iterdir()] == [datasets.CIFAR10.filename]


def test_a_pickle_in_the_archive_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "made",)

    cifar(tmp_path, monkeypatch, {"data": Evil(), "labels": [0]})
    with pytest.raises(DataError, match="not part of an array"):
        downloads.fetch_cifar10(tmp_path, "train")
    assert not (tmp_path / "made").exists()


def test_an_archive_without_the_batch_is_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar(tmp_path, monkeypatch, {"data": PIXELS, "labels": [0] * 6})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_9", ""]])
    with pytest.raises(DataError, match=r"is damaged .*data_batch_9"):
        downloads.fetch_cifar10(tmp_path, "train")


def test_cifar100_has_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"data": PIXELS, "fine_labels": [99, 1, 2, 3, 4, 5], "coarse_labels": [0] * 6}
    name = f"{datasets.CIFAR100.base_folder}/train"
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", archive(tmp_path / datasets.CIFAR100.filename, {name: content}))
    assert downloads.fetch_cifar100(tmp_path, "train")[1].tolist() == [99, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("fetch", "name"), [(downloads.fetch_mnist, "MNIST"), (downloads.fetch_fashion_mnist, "FashionMNIST")]
)
def test_grey_images_get_a_channel_axis(fetch: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8)
    asked: list[Any] = []

    def dataset(root: str, train: bool, download: bool) -> SimpleNamespace:
        asked.append((root, train, download))
        return SimpleNamespace(data=data, targets=torch.tensor([3, 1, 4, 1]))

    monkeypatch.setattr(datasets, name, dataset)
    images, labels = fetch(tmp_path, "test")
    assert asked == [(str(tmp_path), False, True)]
    assert torch.equal(images, data[:, None])
    assert labels.tolist() == [3, 1, 4, 1]


def test_svhn_is_taken_as_torchvision_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PIXELS.reshape(6, 3, 32, 32)

    def dataset(root: str, split: str, download: bool) -> SimpleNamespace:
        assert (split, download) == ("train", True)
        return SimpleNamespace(data=data, labels=np.array([0, 9, 1, 2, 3, 4], dtype=np.int64))

    monkeypatch.setattr(datasets, "SVHN", dataset)
    images, labels = downloads.fetch_svhn(tmp_path, "train")
    assert np.array_equal(images.numpy(), data)
    assert labels.tolist() == [0, 9, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("File not found or corrupted.")])
def test_a_failed_download_says_what_can_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "MNIST", dataset)
    with pytest.raises(DataError, match=r"Could not download mnist into .* Is this computer online\?"):
        downloads.fetch_mnist(tmp_path / "new", "train")


def test_the_extra_images_are_converted_from_their_pickle(tmp_path: Path) -> None:
    nhwc = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "500k.pickle"
    path.write_bytes(pickle.dumps({"data": nhwc, "extrapolated_targets": np.array([3, 1, 4, 1, 5])}))
    data = downloads.convert_pseudo_labelled(path)
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), nhwc)
    assert data.labels.tolist() == [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": PIXELS}, "has no extrapolated_targets; it holds data"),
        ({"data": PIXELS, "extrapolated_targets": np.zeros(6, int)}, "expected uint8 images N x H x W x 3"),
        ({"data": np.zeros((6, 2, 2, 3), np.uint8), "extrapolated_targets": np.full(6, 10)}, "found label 10"),
    ],
)
def test_another_pickle_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message):
        downloads.convert_pseudo_labelled(path)
