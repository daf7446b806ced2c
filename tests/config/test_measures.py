"""conf/measure/ holds the standard measures, with the same settings."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from robustflat.apps import audit, hessian, measure, rescale  # noqa: F401  (register their roots)
from robustflat.apps.build import build
from robustflat.apps.config import config_folder, register
from robustflat.flatness.measures.catalogue import STANDARD


def settings(thing: object) -> object:
    """Attributes, of parts too."""
    if not type(thing).__module__.startswith("robustflat"):
        return thing
    return type(thing), {name: settings(value) for name, value in vars(thing).items()}


def composed(*overrides: str):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("measure", list(overrides))


def test_there_is_a_file_for_every_standard_measure_and_all_has_them_all() -> None:
    assert {path.stem for path in (config_folder() / "measure").glob("*.yaml")} == set(STANDARD)
    assert list(composed("measures=all").measures) == list(STANDARD)


@pytest.mark.parametrize("name", STANDARD)
def test_a_file_gives_the_standard_measure(name: str) -> None:
    assert settings(build(composed(f"measure={name}").measure)) == settings(STANDARD[name])
