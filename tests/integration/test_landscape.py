"""`robustflat landscape` on two tiny runs, a run of another width, and networks from elsewhere."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from robustflat.apps import landscape as application
from robustflat.apps.collect import rows_of_run
from robustflat.apps.main import run_application
from robustflat.flatness.landscape import Landscape
from robustflat.store.results import ResultStore
from robustflat.training.checkpoint import load, save
from tests.integration.conftest import TINY, Answer

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("device=cpu", "examples='test[:16]'", "landscape.points=3", "landscape.trials=2", "landscape.attack.steps=2")
RUNS = {"one": "seed=0", "two": "seed=1", "wide": "model.channels=8"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Outputs folder with three tiny runs, by name; tests work on copies."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, option in RUNS.items():
            patch.setattr(sys, "argv", ["train.py", *TINY, option, f"name={name}",
                                        "evaluation.flatness=null"])  # fmt: skip
            GlobalHydra.instance().clear()
            run_application("train")
    return folder / "outputs"


@pytest.fixture
def runs(trained, tmp_path) -> dict[str, Path]:
    """Copies of the runs in the working folder of the test."""
    shutil.copytree(trained, tmp_path / "outputs")
    return {path.parent.parent.name: path.parent for path in (tmp_path / "outputs").glob("*/*/identity.yaml")}


@pytest.fixture
def draw(tmp_path, monkeypatch, capfd):
    """draw(*arguments) runs `robustflat landscape ...` in this process."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Answer:
        capfd.readouterr()
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["robustflat landscape", *arguments])
        try:
            run_application("landscape")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Answer(code, *capfd.readouterr())

    return call


def stored(run: Path) -> dict[str, tuple[dict[str, np.ndarray], dict]]:
    store = ResultStore(run / "results.h5")
    return {name: (store.read(name).arrays, store.attributes(name)) for name in store.names()}


def test_two_runs_in_one_picture_along_the_same_directions(draw, runs, tmp_path):
    one, two = runs["one"], runs["two"]
    answer = draw(f"run=[{one.name},{two.name}]", *SMALL)
    assert answer.code == 0, answer.err
    for text in ("one", "two", "robust cross-entropy (nats)", "digits test[:16] (16 examples)", "2 random directions",
                 "PGD-2, linf epsilon 0.15", "attacked anew at every point", "standard error"):  # fmt: skip
        assert text in answer.out
    pictures = tmp_path / "outputs" / "landscapes"
    stem = f"paper_random-{one.name}-{two.name}"
    assert sorted(p.name for p in pictures.iterdir()) == [f"{stem}.html", f"{stem}.png", f"{stem}.svg"]
    for run in (one, two):
        ((name, (arrays, attrs)),) = stored(run).items()
        assert name == "last/test[:16]/landscape/paper_random"
        assert {n: a.shape for n, a in arrays.items()} == {
            "losses": (2, 3),
            "errors": (2, 3),
            "steps": (3,),
            "factors": (2,),
        }
        assert json.loads(attrs["config"])["length"] == 0.5 and json.loads(attrs["settings"])["seed"] == 0
        assert {"weights", "seconds", "version", "command", "precision", "attack"} <= attrs.keys()
        assert not list((run / "landscapes").glob(".*"))
    # The same by hand, for the second run.
    from robustflat.apps.build import build
    from robustflat.apps.evaluate import network
    from robustflat.apps.networks import choose, stored_config

    config = stored_config(two)
    config.device = "cpu"
    model, _ = network(config, choose(two, "last", "model")[0])
    (batch,) = build(config.dataset).split("test[:16]").batches(128)
    from robustflat import LinfBall, Pgd

    attack = Pgd(LinfBall(0.15), steps=2, step_size=0.04)
    by_hand = Landscape(attack=attack, points=3, trials=2)(model, batch.x, batch.y)
    found = stored(two)["last/test[:16]/landscape/paper_random"][0]["losses"]
    assert np.allclose(found, by_hand.losses.numpy(), rtol=1e-3)


def test_the_same_command_measures_nothing_again_and_force_does(draw, runs, monkeypatch):
    run = runs["one"]
    first = draw(f"run={run.name}", *SMALL)
    before = (run / "results.h5").read_bytes()
    picture = (run / "landscapes" / "paper_random.svg").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(application, "_measure", None)
        second = draw(f"run={run.name}", *SMALL)
    assert (first.code, second.code) == (0, 0), second.err
    assert (run / "results.h5").read_bytes() == before
    assert (run / "landscapes" / "paper_random.svg").read_bytes() == picture
    other = draw(f"run={run.name}", *SMALL, "seed=1")
    assert other.code == 0 and len(stored(run)) == 2  # other settings stand beside the first
    assert draw(f"run={run.name}", *SMALL, "force=true").code == 0
    assert rows_of_run(run) == []  # landscapes are no rows of the tables


def test_a_killed_grid_goes_on_where_it_was_with_the_same_numbers(draw, runs, tmp_path):
    run = runs["one"]
    options = [f"run={run}", *SMALL, "landscape.points=41"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from robustflat.apps.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, "landscape", *options], cwd=tmp_path, text=True)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        journals = list((run / "landscapes").glob(".*.jsonl"))
        if journals and journals[0].read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (journal,) = (run / "landscapes").glob(".*.jsonl")
    kept = journal.read_bytes().count(b"\n")
    assert 3 <= kept < 81
    resumed = draw(*options)
    assert resumed.code == 0, resumed.err
    assert f"going on after {kept} of 81 points" in resumed.out
    numbers = stored(run)["last/test[:16]/landscape/paper_random"][0]
    assert draw(*options, "force=true").code == 0
    again = stored(run)["last/test[:16]/landscape/paper_random"][0]
    assert all(np.array_equal(numbers[name], again[name]) for name in numbers)


def test_the_path_between_two_runs_ends_at_their_losses(draw, runs):
    one, two = runs["one"], runs["two"]
    clean = ("landscape.loss=clean", "landscape.attack=null")
    answer = draw(f"run={one.name}", f"to={two.name}", "landscape=path", *SMALL[:3], *clean)
    assert answer.code == 0 and "barrier" in answer.out, answer.err
    (path, attrs) = stored(one)["last/test[:16]/landscape/path to two"]
    assert attrs["shape"] == "path"
    both = draw(f"run=[{one.name},{two.name}]", *SMALL[:3], "landscape.trials=1", *clean)
    assert both.code == 0, both.err
    for run, end in ((one, 0), (two, -1)):
        lines = stored(run)["last/test[:16]/landscape/paper_random"][0]["losses"]
        assert lines[0, 1] == pytest.approx(path["losses"][0, end], rel=1e-6)


def test_snapshots_of_one_run_in_one_picture_and_along_a_path(draw, runs):
    run = runs["one"]
    answer = draw(f"run={run.name}", "checkpoints=[1,2]", *SMALL)
    assert answer.code == 0 and "epoch_0001" in answer.out, answer.err
    assert (run / "landscapes" / "paper_random-epoch_0001-epoch_0002.html").exists()
    assert draw(f"run={run.name}", "checkpoints=[1,2]", "landscape=path", *SMALL[:3], SMALL[4]).code == 0
    assert {n.split("/")[0] for n in stored(run)} == {"epoch_0001", "epoch_0002"}


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("paper_adversarial", "adversarial weight directions (20 ascent steps of 0.001, radius 0.003), length 0.025"),
        ("paper_hessian", "leading Hessian eigenvectors, length 0.5"),
        ("released_random", "layer_max_abs normalisation"),
        ("released_adversarial", "radius 0.005), length 0.01 (layer_max_abs normalisation)"),
        ("filter_plane", "3 x 3 steps"),
    ],
)
def test_every_ready_picture_is_drawn(draw, runs, choice, says):
    answer = draw(f"run={runs['one'].name}", f"landscape={choice}", *SMALL, "landscape.trials=1")
    assert answer.code == 0, answer.err
    assert says in answer.out.replace("\n", " ")
    assert (runs["one"] / "landscapes" / f"{choice}.html").exists()


def test_directions_of_one_run_serve_another(draw, runs):
    one, two = runs["one"], runs["two"]
    choice = ("landscape/directions=adversarial", *SMALL)
    saved = draw(f"run={one.name}", *choice, "save_directions=d.h5")
    assert saved.code == 0 and "d.h5" in saved.out, saved.err
    stored_choice = ("landscape/directions=stored", "landscape.directions.path=d.h5", *SMALL)
    answer = draw(f"run=[{one.name},{two.name}]", *stored_choice)
    assert answer.code == 0 and "directions from d.h5" in answer.out, answer.err
    found = stored(one)
    own, shared = (arrays["losses"] for arrays, _ in found.values())
    assert len(found) == 2 and np.array_equal(own, shared)


def test_frozen_examples_are_stated_in_picture_and_results(draw, runs):
    answer = draw(f"run={runs['one'].name}", *SMALL, "landscape.loss=frozen")
    assert answer.code == 0 and "attacked once, at s = 0, and frozen" in answer.out, answer.err
    ((_, attrs),) = stored(runs["one"]).values()
    assert attrs["loss"] == "frozen" and "frozen" in attrs["images"]
    assert "frozen" in (runs["one"] / "landscapes" / "paper_random.html").read_text()


def test_checkpoints_from_elsewhere(draw, runs, tmp_path):
    for name in ("one", "two"):
        torch.save(load(runs[name] / "checkpoints" / "last.pt").parts["model"], tmp_path / f"{name}.pt")
    options = ("model=resnet_tiny", "model.channels=4", "dataset=digits", *SMALL)
    answer = draw("checkpoint=[one.pt,two.pt]", *options)
    assert answer.code == 0, answer.err
    assert len(list((tmp_path / "outputs").glob("*/*/results.h5"))) == 2
    missing = draw("checkpoint=one.pt", *SMALL)
    assert missing.code == 1 and "needs dataset=<choice>" in missing.err


def test_mistakes_end_in_one_sentence(draw, runs):
    one, two, wide = (runs[name].name for name in ("one", "two", "wide"))
    checkpoint = runs["two"] / "checkpoints" / "last.pt"
    sick = load(checkpoint)
    weights = dict(sick.parts["model"])
    weights["conv.weight" if "conv.weight" in weights else next(n for n in weights if n.endswith("weight"))].fill_(
        torch.nan
    )
    save(checkpoint, {**sick.parts, "model": weights}, sick.meta)
    for arguments, says in (
        ((), "Say what to draw"),
        (("run=nothere",), "There is no run 'nothere'"),
        ((f"run={one}", f"to={wide}", "landscape=path"), r"here, (8, "),
        ((f"run={two}",), "NaN or infinite"),
        ((f"run={one}", f"to={two}"), "NaN or infinite"),
        ((f"run={one}", "landscape=path"), "A path leads from one network to another, got 1"),
        ((f"run=[{one},{one}]",), "named twice"),
        ((f"run={one}", "landscape.points=1"), "points must lie in [2, inf)"),
        ((f"run={one}", "landscape.points=10"), "points must be odd"),
        ((f"run={one}", "landscape.trials=0"), "trials must lie in"),
        ((f"run={one}", "landscape.normalisation=layer_l2"), "normalisation must be one of"),
        ((f"run={one}", "landscape.loss=clean"), "leave attack out"),
        ((f"run={one}", "kind=cube"), "kind must be one of"),
        ((f"run={one}", "examples='test[:9999]'"), "examples: "),
        ((f"run={one}", "checkpoints=[7]"), "There is no snapshot of epoch 7; there are 1, 2"),
        ((f"run={one}", "checkpoint=a.pt"), "Say what to draw"),
        ((f"run={one}", "name=mine"), "name= is for the folder of a checkpoint from elsewhere"),
        ((f"run={one}", "labels=[a,b]"), "labels has 2 names for 1 networks"),
        ((f"run={one}", "+speed=3"), "speed"),
        ((f"run={one}", "landscape/directions=stored"), "landscape.directions.path: needs a value"),
        ((f"run={one}", "landscape/directions=stored", "landscape.directions.path=no.h5"), "no results file no.h5"),
    ):
        answer = draw(*arguments, *(o for o in SMALL if o.split("=")[0] not in [a.split("=")[0] for a in arguments]))
        assert answer.code == 1 and says in answer.err and "Traceback" not in answer.err, (arguments, answer.err)


def test_help_explains_the_command(draw):
    answer = draw("--help")
    assert answer.code == 0
    for text in ("landscape=path", "paper_adversarial", "landscape/directions", "save_directions"):
        assert text in answer.out
