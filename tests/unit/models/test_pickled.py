"""Weights out of pickles: torch's own answer for honest files, and nothing executed for the others."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from robustflat.errors import CheckpointError
from robustflat.models.pickled import state_dict_of


class Unknown:
    """A class of another program."""

    def __init__(self) -> None:
        self.notes = {"lr": 0.1}


class Executes:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)))


def assert_equal(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickled_module_gives_its_state_dict(tmp_path, network, new):
    content = {"model": network, "optimizer": torch.optim.SGD(network.parameters(), lr=0.1), "extra": Unknown()}
    torch.save(content, tmp_path / "net.pth.tar", _use_new_zipfile_serialization=new)
    assert_equal(state_dict_of(tmp_path / "net.pth.tar"), network.state_dict())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3, "by": Unknown()}])
def test_state_dicts_are_found_at_the_top_and_inside(tmp_path, network, wrap):
    torch.save(wrap(network.state_dict()), tmp_path / "net.pt")
    assert_equal(state_dict_of(tmp_path / "net.pt"), network.state_dict())


def test_views_and_shared_storages_come_out_right(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {"transposed": base.t(), "row": base[1], "half": base.to(torch.bfloat16), "count": torch.tensor(5)}
    torch.save({"net": state, "by": Unknown()}, tmp_path / "net.pt")
    assert_equal(state_dict_of(tmp_path / "net.pt"), state)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_nothing_in_the_file_is_executed(tmp_path, network, new):
    evil = Executes(str(tmp_path / "made"))
    torch.save(
        {"state_dict": network.state_dict(), "evil": evil}, tmp_path / "net.pt", _use_new_zipfile_serialization=new
    )
    assert_equal(state_dict_of(tmp_path / "net.pt"), network.state_dict())
    assert not (tmp_path / "made").exists()


def test_a_bare_pickle_is_not_executed_either(tmp_path):
    (tmp_path / "net.pt").write_bytes(pickle.dumps(Executes(str(tmp_path / "made"))))
    with pytest.raises(CheckpointError, match=r"net.pt"):
        state_dict_of(tmp_path / "net.pt")
    assert not (tmp_path / "made").exists()


def test_programs_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
        archive.writestr("net/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript program"):
        state_dict_of(tmp_path / "net.pt")


def test_a_tensor_outside_of_its_data_is_refused(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(tmp_path / "net.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            # The size (4,) is pickled as the byte "K" and 4: claim 200 numbers.
            new.writestr(name, content.replace(b"K\x04\x85", b"K\xc8\x85") if name.endswith("data.pkl") else content)
    with pytest.raises(CheckpointError, match="outside of its data"):
        state_dict_of(tmp_path / "net.pt")


def test_a_damaged_table_of_contents_is_named(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "net.pt")
    content = bytearray((tmp_path / "net.pt").read_bytes())
    content[content.rindex(b"PK\x01\x02")] = 0
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net.pt is damaged"):
        state_dict_of(tmp_path / "net.pt")


def test_numbers_that_are_none_make_one_network_no_two(tmp_path):
    state = {"w": torch.tensor([1.0, float("nan")])}
    torch.save({"model": state, "copy": {"w": state["w"].clone()}}, tmp_path / "net.pt")
    torch.testing.assert_close(state_dict_of(tmp_path / "net.pt"), state, equal_nan=True)


def test_files_without_a_network_are_named(tmp_path):
    torch.save({"epoch": 3, "by": Unknown()}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="holds no network"):
        state_dict_of(tmp_path / "net.pt")
    whole = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "net.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        state_dict_of(tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="no file"):
        state_dict_of(tmp_path / "gone.pt")
