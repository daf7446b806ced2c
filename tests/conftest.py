"""Hygiene for every test: fixed seed, one thread, no leaked working directory, environment or Hydra state."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.composing import remembered
from tests.pair import Pair

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two processes that share jobs; they start when the first test asks for them."""
    two = Pair()
    yield two
    two.close()


@pytest.fixture(autouse=True)
def hygiene() -> Iterator[None]:
    """Seed torch's global generator, and put working directory and environment back afterwards."""
    cwd, environment = os.getcwd(), dict(os.environ)
    torch.manual_seed(0)
    yield
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)


@contextmanager
def undrawn() -> Iterator[None]:
    """Inside, figures of reports are made and not written as pictures, which takes most of a report's time."""
    from robustflat.reporting import figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", lambda figure, folder, key: [])
        yield


@pytest.fixture(scope="session", autouse=True)
def hydra_reads_files_once() -> Iterator[None]:
    """See `remembered`; tests that start a process of their own have Hydra as it is."""
    with remembered():
        yield


@pytest.fixture
def without_pictures() -> Iterator[None]:
    """For tests that do not look at pictures; see `undrawn`."""
    with undrawn():
        yield


def pytest_collection_finish() -> None:
    """Tests and libraries are there to stay: looking for garbage among them took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_configure(config: pytest.Config) -> None:
    """Show a card to runs of `-m gpu` only: next to one, processes cannot be forked, and two ranks need two cards."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config.addinivalue_line("filterwarnings", "ignore:Synchronization debug mode is a prototype:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that workers end together; skip tests marked `gpu` where no CUDA device is present."""
    items.sort(key=lambda item: "integration" not in item.path.parts)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
