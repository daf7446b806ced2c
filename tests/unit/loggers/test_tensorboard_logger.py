"""TensorBoard, with a stand-in for its writer: the package is an optional extra."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from robustflat.errors import UserError
from robustflat.loggers.tensorboard import TensorboardLogger


@pytest.fixture
def writers(monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step=None):
            self.log_dir, self.purge_step, self.scalars, self.texts, self.closed = log_dir, purge_step, [], [], False
            made.append(self)

        def add_scalar(self, name, value, global_step):
            self.scalars.append((name, value, global_step))

        def add_text(self, name, text):
            self.texts.append(text)

        def close(self):
            self.closed = True

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


def test_numbers_become_scalars_at_their_step(writers, tmp_path):
    logger = TensorboardLogger(folder=tmp_path, run_id="r1", config={"seed": 3})
    logger.log({"a": 1.0, "b": 2.0}, step=5)
    logger.summary({"final": 3.0})
    logger.finish("done")
    (writer,) = writers
    assert writer.log_dir == str(tmp_path / "tensorboard")
    assert writer.scalars == [("a", 1.0, 5), ("b", 2.0, 5), ("summary/final", 3.0, 0)]
    assert '"seed": 3' in writer.texts[0]
    assert '"run": "r1"' in writer.texts[0]
    assert writer.closed


def test_rewinding_hides_what_came_later(writers, tmp_path):
    logger = TensorboardLogger(folder=tmp_path)
    logger.rewind(7)
    logger.log({"a": 1.0}, step=8)
    assert writers[0].closed
    assert writers[1].purge_step == 8
    assert writers[1].scalars == [("a", 1.0, 8)]


def test_missing_package_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r'pip install "robustflat\[tensorboard\]"'):
        TensorboardLogger(folder=tmp_path)
