"""The HDF5 layout: what is written is read back, and what is wrong is refused with the file's name."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from robustflat.data import hdf5
from robustflat.data.hdf5 import (
    has_split,
    nhwc_to_nchw,
    read_images,
    read_labels,
    read_set,
    split_files,
    write_array,
    write_set,
)
from robustflat.data.images import ImageSet
from robustflat.errors import DataError


def bytes_images(count: int = 6, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)


def store(path: Path, array: NDArray[Any], **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("tensor", data=array, **options)
    return path


def test_a_written_set_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    images = torch.from_numpy(bytes_images()).permute(0, 3, 1, 2)
    write_set(tmp_path / "toy", "train", ImageSet(images, torch.tensor([0, 1, 2, 0, 1, 2]), "toy train", 3))
    data = read_set(tmp_path / "toy", "train", name="toy", classes=3, class_names=("a", "b", "c"))
    assert torch.equal(data.images, images)
    assert data.images.is_contiguous()
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (data.name, data.class_names) == ("toy train", ("a", "b", "c"))


def test_the_files_have_the_documented_layout(tmp_path: Path) -> None:
    images = torch.from_numpy(bytes_images()).permute(0, 3, 1, 2)
    write_set(tmp_path, "test", ImageSet(images, torch.zeros(6).long(), "toy test", 3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test_images.h5", "test_labels.h5"]
    with h5py.File(tmp_path / "test_images.h5") as file:
        assert np.array_equal(file["tensor"][...], bytes_images())
    with h5py.File(tmp_path / "test_labels.h5") as file:
        assert file["tensor"].shape == (6, 1)


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4"])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "chunks": (2, 4, 5, 3)}])
def test_float_images_of_the_released_code_become_the_uint8_they_came_from(
    tmp_path: Path, dtype: str, options: dict[str, Any]
) -> None:
    stored = (bytes_images().astype(np.float64) / 255).astype(dtype)
    read = read_images(store(tmp_path / "x.h5", stored, **options))
    assert read.dtype == np.uint8
    assert np.array_equal(read, bytes_images())


def test_float_images_between_the_grey_values_stay_float(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).random((6, 4, 5, 3), dtype=np.float32)
    read = read_images(store(tmp_path / "x.h5", stored))
    assert read.dtype == np.float32
    assert np.array_equal(read, stored)


def test_a_single_value_between_the_grey_values_in_a_late_chunk_keeps_all_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5, "_CHUNK_BYTES", 500)  # 240 bytes an image: two images at a time
    stored = bytes_images().astype(np.float32) / 255
    stored[-1, 0, 0, 0] = 0.5001
    read = read_images(store(tmp_path / "x.h5", stored, chunks=(2, 4, 5, 3)))
    assert read.dtype == np.float32
    assert np.array_equal(read, stored)


def test_rounding_just_outside_the_unit_range_is_clipped(tmp_path: Path) -> None:
    stored = np.array([-1e-6, 0.3353, 1 + 1e-6], dtype=np.float32).reshape(1, 1, 1, 3)
    read = read_images(store(tmp_path / "x.h5", stored))
    assert read.min() == 0
    assert read.max() == 1


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", ">i8"])
def test_labels_are_read_in_both_shapes_and_any_whole_number_type(
    tmp_path: Path, shape: tuple[int, ...], dtype: str
) -> None:
    labels = np.arange(6).astype(dtype).reshape(shape)
    read = read_labels(store(tmp_path / "y.h5", labels), 6)
    assert read.dtype == np.int64
    assert read.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*train_images\.h5"):
        read_set(tmp_path, "train", name="toy", classes=3)


@pytest.mark.parametrize("keep", [0, 10, 600, 2000])
def test_a_truncated_file_is_called_damaged(tmp_path: Path, keep: int) -> None:
    path = store(tmp_path / "x.h5", bytes_images(50))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x\.h5 is damaged, incomplete, or not an HDF5 file"):
        read_images(path)


def test_a_damaged_chunk_is_called_damaged(tmp_path: Path) -> None:
    path = store(tmp_path / "x.h5", bytes_images(50), compression="gzip", chunks=(50, 4, 5, 3))
    with h5py.File(path) as file:
        offset = file["tensor"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 5 : offset + 205] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        read_images(path)


def test_another_key_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = bytes_images()
    with pytest.raises(DataError, match=r"has no array 'tensor'; it holds 'images'"):
        read_images(tmp_path / "x.h5")


def test_a_group_instead_of_an_array_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_group("tensor")
    with pytest.raises(DataError, match="is a group, not an array"):
        read_images(tmp_path / "x.h5")


@pytest.mark.parametrize("link", [h5py.ExternalLink("other.h5", "/tensor"), h5py.SoftLink("/elsewhere")])
def test_links_are_never_followed(tmp_path: Path, link: Any) -> None:
    store(tmp_path / "other.h5", bytes_images())
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["tensor"] = link
    with pytest.raises(DataError, match="never followed"):
        read_images(tmp_path / "x.h5")


def test_values_kept_in_another_file_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(6 * 60))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("tensor", (6, 4, 5, 3), "u1", external=[(str(tmp_path / "secret"), 0, 360)])
    with pytest.raises(DataError, match="other files, which are never opened"):
        read_images(tmp_path / "x.h5")


def test_virtual_arrays_are_never_opened(tmp_path: Path) -> None:
    source = store(tmp_path / "other.h5", bytes_images())
    layout = h5py.VirtualLayout((6, 4, 5, 3), "u1")
    layout[...] = h5py.VirtualSource(str(source), "tensor", (6, 4, 5, 3))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_virtual_dataset("tensor", layout)
    with pytest.raises(DataError, match="other files, which are never opened"):
        read_images(tmp_path / "x.h5")


@pytest.mark.parametrize("count", [10**6, 10**15])
def test_a_size_the_file_cannot_hold_is_refused_before_memory_is_taken(tmp_path: Path, count: int) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("tensor", (count, 32, 32, 3), "u1", chunks=(10, 32, 32, 3), compression="gzip")
    with pytest.raises(DataError, match=r"declares an array of \d+ x 32 x 32 x 3"):
        read_images(tmp_path / "x.h5")


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 5), (6, 4, 0, 3), (2, 1, 4, 5, 3)])
def test_images_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"images must have shape N x H x W x C, got [26]"):
        read_images(store(tmp_path / "x.h5", np.zeros(shape, np.uint8)))


def test_channels_first_is_recognised_and_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"looks like channels first. Transpose the array with \(0, 2, 3, 1\)"):
        read_images(store(tmp_path / "x.h5", np.zeros((6, 3, 32, 32), np.uint8)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (255.0, "got values from 0 to 255. Divide"),
        (-0.5, "from -0.5 to 0"),
        (np.nan, "from nan to nan"),
        (np.inf, "inf"),
    ],
)
def test_float_images_outside_the_unit_range_are_refused(tmp_path: Path, value: float, message: str) -> None:
    images = np.zeros((6, 4, 5, 3), np.float32)
    images[3, 2, 1, 0] = value
    with pytest.raises(DataError, match=message):
        read_images(store(tmp_path / "x.h5", images))


@pytest.mark.parametrize("dtype", ["int64", "int16", "S3"])
def test_images_of_another_type_are_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(DataError, match=r"must be uint8 or floating point|must hold numbers"):
        read_images(store(tmp_path / "x.h5", np.zeros((6, 4, 5, 3), dtype)))


def test_unit_range_images_cast_to_uint8_are_recognised(tmp_path: Path) -> None:
    cast = (bytes_images() / 255).astype(np.uint8)
    with pytest.raises(
        DataError, match=r"no value of these whole-number images is above 1. Were images in \[0, 1\] cast"
    ):
        read_images(store(tmp_path / "x.h5", cast))


@pytest.mark.parametrize(("label", "shown"), [(3, "3"), (-1, "-1"), (255, "255")])
def test_a_label_out_of_range_is_named(tmp_path: Path, label: int, shown: str) -> None:
    with pytest.raises(DataError, match=rf"found label {shown}, but 3 classes allow only 0\.\.2"):
        read_labels(store(tmp_path / "y.h5", np.array([0, 1, label])), 3)


def test_labels_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels must have shape N x 1 or N, got 6 x 3"):
        read_labels(store(tmp_path / "y.h5", np.zeros((6, 3), int)), 3)
    with pytest.raises(DataError, match="labels must be whole numbers, got float64"):
        read_labels(store(tmp_path / "z.h5", np.zeros(6)), 3)


def test_images_and_labels_of_different_length_are_refused_with_both_numbers(tmp_path: Path) -> None:
    store(tmp_path / "train_images.h5", bytes_images(6))
    store(tmp_path / "train_labels.h5", np.zeros((5, 1), int))
    with pytest.raises(DataError, match=r"has 6 images, but .* has 5 labels"):
        read_set(tmp_path, "train", name="toy", classes=3)


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.h5"
    write_array(path, bytes_images(seed=1))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(h5py.File, "create_dataset", killed)
    with pytest.raises(KeyboardInterrupt):
        write_array(path, bytes_images(seed=2))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]
    assert np.array_equal(read_images(path), bytes_images(seed=1))


def test_a_split_counts_as_there_only_with_both_files(tmp_path: Path) -> None:
    images, labels = split_files(tmp_path, "train")
    assert not has_split(tmp_path, "train")
    store(images, bytes_images())
    assert not has_split(tmp_path, "train")
    store(labels, np.zeros(6, int))
    assert has_split(tmp_path, "train")


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="Cannot write"):
        write_array(tmp_path / "file" / "x.h5", bytes_images())


@pytest.mark.parametrize("size", [100, 5000])
def test_a_write_that_the_system_refuses_half_way_leaves_the_old_file(tmp_path: Path, size: int) -> None:
    """As a full disk: the system lets no file grow beyond `size` bytes."""
    path = tmp_path / "x.h5"
    write_array(path, bytes_images(seed=1))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(DataError, match=r"Cannot write .*x\.h5: .*File too large"):
            write_array(path, bytes_images(500, seed=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]
    assert np.array_equal(read_images(path), bytes_images(seed=1))


def test_rearranging_some_rows_at_a_time_equals_a_transposition(monkeypatch: pytest.MonkeyPatch) -> None:
    images = bytes_images(11)
    expected = images.transpose(0, 3, 1, 2).copy()
    for size in (1, 200, 10**6):
        monkeypatch.setattr(hdf5, "_REARRANGED_BYTES", size)
        own = images.copy()
        found = nhwc_to_nchw(own)
        assert np.array_equal(found.numpy(), expected)
        assert np.shares_memory(found.numpy(), own)
