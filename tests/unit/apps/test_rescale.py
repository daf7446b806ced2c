"""The table of rescaled networks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from torch import nn

from robustflat.apps.networks import NetworkFile
from robustflat.apps.rescale import Variant, _line


def test_a_network_whose_store_holds_other_settings_of_an_attack_shares_its_columns_with_the_scaled_ones() -> None:
    arrays = {name: np.ones(1) for name in ("top", "bottom", "top_residuals", "bottom_residuals")}
    place = cast(Any, SimpleNamespace(store=SimpleNamespace(read=lambda name: SimpleNamespace(arrays=arrays))))
    lines = []
    for label, measure in (("last", "pgd20~1c2521e2"), ("last_x2", "pgd20")):
        row = {"role": "test", "metric": "robust_error", "measure": measure, "value": 0.25, "stderr": 0.1}
        variant = Variant(NetworkFile(label, Path("last.pt"), "model", None), nn.Identity(), "", label, 0.0)
        lines.append(_line(place, variant, [cast(Any, row)], "hessian/clean"))
    assert list(lines[0]) == list(lines[1])
    assert lines[0]["test robust_error pgd20"] == pytest.approx(0.25)
