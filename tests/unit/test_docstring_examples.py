"""The examples in docstrings are run: what they show is what comes out."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import robustflat

PACKAGE = Path(robustflat.__file__).parent


def _has_examples(path: Path) -> bool:
    """Whether any example is run: those that need a user's own network are skipped."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return any(line.lstrip().startswith(">>> ") and "doctest: +SKIP" not in line for line in lines)


WITH_EXAMPLES = sorted(filter(_has_examples, PACKAGE.rglob("*.py")))


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_show_what_comes_out(path: Path) -> None:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
