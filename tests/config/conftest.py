"""Composing configurations as the command line does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from robustflat.apps.config import config_folder, register

Compose = Callable[..., DictConfig]


@pytest.fixture
def compose() -> Iterator[Compose]:
    """compose(*overrides) -> the configuration of `train.py` with these overrides, without its hydra node."""
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):

        def with_overrides(*overrides: str, hydra_node: bool = False) -> DictConfig:
            config = hydra.compose("train", list(overrides), return_hydra_config=True)
            if hydra_node:
                return config
            return OmegaConf.masked_copy(config, [k for k in config if k != "hydra"])

        yield with_overrides
    GlobalHydra.instance().clear()
