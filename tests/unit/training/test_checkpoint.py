"""Checkpoints: atomic, checked, never executed, with a way back."""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from robustflat.errors import CheckpointError, UserError
from robustflat.training import checkpoint
from robustflat.training.checkpoint import load, load_into, load_newest, save

PARTS = {
    "model": {"w": torch.arange(40.0).reshape(5, 8), "count": torch.tensor(3)},
    "optimizer": {"state": {0: {"momentum": torch.ones(5, 8)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    "note": None,
    "history": [{"loss": 1.5}],
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "last.pt"
    save(path, PARTS, {"version": "1"})
    return path


def test_what_was_saved_comes_back(file, same_state):
    parts, meta = load(file)
    assert same_state(parts, PARTS)
    assert meta == {"version": "1"}
    assert same_state(torch.load(file, weights_only=True)["parts"], PARTS)


def test_folder_is_made_and_no_temporary_file_stays(tmp_path):
    save(tmp_path / "a" / "b" / "x.pt", {})
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["x.pt"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_cut_off_file_is_refused(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"damaged|cut off|not a checkpoint"):
        load(file)


def test_flipped_bytes_are_noticed_or_harmless(file, same_state):
    content = file.read_bytes()
    noticed = 0
    for position in range(0, len(content), 17):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        file.write_bytes(damaged)
        try:
            parts, _ = load(file)
        except CheckpointError:
            noticed += 1
        else:
            assert same_state(parts, PARTS), position
    assert noticed > 20


def test_flipped_byte_inside_a_weight_is_noticed(file):
    content = bytearray(file.read_bytes())
    position = content.index(torch.tensor([17.0, 18.0]).numpy().tobytes())
    content[position + 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="wrong checksum of"):
        load(file)


class Canary:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_bare_pickle_is_refused_without_running_it(tmp_path):
    file, canary = tmp_path / "last.pt", tmp_path / "canary"
    file.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError, match=r"bare pickle.*never unpickles"):
        load(file)
    assert not canary.exists()


def test_pickle_inside_a_torch_file_is_refused_without_running_it(tmp_path):
    file, canary = tmp_path / "last.pt", tmp_path / "canary"
    torch.save({"format": 1, "meta": {}, "parts": {"model": Canary(canary)}}, file)
    with pytest.raises(CheckpointError, match=r"holds Python objects other than tensors.*never unpickles"):
        load(file)
    assert not canary.exists()


def test_other_torch_files_and_other_formats_are_told_apart(tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of robustflat.*model=external"):
        load(file)
    torch.save({"format": 99, "meta": {}, "parts": {}}, file)
    with pytest.raises(CheckpointError, match="has checkpoint format 99; this version reads format 1"):
        load(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(CheckpointError, match="is damaged"):
        load(file)
    file.write_text("hello")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load(file)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "absent.pt")


@pytest.mark.parametrize("value", [{1, 2}, object(), Path("x"), {(1, 2): 3}, [nn.ReLU()]])
def test_objects_that_could_not_be_loaded_are_not_saved(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"checkpoint\.parts\.a"):
        save(tmp_path / "x.pt", {"a": value})
    assert list(tmp_path.iterdir()) == []


def fail_with(code: int):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_disk_leaves_the_earlier_checkpoint(file, monkeypatch, same_state, code):
    monkeypatch.setattr(checkpoint.os, "fsync", fail_with(code))
    with pytest.raises(UserError, match=r"could not write the checkpoint .*An earlier one, if any, is intact"):
        save(file, {"model": {}}, keep=file.with_name("previous.pt"))
    monkeypatch.undo()
    assert [p.name for p in file.parent.iterdir()] == ["last.pt"]
    assert same_state(load(file).parts, PARTS)


def test_interrupt_while_writing_leaves_the_earlier_checkpoint(file, monkeypatch, same_state):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(file, {"model": {}})
    monkeypatch.undo()
    assert [p.name for p in file.parent.iterdir()] == ["last.pt"]
    assert same_state(load(file).parts, PARTS)


def test_newest_is_last(tmp_path):
    for epoch in (1, 2):
        save(tmp_path / "last.pt", {"epoch": epoch}, keep=tmp_path / "previous.pt")
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest.parts == {"epoch": 2}
    assert newest.path == tmp_path / "last.pt"
    assert newest.message is None


@pytest.mark.parametrize("harm", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-200])])
def test_newest_falls_back_to_the_previous_one_and_says_so(tmp_path, harm):
    for epoch in (1, 2):
        save(tmp_path / "last.pt", {"epoch": epoch}, keep=tmp_path / "previous.pt")
    harm(tmp_path / "last.pt")
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest.parts == {"epoch": 1}
    assert newest.message is not None
    assert "last.pt" in newest.message
    assert "Going back to" in newest.message


def test_without_any_checkpoint_there_is_no_newest(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "absent") is None


def test_two_damaged_checkpoints_are_both_named(tmp_path):
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"PK damaged")
    with pytest.raises(CheckpointError, match=r"neither checkpoint can be read.*last.pt.*previous.pt"):
        load_newest(tmp_path)
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(CheckpointError, match=r"last.pt is damaged"):
        load_newest(tmp_path)


def test_loading_into_a_model_lists_every_kind_of_mismatch_and_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    state = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "1.weight": torch.zeros(4, 3), "x": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, state)
    text = str(caught.value)
    assert "1 missing: 1.bias." in text
    assert "1 unexpected: x." in text
    assert "1 of another shape: 0.bias (checkpoint (4,), model (3,))." in text
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_long_lists_of_names_are_shortened():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(10)))
    with pytest.raises(CheckpointError, match=r"20 missing: .* and 12 more"):
        load_into(model, {})


def test_matching_state_is_loaded():
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    load_into(model, other.state_dict())
    assert torch.equal(model.weight, other.weight)


def test_same_content_gives_the_same_bytes(tmp_path):
    files = []
    for name in ("a.pt", "b.pt"):
        save(tmp_path / name, PARTS)
        files.append(zipfile.ZipFile(io.BytesIO((tmp_path / name).read_bytes())))
    members = [[archive.read(n) for n in archive.namelist()] for archive in files]
    assert members[0] == members[1]
