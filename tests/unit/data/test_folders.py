"""Folders of images in class sub-folders."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustflat.data.folders import ImageFolder
from robustflat.data.images import ImageSet
from robustflat.errors import DataError, UserError


def paint(path: Path, value: int | tuple[int, int, int], size: tuple[int, int] = (6, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if isinstance(value, tuple) else "L", size, value).save(path)
    return path


def two_level(root: Path, test_name: str = "test") -> Path:
    for k, name in enumerate(("ant", "bee")):
        for i in range(4):
            paint(root / "train" / name / f"{i}.png", 100 * k + i)
        for i in range(2):
            paint(root / test_name / name / f"{i}.png", 100 * k + 50 + i)
    return root


def values(data: ImageSet) -> list[tuple[int, int]]:
    return sorted(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True))


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_train_and_test_folders_become_the_two_sets(tmp_path: Path, test_name: str) -> None:
    sets = ImageFolder(str(two_level(tmp_path, test_name)), size=6, channels=1)()
    assert values(sets["train"]) == [(100 * k + i, k) for k in range(2) for i in range(4)]
    assert values(sets["test"]) == [(100 * k + 50 + i, k) for k in range(2) for i in range(2)]
    assert sets["train"].class_names == ("ant", "bee")
    assert sets["train"].image_shape == (1, 6, 6)


def test_val_beside_test_is_a_set_of_its_own(tmp_path: Path) -> None:
    root = two_level(two_level(tmp_path, "val"), "test")
    paint(root / "val" / "bee" / "more.png", 7)
    sets = ImageFolder(str(root), size=6, channels=1)()
    assert sorted(sets) == ["test", "train", "val"]
    assert (7, 1) in values(sets["val"])
    assert (7, 1) not in values(sets["test"])


def test_an_empty_val_beside_test_is_no_set(tmp_path: Path) -> None:
    root = two_level(tmp_path)
    (root / "val").mkdir()
    assert sorted(ImageFolder(str(root), size=6, channels=1)()) == ["test", "train"]


def test_the_images_of_a_set_are_mixed(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        for i in range(30):
            paint(tmp_path / "train" / name / f"{i}.png", i)
    labels = ImageFolder(str(tmp_path), size=6)()["train"].labels
    assert 5 < labels[:30].sum() < 25


def test_one_level_is_divided_class_by_class_and_always_alike(tmp_path: Path) -> None:
    for k, (name, count) in enumerate((("ant", 10), ("bee", 20))):
        for i in range(count):
            paint(tmp_path / name / f"{i}.png", 100 * k + i)
    sets = ImageFolder(str(tmp_path), size=6, channels=1, test_fraction=0.3)()
    assert sets["test"].class_counts().tolist() == [3, 6]
    assert sets["train"].class_counts().tolist() == [7, 14]
    everything = [(100 * k + i, k) for k, count in ((0, 10), (1, 20)) for i in range(count)]
    assert sorted(values(sets["train"]) + values(sets["test"])) == everything
    again = ImageFolder(str(tmp_path), size=6, channels=1, test_fraction=0.3)()
    assert torch.equal(again["test"].images, sets["test"].images)


def test_pixels_of_unresized_images_are_untouched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    (tmp_path / "train" / "ant").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "train" / "ant" / "a.png")
    data = ImageFolder(str(tmp_path), size=6)()["train"]
    assert np.array_equal(data.images[0].permute(1, 2, 0).numpy(), pixels)


def stripes(root: Path) -> Path:
    """A 12 x 4 image: left third black, middle third white, right third black."""
    pixels = np.zeros((4, 12), np.uint8)
    pixels[:, 4:8] = 255
    (root / "train" / "ant").mkdir(parents=True)
    Image.fromarray(pixels).save(root / "train" / "ant" / "a.png")
    return root


def test_crop_takes_the_centre_and_squash_the_whole(tmp_path: Path) -> None:
    root = str(stripes(tmp_path))
    cropped = ImageFolder(root, size=4, channels=1, resize="crop")()["train"].images
    assert cropped.unique().tolist() == [255]
    squashed = ImageFolder(root, size=6, channels=1, resize="squash")()["train"].images[0, 0].float()
    assert squashed[:, 0].max() < 40
    assert squashed[:, 2:4].min() > 200
    with pytest.raises(DataError, match="has 12 x 4 pixels, not 4 x 4; set resize=crop or resize=squash"):
        ImageFolder(root, size=4, resize="none")()


def test_colour_becomes_grey_and_grey_becomes_colour(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "ant" / "a.png", (255, 0, 0))
    assert ImageFolder(str(tmp_path), size=6, channels=1)()["train"].images.unique().tolist() == [76]
    paint(tmp_path / "train" / "ant" / "a.png", 9)
    assert ImageFolder(str(tmp_path), size=6)()["train"].images.shape == (1, 3, 6, 6)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255  # stored: top half white
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    (tmp_path / "train" / "ant").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "train" / "ant" / "a.png", exif=exif)
    image = ImageFolder(str(tmp_path), size=8, channels=1)()["train"].images[0, 0]
    assert image[4:].min() == 255
    assert image[:4].max() == 0


def test_files_that_are_no_images_are_skipped_and_listed(tmp_path: Path) -> None:
    two_level(tmp_path)
    (tmp_path / "train" / "ant" / "notes.txt").touch()
    (tmp_path / "train" / "bee" / ".DS_Store").touch()
    with pytest.warns(UserWarning, match=r"skipped 1 files that are no images: train/ant/notes\.txt"):
        sets = ImageFolder(str(tmp_path), size=6)()
    assert len(sets["train"]) == 8


def test_images_in_hidden_folders_are_left_out(tmp_path: Path) -> None:
    """Notebooks and file managers keep copies there; one of them could be trained on and tested on."""
    two_level(tmp_path)
    paint(tmp_path / "train" / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png", 0)
    paint(tmp_path / "train" / "ant" / "more" / ".cache" / "deep" / "0.png", 0)
    paint(tmp_path / "train" / "ant" / "more" / "9.png", 9)
    assert ImageFolder(str(tmp_path), size=6)()["train"].class_counts().tolist() == [5, 4]


def test_a_test_folder_without_a_training_folder_is_no_class(tmp_path: Path) -> None:
    (two_level(tmp_path) / "train").rename(tmp_path / "Train")
    with pytest.raises(DataError, match=r"has class folders in test, but no folder train"):
        ImageFolder(str(tmp_path), size=6)()


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    for name in ("control", "test"):
        for i in range(3):
            paint(tmp_path / name / f"{i}.png", i)
    assert ImageFolder(str(tmp_path), size=6)()["train"].class_names == ("control", "test")


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    path = two_level(tmp_path) / "train" / "ant" / "0.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"ant/0\.png cannot be read as an image .* Remove or repair it"):
        ImageFolder(str(tmp_path), size=6)()
    path.write_text("no image at all")
    with pytest.raises(DataError, match=r"ant/0\.png cannot be read as an image"):
        ImageFolder(str(tmp_path), size=6)()


def test_a_format_that_could_run_programs_is_not_opened(tmp_path: Path) -> None:
    two_level(tmp_path)
    (tmp_path / "train" / "ant" / "0.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\nshowpage\n")
    with pytest.raises(DataError, match="cannot be read as an image"):
        ImageFolder(str(tmp_path), size=6)()


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    two_level(tmp_path)
    paint(tmp_path / "train" / "ant" / "bomb.png", 0, (30, 30))
    with pytest.raises(DataError, match=r"bomb\.png has 30 x 30 pixels, more than max_pixels=800"):
        ImageFolder(str(tmp_path), size=6, max_pixels=800)()


def test_an_image_with_sixteen_bits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "ant").mkdir(parents=True)
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(tmp_path / "train" / "ant" / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits per channel"):
        ImageFolder(str(tmp_path), size=6)()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, what: str) -> None:
    outside = paint(tmp_path / "outside" / "secret.png", 1)
    root = two_level(tmp_path / "root")
    if what == "file":
        (root / "train" / "ant" / "link.png").symlink_to(outside)
    else:
        (root / "train" / "cat").symlink_to(outside.parent)
    with pytest.raises(DataError, match=r"is a link that leaves .*root; such links are never followed"):
        ImageFolder(str(root), size=6)()


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    two_level(tmp_path)
    (tmp_path / "train" / "ant" / "link.png").symlink_to(tmp_path / "train" / "bee" / "0.png")
    assert ImageFolder(str(tmp_path), size=6)()["train"].class_counts().tolist() == [5, 4]


def test_missing_and_empty_folders_say_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nowhere\. Set dataset\.source\.root"):
        ImageFolder(str(tmp_path / "nowhere"), size=6)()
    with pytest.raises(DataError, match="has no class folders"):
        ImageFolder(str(tmp_path), size=6)()
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match="has no images"):
        ImageFolder(str(tmp_path), size=6)()


def test_a_test_class_that_training_lacks_is_named(tmp_path: Path) -> None:
    paint(two_level(tmp_path) / "test" / "wasp" / "0.png", 1)
    with pytest.raises(DataError, match="has classes that train lacks: wasp"):
        ImageFolder(str(tmp_path), size=6)()


def test_one_image_per_class_cannot_be_divided(tmp_path: Path) -> None:
    paint(tmp_path / "ant" / "0.png", 1)
    with pytest.raises(DataError, match="leaves nothing to test on"):
        ImageFolder(str(tmp_path), size=6)()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must lie in"),
        ({"size": 6, "channels": 4}, "channels must be one of 1, 3"),
        ({"size": 6, "resize": "stretch"}, "resize must be one of crop, none, squash"),
        ({"size": 6, "test_fraction": 1.0}, "test_fraction must lie in"),
    ],
)
def test_wrong_settings_are_refused(settings: Mapping[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageFolder("anywhere", **settings)


def test_the_cache_is_used_until_a_file_or_a_setting_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = two_level(tmp_path / "insects"), tmp_path / "cache"
    decoded: list[Path] = []
    decode = ImageFolder._decode

    def counted(self: ImageFolder, path: Path, formats: list[str]) -> object:
        decoded.append(path)
        return decode(self, path, formats)

    monkeypatch.setattr(ImageFolder, "_decode", counted)
    first = ImageFolder(str(root), size=6, cache=str(cache))()
    assert len(decoded) == 12
    second = ImageFolder(str(root), size=6, cache=str(cache))()
    assert len(decoded) == 12
    for split in ("train", "test"):
        assert torch.equal(first[split].images, second[split].images)
        assert torch.equal(first[split].labels, second[split].labels)
        assert first[split].name == second[split].name
        assert first[split].class_names == second[split].class_names
    for number, change in enumerate(({"size": 5}, {"channels": 1}, {"resize": "squash"}), start=2):
        ImageFolder(str(root), **{"size": 6, "cache": str(cache), **change})()
        assert len(decoded) == 12 * number, change
    paint(root / "train" / "ant" / "9.png", 7)
    assert len(ImageFolder(str(root), size=6, cache=str(cache))()["train"]) == 9
    assert len(decoded) == 61
    os.utime(root / "train" / "ant" / "9.png", ns=(1, 1))  # as after an edit that keeps the length
    ImageFolder(str(root), size=6, cache=str(cache))()
    assert len(decoded) == 74


def test_reading_leaves_the_filters_of_warnings_as_they_were(tmp_path: Path) -> None:
    before = list(warnings.filters)
    ImageFolder(str(two_level(tmp_path)), size=6)()
    assert warnings.filters == before
