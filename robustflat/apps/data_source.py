"""Which images a configuration is about: what of a data set's source decides them, wherever its files lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

PLACES = ("root", "download", "cache")
"""Arguments of sources that say where known files lie, not what is in them."""


def deciding_source(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the source that decide which images it gives.

    The root of a folder of images is one of them, from `data_root` on if it lies below that; a stored data set such as
    CIFAR-10 is the same under every root.

    Args:
        values: a configuration as plain values: `dataset`, and `data_root` if it is known.
    """
    source = (values.get("dataset") or {}).get("source")
    if not isinstance(source, Mapping):
        return {}
    kept = {str(key): value for key, value in source.items() if key not in PLACES}
    if str(source.get("_target_")).endswith(".ImageFolder"):
        root = os.path.normpath(str(source.get("root")))
        kept["root"] = root.removeprefix(os.path.normpath(str(values.get("data_root"))) + os.sep)
    return kept


def same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations, as plain values, have the same source of images."""
    return deciding_source(one) == deciding_source(other)


def moved(path: str, old: str, new: str) -> str:
    """A path that is `old` or lies below it, at `new` instead; any other path as it is."""
    if path == old or path.startswith(old.rstrip(os.sep) + os.sep):
        return new + path[len(old.rstrip(os.sep)) :]
    return path
