"""W&B without network and account: a stand-in for the module, and once the real one offline."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from robustflat.errors import UserError
from robustflat.loggers.wandb import WandbLogger


class FakeRun:
    url = "https://example.org/run"

    def __init__(self) -> None:
        self.logged, self.summary, self.exit_code, self.broken = [], {}, None, False

    def log(self, metrics, step):
        if self.broken:
            raise RuntimeError("connection lost\nlong trace")
        self.logged.append((metrics, step))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A `wandb` whose `init` notes its arguments; `refuse` names the modes in which it fails."""
    module = ModuleType("wandb")
    module.calls, module.refuse, module.torn_down = [], (), 0

    class Settings(SimpleNamespace):
        model_fields = ("init_timeout", "silent", "console", "base_url")
        base_url = "https://api.example.org"

    def init(**arguments):
        module.calls.append(arguments)
        if arguments["mode"] in module.refuse:
            raise RuntimeError("timed out.")
        module.run = FakeRun()
        return module.run

    def teardown():
        module.torn_down += 1

    module.Settings, module.init, module.teardown = Settings, init, teardown
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return module


def test_run_gets_id_group_tags_and_config_and_is_resumable(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    logger = WandbLogger(
        project="p", entity="e", group="g", tags=("a", "b"), folder=tmp_path / "f", run_id="r", config={"seed": 1}
    )
    (call,) = fake.calls
    assert (tmp_path / "f").is_dir()
    assert call["mode"] == "online"
    assert call["resume"] == "allow"
    assert {k: call[k] for k in ("project", "entity", "group", "tags", "id", "config")} == {
        "project": "p",
        "entity": "e",
        "group": "g",
        "tags": ["a", "b"],
        "id": "r",
        "config": {"seed": 1},
    }
    logger.log({"loss": 1.0}, step=4)
    logger.summary({"final": 2.0})
    logger.finish("done")
    assert fake.run.logged == [({"loss": 1.0}, 4)]
    assert fake.run.summary == {"final": 2.0}
    assert fake.run.exit_code == 0


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_runs_that_did_not_end_well_are_marked(fake, status):
    WandbLogger(mode="offline").finish(status)
    assert fake.run.exit_code == 1


def test_without_account_the_run_is_offline_and_one_line_says_so(fake, capsys):
    logger = WandbLogger(mode="online")
    assert [call["mode"] for call in fake.calls] == ["offline"]
    assert logger.active
    assert capsys.readouterr().out.count("\n") == 1


def test_account_in_the_netrc_file_is_found(fake, tmp_path):
    (tmp_path / "netrc").write_text("machine api.example.org login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    WandbLogger(mode="online")
    assert [call["mode"] for call in fake.calls] == ["online"]


def test_without_network_the_run_goes_on_offline(fake, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    fake.refuse = ("online",)
    logger = WandbLogger(mode="online")
    assert [call["mode"] for call in fake.calls] == ["online", "offline"]
    assert fake.torn_down == 1
    assert logger.active
    assert capsys.readouterr().out == "W&B cannot be reached (timed out); keeping this run offline.\n"


def test_if_nothing_works_the_logger_is_off_and_silent_from_there(fake, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    fake.refuse = ("online", "offline")
    logger = WandbLogger(mode="online")
    logger.log({"a": 1.0}, step=1)
    logger.finish("done")
    assert not logger.active
    assert capsys.readouterr().out.count("\n") == 2


def test_failure_while_logging_is_reported_once(fake, capsys):
    logger = WandbLogger(mode="offline")
    fake.run.broken = True
    for step in range(3):
        logger.log({"a": 1.0}, step=step)
    logger.finish("done")
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    assert "connection lost" in text
    assert "long trace" not in text


def test_missing_package_is_reported_and_training_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = WandbLogger(mode="offline")
    logger.log({"a": 1.0}, step=1)
    assert not logger.active
    assert "W&B is not used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "environment", "used"),
    [
        ("auto", None, ["offline"]),  # no account, so online becomes offline
        ("auto", "disabled", []),
        ("auto", "offline", ["offline"]),
        ("online", "disabled", []),
        ("offline", "disabled", ["offline"]),
        ("disabled", "online", []),
        ("online", "nonsense", ["offline"]),
    ],
)
def test_environment_decides_auto_and_may_forbid_online(fake, monkeypatch, mode, environment, used):
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    WandbLogger(mode=mode)
    assert [call["mode"] for call in fake.calls] == used


def test_unknown_mode_is_refused():
    with pytest.raises(UserError, match=r"logger.mode must be one of auto, disabled, offline, online"):
        WandbLogger(mode="cloud")


@pytest.mark.slow
def test_real_offline_run_writes_files_and_needs_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = WandbLogger(mode="offline", folder=tmp_path, run_id="abc", group="g", config={"nested": {"a": 1}})
    assert logger.active
    logger.log({"train/loss": 1.0, "nan": float("nan")}, step=1)
    logger.summary({"final": 2.0})
    logger.finish("done")
    assert list(tmp_path.glob("wandb/offline-run-*-abc/run-abc.wandb"))


@pytest.mark.slow
def test_a_run_never_logs_into_one_before_it_that_was_not_closed(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_SILENT", "true")
    WandbLogger(mode="offline", folder=tmp_path / "a", run_id="first")  # failed before training: nobody closes it
    second = WandbLogger(mode="offline", folder=tmp_path / "b", run_id="second")
    second.finish("done")
    assert list((tmp_path / "b").glob("wandb/offline-run-*-second/run-second.wandb"))
