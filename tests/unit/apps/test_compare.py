"""Two runs are equal only if every tensor, number and line is."""

from __future__ import annotations

import torch

from robustflat.apps.compare import compare_runs
from robustflat.training.checkpoint import save


def write(folder, weight, metrics="{}\n", **rest):
    save(folder / "checkpoints" / "last.pt", {"model": {"w": weight}, "step": 3, "list": [1, 2], **rest})
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


def test_equal_runs_have_no_differences(tmp_path):
    a = write(tmp_path / "a", torch.arange(3.0), nothing=float("nan"))
    b = write(tmp_path / "b", torch.arange(3.0), nothing=float("nan"))
    assert compare_runs(a, b) == []


def test_every_difference_is_named(tmp_path):
    a = write(tmp_path / "a", torch.arange(3.0), "1\n2\n", only=1, n=1)
    b = write(tmp_path / "b", torch.tensor([0.0, 1.0, 2.0000002]), "1\n3\n", n=2)
    text = "\n".join(compare_runs(a, b))
    for part in (
        "model.w: differs in 1 of 3",
        "only: only in the first",
        "n: 1 against 2",
        "first difference in line 2",
    ):
        assert part in text


def test_a_torn_metrics_file_and_other_shapes_are_named(tmp_path):
    a = write(tmp_path / "a", torch.zeros(3), "1\n2\n")
    b = write(tmp_path / "b", torch.zeros(4), "1\n")
    text = "\n".join(compare_runs(a, b))
    assert "(3,) against torch.float32 (4,)" in text
    assert "2 against 1 lines, first difference in line 2" in text
