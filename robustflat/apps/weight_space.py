"""What a run folder holds of the neighbourhood of its weights besides flatness: curvature and landscapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustflat.apps.collect import RESULTS
from robustflat.apps.landscape_summary import stored_landscape
from robustflat.errors import DataError
from robustflat.evaluation.rows import Row
from robustflat.flatness.landscape_result import LandscapeResult
from robustflat.store.results import ResultStore

_VALUES = {"lambda_max": "value", "non_convexity": "non_convexity", "trace": "trace", "frobenius": "frobenius"}
"""Metric of a row -> key of `RunRecord.curvature`."""


def curvature_of(rows: Sequence[Row], checkpoint: str) -> dict[str, Any]:
    """Ends of the Hessian's spectrum of a checkpoint, of the clean loss on test examples where that was measured.

    Other matrices (see `spectrum_rows`) do not count.

    Args:
        rows: tidy rows of a run.
        checkpoint: such as "last".

    Returns:
        Empty if none was measured.
    """
    found = [row for row in rows if row["kind"] == "hessian" and row["checkpoint"] == checkpoint]
    # A name with "~" is that of a second result with other settings, such as the number of eigenvalues.
    names = [name for name in dict.fromkeys(str(row["measure"]) for row in found) if "_" not in name]
    if not names:
        return {}
    name = next((name for name in names if name.partition("~")[0] == "clean"), names[0])
    loss = name.partition("~")[0]
    measured = [row for row in found if row["measure"] == name]
    test = [row for row in measured if str(row.get("split")).startswith("test")]
    split = (test or measured)[-1].get("split")  # of several the one with the most examples, which comes last
    chosen = [row for row in measured if row.get("split") == split]
    values = {_VALUES[row["metric"]]: float(row["value"]) for row in chosen if row["metric"] in _VALUES}
    about = {"loss": loss, "examples": chosen[0].get("count"), "precision": chosen[0].get("precision", "")}
    return {**values, "curvature": "hessian", **about}


def landscapes_of(folder: Path, checkpoint: str) -> dict[str, LandscapeResult]:
    """Losses along lines through a checkpoint's weights by the name of the landscape; damaged ones are left out.

    Args:
        folder: of the run.
        checkpoint: such as "last".
    """
    store = ResultStore(folder / RESULTS)
    found: dict[str, LandscapeResult] = {}
    try:
        for name in store.names():
            attributes = store.attributes(name) if name.startswith(f"{checkpoint}/") else {}
            if attributes.get("kind") == "landscape" and attributes.get("shape") == "lines":
                found[name.rsplit("/", 1)[1]] = stored_landscape(store, name)
    except DataError:  # the rows of the same file, read before, have said so
        return found
    return found
