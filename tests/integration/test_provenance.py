"""Where a run comes from, deterministic training, and the comparison of two runs."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from robustflat.apps.compare import main
from robustflat.apps.train import make_deterministic
from robustflat.data.sources import Digits
from tests.integration.conftest import TINY, only_run

ONE = (*TINY, "trainer.epochs=1")


@pytest.fixture(autouse=True)
def _as_before():
    yield
    make_deterministic(False)


def test_provenance_says_which_data_code_and_machine(cli, tmp_path):
    assert cli(*ONE).code == 0
    found = json.loads((only_run(tmp_path) / "provenance.json").read_text())
    sets = Digits()()
    images, labels = sets["train"].images[:128], sets["train"].labels[:128]
    head = f"{tuple(images.shape)} {images.dtype}".encode()
    expected = hashlib.sha256(head + images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
    assert found["data_hash"]["train"] == expected
    assert {"commit", "dirty", "python", "packages", "platform", "cpu", "cores", "gpus", "command"} <= found.keys()
    assert found["deterministic"] is False
    assert "earlier" not in found


def test_what_another_version_did_of_a_run_stays_on_record(cli, tmp_path):
    assert cli(*ONE).code == 0
    file = only_run(tmp_path) / "provenance.json"
    other = json.loads(file.read_text()) | {"commit": "0" * 40}
    file.write_text(json.dumps(other))
    (only_run(tmp_path) / "DONE").unlink()
    assert cli(*ONE).code == 0
    found = json.loads(file.read_text())
    assert [entry["commit"] for entry in found["earlier"]] == ["0" * 40]
    (only_run(tmp_path) / "DONE").unlink()
    assert cli(*ONE).code == 0
    assert len(json.loads(file.read_text())["earlier"]) == 1


def test_deterministic_runs_use_deterministic_algorithms_and_are_the_same_run(cli, tmp_path, capfd):
    assert cli(*ONE, "deterministic=true", "outputs=a").code == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert cli(*ONE, "outputs=b").code == 0
    assert not torch.are_deterministic_algorithms_enabled()
    (a,), (b,) = tmp_path.glob("a/*/*"), tmp_path.glob("b/*/*")
    assert json.loads((a / "provenance.json").read_text())["deterministic"] is True
    assert a.name == b.name
    assert main([str(a), str(b), "--assert-equal"]) == 0
    out = capfd.readouterr().out
    assert "origin  deterministic" in out
    assert "equal bit for bit" in out


def test_an_operation_without_a_deterministic_form_is_explained(cli, tmp_path, monkeypatch):
    from robustflat.training.trainer import Trainer

    def refuses(self: Trainer) -> None:
        torch.use_deterministic_algorithms(True)
        raise RuntimeError("put_ does not have a deterministic implementation, but you set ... Long advice")

    monkeypatch.setattr(Trainer, "_train_step", refuses)
    answer = cli(*ONE, "deterministic=true")
    assert answer.code == 1
    assert "deterministic=true: put_ does not have a deterministic implementation" in answer.err


def test_different_runs_are_told_apart_and_missing_ones_named(cli, tmp_path, capfd):
    assert cli(*ONE, "outputs=a").code == 0
    assert cli(*ONE, "outputs=b", "seed=1").code == 0
    a, b = (str(next(tmp_path.glob(f"{side}/*/*"))) for side in "ab")
    assert main([a, b]) == 0
    assert "result  .model" in capfd.readouterr().out
    assert main([a, b, "--assert-equal"]) == 1
    assert main([a, str(tmp_path / "none"), "--assert-equal"]) == 2
    assert "there is no checkpoint" in capfd.readouterr().err
