"""The command that makes data sets available."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from robustflat.data import downloads
from robustflat.data.prepare import main
from robustflat.data.sources import TinyImages500k
from robustflat.errors import DataError


def test_a_data_set_is_fetched_converted_verified_and_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((4, 3, 32, 32), 51, dtype=torch.uint8), torch.arange(4)

    monkeypatch.setattr(downloads, "fetch_svhn", fetch)
    assert main(["svhn", "--root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "svhn train: 4 images (3, 32, 32), 0-1 per class, mean [0.2, 0.2, 0.2], std [0.0, 0.0, 0.0]" in text
    assert sorted(p.name for p in (tmp_path / "svhn").iterdir()) == [
        "test_images.h5", "test_labels.h5", "train_images.h5", "train_labels.h5",
    ]  # fmt: skip


def test_one_failure_does_not_stop_the_others_but_shows_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(folder: Path, split: str) -> None:
        raise DataError("Could not download mnist.")

    def fetch(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((4, 1, 28, 28), 51, dtype=torch.uint8), torch.arange(4)

    monkeypatch.setattr(downloads, "fetch_mnist", offline)
    monkeypatch.setattr(downloads, "fetch_fashion_mnist", fetch)
    assert main(["mnist", "fashion_mnist", "--root", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "mnist: Could not download mnist." in captured.err
    assert "fashion_mnist test: 4 images" in captured.out


def test_the_extra_images_are_converted_from_the_pickle_given(tmp_path: Path) -> None:
    path = tmp_path / "500k.pickle"
    images = np.full((3, 32, 32, 3), 9, dtype=np.uint8)
    path.write_bytes(pickle.dumps({"data": images, "extrapolated_targets": np.arange(3)}))
    assert main(["tinyimages500k", "--root", str(tmp_path), "--pickle", str(path)]) == 0
    assert TinyImages500k(str(tmp_path))()["train"].labels.tolist() == [0, 1, 2]


def test_an_unknown_name_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cifar11"])
    assert "cifar10" in capsys.readouterr().err


def test_a_data_set_may_be_named_as_the_other_commands_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((4, 1, 28, 28), 51, dtype=torch.uint8), torch.arange(4)

    monkeypatch.setattr(downloads, "fetch_mnist", fetch)
    monkeypatch.setattr(downloads, "fetch_fashion_mnist", fetch)
    assert main(["dataset=mnist", "fashion_mnist", "--root", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} >= {"mnist", "fashion_mnist"}
    with pytest.raises(SystemExit):
        main(["dataset=cifar11"])
    assert "cifar10" in capsys.readouterr().err
