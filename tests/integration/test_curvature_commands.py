"""`robustflat hessian`, `measure`, `rescale` and `audit` on a run of two epochs, and on a network from elsewhere."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra

from robustflat.apps.collect import rows_of_run
from robustflat.apps.main import run_application
from robustflat.store.results import ResultStore
from tests.integration.conftest import Answer

FEW = ("device=cpu", "examples='test[:16]'", "batch_size=8")
ATTACK = ("attack.steps=2", "attack.restarts=1")
SMALL_EVALUATION = (
    "evaluation.test='test[:16]'",
    "evaluation.train='train[:16]'",
    "evaluation.flatness='test[:16]'",
    "evaluation.attacks.pgd20.steps=2",
    "evaluation.restarts.pgd20=1",
    "evaluation.measures.average.trials=2",
    "evaluation.measures.average.attack.steps=2",
    "evaluation.measures.worst.restarts=1",
    "evaluation.measures.worst.steps=2",
    "evaluation.measures.worst_clean.restarts=1",
    "evaluation.measures.worst_clean.steps=2",
)


@pytest.fixture
def robustflat(tmp_path, monkeypatch, capfd):
    """robustflat(command, *arguments) runs it in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(command: str, *arguments: str) -> Answer:
        capfd.readouterr()
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [f"robustflat {command}", *arguments])
        try:
            run_application(command)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Answer(code, *capfd.readouterr())

    return call


def test_hessian_stores_what_it_prints_and_measures_nothing_twice(robustflat, run):
    arguments = (f"run={run.name}", *FEW, *ATTACK, "loss=[clean,frozen]", "hessian.trace_products=6")
    more = ("hessian.density_probes=2", "hessian.density_steps=8", "vectors=true")
    answer = robustflat("hessian", *arguments, *more)
    assert answer.code == 0, answer.err
    for text in ("largest eigenvalues", "smallest eigenvalues", "|lambda_min| / |lambda_max|", "trace", "16 examples"):
        assert text in answer.out
    store = ResultStore(run / "results.h5")
    found = {loss: store.read(f"last/test[:16]/hessian/{loss}") for loss in ("clean", "frozen")}
    assert found["clean"].arrays["top"].shape == (3,) and found["clean"].arrays["density_nodes"].shape == (2, 8)
    assert found["clean"].arrays["top"][0] != found["frozen"].arrays["top"][0]
    for ending in ("png", "svg"):
        assert (run / f"hessian_density.{ending}").stat().st_size > 1000
    vectors = ResultStore(run / "hessian_vectors.h5").read("last/test[:16]/clean").arrays["top"]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    (run / "hessian_vectors.h5").unlink()
    before = (run / "results.h5").read_bytes()
    again = robustflat("hessian", *arguments, *more)
    assert np.array_equal(ResultStore(run / "hessian_vectors.h5").read("last/test[:16]/clean").arrays["top"], vectors)
    assert again.code == 0 and (run / "results.h5").read_bytes() == before
    rows = {row["metric"] for row in rows_of_run(run) if row["kind"] == "hessian"}
    assert rows == {"lambda_max", "lambda_min", "non_convexity", "trace", "frobenius"}


def test_hessian_of_all_snapshots_and_of_the_released_codes_reduction(robustflat, run):
    options = ("hessian.top=1", "hessian.bottom=0", "hessian.trace_products=0")
    answer = robustflat("hessian", f"run={run}", *FEW, *options, "checkpoints=all")
    assert answer.code == 0, answer.err
    store = ResultStore(run / "results.h5")
    assert {name.split("/")[0] for name in store.names()} == {"epoch_0001", "last"}
    summed = robustflat("hessian", f"run={run}", *FEW, *options, "hessian.reduction=sum_over_batches", "vectors=true")
    assert summed.code == 0 and "sum_over_batches" in summed.out
    values = {name: float(store.read(name).arrays["top"][0]) for name in store.names() if name.startswith("last")}
    plain = values.pop("last/test[:16]/hessian/clean")
    assert list(values.values()) == pytest.approx([2 * plain], rel=1e-3)
    (kept,) = ResultStore(run / "hessian_vectors.h5").names()
    assert kept.startswith("last/test[:16]/clean~")  # not where the vectors of the mean would be


def test_measure_prints_value_error_cost_and_source(robustflat, run):
    only = "only=[sam,adaptive_average,gradient_norm,distance_from_start,weight_norm]"
    answer = robustflat("measure", f"run={run.name}", *FEW, *ATTACK, "loss=[clean,robust]", only)
    assert answer.code == 0, answer.err
    for text in (
        "last, clean",
        "last, robust",
        "+-",
        "passes",
        "Foret et al., ICLR 2021",
        "distance_from_start (robust)",
    ):
        assert text in answer.out
    rows = [row for row in rows_of_run(run) if row["kind"] == "sharpness" and row["metric"] == "sharpness"]
    assert {row["measure"] for row in rows} >= {"sam", "weight_norm", "distance_from_start"}
    before = (run / "results.h5").read_bytes()
    again = robustflat("measure", f"run={run.name}", *FEW, *ATTACK, "loss=[clean,robust]", only)
    assert again.out == answer.out and (run / "results.h5").read_bytes() == before


def test_a_single_measure_and_a_barrier_between_runs(robustflat, run):
    answer = robustflat("measure", f"run={run}", *FEW, "measure=sam", "measure.rho=0.01", "precision=fp64")
    assert answer.code == 0 and "fp64" in answer.out, answer.err
    answer = robustflat("measure", f"run={run}", *FEW, "measure=interpolation_barrier", f"other={run}")
    assert answer.code == 0, answer.err
    stored = ResultStore(run / "results.h5").attributes("last/test[:16]/sharpness/clean/interpolation_barrier")
    assert stored["value"] == pytest.approx(0, abs=1e-6)


def test_a_barrier_to_other_weights_under_the_same_name_is_measured_anew(robustflat, run, tmp_path):
    ends = []
    for name in ("epoch_0001", "last"):
        shutil.copy(run / "checkpoints" / f"{name}.pt", tmp_path / "other.pt")
        assert robustflat("measure", f"run={run}", *FEW, "measure=interpolation_barrier", "other=other.pt").code == 0
        store = ResultStore(run / "results.h5")
        ends.append([json.loads(store.attributes(name)["details"])["other_loss"] for name in store.names()])
    assert len(ends[1]) == 2 and len(set(ends[1])) == 2


def test_rescale_gives_the_papers_table(robustflat, run):
    answer = robustflat("rescale", f"run={run}", *FEW, *SMALL_EVALUATION, "save=true", "hessian.bottom=0")
    assert answer.code == 0, answer.err
    table = pd.read_csv(run / "rescale.csv").set_index("scale")
    assert list(table.index) == ["original", "x0.5", "x2"]
    for column in ("test robust_error pgd20", "train robust_error pgd20", "test robust_loss pgd20"):
        assert table[column].tolist() == pytest.approx([table[column].iloc[0]] * 3, rel=1e-3)
    for column in ("test flatness average", "test flatness worst_clean"):
        assert table[column].tolist() == pytest.approx([table[column].iloc[0]] * 3, rel=2e-2, abs=1e-3)
    assert table.lambda_max["x0.5"] > 2 * table.lambda_max["original"] > 4 * table.lambda_max["x2"]
    assert table.logit_change.max() < 1e-3
    assert "| network " in (run / "rescale.md").read_text()
    scaled = robustflat("evaluate", f"checkpoint={run}/rescaled/last_x2.pt", "model=resnet_tiny", "model.channels=4",
                        "dataset=digits", "evaluation=smoke", "device=cpu")  # fmt: skip
    assert scaled.code == 0, scaled.err


def test_rescale_to_the_norm_of_another_network(robustflat, run):
    first = ("factors=[2]", "evaluation=smoke", "save=true", *FEW)
    assert robustflat("rescale", f"run={run}", *first).code == 0
    answer = robustflat("rescale", f"run={run}", "factors=[]", f"like={run}/rescaled/last_x2.pt", *first[1:2], *FEW)
    assert answer.code == 0, answer.err
    assert pd.read_csv(run / "rescale.csv")["scale"].tolist() == ["original", "x2"]


def test_audit_reports_what_moves(robustflat, run):
    answer = robustflat("audit", f"run={run}", *FEW, "only=[sam,adaptive_average,fisher_rao,weight_norm]")
    assert answer.code == 0, answer.err
    for text in ("batch_norm_scaling", "layer_scaling: not applicable", "moves x", "0 unexpected", "fp64"):
        assert text in answer.out
    table = pd.read_csv(run / "audit_last_clean.csv")
    assert set(table.verdict) <= {"as expected", "did not move"}
    assert "Foret et al., ICLR 2021" in set(table.source)
    other = robustflat("audit", f"run={run}", *FEW, "only=[sam]", "transformations=[batch_norm_scaling]", "factor=4")
    assert other.code == 0 and len(pd.read_csv(run / "audit_last_clean.csv")) == 1
    again = robustflat("audit", f"run={run}", *FEW, "only=[sam,adaptive_average,fisher_rao,weight_norm]")
    assert again.out == answer.out
    pd.testing.assert_frame_equal(pd.read_csv(run / "audit_last_clean.csv"), table)


def test_a_network_from_elsewhere_gives_what_its_run_does(robustflat, run, tmp_path):
    options = (*FEW, "hessian.trace_products=0", "hessian.bottom=0")
    shutil.copy(run / "checkpoints" / "last.pt", tmp_path / "net.pt")
    node = ("model=resnet_tiny", "model.channels=4", "dataset=digits")
    answer = robustflat("hessian", "checkpoint=net.pt", *node, *options)
    assert answer.code == 0, answer.err
    assert robustflat("hessian", f"run={run}", *options).code == 0
    (elsewhere,) = tmp_path.glob("outputs/net/*/results.h5")
    one, two = (ResultStore(path).read("last/test[:16]/hessian/clean") for path in (elsewhere, run / "results.h5"))
    assert one.arrays["top"].tolist() == pytest.approx(two.arrays["top"].tolist(), rel=1e-4)


def test_a_checkpoint_that_says_which_network_it_holds_needs_no_model(robustflat, run, tmp_path):
    shutil.copy(run / "checkpoints" / "last.pt", tmp_path / "net.pt")
    options = ("hessian.trace_products=0", "hessian.bottom=0", "hessian.top=1")
    answer = robustflat("hessian", "checkpoint=net.pt", "dataset=digits", *FEW, *options)
    assert answer.code == 0, answer.err
    drawn = ("landscape=clean", "landscape.trials=1", "landscape.points=3", "examples='test[:16]'", "device=cpu")
    answer = robustflat("landscape", "checkpoint=net.pt", "dataset=digits", *drawn)
    assert answer.code == 0, answer.err


MISTAKES = {
    "no network": ("hessian", ["run=null"], ["run=<folder or id>", "checkpoint=<file>"]),
    "an unknown run": ("measure", ["run=nonsense"], ["There is no run 'nonsense'"]),
    "a name for the run's folder": ("hessian", ["name=mine"], ["name= is for", "checkpoint from elsewhere"]),
    "an unknown loss": ("hessian", ["loss=robust"], ["loss must be one of", "clean, frozen"]),
    "a misspelt curvature": ("hessian", ["hessian.curvature=hesian"], ["curvature must be one of"]),
    "an unknown option": ("hessian", ["+hessian.steps=3"], ["hessian.steps", "takes no argument"]),
    "too many examples": ("hessian", ["examples='test[:9999]'"], ["examples:", "9999"]),
    "an unknown measure": ("measure", ["only=[samm]"], ["only=", "sam"]),
    "a barrier without other": ("measure", ["measure=interpolation_barrier"], ["other=<run or file>"]),
    "curvature of the robust loss": ("measure", ["measure=fisher_rao", "loss=robust"], ["not defined on the robust"]),
    "a misspelt attack to rescale": ("rescale", ["only=[pgdd20]"], ["only=", "pgd20"]),
    "early stopping of scaled networks": ("rescale", ["evaluation=study_early_stopped"], ["chooses no snapshot"]),
    "nothing to scale": ("rescale", ["factors=[]"], ["nothing to scale"]),
    "a negative factor": ("rescale", ["factors=[-1]"], ["factors must lie in"]),
    "an unknown transformation": ("audit", ["transformations=[rotate]"], ["transformation must be one of"]),
    "the robust loss audited": ("audit", ["loss=robust"], ["loss must be one of"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_sentence(robustflat, run, name):
    command, arguments, expected = MISTAKES[name]
    given = arguments if arguments[0].startswith("run=") else [f"run={run}", *arguments]
    few = [option for option in FEW if option.split("=")[0] not in {a.split("=")[0] for a in arguments}]
    answer = robustflat(command, *given, *few)
    assert answer.code == 1 and answer.err.startswith("error: "), answer.err
    for text in expected:
        assert text in answer.err
    assert "Traceback" not in answer.err + answer.out


@pytest.mark.parametrize("command", ["hessian", "measure", "rescale", "audit"])
def test_help_shows_examples(robustflat, command):
    answer = robustflat(command, "--help")
    assert answer.code == 0 and f"robustflat {command} run=3f2a9c1d" in answer.out
