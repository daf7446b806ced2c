"""The measurement after training, by two ranks that hold the same trained network."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from robustflat.apps.config import identity, register
from robustflat.apps.measurements import measure
from robustflat.apps.run_folder import RunFolder
from robustflat.apps.train import prepare
from robustflat.ranks import sharing_work
from tests.forked_ranks import on_ranks


def without_times(values):
    if not isinstance(values, dict):
        return values
    return {key: without_times(value) for key, value in values.items() if key != "seconds"}


def test_two_ranks_measure_what_one_measures_and_one_writes_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register()
    config = OmegaConf.load(run / "config.yaml")
    expected = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    with closing(RunFolder(run, identity(config))) as folder:
        session = prepare(config, folder, name="run", command=[], console=Console(quiet=True))

        def work():
            with sharing_work():
                return measure(session, "key"), measure(session, "key")

        first, second = on_ranks(2, work, tmp_path)
        session.logger.finish("done")
    (alone,) = expected.values()
    stored = json.loads((run / "results.json").read_text())["key"]
    assert first == second
    assert first[0] == first[1]
    assert stored == json.loads(json.dumps(first[0]))
    assert without_times(first[0]["weights"]) == without_times(alone["weights"])
    assert first[0]["complete"]


@pytest.mark.parametrize("ranks", [2])
def test_a_disk_that_is_full_for_the_first_rank_is_an_error_on_all(run, ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register()
    config = OmegaConf.load(run / "config.yaml")
    with closing(RunFolder(run, identity(config))) as folder:
        session = prepare(config, folder, name="run", command=[], console=Console(quiet=True))

        def full(*_):
            raise OSError(28, "No space left on device")

        def work():
            monkeypatch.setattr("robustflat.apps.run_folder.os.replace", full)
            with sharing_work():
                return measure(session, "key")

        errors = on_ranks(ranks, work, tmp_path)
        session.logger.finish("done")
    assert all("No space left on device" in str(error) for error in errors)
