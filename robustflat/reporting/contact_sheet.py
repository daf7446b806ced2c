"""A contact sheet: rows of images under titles, to see what the network sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from robustflat.errors import UserError, require_range
from robustflat.reporting.figures import plain_text, write

TILE_INCHES = 1.0
TITLE_INCHES = 0.3
WHITE = 255


def contact_sheet(rows: Mapping[str, Tensor], path: Path | str, *, columns: int = 8) -> Path:
    """Write a PNG with one row of images for each entry, its name above it.

    Args:
        rows: title -> images (N, C, H, W), uint8 or float in [0, 1], C = 1 (grey) or 3 (RGB); floats are
            rounded to grey levels, values outside [0, 1] are clamped.
        path: file to write, ending in .png; its folder is made if needed and an old file replaced.
        columns: at most so many images of each row are shown, the first ones.

    Returns:
        The path of the file.

    Raises:
        UserError: if there is no row, a row holds no images, columns is below 1, or the file cannot be written.
    """
    require_range("columns", columns, low=1)
    if not rows:
        raise UserError("A contact sheet needs at least one row of images, got none.")
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise UserError(f"A contact sheet is a PNG file: name it *.png, got '{target.name}'.")
    strips = {title: _strip(title, images[:columns]) for title, images in rows.items()}
    width = max(1, *(min(columns, len(images)) for images in rows.values())) * TILE_INCHES
    figure = Figure(figsize=(width, len(strips) * (TILE_INCHES + TITLE_INCHES)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, strip) in zip(figure.subplots(len(strips), 1, squeeze=False)[:, 0], strips.items(), strict=True):
        axes.imshow(strip, interpolation="nearest")
        axes.set_title(plain_text(title), loc="left", fontsize=8)
        axes.set_anchor("W")
        axes.set_axis_off()
    write(figure, target)
    return target


def _strip(title: str, images: Tensor) -> NDArray[np.uint8]:
    """Images side by side with white gaps: (N, C, H, W) -> uint8 (H, N * W + gaps, 3)."""
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise UserError(
            f"Row '{title}' of the contact sheet must be images (N, C, H, W) with N >= 1 and C = 1 or 3, got "
            f"{tuple(images.shape)}."
        )
    if images.dtype != torch.uint8:
        images = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    tiles = images.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    height, width = tiles.shape[1:3]
    gap = np.full((height, max(1, width // 16), 3), WHITE, dtype=np.uint8)
    return np.concatenate([piece for tile in tiles for piece in (tile, gap)][:-1], axis=1)
