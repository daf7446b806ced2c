"""What scripts/export.py refuses instead of writing an empty table."""

from __future__ import annotations

from argparse import Namespace

import h5py
import pandas as pd
import pytest

from robustflat.errors import UserError
from scripts.export import main, selected

TABLE = pd.DataFrame({"metric": ["robust_error", "robust_loss"], "checkpoint": ["last", "average"]})


def test_rows_are_kept_by_metric_and_checkpoint_and_unknown_names_are_told() -> None:
    assert len(selected(TABLE, Namespace(metrics=["robust_error"], checkpoints=[]))) == 1
    with pytest.raises(UserError, match=r"--metrics must be one of robust_error, robust_loss, got 'robust_eror'\. Did"):
        selected(TABLE, Namespace(metrics=["robust_error", "robust_eror"], checkpoints=[]))
    with pytest.raises(UserError, match="--checkpoints must be one of average, last, got 'best'"):
        selected(TABLE, Namespace(metrics=[], checkpoints=["best"]))


def test_runs_whose_results_hold_no_number_give_no_table(tmp_path, capsys) -> None:
    h5py.File(tmp_path / "results.h5", "w").close()
    assert main([str(tmp_path), "--output", str(tmp_path / "table.md")]) == 1
    assert "hold no errors and no measures: python evaluate.py run=<folder>" in capsys.readouterr().err
    assert not (tmp_path / "table.md").exists()
