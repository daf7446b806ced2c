"""Which images a configuration is about, wherever their files lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLACES = ("root", "download", "cache")
"""Keys of a source that say where its files lie and how they come there."""


def source_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the source that decide the images.

    Known data sets lie below their root under a name of their own, so the root does not count. A folder of images has
    no other name: its root counts, relative to data_root if it lies inside.

    Args:
        config: with the keys dataset and data_root, resolved; without a source the result is empty.
    """
    dataset = config.get("dataset")
    source = dataset.get("source") if isinstance(dataset, Mapping) else None
    if not isinstance(source, Mapping):  # the check of the configuration says so
        return {}
    kept = {key: value for key, value in source.items() if key not in PLACES}
    if str(source.get("_target_")).endswith(".ImageFolder"):
        kept["root"] = below(Path(str(source.get("root"))), Path(str(config.get("data_root"))))
    return kept


def below(path: Path, folder: Path) -> str:
    """A path relative to a folder if it lies inside, else as it is."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
