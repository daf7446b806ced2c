"""Pictures of spectral densities of curvature matrices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib.figure import Figure

from robustflat.errors import UserError
from robustflat.reporting.figures import legend_label, plain_text, with_ending, write
from robustflat.reporting.landscape_plots import COLOURS

Nodes = tuple[NDArray[Any], NDArray[Any]]
"""Nodes and weights (probes, steps) of stochastic Lanczos quadrature; the weights of each probe sum to 1."""

_POINTS = 1000
_WIDTH = 0.005
"""Standard deviation of the Gaussian that widens a node, as a share of the spectrum's range."""


def density_picture(densities: Mapping[str, Nodes], path: Path, *, title: str = "") -> list[Path]:
    """Densities of eigenvalues on one scale, logarithmic, one colour each; as PNG and SVG.

    Thick line: mean over the probes; thin lines: single probes, so that their spread can be seen. Triangles mark the
    outermost nodes.

    Args:
        densities: label -> nodes and weights.
        path: file name; an ending .png, .svg or .html is replaced.
        title: above the picture.

    Raises:
        UserError: if there is nothing to draw, or a file cannot be written.
    """
    if not densities:
        raise UserError("There is no spectral density to draw: ask for hessian.density_probes=5, say.")
    low = min(float(nodes.min()) for nodes, _ in densities.values())
    high = max(float(nodes.max()) for nodes, _ in densities.values())
    sigma = _WIDTH * ((high - low) or abs(high) or 1.0)
    points = np.linspace(low - 4 * sigma, high + 4 * sigma, _POINTS)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    peak = 0.0
    for (label, (nodes, weights)), colour in zip(densities.items(), _colours(len(densities)), strict=True):
        curves = np.stack([_density(points, n, w, sigma) for n, w in zip(nodes, weights, strict=True)])
        for curve in curves if len(curves) > 1 else []:
            axes.semilogy(points, curve, color=colour, linewidth=0.5, alpha=0.35)
        axes.semilogy(points, curves.mean(axis=0), color=colour, linewidth=1.6, label=legend_label(label))
        peak = max(peak, float(curves.max()))
    for (nodes, _), colour in zip(densities.values(), _colours(len(densities)), strict=True):
        for end in (float(nodes.min()), float(nodes.max())):
            axes.plot(end, 1e-7 * peak, "^", color=colour, markersize=5, clip_on=False)
    axes.set(xlabel="eigenvalue", ylabel="density (log scale)", ylim=(1e-7 * peak, 3 * peak))
    axes.axvline(0, color="0.6", linewidth=0.6)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title=f"nodes widened by {sigma:.2g}", title_fontsize=8, fontsize=8)
    if title:
        figure.suptitle(plain_text(title), fontsize=9)
    files = [with_ending(path, ending) for ending in (".png", ".svg")]
    for file in files:
        write(figure, file)
    return files


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _density(points: NDArray[Any], nodes: NDArray[Any], weights: NDArray[Any], sigma: float) -> NDArray[Any]:
    gaps = (points[:, None] - nodes[None, :].astype(np.float64)) / sigma
    density: NDArray[Any] = np.exp(-(gaps**2) / 2) @ weights.astype(np.float64) / (sigma * np.sqrt(2 * np.pi))
    return density
