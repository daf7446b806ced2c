"""Contact sheets: every image is there, in its place, in its colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustflat.errors import UserError
from robustflat.reporting.contact_sheet import _strip, contact_sheet


def flat(*colours: tuple[float, float, float]) -> torch.Tensor:
    """One 8 x 8 image of each colour."""
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, 3, 8, 8)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def area(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels - np.array(colour)).max(-1) <= 2).sum())


def test_all_images_appear_with_equal_area_and_rows_in_order(tmp_path: Path) -> None:
    rows = {"clean": flat((1, 0, 0), (0, 1, 0)), "attacked": flat((0, 0, 1), (1, 1, 0))}
    path = contact_sheet(rows, tmp_path / "sheet.png")
    pixels = pixels_of(path)
    areas = [area(pixels, colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]]
    assert min(areas) > 5000
    assert max(areas) < 1.1 * min(areas)
    heights = [np.argwhere((pixels == colour).all(-1))[:, 0].mean() for colour in [(255, 0, 0), (0, 0, 255)]]
    assert heights[0] < heights[1]


def test_titles_are_written_above_the_rows(tmp_path: Path) -> None:
    with_title = pixels_of(contact_sheet({"a long title": flat((1, 0, 0))}, tmp_path / "a.png"))
    without = pixels_of(contact_sheet({" ": flat((1, 0, 0))}, tmp_path / "b.png"))
    assert int((with_title.max(-1) < 100).sum()) > 50
    assert int((without.max(-1) < 100).sum()) == 0


def test_only_the_first_columns_are_shown(tmp_path: Path) -> None:
    path = contact_sheet({"row": flat((1, 0, 0), (0, 1, 0), (0, 0, 1))}, tmp_path / "sheet.png", columns=2)
    pixels = pixels_of(path)
    assert area(pixels, (0, 255, 0)) > 0
    assert area(pixels, (0, 0, 255)) == 0


def test_strips_hold_the_exact_levels_of_grey_float_and_uint8_images() -> None:
    levels = torch.randint(0, 255, (3, 1, 8, 8))
    for images in (levels / 255, levels.to(torch.uint8), (levels / 255).double()):
        strip = _strip("row", images)
        assert strip.shape == (8, 3 * 8 + 2, 3)
        for i, image in enumerate(levels):
            tile = strip[:, 9 * i : 9 * i + 8]
            assert np.array_equal(tile, np.repeat(image.numpy().transpose(1, 2, 0), 3, axis=2))
    assert (strip[:, 8] == 255).all()


def test_values_outside_the_unit_interval_are_clamped() -> None:
    strip = _strip("row", torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1))
    assert strip[0, :, 0].tolist() == [0, 255, 255]


def test_folders_are_made_an_old_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "new" / "sheet.png"
    contact_sheet({"row": flat((1, 0, 0))}, target)
    contact_sheet({"row": flat((0, 1, 0))}, str(target))
    assert [entry.name for entry in target.parent.iterdir()] == ["sheet.png"]
    assert area(pixels_of(target), (0, 255, 0)) > 0


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ({}, "needs at least one row of images, got none"),
        ({"clean": torch.zeros(3, 8, 8)}, r"Row 'clean' of the contact sheet must be images .* got \(3, 8, 8\)"),
        ({"clean": torch.zeros(2, 2, 8, 8)}, r"got \(2, 2, 8, 8\)"),
        ({"clean": torch.zeros(0, 3, 8, 8)}, "with N >= 1"),
    ],
)
def test_rows_that_are_no_images_are_refused(rows: dict[str, torch.Tensor], text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        contact_sheet(rows, tmp_path / "sheet.png")


def test_impossible_columns_and_file_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="columns must lie in"):
        contact_sheet({"row": flat((1, 0, 0))}, tmp_path / "sheet.png", columns=0)
    with pytest.raises(UserError, match=r"name it \*.png, got 'sheet.jpg'"):
        contact_sheet({"row": flat((1, 0, 0))}, tmp_path / "sheet.jpg")
