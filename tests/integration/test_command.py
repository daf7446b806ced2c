"""The installed command `robustflat`, its applications and its errors; W&B without a network."""

from __future__ import annotations

import sys
from contextlib import suppress

import pytest

from robustflat import __version__
from robustflat.apps import main as command
from tests.integration.conftest import TINY, only_run


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["robustflat", *arguments])
    with pytest.raises(SystemExit) as end:
        command.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out + captured.err


def test_help_lists_the_applications(monkeypatch, capsys):
    code, text = call(monkeypatch, capsys, "--help")
    assert code == 0
    for name in command.APPLICATIONS:
        assert name in text


def test_no_argument_shows_the_help_and_fails(monkeypatch, capsys):
    assert call(monkeypatch, capsys)[0] == 2


def test_the_version_is_told(monkeypatch, capsys):
    assert call(monkeypatch, capsys, "--version") == (0, f"robustflat {__version__}\n")


def test_an_unknown_application_is_named_and_the_closest_suggested(monkeypatch, capsys):
    code, text = call(monkeypatch, capsys, "trian")
    assert code == 2
    assert "Did you mean train?" in text


def test_the_installed_command_runs_the_same_application(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["robustflat", "train", *TINY, "trainer.epochs=1"])
    command.main()
    assert only_run(tmp_path).parent.name == "digits-at"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("robustflat train attack=pgd_l", ["attack=pgd_l1", "attack=pgd_l2", "attack=pgd_linf"]),
        ("robustflat hessian run=a loss", ["loss="]),
        ("robustflat tr", ["train"]),
        ("robustflat ", list(command.APPLICATIONS)),
        ("robustflat show", ["show_batch"]),
    ],
)
def test_the_shell_completes_applications_and_their_values(monkeypatch, capfd, line, offered):
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setattr(sys, "argv", ["robustflat", "-sc", "query=bash"])  # what the installed function calls
    with suppress(SystemExit):
        command.main()
    assert set(capfd.readouterr().out.split()) == set(offered)


@pytest.mark.parametrize("arguments", [("train", "-sc", "install=bash"), ("-sc", "install=bash")])
def test_completion_is_installed_for_the_command(monkeypatch, capfd, arguments):
    monkeypatch.delenv("COMP_LINE", raising=False)
    monkeypatch.setattr(sys, "argv", ["robustflat", *arguments])
    command.main()
    assert capfd.readouterr().out.rstrip().endswith("-F hydra_bash_completion robustflat")


def test_torch_and_torchvision_that_do_not_fit_get_a_sentence(cli, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("robustflat.apps.train.run", broken)
    answer = cli(*TINY)
    assert answer.code == 1
    assert "pip install --upgrade torch torchvision" in answer.err
    assert "Traceback" not in answer.err


def test_a_bug_keeps_its_traceback(cli, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("robustflat.apps.train.run", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli(*TINY)


def test_an_interrupt_says_how_to_go_on(cli, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("robustflat.apps.train.run", interrupted)
    answer = cli(*TINY)
    assert answer.code == 130
    assert "same command goes on" in answer.err


def test_wandb_disabled_changes_nothing(cli, tmp_path):
    answer = cli(*TINY, "trainer.epochs=1", "logger=wandb", "logger.mode=disabled")
    assert answer.code == 0, answer.err
    assert (only_run(tmp_path) / "metrics.jsonl").exists()


def test_a_run_stopped_by_sigterm_goes_on_with_the_same_command(cli, tmp_path, monkeypatch):
    import os
    import signal

    from robustflat.training.callbacks import SaveLast

    saved = SaveLast.on_epoch_end

    def stop_after_first(self, trainer):
        saved(self, trainer)
        if trainer.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SaveLast, "on_epoch_end", stop_after_first)
    answer = cli(*TINY)
    assert answer.code == 75
    assert "goes on from the last step that was saved" in answer.err
    monkeypatch.setattr(SaveLast, "on_epoch_end", saved)
    again = cli(*TINY)
    assert again.code == 0
    assert "going on after epoch 1 of 2" in again.out


def test_a_sweep_may_be_asked_for_behind_or_between_the_values(cli, tmp_path):
    answer = cli(*TINY[:2], "-m", *TINY[2:], "explain=true", "seed=0,1")
    assert answer.code == 0, answer.err
    assert answer.out.count("cost of a step") == 2
