"""Which folders a report is about."""

from __future__ import annotations

import pytest

from robustflat.apps.report import folders_of
from robustflat.errors import UserError


@pytest.mark.parametrize("runs", [5, ["nowhere", 5], "nowhere"])
def test_runs_that_are_not_there_are_named(runs):
    with pytest.raises(UserError, match="There is no folder"):
        folders_of(runs)
