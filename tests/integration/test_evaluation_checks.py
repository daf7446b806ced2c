"""What an evaluation says of itself, attacks killed between batches, transfer from other runs, and paired tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

from robustflat.apps.collect import rows_of_run
from robustflat.apps.networks import NetworkFile, digest_of, weights_of
from robustflat.apps.paired_runs import compare_networks, network_in
from robustflat.attacks import autoattack, sanity
from robustflat.errors import UserError
from robustflat.evaluation import attacked
from robustflat.store.results import ResultStore
from robustflat.training.checkpoint import load, save
from tests.integration.conftest import PAPER, ROOT, SMALL, arrays_of, assert_same

AUTOATTACK = (
    *SMALL,
    "evaluation.train=null",
    "attack=autoattack",
    "attack.version=custom",
    "+attack.attacks=[apgd-ce,apgd-t]",
    "evaluation.attack_batch=1",
)
CHECKS = {
    "image range",
    "mode",
    "deterministic",
    "batch independence",
    "gradients of the margin",
    "gradients of the cross-entropy",
    "unbounded attack",
    "more steps",
    "black box against white box",
}


def findings(run, name):
    return {f["check"]: f for f in json.loads(ResultStore(run / "results.h5").attributes(name)["sanity"])}


@pytest.fixture
def other(run):
    """A second run: the same configuration, the weights of an earlier epoch."""
    folder = run.parent / "0ther000"
    shutil.copytree(run, folder)
    shutil.copy(folder / "checkpoints" / "epoch_0001.pt", folder / "checkpoints" / "last.pt")
    return folder


# Sanity


def test_every_evaluation_runs_all_checks_and_reports_them(evaluate, run):
    answer = evaluate(f"run={run}", *PAPER)
    assert answer.code == 0, answer.err
    assert findings(run, "last/test[:24]/sanity").keys() == CHECKS
    assert findings(run, "last/test[:24]/attacks/pgd20").keys() == {"ball and box"}
    report = [line for line in answer.out.splitlines() if line.startswith(("sanity", "WARNING"))]
    assert all(any(check in line for line in report) for check in CHECKS)
    assert any("pgd20 on test[:24]" in line and "verified in float64" in line for line in report)
    counted = [r for r in rows_of_run(run) if r["metric"] == "sanity_warnings"]
    assert {(r["kind"], r["measure"]) for r in counted} == {("sanity", "sanity"), ("attack", "pgd20")}


def test_a_masked_network_is_reported_in_full(evaluate, run, monkeypatch):
    """The gradients that the checks see are zero, as behind a rounding of the images."""
    monkeypatch.setattr(
        sanity, "_zero_gradients", lambda *a: sanity.Finding("gradients of the margin", "warning", "9 of 9")
    )
    answer = evaluate(f"run={run}", *SMALL, "attack=pgd7")
    assert answer.code == 0, answer.err
    assert "WARNING      test[:24]: gradients of the margin: 9 of 9" in answer.out
    again = evaluate(f"run={run}", *SMALL, "attack=pgd7")  # from the store
    assert "WARNING      test[:24]: gradients of the margin: 9 of 9" in again.out
    (row,) = [r for r in rows_of_run(run) if r["kind"] == "sanity"]
    assert row["value"] == 2


def test_images_outside_the_threat_model_are_reported(evaluate, run):
    answer = evaluate(f"run={run}", *SMALL, "attack=n_fgsm_linf")
    assert answer.code == 0, answer.err
    assert (
        "adversarial examples lie outside and are counted as errors: this attack leaves the threat model" in answer.out
    )


def test_whether_the_worst_case_has_converged_is_said(evaluate, run):
    answer = evaluate(f"run={run}", *SMALL, "flatness=worst_clean", "flatness.steps=4", "flatness.restarts=2")
    assert answer.code == 0, answer.err
    assert "the last quarter of the steps added" in answer.out
    attrs = ResultStore(run / "results.h5").attributes("last/test[:24]/flatness/worst_clean")
    assert isinstance(attrs["converged"], bool)
    assert len(json.loads(attrs["value_against_steps"])) == 5
    assert len(json.loads(attrs["value_against_trials"])) == 2


# Attacks in the store


def test_autoattack_keeps_every_verdict(evaluate, run):
    assert evaluate(f"run={run}", *AUTOATTACK).code == 0
    arrays, attrs = ResultStore(run / "results.h5").read("last/test[:24]/attacks/autoattack")
    assert json.loads(attrs["members"]) == ["apgd-ce", "apgd-t"]
    assert {name: array.shape for name, array in arrays.items()} == {
        "logits": (1, 24, 10),
        **dict.fromkeys(("tried", "broken", "loss", "margin", "size", "queries"), (2, 24)),
    }
    with h5py.File(run / "results.h5") as file:
        labels, clean = (file[f"last/test[:24]/{name}"][()] for name in ("labels", "clean/logits"))
    correct = clean.argmax(1) == labels
    assert np.array_equal(arrays["tried"][0], correct)
    assert np.array_equal(arrays["tried"][1], correct & ~arrays["broken"][0])
    assert np.array_equal(arrays["logits"][0].argmax(1) != labels, ~correct | arrays["broken"].any(0))
    assert (arrays["size"][arrays["tried"]] <= attrs["epsilon"] * (1 + 1e-5)).all()
    assert (arrays["margin"][arrays["broken"]] > 0).all()
    assert set(json.loads(attrs["costs"])) == {"apgd-ce", "apgd-t"}


@pytest.mark.parametrize("after", [1, 3])
def test_autoattack_killed_between_batches_goes_on_there_with_the_same_verdicts(evaluate, run, monkeypatch, after):
    piece, done = autoattack.attack_piece, []

    def counted(*arguments):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return piece(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(autoattack, "attack_piece", counted)
        assert evaluate(f"run={run}", *AUTOATTACK).code == 130
    assert len(list(run.glob("unfinished/*/autoattack/apgd-*.pt"))) == after
    monkeypatch.setattr(autoattack, "attack_piece", lambda *a: (done.append(1), piece(*a))[1])
    assert evaluate(f"run={run}", *AUTOATTACK).code == 0
    assert not (run / "unfinished").exists()
    resumed = arrays_of(run / "results.h5")
    monkeypatch.setattr(autoattack, "attack_piece", lambda *a: (whole.append(1), piece(*a))[1])
    (run / "results.h5").unlink()
    whole: list[int] = []
    assert evaluate(f"run={run}", *AUTOATTACK).code == 0
    assert len(done) == len(whole)
    before, now = ({k: np.nan_to_num(v) for k, v in a.items()} for a in (resumed, arrays_of(run / "results.h5")))
    assert_same(before, now)


def test_any_attack_killed_between_batches_goes_on_there_with_the_same_numbers(evaluate, run, monkeypatch):
    strongest, done = attacked.strongest, []

    def counted(*arguments, **options):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return strongest(*arguments, **options)

    command = (f"run={run}", *SMALL, "evaluation.train=null", "attack=pgd7")  # batches of 16 and 8
    with monkeypatch.context() as patched:
        patched.setattr(attacked, "strongest", counted)
        assert evaluate(*command).code == 130
    assert evaluate(*command).code == 0
    resumed = arrays_of(run / "results.h5")
    (run / "results.h5").unlink()
    assert evaluate(*command).code == 0
    assert_same(resumed, arrays_of(run / "results.h5"))


def test_a_damaged_piece_of_an_interrupted_attack_is_named(evaluate, run, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(autoattack, "attack_piece", interrupted)
        assert evaluate(f"run={run}", *AUTOATTACK).code == 130
    (about,) = run.glob("unfinished/*/about.pt")
    about.write_bytes(b"half")
    answer = evaluate(f"run={run}", *AUTOATTACK)
    assert answer.code == 1
    assert "about.pt is damaged. Delete it" in answer.err


def test_the_threat_model_of_a_result_is_that_of_its_attack(evaluate, run):
    assert evaluate(f"run={run}", *SMALL, "evaluation.train=null", "attack=pgd_l2", "attack.ball.epsilon=0.3").code == 0
    attrs = ResultStore(run / "results.h5").attributes("last/test[:24]/attacks/pgd_l2")
    assert (attrs["norm"], attrs["epsilon"]) == ("l2", 0.3)


# Transfer


def test_a_transfer_attack_searches_on_another_run(evaluate, run, other):
    command = (*SMALL, "evaluation.train=null", "attack.attack.restarts=1", "attack.attack.steps=3", "attack=transfer")
    answer = evaluate(f"run={run}", *command, "attack.surrogate=0ther000")
    assert answer.code == 0, answer.err
    assert "RErr (transfer)" in answer.out
    attrs = ResultStore(run / "results.h5").attributes("last/test[:24]/attacks/transfer")
    weights = digest_of(weights_of(NetworkFile("last", other / "checkpoints" / "last.pt", "model", None)))
    assert f"surrogate=0ther000@{weights}" in attrs["attack"]
    assert attrs["black_box"]
    transferred = arrays_of(run / "results.h5")["last/test[:24]/attacks/transfer/logits"]
    # By folder instead of id it is the same result, not measured again.
    assert evaluate(f"run={run}", *command, f"attack.surrogate={other}").code == 0
    assert len([n for n in ResultStore(run / "results.h5").names() if "transfer" in n]) == 1
    # With other weights it is another.
    shutil.copy(run / "checkpoints" / "last.pt", other / "checkpoints" / "last.pt")
    assert evaluate(f"run={run}", *command, f"attack.surrogate={other}").code == 0
    names = [n for n in ResultStore(run / "results.h5").names() if "transfer" in n]
    assert len(names) == 2
    assert not np.array_equal(ResultStore(run / "results.h5").read(names[1]).arrays["logits"], transferred)


def test_transfer_and_white_box_are_compared(evaluate, run, other):
    added = "+attack@evaluation.attacks.transfer=transfer"
    values = ("evaluation.attacks.transfer.attack.steps=2", f"evaluation.attacks.transfer.surrogate={other}")
    answer = evaluate(f"run={run}", *PAPER, "only=[pgd20,transfer]", added, *values)
    assert answer.code == 0, answer.err
    assert "attacks on test[:24]: without gradients" in answer.out


def no_surrogate(run, other):
    return ["attack=transfer"], "attack.surrogate"


def unknown_surrogate(run, other):
    return ["attack=transfer", "attack.surrogate=0ther001"], "Did you mean 0ther000"


def surrogate_of_other_classes(run, other):
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("classes: 10", "classes: 7"))
    return ["attack=transfer", f"attack.surrogate={other}"], "trained with dataset.classes=7, but here it is 10"


def surrogate_that_runs_code(run, other):
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("robustflat.models.resnet.resnet_tiny", "os.system"))
    return ["attack=transfer", f"attack.surrogate={other}"], "was not imported"


def surrogate_that_does_not_fit(run, other):
    state = load(other / "checkpoints" / "last.pt").parts["model"]
    save(other / "checkpoints" / "last.pt", {"model": dict(list(state.items())[1:])})
    return ["attack=transfer", f"attack.surrogate={other}"], "1 missing"


@pytest.mark.parametrize(
    "mistake",
    [
        no_surrogate,
        unknown_surrogate,
        surrogate_of_other_classes,
        surrogate_that_runs_code,
        surrogate_that_does_not_fit,
    ],
)
def test_a_mistake_about_the_surrogate_gets_a_sentence(evaluate, run, other, mistake):
    arguments, expected = mistake(run, other)
    answer = evaluate(f"run={run}", *SMALL, *arguments)
    assert answer.code == 1, answer.out
    assert expected in answer.err
    assert "Traceback" not in answer.err + answer.out


# Two networks


def test_two_networks_are_compared_on_all_that_both_have(evaluate, run, other, tmp_path):
    for folder in (run, other):
        assert evaluate(f"run={folder}", *PAPER).code == 0
    command = [sys.executable, str(ROOT / "scripts" / "compare_networks.py"), run.name, "0ther000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for text in ("test[:24] (24 examples)", "robust_error (pgd20)", "McNemar", "flatness (worst)", "paired bootstrap"):
        assert text in done.stdout
    found = compare_networks(network_in(run, "last"), network_in(other, "last"))
    rows = {(r["measure"], r["metric"]): r["value"] for r in rows_of_run(run) if r["split"] == "test[:24]"}
    for difference in found["test[:24]"].differences:
        assert difference.first == pytest.approx(rows[difference.measure, difference.metric], abs=1e-9)
    same = compare_networks(network_in(run, "last"), network_in(run, "last"))["test[:24]"]
    assert all(d.difference == 0 and d.p_value == 1 for d in same.differences)


def test_networks_without_common_results_cannot_be_compared(evaluate, run, other):
    with pytest.raises(UserError, match=r"has no results\.h5: evaluate it first"):
        network_in(run, "last")
    assert evaluate(f"run={run}", *SMALL, "evaluation.train=null", "attack=pgd7").code == 0
    with pytest.raises(UserError, match="has no results of 'early'; it has those of last"):
        network_in(run, "early")
    assert (
        evaluate(f"run={other}", *SMALL, "evaluation.train=null", "evaluation.test='test[24:30]'", "attack=pgd7").code
        == 0
    )
    with pytest.raises(UserError, match="no examples in common"):
        compare_networks(network_in(run, "last"), network_in(other, "last"))
    store = ResultStore(other / "results.h5")
    store.write("last/test[:24]", {"labels": np.zeros(24, dtype=np.int64)}, {"split": "test[:24]"})
    store.write("last/test[:24]/clean", {"logits": np.zeros((24, 10), np.float32)}, {"key": "x", "kind": "clean"})
    with pytest.raises(UserError, match="holds other examples"):
        compare_networks(network_in(run, "last"), network_in(other, "last"))
