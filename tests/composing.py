"""Hydra reads every file of a configuration once in a test process, and not again at every command.

Composing is the greater part of the time of a test that asks whether a command is understood: 0.12 s, a third of it for
reading the same files again, and all of it twice in a command, as Hydra first asks for the mode. That the results are
those of Hydra left alone is tested in `tests/config/test_composition.py`.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from omegaconf import _utils, base, grammar_parser

AS_IT_IS = {
    (ConfigRepository, "load_config"): ConfigRepository.load_config,
    (Hydra, "get_mode"): Hydra.get_mode,
    **{(module, "parse"): grammar_parser.parse for module in (grammar_parser, base, _utils)},
}


@contextmanager
def remembered() -> Iterator[None]:
    """Inside, files and interpolations that have not changed are not parsed again, and commands are composed once."""
    parse = functools.cache(grammar_parser.parse)
    faster = {
        (ConfigRepository, "load_config"): _remembering(ConfigRepository.load_config),
        (Hydra, "get_mode"): _mode_where_something_sets_it(Hydra.get_mode),
        **{(module, "parse"): parse for module in (grammar_parser, base, _utils)},
    }
    with _replaced(faster):
        yield


@contextmanager
def forgotten() -> Iterator[None]:
    """Inside, Hydra is as it is."""
    with _replaced(AS_IT_IS):
        yield


@contextmanager
def _replaced(functions: dict[tuple[Any, str], Callable[..., Any]]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), function in functions.items():
            patch.setattr(owner, name, function)
        yield


def _remembering(load: Callable[..., Any]) -> Callable[..., Any]:
    memory: dict[Any, Any] = {}

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        key = (config_path, *(_state(source, config_path) for source in self.sources))
        if key not in memory:
            found = load(self, config_path)
            if found is None:  # a plugin may bring it later
                return None
            memory[key] = found
        found = copy.copy(memory[key])
        found.config, found.defaults_list = copy.deepcopy((found.config, found.defaults_list))
        return found

    return load_config


def _state(source: Any, config_path: str) -> tuple[Any, ...]:
    """What decides on the answer of a source: where it looks, and the version of a file there."""
    where = (source.scheme(), source.provider, source.path)
    if source.scheme() != "file":
        return where
    try:
        stat = os.stat(os.path.join(source.path, source._normalize_file_name(config_path)))
    except OSError:
        return where
    return *where, stat.st_mtime_ns, stat.st_size, stat.st_ino


def _mode_where_something_sets_it(get_mode: Callable[..., Any]) -> Callable[..., Any]:
    """Hydra's own answer where an argument or a sweep may set a mode; `Hydra.run` fails where something else does."""

    def mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        asked = any("sweep" in override or "hydra.mode" in override for override in overrides)
        return get_mode(self, config_name, overrides) if asked else None

    return mode
