"""`robustflat doctor`: what is fine, what is not, and what to do about it."""

from __future__ import annotations

import importlib
import shutil
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from robustflat.apps import doctor
from robustflat.apps.doctor import FAIL, OK, WARN, examine
from robustflat.data.hdf5 import write_set
from robustflat.data.images import ImageSet
from tests.integration.conftest import ROOT, Cli


def levels(folder: Path, **options: str) -> dict[str, str]:
    worst: dict[str, str] = {}
    for level, what, _ in examine(folder / "outputs", folder / "data", **options):
        if worst.get(what) != FAIL:
            worst[what] = level
    return worst


def text_of(folder: Path, what: str) -> str:
    return " ".join(f.text for f in examine(folder / "outputs", folder / "data") if f.what == what)


def test_a_sound_installation_has_no_failure_and_leaves_nothing_behind(cli_of, tmp_path):
    answer = cli_of("doctor", "device=cpu")
    assert answer.code == 0, answer.out
    assert "0 failures" in answer.out
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_failure_with_exit_code_1(cli_of, tmp_path):
    (tmp_path / "file").write_text("")
    answer = cli_of("doctor", "outputs=file/inside", "device=cpu")
    assert answer.code == 1
    assert "choose another with outputs=FOLDER" in answer.out


def test_torch_and_torchvision_that_do_not_match_are_a_failure(tmp_path, monkeypatch):
    real = importlib.import_module

    def refuses(name: str, *rest: str):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", refuses)
    assert levels(tmp_path, device="cpu")["torchvision"] == FAIL
    assert "pip install --upgrade torch torchvision" in text_of(tmp_path, "torchvision")


def test_a_torch_that_cannot_be_imported_does_not_end_the_examination(tmp_path, monkeypatch):
    real = importlib.import_module

    def refuses(name: str, *rest: str):
        if name == "torch":
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", refuses)
    found = levels(tmp_path)
    assert found["torch"] == FAIL
    assert found["outputs"] == OK


def test_a_full_disk_is_a_failure_and_a_nearly_full_one_a_warning(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 1000))
    assert levels(tmp_path)["disk space"] == FAIL
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 2**30))
    assert levels(tmp_path)["disk space"] == WARN


def test_a_device_that_is_not_there_is_a_failure(tmp_path):
    assert levels(tmp_path, device="cuda:99")["device"] == FAIL


def test_data_sets_that_are_there_are_named(tmp_path):
    assert "mnist" not in text_of(tmp_path, "data sets").split("not here")[0]
    digits = ImageSet(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1]), "mnist train", 10)
    for split in ("train", "test"):
        write_set(tmp_path / "data" / "mnist", split, digits)
    assert "mnist" in text_of(tmp_path, "data sets").split("not here")[0]


def test_every_dependency_is_looked_for(tmp_path, monkeypatch):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    elsewhere = {"torch", "torchvision", "wandb", "hydra-joblib-launcher"}
    assert {text.split(">=")[0] for text in declared} - elsewhere == set(doctor.REQUIRED)
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "plotly" else "1.0")
    assert levels(tmp_path)["packages"] == FAIL and "pip install plotly" in text_of(tmp_path, "packages")


def test_missing_extras_are_warnings_that_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "hydra-ray-launcher" else "1.0")
    assert levels(tmp_path)["hydra-ray-launcher"] == WARN
    assert "robustflat[ray]" in text_of(tmp_path, "hydra-ray-launcher")


@pytest.mark.parametrize(("state", "level"), [(None, WARN), (False, WARN), (True, OK)])
def test_an_account_at_wandb_is_looked_for(tmp_path, monkeypatch, state, level):
    monkeypatch.setattr("robustflat.loggers.wandb.account", lambda: state)
    assert levels(tmp_path)["W&B"] == level


def test_the_command_is_listed(cli_of: Cli):
    answer = cli_of("doctor", "--help")
    assert answer.code == 0
    assert "robustflat doctor" in answer.out
