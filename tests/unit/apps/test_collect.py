"""Rows of a run: gaps between test and training examples that belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from robustflat.apps.collect import rows_of_run
from robustflat.apps.records import headline, read_record
from robustflat.store.results import KEY, ResultStore


def store(run: Path, split: str, role: str, *, wrong: int, count: int, epsilon: float = 0.1) -> None:
    """Logits of two classes, all labels 0: all clean ones right, the first `wrong` attacked ones wrong."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "identity.yaml").write_text("seed: 0\n")
    results = ResultStore(run / "results.h5")
    right = np.tile(np.array([[2.0, 0.0]], dtype=np.float32), (count, 1))
    attacked = right.copy()
    attacked[:wrong] = [0.0, 2.0]
    about = {"split": split, "role": role, "checkpoint": "last", KEY: f"{split}", "norm": "linf", "epsilon": epsilon}
    results.write(f"last/{split}", {"labels": np.zeros(count, dtype=np.int64)}, {})
    results.write(f"last/{split}/clean", {"logits": right}, {**about, "kind": "clean"})
    results.write(
        f"last/{split}/attacks/pgd20", {"logits": attacked[None]}, {**about, "kind": "attacks", "attack": "P"}
    )


def gap_of(run: Path) -> list[float]:
    return [row["value"] for row in rows_of_run(run) if row["metric"] == "robust_error_gap"]


def test_subsets_that_are_cut_alike_are_compared_once(tmp_path):
    store(tmp_path / "run", "test[:10]", "test", wrong=5, count=10)
    store(tmp_path / "run", "train[:10]", "train", wrong=2, count=10)
    store(tmp_path / "run", "test[:4]", "test", wrong=4, count=4)
    store(tmp_path / "run", "train[:4]", "train", wrong=0, count=4)
    assert gap_of(tmp_path / "run") == [pytest.approx(0.5 - 0.2)]
    assert headline(read_record(tmp_path / "run"))["RErr"] == "50.0 %"  # of the most examples


def test_without_such_subsets_the_largest_are_compared(tmp_path):
    store(tmp_path / "run", "test", "test", wrong=5, count=10)
    store(tmp_path / "run", "train[:4]", "train", wrong=1, count=4)
    store(tmp_path / "run", "train[:8]", "train", wrong=2, count=8)
    assert gap_of(tmp_path / "run") == [pytest.approx(0.5 - 0.25)]


@pytest.mark.parametrize("other", [{"split": "svhn test[:10]"}, {"split": "test[:10]", "epsilon": 0.2}])
def test_other_data_and_other_threat_models_make_no_gap(tmp_path, other):
    store(tmp_path / "run", "train[:10]", "train", wrong=2, count=10)
    store(tmp_path / "run", role="test", wrong=9, count=10, **other)
    assert gap_of(tmp_path / "run") == []
