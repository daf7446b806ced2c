"""Learning curves: what is drawn is the mean and standard deviation of the rows."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from robustflat.reporting.plots import training_curves

KEYS = ("train_robust_loss", "test_robust_loss", "train_robust_error", "test_robust_error", "test_error")


def rows(shift: float) -> list[dict[str, float]]:
    return [{"epoch": float(e), **{key: e + shift for key in KEYS}} for e in (1, 2, 3)]


def drawn(monkeypatch, histories, path, **options) -> Figure:
    seen: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))[1])
    training_curves(histories, path, **options)
    return seen[0]


def test_the_mean_over_runs_and_a_band_of_one_standard_deviation(monkeypatch, tmp_path):
    figure = drawn(monkeypatch, [rows(0), rows(2)], tmp_path / "a.png", title="two", drops=[2])
    left = figure.axes[0]
    assert left.lines[0].get_xydata().tolist() == [[1, 2], [2, 3], [3, 4]]
    band = left.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(2 - 2**0.5)
    assert band[:, 1].max() == pytest.approx(4 + 2**0.5)
    assert "nats" in left.get_ylabel()
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_errors_are_drawn_in_per_cent_and_one_run_has_no_band(monkeypatch, tmp_path):
    figure = drawn(monkeypatch, [rows(0)], tmp_path / "a.png")
    assert figure.axes[1].lines[0].get_ydata().tolist() == [100, 200, 300]
    assert not figure.axes[0].collections


def test_missing_values_are_left_out(monkeypatch, tmp_path):
    clean_only = [{"epoch": 1.0, "test_error": 0.5}]
    figure = drawn(monkeypatch, [clean_only], tmp_path / "a.png")
    assert not figure.axes[0].lines
    assert figure.axes[1].lines[0].get_ydata().tolist() == [50]
