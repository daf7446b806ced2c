"""Run folders: atomic files, one owner, one configuration."""

from __future__ import annotations

import errno
import json
import os
import subprocess

import pytest
import torch

from robustflat.apps import run_folder
from robustflat.apps.run_folder import RunFolder, provenance, write_text
from robustflat.errors import UserError
from robustflat.models.precision import exact_float32


def test_a_file_is_replaced_whole_and_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_files_are_as_readable_as_the_user_wants_files_to_be(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "λ")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a.txt").read_bytes() == "λ".encode()


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "3"])
def test_an_identity_that_is_no_mapping_is_named(tmp_path, text):
    (tmp_path / "identity.yaml").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        RunFolder(tmp_path, {"seed": 0})


def test_a_new_file_of_the_package_makes_the_checkout_dirty(tmp_path, monkeypatch):
    (tmp_path / "robustflat").mkdir()
    package = tmp_path / "robustflat" / "__init__.py"
    package.write_text("")
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    monkeypatch.setattr("robustflat.__file__", str(package))
    monkeypatch.setattr(run_folder, "_commit", run_folder._commit.__wrapped__)  # as a new process each time
    found = [provenance([])["dirty"]]
    (tmp_path / "notes.txt").write_text("nothing that is run")
    found.append(provenance([])["dirty"])
    for text in ("one", "two"):
        (tmp_path / "robustflat" / "mine.py").write_text(text)
        found.append(provenance([])["dirty"])
    assert found[:2] == [None, None]
    assert len(set(found)) == 3


def test_json_has_no_nan_and_a_damaged_file_counts_as_absent(tmp_path):
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    folder.write_json("r.json", {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": 2}})
    assert json.loads((tmp_path / "run" / "r.json").read_text()) == {"a": None, "b": [1.0, None], "c": {"d": 2}}
    (tmp_path / "run" / "r.json").write_text('{"a": ')
    assert folder.read_json("r.json") == {}
    assert folder.read_json("absent.json") == {}
    folder.close()


def test_one_configuration_per_folder(tmp_path):
    RunFolder(tmp_path, {"trainer": {"epochs": 2}, "x": [1]}).close()
    RunFolder(tmp_path, {"trainer": {"epochs": 2}, "x": [1]}).close()
    with pytest.raises(UserError, match=r"trainer\.epochs: 2 there, 3 here"):
        RunFolder(tmp_path, {"trainer": {"epochs": 3}, "x": [1]})


def test_a_folder_from_before_an_option_is_taken_where_the_option_decides_nothing(tmp_path):
    RunFolder(tmp_path, {"trainer": {"epochs": 2}}).close()
    RunFolder(tmp_path, {"trainer": {"epochs": 2, "memory_budget": "auto", "compile": "none"}}).close()
    with pytest.raises(UserError, match=r"trainer\.compile: absent there, default here"):
        RunFolder(tmp_path, {"trainer": {"epochs": 2, "memory_budget": 10, "compile": "default"}})


def test_a_damaged_identity_is_named(tmp_path):
    (tmp_path / "identity.yaml").write_text("a: [1, 2\nb: }")
    with pytest.raises(UserError, match="damaged"):
        RunFolder(tmp_path, {"a": 1})


def test_one_owner_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    first = RunFolder(tmp_path, {"a": 1})
    with pytest.raises(UserError, match="Another process"):
        RunFolder(tmp_path, {"a": 1})
    first.close()
    RunFolder(tmp_path, {"a": 1}).close()


def test_a_place_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"outputs=<folder>"):
        RunFolder(tmp_path / "file" / "run", {"a": 1})


def test_provenance_says_what_a_card_computes_in_tf32(monkeypatch):
    assert provenance([])["tf32"] == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert provenance([])["tf32"] == ["convolutions"]  # torch's default
    with exact_float32(torch.device("cpu")):
        assert provenance([])["tf32"] == []


def test_provenance_names_versions_and_command():
    found = provenance(["trainer=at"])
    assert found["command"] == ["trainer=at"]
    assert {"torch", "hydra-core"} <= found["packages"].keys()
    assert found["commit"] is None or len(found["commit"]) == 40
