"""`profile=true`: the same run with the same results, and tables and traces beside it."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from robustflat.training.checkpoint import load
from tests.integration.conftest import SMALL, TINY, only_run


def values(run):
    """results.json without times."""
    return json.loads((run / "results.json").read_text(), object_hook=lambda d: {**d, "seconds": 0})


@pytest.mark.slow
def test_a_profiled_training_is_the_same_run(cli, tmp_path):
    arguments = (*TINY, "trainer.callbacks.evaluation=null", "evaluation.train=null")
    answer = cli(*arguments, "profile={steps: 2, warmup: 1}", "outputs=watched")
    assert answer.code == 0, answer.err
    assert cli(*arguments, "outputs=plain").code == 0
    (watched,), (plain,) = ([p.parent for p in tmp_path.glob(f"{name}/*/*/DONE")] for name in ("watched", "plain"))
    assert watched.name == plain.name
    assert values(watched) == values(plain)
    states = [load(run / "checkpoints" / "last.pt").parts for run in (watched, plain)]
    assert all(torch.equal(w, states[1]["model"][name]) for name, w in states[0]["model"].items())
    assert "profile" not in states[0]["callbacks"]
    assert not (plain / "profile").exists()
    folder = watched / "profile" / "training"
    assert {p.name for p in folder.iterdir()} == {"phases.csv", "operators.csv", "profile.md", "trace.json"}
    phases = pd.read_csv(folder / "phases.csv").set_index("phase")
    assert phases.loc["craft", "calls"] == 1.0
    assert "aten::convolution_backward" in set(pd.read_csv(folder / "operators.csv")["operator"])
    assert "## phases" in (folder / "profile.md").read_text()
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert "Training: 2 steps after 1 that warmed up" in answer.out
    parts = pd.read_csv(watched / "profile" / "evaluation" / "phases.csv")
    assert list(parts["part"]) == ["test (model weights)", "flatness (model weights)"]
    assert (parts["passes recorded"] > 0).all()
    again = cli(*arguments, "profile=true", "outputs=watched")
    assert "there is nothing to profile" in again.out


def test_a_training_shorter_than_the_warm_up_says_so(cli):
    answer = cli(*TINY, "profile={warmup: 50}", "evaluation.train=null", "evaluation.flatness=null")
    assert answer.code == 0, answer.err
    assert "profile: training ended within the 50 steps that warm up" in answer.out


@pytest.mark.parametrize("value", ["maybe", "{stepps: 3}", "{steps: 0}", "{steps: 1.5}", "3"])
def test_other_values_are_refused_before_anything_is_done(cli, tmp_path, value):
    answer = cli(*TINY, f"profile={value}")
    assert answer.code == 1
    assert "profile" in answer.err
    assert not list(tmp_path.glob("outputs/*/*"))


@pytest.mark.slow
def test_parts_of_an_evaluation_are_timed_and_recorded(evaluate, run):
    options = ("evaluation=paper", *SMALL, "only=[pgd20]", "evaluation.attacks.pgd20.steps=2", "evaluation.train=null")
    answer = evaluate(f"run={run}", *options, "profile={steps: 1, warmup: 1}")
    assert answer.code == 0, answer.err
    folder = run / "profile" / "evaluation"
    parts = pd.read_csv(folder / "phases.csv").set_index("part")
    assert parts.loc["last: pgd20 on test[:24]", "passes recorded"] == 4
    assert parts["share"].sum() == pytest.approx(1.0)
    operators = pd.read_csv(folder / "operators.csv")
    assert "aten::convolution_backward" in set(operators[operators["part"] == "last: pgd20 on test[:24]"]["operator"])
    assert list(folder.glob("last--pgd20-on-test*.json"))
    again = evaluate(f"run={run}", *options, "profile=true")
    assert "everything is stored already" in again.out
    assert only_run(run.parents[2]) == run
