"""`python train.py` from the first line to the last, on a few images."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from robustflat.training.checkpoint import load
from tests.integration.conftest import TINY, only_run


def test_a_run_leaves_what_it_promises(cli, tmp_path, curves):
    answer = cli(*TINY)
    assert answer.code == 0, answer.err
    for text in (
        "clean error",
        "RErr  (pgd20)",
        "RLoss (pgd20)",
        "average-case flatness of the robust loss",
        "results.json",
    ):
        assert text in answer.out
    run = only_run(tmp_path)
    assert run.parent.name == "digits-at"
    assert {"DONE", "config.yaml", "provenance.json", "metrics.jsonl", "results.json", "curves.png"} <= {
        p.name for p in run.iterdir()
    }
    assert (run / "checkpoints" / "last.pt").exists()
    assert (run / "checkpoints" / "epoch_0001.pt").exists()
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    (results,) = json.loads((run / "results.json").read_text()).values()
    measured = results["weights"]["model"]
    assert measured["test"]["count"] == 32
    assert 0 <= measured["test"]["pgd20"]["robust_error"] <= 1
    assert measured["test"]["pgd20"]["robust_error"] >= measured["test"]["clean"]["error"]
    assert measured["flatness"]["standard_error"] > 0
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["packages"]["torch"] == torch.__version__.split("+")[0]
    assert provenance["command"] == list(TINY)
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["epochs"] == 2


def test_the_same_command_trains_nothing_and_repeats_the_summary(cli, tmp_path):
    first = cli(*TINY)
    run = only_run(tmp_path)
    before = {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "identity.yaml")
    }
    second = cli(*TINY)
    assert second.code == 0
    assert "This run is done" in second.out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    table = [line for line in first.out.splitlines() if "RErr" in line or "flatness" in line]
    assert table == [line for line in second.out.splitlines() if "RErr" in line or "flatness" in line]


def test_another_evaluation_of_a_done_run_measures_without_training(cli, tmp_path):
    cli(*TINY)
    run = only_run(tmp_path)
    weights = (run / "checkpoints" / "last.pt").read_bytes()
    answer = cli(*TINY, "flatness.ball.radius=0.1")
    assert answer.code == 0
    assert "xi 0.1" in answer.out
    assert (run / "checkpoints" / "last.pt").read_bytes() == weights
    assert len(json.loads((run / "results.json").read_text())) == 2


def test_two_runs_of_one_command_are_equal_bit_for_bit(cli, tmp_path):
    cli(*TINY, "outputs=a")
    cli(*TINY, "outputs=b")
    (a,), (b,) = tmp_path.glob("a/*/*"), tmp_path.glob("b/*/*")
    one, two = load(a / "checkpoints" / "last.pt").parts, load(b / "checkpoints" / "last.pt").parts
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("trainer=trades", "attack=pgd_linf"),
        ("trainer=at_half", "attack=pgd_l2"),
        ("attack=pgd_l1", "optimizer=adam", "schedule=cyclic"),
        ("trainer=weight_averaging", "optimizer=adamw", "schedule=cosine"),
        ("trainer=weight_clipping", "trainer.precision=bf16", "schedule=constant"),
    ],
    ids=" ".join,
)
def test_methods_run(cli, tmp_path, arguments):
    answer = cli(*arguments, *TINY, "trainer.epochs=1")
    assert answer.code == 0, answer.err
    (results,) = json.loads((only_run(tmp_path) / "results.json").read_text()).values()
    assert results["complete"]
    if "trainer=weight_averaging" in arguments:
        assert set(results["weights"]) == {"model", "average"}


def test_standard_training_runs_without_attack(cli, tmp_path):
    answer = cli("trainer=standard", *(a for a in TINY if a != "attack.steps=2"), "trainer.epochs=1")
    assert answer.code == 0, answer.err
    assert only_run(tmp_path).parent.name == "digits-standard"


def test_a_sweep_gives_each_job_its_own_folder_and_skips_the_done_ones(cli, tmp_path):
    sweep = (
        "-m",
        *TINY,
        "trainer.epochs=1",
        "trainer.loss.label_smoothing=0,0.1",
        "optimizer.weight_decay=0.0005,0.005",
    )
    assert cli(*sweep).code == 0
    assert len(list(tmp_path.glob("outputs/digits-at/*/DONE"))) == 4
    again = cli(*sweep)
    assert again.code == 0
    assert again.out.count("This run is done") == 4


def test_a_failing_job_of_a_sweep_does_not_stop_the_others(cli, tmp_path):
    answer = cli("-m", *TINY, "trainer.epochs=1", "attack.ball.epsilon=8,0.1")
    assert answer.code == 1
    assert "0.03137" in answer.err
    assert "Traceback" not in answer.err
    assert len(list(tmp_path.glob("outputs/digits-at/*/DONE"))) == 1


@pytest.mark.slow
def test_a_sweep_file_runs_and_skips_what_is_done(cli, tmp_path):
    job = ("+sweep=seeds", "seed=0,1", *TINY, "trainer.epochs=1")
    assert cli(*job).code == 0
    again = cli(*job)
    assert again.code == 0
    assert again.out.count("This run is done") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the plugin's Optuna 2 is older than the Python it runs on
def test_the_optuna_search_runs_and_finds_its_trials_again(cli, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra robustflat[optuna]")
    tiny = [
        word for word in TINY if not word.startswith(("dataset.train", "evaluation=", "trainer.callbacks.evaluation"))
    ]
    search = (
        "+sweep=optuna",
        "hydra.sweeper.n_trials=2",
        *tiny,
        "trainer.epochs=1",
        "trainer.callbacks.evaluation=null",
    )
    small = ("evaluation=smoke", "dataset.batch_size=256")
    first = cli(*search, *small)
    assert first.code == 0, first.err
    assert len(list(tmp_path.glob("outputs/digits-at/*/DONE"))) == 2
    again = cli(*search, *small)
    assert again.out.count("This run is done") == 2


def test_explaining_prints_the_method_and_leaves_nothing_behind(cli, tmp_path):
    answer = cli("trainer=trades_awp", "explain=true", *TINY)
    assert answer.code == 0, answer.err
    for text in (
        "CE(f(x), y) + 6 KL(p(x) || p(x'))", "Zhang et al., ICML 2019", "0.005 ||w_l|| g_l / ||g_l||", "Wu et al.",
        "sgd(lr=0.05", "multistep(", "F + K (F + Bx) + F + (k + 1) (2 (F + B))", "(K = 2, k = 1)", "8 F + 4 B + 2 Bx",
        "steps           4", "2 epochs",
    ):  # fmt: skip
        assert text in answer.out, text
    assert not list(tmp_path.glob("outputs/*"))


def test_explaining_needs_no_data_and_a_wrong_value_is_refused(cli, tmp_path):
    answer = cli("+experiment=iccv21/mart_6", "explain=true", f"data_root={tmp_path}/none")
    assert answer.code == 0, answer.err
    assert "Wang et al., ICLR 2020" in answer.out
    assert "could not be read" in answer.out
    assert cli("explain=true", "optimizer.lr=-1").code == 1
    assert not list(tmp_path.glob("outputs/*"))


def test_a_data_set_of_ones_own_by_config_dir(cli, tmp_path):
    (tmp_path / "mine" / "trainer").mkdir(parents=True)
    (tmp_path / "mine" / "trainer" / "gentle.yaml").write_text("# mine\ndefaults: [base, _self_]\nlog_every: 7\n")
    answer = cli("--config-dir", "mine", "trainer=gentle", *TINY, "trainer.epochs=1")
    assert answer.code == 0, answer.err
    assert only_run(tmp_path).parent.name == "digits-gentle"


def test_help_names_groups_choices_and_examples(cli):
    answer = cli("--help")
    assert answer.code == 0
    for text in ("Usage:", "trainer=trades attack=pgd_linf", "dataset: ", "pgd_linf", "seed", 'eval "$(python'):
        assert text in answer.out


def test_shell_completion_offers_the_choices_of_a_group(cli, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "python train.py attack=pgd_")
    answer = cli("-sc", "query=bash")
    assert answer.code == 0
    assert "attack=pgd_linf" in answer.out
