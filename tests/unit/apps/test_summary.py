"""The flatness on the last screen of a run."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from robustflat.apps.summary import print_summary


@pytest.mark.parametrize(
    ("reduction", "words"),
    [
        ("mean", "average-case flatness of the robust loss: 0.250 +- 0.010 (xi 0.5, test: 8 examples, 2 draws, "),
        ("max", "worst-case flatness of the robust loss: 0.250 (xi 0.5, test: 8 examples, 2 restarts, "),
    ],
)
def test_only_the_average_case_has_an_error(tmp_path: Path, reduction: str, words: str) -> None:
    flat = {"reduction": reduction, "loss": "robust", "value": 0.25, "standard_error": 0.01, "radius": 0.5}
    flat |= {"split": "test", "examples": 8, "trials": [0.24, 0.26], "tensors": 4, "protocol": "paper"}
    results = {"weights": {"model": {"flatness": flat}}, "description": ""}
    written = StringIO()
    print_summary(Console(file=written, width=200), results, tmp_path, facts="")
    assert words in written.getvalue()
