"""`python evaluate.py` on a run of two epochs, and on networks from elsewhere."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from robustflat.apps import bench
from robustflat.apps.collect import rows_of_run
from robustflat.apps.networks import digest_of
from robustflat.store.results import ResultStore
from robustflat.training.checkpoint import load, save
from tests.integration.conftest import PAPER, SMALL, arrays_of, assert_same

ROOT = Path(__file__).resolve().parents[2]
CHOICE = "evaluation.selection.split='train[-24:]'"


def test_the_papers_evaluation_is_one_command_and_leaves_what_it_promises(evaluate, run):
    answer = evaluate(f"run={run.name}", *PAPER)
    assert answer.code == 0, answer.err
    for text in ("clean error", "RErr (pgd20)", "RLoss on correct", "flatness (average, xi 0.5)", "results.h5"):
        assert text in answer.out
    found = {name: array.shape for name, array in arrays_of(run / "results.h5").items()}
    assert found == {
        "last/test[:24]/labels": (24,),
        "last/test[:24]/clean/logits": (24, 10),
        "last/test[:24]/attacks/pgd20/logits": (3, 24, 10),
        "last/test[:24]/flatness/average/losses": (2, 24),
        "last/test[:24]/flatness/average/reference": (24,),
        "last/test[:24]/flatness/worst/losses": (2, 24),
        "last/test[:24]/flatness/worst/reference": (24,),
        "last/test[:24]/flatness/worst/trace": (2, 3),
        "last/train[:24]/labels": (24,),
        "last/train[:24]/clean/logits": (24, 10),
        "last/train[:24]/attacks/pgd20/logits": (3, 24, 10),
    }
    attrs = ResultStore(run / "results.h5").attributes("last/test[:24]/flatness/worst")
    assert json.loads(attrs["config"])["measure"]["ball"]["radius"] == 0.003
    assert {"seed", "version", "seconds", "weights", "command", "protocol", "precision"} <= attrs.keys()
    assert not list(run.glob(".results*"))


def test_the_same_command_measures_nothing_again_and_prints_the_same_table(evaluate, run, monkeypatch):
    first = evaluate(f"run={run}", *PAPER)
    before = (run / "results.h5").read_bytes()
    monkeypatch.setattr(bench, "_measure", None)
    second = evaluate(f"run={run}", *PAPER)
    assert second.code == 0, second.err
    assert (run / "results.h5").read_bytes() == before
    table = [line for line in first.out.splitlines() if "RErr" in line or "flatness" in line]
    assert table
    assert table == [line for line in second.out.splitlines() if "RErr" in line or "flatness" in line]


@pytest.mark.parametrize("pieces", [1, 3, 5])
def test_an_interrupted_evaluation_goes_on_with_the_same_numbers_and_repeats_no_finished_part(
    evaluate, run, monkeypatch, pieces
):
    measure, done = bench._measure, []

    def interrupted(*arguments):
        if len(done) == pieces:
            raise KeyboardInterrupt
        done.append(arguments[-1].name)
        return measure(*arguments)

    monkeypatch.setattr(bench, "_measure", interrupted)
    assert evaluate(f"run={run}", *PAPER).code == 130
    monkeypatch.setattr(bench, "_measure", lambda *a: (done.append(a[-1].name), measure(*a))[1])
    assert evaluate(f"run={run}", *PAPER).code == 0
    assert sorted(done) == ["average", "clean", "clean", "pgd20", "pgd20", "sanity", "worst"]
    interrupted_arrays = arrays_of(run / "results.h5")
    (run / "results.h5").unlink()
    assert evaluate(f"run={run}", *PAPER).code == 0
    assert_same(interrupted_arrays, arrays_of(run / "results.h5"))


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_a_readable_store(evaluate, run, tmp_path):
    command = [sys.executable, str(ROOT / "evaluate.py"), f"run={run}", *PAPER, "evaluation.measures.average.trials=20"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "results.h5").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ResultStore(run / "results.h5").names()
    assert evaluate(f"run={run}", *PAPER, "evaluation.measures.average.trials=20").code == 0
    killed = arrays_of(run / "results.h5")
    (run / "results.h5").unlink()
    assert evaluate(f"run={run}", *PAPER, "evaluation.measures.average.trials=20").code == 0
    assert_same(killed, arrays_of(run / "results.h5"))


def test_force_measures_again_and_replaces(evaluate, run, monkeypatch):
    evaluate(f"run={run}", *PAPER)
    before = arrays_of(run / "results.h5")
    measure, done = bench._measure, []
    monkeypatch.setattr(bench, "_measure", lambda *a: (done.append(a[-1].name), measure(*a))[1])
    assert evaluate(f"run={run}", *PAPER, "force=true").code == 0
    assert len(done) == 7
    assert_same(before, arrays_of(run / "results.h5"))


def test_measures_of_equal_settings_share_their_reference(evaluate, run):
    clean = "{{_target_: robustflat.flatness.average.AverageFlatness, trials: {}, loss: clean}}"
    added = (f"+evaluation.measures.short={clean.format(2)}", f"+evaluation.measures.long={clean.format(3)}")
    answer = evaluate(f"run={run}", *PAPER, *added, "only=[short,long]")
    assert answer.code == 0, answer.err
    store = ResultStore(run / "results.h5")
    one, other = (store.read(f"last/test[:24]/flatness/{name}") for name in ("short", "long"))
    assert np.array_equal(one.arrays["reference"], other.arrays["reference"])
    assert "(shared)" in other.attrs["reference_attack"]
    assert "(shared)" not in one.attrs["reference_attack"]
    # All measures draw from one seed: the first draws of the longer one are those of the shorter one.
    assert np.array_equal(one.arrays["losses"], other.arrays["losses"][:2])


@pytest.mark.parametrize("force", [False, True])
def test_ten_runs_of_the_measures_own_attack_are_its_reference(evaluate, run, force):
    steps = ("evaluation.attacks.pgd20.steps=20", "evaluation.measures.average.attack.steps=20")
    more = ("evaluation.restarts.pgd20=10", "only=[pgd20,average,worst]", f"force={force}")
    assert evaluate(f"run={run}", *PAPER, *steps, *more).code == 0
    store = ResultStore(run / "results.h5")
    labels = store.read("last/test[:24]").arrays["labels"]
    logits = store.read("last/test[:24]/attacks/pgd20").arrays["logits"].astype(np.float64)
    losses = np.logaddexp.reduce(logits, axis=2) - logits[:, np.arange(24), labels]
    for name in ("average", "worst"):
        found = store.read(f"last/test[:24]/flatness/{name}")
        assert found.arrays["reference"] == pytest.approx(losses.max(axis=0), rel=1e-5, abs=1e-6)
        assert "(shared)" in found.attrs["reference_attack"]


def test_other_runs_than_the_measures_own_are_not_its_reference(evaluate, run):
    other = ("evaluation.restarts.pgd20=10", "evaluation.attacks.pgd20.steps=19", "only=[pgd20,average]")
    assert evaluate(f"run={run}", *PAPER, *other).code == 0
    found = ResultStore(run / "results.h5").read("last/test[:24]/flatness/average")
    assert "(shared)" not in found.attrs["reference_attack"]


def test_a_single_measure_and_a_single_attack(evaluate, run):
    answer = evaluate(f"run={run}", *SMALL, "flatness=average_clean", "flatness.trials=3")
    assert answer.code == 0, answer.err
    assert "flatness (average_clean, xi 0.5)" in answer.out
    answer = evaluate(f"run={run}", *SMALL, "attack=pgd7")
    assert answer.code == 0, answer.err
    names = ResultStore(run / "results.h5").names()
    assert {name.split("/", 2)[2] for name in names} == {"clean", "sanity", "flatness/average_clean", "attacks/pgd7"}


def test_other_settings_of_one_name_stand_beside_the_first(evaluate, run):
    evaluate(f"run={run}", *SMALL, "attack=pgd7")
    answer = evaluate(f"run={run}", *SMALL, "attack=pgd7", "attack.steps=1")
    assert answer.code == 0, answer.err
    attacks = [name for name in ResultStore(run / "results.h5").names() if name.startswith("last/test[:24]/attacks")]
    assert len(attacks) == 2
    assert attacks[1].startswith(attacks[0] + "~")


def test_the_evaluation_of_training_is_found_again_by_its_settings(evaluate, run):
    """`train.py` and `evaluate.py evaluation=smoke` measure the same thing."""
    answer = evaluate(f"run={run}", "evaluation=smoke", "device=cpu")
    assert answer.code == 0, answer.err
    (trained,) = json.loads((run / "results.json").read_text()).values()
    expected = trained["weights"]["model"]["test"]["pgd20"]["robust_error"]
    assert f"{100 * expected:.1f} %" in next(
        line for line in answer.out.splitlines() if line.startswith("RErr (pgd20)")
    )
    store = ResultStore(run / "results.h5")
    value = trained["weights"]["model"]["flatness"]["value"]
    assert store.attributes("last/test[:32]/flatness/average")["value"] == pytest.approx(value, abs=1e-6)


def test_every_snapshot_and_the_average(evaluate, run):
    answer = evaluate(f"run={run}", *SMALL, "attack=pgd7", "checkpoints=all")
    assert answer.code == 0, answer.err
    assert evaluate(f"run={run}", *SMALL, "attack=pgd7", "checkpoints=average").code == 0
    assert evaluate(f"run={run}", *SMALL, "attack=pgd7", "part=average", "checkpoints=1").code == 0
    names = {name.split("/")[0] for name in ResultStore(run / "results.h5").names()}
    assert names == {"epoch_0001", "last", "average", "average_epoch_0001"}
    last = load(run / "checkpoints" / "last.pt").parts["callbacks"]["weight_average"]["average"]
    weights = {n: ResultStore(run / "results.h5").attributes(f"{n}/test[:24]/clean")["weights"] for n in names}
    assert len(set(weights.values())) == 4
    assert weights["average"] == digest_of(last)


def test_early_stopping_evaluates_the_best_snapshot_like_any_other(evaluate, run):
    answer = evaluate(f"run={run}", *PAPER, "evaluation=early_stopping", CHOICE, "evaluation.selection.restarts=2")
    assert answer.code == 0, answer.err
    assert "early stopping on train[-24:]: epoch" in answer.out
    store = ResultStore(run / "results.h5")
    arrays, attrs = store.read("early_stopped")
    assert arrays["epochs"].tolist() == [1, 2]
    assert arrays["scores"].shape == (2, 2)
    assert attrs["epoch"] == 1 + int(arrays["scores"][:, 0].argmin())
    assert store.has("early_stopped/test[:24]/flatness/worst")
    assert store.attributes("early_stopped/test[:24]/clean")["epoch"] == attrs["epoch"]
    again = evaluate(f"run={run}", *PAPER, "evaluation=early_stopping", CHOICE, "evaluation.selection.restarts=2")
    assert again.code == 0
    # The chosen snapshot has the weights of one that may be evaluated by its own name: nothing is measured twice.
    evaluate(f"run={run}", *PAPER, f"checkpoints={attrs['epoch']}")
    copied = store.attributes(f"epoch_{attrs['epoch']:04d}/test[:24]/flatness/worst")
    assert copied["copied_from"] == "early_stopped/test[:24]/flatness/worst"
    assert "labels" in store.read(f"epoch_{attrs['epoch']:04d}/test[:24]").arrays


def test_training_on_makes_old_results_of_last_stale(evaluate, run):
    evaluate(f"run={run}", *SMALL, "attack=pgd7")
    shutil.copy(run / "checkpoints" / "epoch_0001.pt", run / "checkpoints" / "last.pt")
    answer = evaluate(f"run={run}", *SMALL, "flatness=average_clean", "flatness.trials=2")
    assert answer.code == 0, answer.err
    assert "other weights" in answer.out
    assert not [name for name in ResultStore(run / "results.h5").names() if "pgd7" in name]


@pytest.fixture
def state(run) -> dict[str, torch.Tensor]:
    return load(run / "checkpoints" / "last.pt").parts["model"]


FOREIGN = ("model=resnet_tiny", "model.channels=4", "dataset=digits", *SMALL, "attack=pgd7")


@pytest.mark.parametrize("form", ["plain", "nested", "parallel"])
def test_a_plain_state_dict_from_elsewhere_is_evaluated_like_our_own(evaluate, run, state, tmp_path, form):
    content = {
        "plain": state,
        "nested": {"state_dict": state, "epoch": 3},
        "parallel": {f"module.{name}": value for name, value in state.items()},
    }[form]
    torch.save(content, tmp_path / "net.pt")
    answer = evaluate("checkpoint=net.pt", *FOREIGN)
    assert answer.code == 0, answer.err
    (path,) = tmp_path.glob("outputs/net/*/results.h5")
    assert (path.parent / "provenance.json").exists()
    evaluate(f"run={run}", *SMALL, "attack=pgd7")
    assert_same(arrays_of(path), arrays_of(run / "results.h5"))


def test_our_own_checkpoint_file_is_read_too(evaluate, run):
    answer = evaluate(f"checkpoint={run / 'checkpoints' / 'epoch_0001.pt'}", *FOREIGN)
    assert answer.code == 0, answer.err


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def bad_weights(state, tmp_path, run):
    broken = {name: value.clone() for name, value in state.items()}
    name = next(iter(broken))
    broken[name].view(-1)[0] = float("nan")
    torch.save(broken, tmp_path / "net.pt")
    return ["checkpoint=net.pt", *FOREIGN], [name, "NaN"]


def misfit(state, tmp_path, run):
    other = {("odd.weight" if i == 0 else name): value for i, (name, value) in enumerate(state.items())}
    torch.save(other, tmp_path / "net.pt")
    return ["checkpoint=net.pt", *FOREIGN], ["1 missing", next(iter(state)), "1 unexpected: odd.weight"]


def other_width(state, tmp_path, run):
    torch.save(state, tmp_path / "net.pt")
    return ["checkpoint=net.pt", *FOREIGN, "model.channels=8"], ["of another shape", "checkpoint ("]


def hostile(state, tmp_path, run):
    torch.save({"state_dict": state, "extra": Hostile()}, tmp_path / "net.pt")
    return ["checkpoint=net.pt", *FOREIGN], ["never unpickled", "scripts/convert_checkpoint.py"]


def bare_pickle(state, tmp_path, run):
    (tmp_path / "net.pt").write_bytes(pickle.dumps(Hostile()))
    return ["checkpoint=net.pt", *FOREIGN], ["bare pickle", "scripts/convert_checkpoint.py"]


def no_tensors(state, tmp_path, run):
    torch.save({"epoch": 3}, tmp_path / "net.pt")
    return ["checkpoint=net.pt", *FOREIGN], ["no named tensors"]


def cut_off(state, tmp_path, run):
    path = run / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[:2000])
    return [f"run={run}", *SMALL], ["last.pt"]


def no_part(state, tmp_path, run):
    save(run / "checkpoints" / "last.pt", {"model": state})
    return [f"run={run}", *SMALL, "checkpoints=average"], ["no part 'average'"]


def hostile_config(state, tmp_path, run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("robustflat.models.resnet.resnet_tiny", "os.system"))
    return [f"run={run}", *SMALL], ["model._target_", "os.system", "not imported"]


def interpolating_config(state, tmp_path, run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("name: null", "name: ${oc.env:HOME}"))
    return [f"run={run}", *SMALL], ["not the resolved configuration"]


def damaged_results(state, tmp_path, run):
    (run / "results.h5").write_bytes(b"\x89HDF nothing")
    return [f"run={run}", *SMALL, "attack=pgd7"], ["results.h5 is damaged", "Move it away"]


def plain(*arguments: str, expected: list[str]):
    return lambda state, tmp_path, run: ([f"run={run}", *SMALL, *arguments], expected)


MISTAKES = {
    "NaN weights": bad_weights,
    "names that do not fit": misfit,
    "shapes that do not fit": other_width,
    "a pickle inside": hostile,
    "a bare pickle": bare_pickle,
    "no weights in it": no_tensors,
    "a cut off checkpoint": cut_off,
    "a part that is not there": no_part,
    "a hostile configuration": hostile_config,
    "an interpolation in the configuration": interpolating_config,
    "a damaged results file": damaged_results,
    "more examples than there are": plain("evaluation.test='test[:9999]'", expected=["evaluation.test", "9999", "500"]),
    "examples of flatness": plain("evaluation.flatness='test[:9999]'", expected=["evaluation.flatness", "9999"]),
    "xi of zero": plain("flatness=worst_robust", "flatness.ball.radius=0", expected=["radius must lie in", "measures"]),
    "xi below zero": plain("flatness=worst_robust", "flatness.ball.radius=-1", expected=["radius must lie in"]),
    "a misspelt measure": plain("only=[avrage]", expected=["only=", "Did you mean 'average'"]),
    "a misspelt key": plain("+evaluation.batchsize=3", expected=["evaluation.batchsize", "batch_size"]),
    "a key that nothing reads": plain("+epochs=3", expected=["epochs"]),
    "an epoch without snapshot": plain("checkpoints=7", expected=["epoch 7", "there are 1, 2"]),
    "a name for the run's folder": plain("name=mine", expected=["name= is for", "checkpoint from elsewhere"]),
    "a word for checkpoints": plain("checkpoints=best", expected=["checkpoints must be last, all"]),
    "choosing on what was trained on": plain(
        "evaluation=early_stopping", "evaluation.selection.split='train[:64]'", expected=["64", "were trained on"]
    ),
    "another class for the model": plain("dataset=cifar100", expected=["model.classes=10"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_sentence(evaluate, run, state, tmp_path, name):
    arguments, expected = MISTAKES[name](state, tmp_path, run)
    answer = evaluate(*arguments)
    assert answer.code == 1, answer.out
    assert answer.err.startswith("error: ")
    for text in expected:
        assert text in answer.err, answer.err
    assert "Traceback" not in answer.err + answer.out
    assert "must never be printed" not in answer.err + answer.out
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_to_evaluate_must_be_said(evaluate, run):
    for arguments in ((), ("run=a", "checkpoint=b")):
        answer = evaluate(*arguments)
        assert answer.code == 1
        assert "run=<folder or id>" in answer.err
    answer = evaluate("run=" + run.name[:-1])
    assert f"Did you mean {run.name}" in answer.err
    answer = evaluate("checkpoint=gone.pt", "attack=pgd7")
    assert "dataset: a checkpoint from elsewhere needs dataset=" in answer.err
    answer = evaluate("checkpoint=gone.pt", *FOREIGN)
    assert "no checkpoint gone.pt" in answer.err


def test_a_second_process_waits_its_turn(evaluate, run):
    fcntl = pytest.importorskip("fcntl")
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = evaluate(f"run={run}", *SMALL)
    assert answer.code == 1
    assert "Another process is working" in answer.err


def test_several_runs_in_one_sweep_and_their_table(evaluate, run, tmp_path):
    other = run.parent / "00000000"
    shutil.copytree(run, other)
    assert evaluate("-m", f"run={run.name},00000000", *SMALL, "attack=pgd7").code == 0
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), str(run), str(other), str(tmp_path)]
    for output in ("table.parquet", "table.csv", "table.md", "table.tex"):
        done = subprocess.run([*command, "--output", output], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "from 2 runs, 1 without results" in done.stderr
        assert (tmp_path / output).stat().st_size > 0
    import pandas as pd

    table = pd.read_parquet(tmp_path / "table.parquet")
    robust = table[(table["metric"] == "robust_error") & (table["split"] == "test[:24]")]
    assert set(robust["run_id"]) == {run.name, "00000000"}
    assert set(table[table["split"] == "test - train"]["metric"]) >= {"robust_error_gap", "robust_loss_gap"}
    with h5py.File(run / "results.h5") as file:  # by hand, as docs/results.md says
        clean, attacked = (file[f"last/test[:24]/{n}/logits"][()] for n in ("clean", "attacks/pgd7"))
        labels = file["last/test[:24]/labels"][()]
    wrong = (clean.argmax(1) != labels) | (attacked.argmax(2) != labels).any(0)
    assert robust["value"].tolist() == [wrong.mean()] * 2


def test_help_names_the_ways_to_call_it(evaluate):
    answer = evaluate("--help")
    assert answer.code == 0
    for text in ("evaluation=early_stopping", "checkpoints=all", "worst_robust", "checkpoint=net.pt"):
        assert text in answer.out


def test_the_code_of_the_documentation_reads_the_file(evaluate, run, tmp_path, capfd):
    assert evaluate(f"run={run}", *PAPER).code == 0
    reading, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "results.md").read_text(), re.DOTALL)
    reading = reading.replace("outputs/digits-at/d7f35309", str(run)).replace('"last/test"', '"last/test[:24]"')
    exec(compile(reading, "results.md", "exec"), {})
    robust_error, robust_loss, flatness = (float(line.split()[-1]) for line in capfd.readouterr().out.splitlines()[-3:])
    rows = {(r["measure"], r["metric"], r["split"]): r["value"] for r in rows_of_run(run)}
    assert robust_error == rows["pgd20", "robust_error", "test[:24]"]
    assert robust_loss == pytest.approx(rows["pgd20", "robust_loss", "test[:24]"], rel=1e-5)
    assert flatness == pytest.approx(rows["average", "flatness", "test[:24]"], rel=1e-4)


def test_a_pickled_network_is_converted_and_evaluated(evaluate, state, tmp_path):
    torch.save({"state_dict": state, "extra": Hostile()}, tmp_path / "net.pth.tar")
    command = [sys.executable, str(ROOT / "scripts" / "convert_checkpoint.py"), "net.pth.tar", "net.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "must never be printed" not in done.stdout + done.stderr
    assert evaluate("checkpoint=net.pt", *FOREIGN).code == 0
