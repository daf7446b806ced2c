"""Anything on the command line and any bytes in a file: it works, or there is a message; never a traceback.

The configuration is composed, checked, built and trained for one step in this process.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import h5py
import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from robustflat.apps.config import config_folder, register
from robustflat.apps.main import _leaves
from robustflat.data.hdf5 import read_images, read_labels
from robustflat.errors import UserError
from robustflat.store.results import ResultStore
from robustflat.training.checkpoint import load, save
from robustflat.training.trainer import Trainer
from tests.integration.conftest import TINY

GROUPS = ("dataset", "model", "optimizer", "schedule", "attack", "trainer", "flatness", "evaluation", "logger")
SMALL = (*(a for a in TINY if "epochs" not in a), "trainer.epochs=1")
VALUES = (
    "null", "0", "-1", "1", "2", "3", "1e9", "-1e-9", "nan", "inf", "-inf", "true", "''", "x", "[]", "{}", "[1,2]",
    "{a: 1}", "???", "'${nothing}'", "'${seed}'", "0.5", "1e-320", "{_target_: os.system}", "auto", "cuda:7", "linf",
    "'test[:5]'", "'train[5:2]'", "'${px:8}'", "..", "é",
)  # fmt: skip


def leaves() -> list[str]:
    """Keys of the default configuration, those below the lengths that keep a test small excepted."""
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose("train")
    large = ("model.channels", "steps", "trials", "epochs", "threads", "restarts")
    outside = ("outputs", "data_root", "trusted_packages")
    return [key for key in _leaves(config) if not key.endswith(large) and key not in outside]


LEAVES = leaves()


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training ends after one step as if it were done; what is measured afterwards is tested elsewhere."""
    epoch = Trainer._train_epoch

    def shortened(self: Trainer) -> None:
        if self.step == 0:
            self._train_step()
        raise UserError("one step is enough")

    assert epoch is not shortened
    monkeypatch.setattr(Trainer, "_train_epoch", shortened)
    return


def require_message(answer) -> None:
    assert answer.code in (0, 1), (answer.code, answer.err)
    assert "Traceback" not in answer.err + answer.out
    if answer.code:
        assert "error: " in answer.err, answer.err


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("form", ["{}=null", "~{}", "{}=", "{}=not_there", "+{0}={0}", "{}={{}}"])
def test_every_group_left_out_or_misnamed_gives_a_message(cli, one_step, group, form):
    kept = [a for a in SMALL if not a.startswith(f"{group}.")]
    answer = cli(*kept, form.format(group))
    require_message(answer)
    if form == "{}=null":
        assert answer.code == 1
        assert "~GROUP" in answer.err


FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.slow
@FUZZ
@example("optimizer._partial_", "-1", "")
@given(st.sampled_from(LEAVES), st.sampled_from(VALUES), st.sampled_from(["", "+", "++", "~"]))
def test_any_override_runs_or_gives_a_message(cli, one_step, key, value, prefix):
    kept = [a for a in SMALL if a.split("=")[0] != key]
    require_message(cli(*kept, f"{prefix}{key}" if prefix == "~" else f"{prefix}{key}={value}"))


@pytest.mark.slow
@FUZZ
@given(st.text(min_size=1, max_size=30))
@example("a=b=c")
@example("=")
@example("model=[mlp,lenet]")
@example("seed=${seed}")
def test_any_text_as_an_argument_gives_a_message(cli, one_step, text):
    if text.startswith("-") or "\0" in text:
        return  # an option of Hydra's own; and no shell can pass a zero byte
    require_message(cli(*SMALL, text))


def damaged(content: bytes, seed: int) -> bytes:
    """Cut off somewhere, some bytes flipped, a stretch zeroed, or one repeated."""
    draw = random.Random(seed)
    kind, place = draw.randrange(4), draw.randrange(len(content))
    if kind == 0:
        return content[:place]
    changed = bytearray(content)
    if kind == 1:
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    else:
        changed[place:place] = changed[place : place + 64]
    return bytes(changed)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.rand(20, 20, generator=generator), "n": torch.arange(4)}
    save(folder / "last.pt", {"model": weights, "epoch": 3, "list": [1.0, None, "text"]}, {"config": "a: 1"})
    with h5py.File(folder / "images.h5", "w") as file:
        file["tensor"] = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    with h5py.File(folder / "labels.h5", "w") as file:
        file["tensor"] = np.arange(20)[:, None] % 10
    ResultStore(folder / "results.h5").write("last/test", {"labels": np.arange(5000.0)}, {"key": "k", "n": 3})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def use(path: Path) -> object:
    """What the program does with a file of this name."""
    if path.name == "last.pt":
        return load(path)
    if path.name == "images.h5":
        return read_images(path)
    if path.name == "labels.h5":
        return read_labels(path, 10)
    store = ResultStore(path)
    return [store.read(name) for name in store.names()]


@pytest.mark.parametrize("name", ["last.pt", "images.h5", "labels.h5", "results.h5"])
def test_damaged_bytes_give_a_message_or_what_was_there(tmp_path, sound, name):
    messages = []
    for seed in range(150):
        path = tmp_path / name
        path.write_bytes(damaged(sound[name], seed))
        try:
            use(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(name in message for message in messages)


def test_a_damaged_checkpoint_is_never_taken_for_a_sound_one(tmp_path, sound):
    """Every member has a checksum: what loads at all has the very values that were saved."""
    (tmp_path / "sound.pt").write_bytes(sound["last.pt"])
    expected = load(tmp_path / "sound.pt")
    for seed in range(150, 300):
        (tmp_path / "last.pt").write_bytes(damaged(sound["last.pt"], seed))
        try:
            found = load(tmp_path / "last.pt")
        except UserError:
            continue
        assert all(torch.equal(found.parts["model"][k], w) for k, w in expected.parts["model"].items())
        assert (found.parts["epoch"], found.parts["list"], found.meta) == (3, [1.0, None, "text"], {"config": "a: 1"})
