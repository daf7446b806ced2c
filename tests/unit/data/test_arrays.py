"""Array files of the user's own: read as NumPy reads them, refused where they are not images and labels."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustflat.data.arrays import ArrayFiles, open_array
from robustflat.data.hdf5 import write_array
from robustflat.errors import DataError, UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)  # N x H x W x C
LABELS = np.array([0, 1, 2, 0, 1, 2])
NCHW = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)


def save(path: Path, array: Any) -> str:
    np.save(path, array)
    return str(path)


@pytest.mark.parametrize(
    ("array", "layout"),
    [
        (IMAGES, "auto"),
        (IMAGES, "nhwc"),
        (IMAGES.transpose(0, 3, 1, 2), "auto"),
        (IMAGES.transpose(0, 3, 1, 2), "nchw"),
        (IMAGES.astype(np.int64), "auto"),
        (IMAGES.astype(np.float32) / 255, "auto"),
        (np.asfortranarray(IMAGES), "auto"),
    ],
)
def test_every_layout_and_type_gives_the_same_images(tmp_path: Path, array: Any, layout: str) -> None:
    source = ArrayFiles(
        train_images=save(tmp_path / "x.npy", array), train_labels=save(tmp_path / "y.npy", LABELS), layout=layout
    )
    data = source()["train"]
    assert torch.equal(data.images, NCHW)
    assert data.labels.tolist() == LABELS.tolist()
    assert data.classes == 3


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("keys", [("images", "labels"), ("x_train", "y_train"), ("image", "label")])
def test_images_and_labels_are_found_in_one_npz(tmp_path: Path, writer: Any, keys: tuple[str, str]) -> None:
    writer(tmp_path / "all.npz", **{keys[0]: IMAGES, keys[1]: LABELS[:, None]})
    data = ArrayFiles(train_images=str(tmp_path / "all.npz"))()["train"]
    assert torch.equal(data.images, NCHW)
    assert data.labels.tolist() == LABELS.tolist()


def test_hdf5_files_are_read_too(tmp_path: Path) -> None:
    write_array(tmp_path / "x.h5", IMAGES)
    write_array(tmp_path / "y.h5", LABELS)
    data = ArrayFiles(test_images=str(tmp_path / "x.h5"), test_labels=str(tmp_path / "y.h5"), classes=5)()["test"]
    assert torch.equal(data.images, NCHW)
    assert data.classes == 5


def test_grey_images_without_channel_axis_get_one(tmp_path: Path) -> None:
    for layout in ("auto", "nhwc", "nchw"):
        source = ArrayFiles(
            train_images=save(tmp_path / "x.npy", IMAGES[..., 0]),
            train_labels=save(tmp_path / "y.npy", LABELS),
            layout=layout,
        )
        assert torch.equal(source()["train"].images, NCHW[:, :1])


def test_the_number_of_classes_is_that_of_both_sets(tmp_path: Path) -> None:
    images, labels = save(tmp_path / "x.npy", IMAGES), save(tmp_path / "y.npy", LABELS)
    more = save(tmp_path / "z.npy", LABELS + 2)
    sets = ArrayFiles(train_images=images, train_labels=labels, test_images=images, test_labels=more)()
    assert sets["train"].classes == sets["test"].classes == 5


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_an_npz_member_is_what_numpy_reads_and_mapped_if_not_compressed(
    tmp_path: Path, writer: Any, order: Any
) -> None:
    first, second = np.arange(24.0).reshape(2, 3, 4), np.asarray(IMAGES, order=order)
    writer(tmp_path / "x.npz", first=first, second=second)
    read = open_array(tmp_path / "x.npz", ["second"])
    assert np.array_equal(read, second)
    assert isinstance(read, np.memmap) == (writer is np.savez)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "x.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"x\.npy is damaged or not a \.npy file of numbers"):
        open_array(tmp_path / "x.npy", [])
    with pytest.raises(DataError, match="'images' must hold numbers, got object"):
        open_array(tmp_path / "x.npz", ["images"])


def test_another_key_is_refused_with_what_there_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", photos=IMAGES, classes=LABELS)
    with pytest.raises(DataError, match=r"has no array images or image .*; it holds photos, classes"):
        ArrayFiles(train_images=str(tmp_path / "x.npz"), train_labels=save(tmp_path / "y.npy", LABELS))()
    source = ArrayFiles(train_images=str(tmp_path / "x.npz"), images_key="photos", labels_key="classes")
    assert torch.equal(source()["train"].images, NCHW)


def test_a_truncated_file_is_called_damaged(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "x.npy", IMAGES))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"x\.npy is damaged"):
        open_array(path, [])
    np.savez(tmp_path / "x.npz", images=IMAGES)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-10])
    with pytest.raises(DataError, match=r"x\.npz is damaged"):
        open_array(tmp_path / "x.npz", ["images"])


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_inside_a_compressed_npz_is_called_damage(tmp_path: Path, method: int) -> None:
    noise = np.random.default_rng(0).integers(0, 5, (200, 8, 8, 3), dtype=np.uint8)
    content = io.BytesIO()
    np.save(content, noise)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("images.npy", content.getvalue())
    whole = (tmp_path / "x.npz").read_bytes()
    for place in range(200, 6000, 290):
        (tmp_path / "x.npz").write_bytes(whole[:place] + bytes(40) + whole[place + 40 :])
        with pytest.raises(DataError, match=r"x\.npz is damaged"):
            open_array(tmp_path / "x.npz", ["images"])


def test_an_encrypted_npz_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=IMAGES)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1  # the flag of encryption
    content[6] |= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz is damaged .*encrypted"):
        open_array(tmp_path / "x.npz", ["images"])


def test_an_npz_that_declares_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": (10**7, 32, 32, 3), "fortran_order": False, "descr": "|u1"})
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
            archive.writestr("images.npy", header.getvalue())
        with pytest.raises(DataError, match="declares an array of 10000000 x 32 x 32 x 3"):
            open_array(tmp_path / "x.npz", ["images"])


def test_a_shape_without_channels_asks_for_the_layout(tmp_path: Path) -> None:
    labels = save(tmp_path / "y.npy", LABELS)
    for shape in ((6, 3, 8, 3), (6, 8, 8, 4)):
        images = save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
        with pytest.raises(DataError, match="set layout=nhwc or layout=nchw"):
            ArrayFiles(train_images=images, train_labels=labels)()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES * 1.0, LABELS, r"must lie in \[0, 1\]"),
        (IMAGES.astype(int) + 200, LABELS, r"must lie in 0\.\.255, got 200"),
        (IMAGES > 127, LABELS, r"no value of these whole-number images is above 1"),
        (IMAGES // 255, LABELS, r"no value of these whole-number images is above 1"),
        (IMAGES.astype(int) // 128, LABELS, r"no value of these whole-number images is above 1"),
        (IMAGES, LABELS * 0.5, "labels must be whole numbers"),
        (IMAGES, np.eye(6, dtype=int), "labels must be whole numbers of shape N or N x 1"),
        (IMAGES, LABELS[:5], "6 images, but 5 labels"),
        (IMAGES[0, 0], LABELS, "must be N x H x W x C or N x C x H x W"),
        (IMAGES, LABELS - 1, "found label -1"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(tmp_path: Path, images: Any, labels: Any, message: str) -> None:
    source = ArrayFiles(
        train_images=save(tmp_path / "x.npy", images), train_labels=save(tmp_path / "y.npy", labels), layout="nhwc"
    )
    with pytest.raises(DataError, match=message):
        source()


def test_wrong_settings_are_refused_when_the_source_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Give train_images or test_images"):
        ArrayFiles()
    with pytest.raises(UserError, match=r"test_labels=y\.npy without test_images"):
        ArrayFiles(train_images="x.npy", train_labels="y.npy", test_labels="y.npy")
    with pytest.raises(UserError, match="layout must be one of auto, nchw, nhwc"):
        ArrayFiles(train_images="x.npy", layout="hwc")
    with pytest.raises(DataError, match="There is no file"):
        ArrayFiles(train_images=str(tmp_path / "x.npy"))()
    (tmp_path / "x.pkl").touch()
    with pytest.raises(UserError, match="the ending must be one of"):
        ArrayFiles(train_images=str(tmp_path / "x.pkl"))()
