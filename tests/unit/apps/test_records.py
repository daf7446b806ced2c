"""Run folders as records, whatever state they are in; lists, filters and removal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from robustflat.apps.cards import card_of, card_schema, write_card
from robustflat.apps.collect import rows_of_run
from robustflat.apps.records import NOTE, failed_record, headline, read_record, read_records, warnings_of
from robustflat.apps.run_folder import RunFolder
from robustflat.apps.runs import RunsRoot, comparison, condition_of, found, job, remove, sorted_by
from robustflat.errors import UserError
from robustflat.store.results import KEY, ResultStore
from robustflat.store.tables import COLUMNS

CONFIG = """
seed: 3
dataset: {source: {_target_: robustflat.data.sources.Digits}}
model: {channels: 4}
attack: {_target_: robustflat.attacks.pgd.Pgd}
trainer:
  epochs: 5
  loss: {_target_: robustflat.losses.trades.Trades}
  gradient: {_target_: robustflat.gradients.adversarial_weights.AdversarialWeights}
"""
METRICS = (
    '{"step": 1, "train/loss": 2.0}\n{"step": 2, "epoch": 1, "epoch/loss": 1.5}\n'
    '{"step": 2, "evaluation/test_robust_loss": 1.25, "evaluation/robust_loss_gap": 0.5}\n{"step": 4, "epoch": 2}\n'
)


def make_run(folder: Path, *, done: bool = True, results: bool = True, labels: str = "last") -> Path:
    """A run folder as train.py and evaluate.py leave it, with four examples of two classes."""
    folder.mkdir(parents=True)
    (folder / "identity.yaml").write_text("seed: 3\n")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text(METRICS)
    (folder / "provenance.json").write_text(
        json.dumps({"command": ["trainer=trades_awp", "seed=3", "optimizer.lr=0.1"]})
    )
    if done:
        (folder / "DONE").write_text("")
    if results:
        store_logits(folder, labels)
    return folder


def store_logits(folder: Path, checkpoint: str) -> None:
    store = ResultStore(folder / "results.h5")
    logits = np.array([[2, 0], [0, 2], [2, 0], [0, 2]], dtype=np.float32)
    shared = {"split": "test[:4]", "checkpoint": checkpoint, "role": "test", KEY: "abc", "seconds": 0.5}
    store.write(f"{checkpoint}/test[:4]", {"labels": np.array([0, 1, 0, 0])}, {})
    clean = {**shared, "kind": "clean", "forwards": 1, "backwards": 0, "images": 4, "peak_memory_mib": 9.0}
    store.write(f"{checkpoint}/test[:4]/clean", {"logits": logits}, clean)
    attacked = {**shared, "kind": "attacks", "norm": "linf", "epsilon": 0.1, "attack": "PGD"}
    store.write(f"{checkpoint}/test[:4]/attacks/pgd20", {"logits": logits[None, ::-1].copy()}, attacked)


def value(record, metric):
    (line,) = record.table[record.table["metric"] == metric].to_dict("records")
    return line["value"]


def test_a_finished_run(tmp_path):
    record = read_record(make_run(tmp_path / "digits-trades_awp" / "0a1b2c3d"))
    assert (record.run_id, record.experiment, record.seed, record.status) == (
        "0a1b2c3d",
        "digits-trades_awp",
        3,
        "done",
    )
    assert record.label == "digits-trades_awp optimizer.lr=0.1"
    assert record.family == "TRADES-AWP"
    assert list(record.table.columns) == list(COLUMNS)
    assert value(record, "error") == 0.25
    assert value(record, "robust_error") == 1.0
    assert value(record, "loss") == pytest.approx((3 * math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 4)
    assert record.history.to_dict("records")[0] == {
        "epoch": 1.0, "loss": 1.5, "test/robust_loss": 1.25, "robust_loss_gap": 0.5,
    }  # fmt: skip
    clean = record.ledger.set_index("phase").loc["last/test[:4]/clean"]
    assert (clean["images_per_second"], clean["peak_memory_mib"]) == (8.0, 9.0)
    assert headline(record)["RErr"] == "100.0 %"
    assert record.problem == ""


def test_names_and_troubles_that_a_study_noted(tmp_path):
    run = make_run(tmp_path / "a" / "b", labels="average")
    note = {"label": "mine", "family": "means", "part": "average", "problem": ""}
    (run / NOTE).write_text(json.dumps(note))
    record = read_record(run)
    assert (record.label, record.family, record.status) == ("mine", "means", "done")
    assert set(record.table["checkpoint"]) == {"last"}
    assert record.part == "average"
    (run / NOTE).write_text(json.dumps({**note, "problem": "out of memory"}))
    assert (read_record(run).status, read_record(run).problem) == ("failed", "out of memory")
    assert read_record(run, part="model").status == "failed"
    (run / NOTE).unlink()
    assert "no results of the part 'model'" in read_record(run).problem


def test_learning_curves_are_those_of_the_network_that_counts(tmp_path):
    run = make_run(tmp_path / "a" / "b")
    line = {"step": 2, "evaluation_average/test_robust_loss": 1.0, "evaluation_average/robust_loss_gap": 0.25}
    (run / "metrics.jsonl").write_text(METRICS + json.dumps(line) + "\n")
    (first, _) = read_record(run, part="average").history.to_dict("records")
    assert first == {"epoch": 1.0, "loss": 1.5, "test/robust_loss": 1.0, "robust_loss_gap": 0.25}
    (first, _) = read_record(run, part="model").history.to_dict("records")
    assert (first["test/robust_loss"], first["average/test/robust_loss"]) == (1.25, 1.0)


def test_numbers_of_the_last_weights_of_an_averaging_run_say_so(tmp_path):
    run = make_run(tmp_path / "a" / "b")
    assert read_record(run).warnings == ()
    averaging = "  callbacks: {average: {_target_: robustflat.training.callbacks.WeightAverage}}\n"
    (run / "config.yaml").write_text(CONFIG + averaging)
    (warning,) = read_record(run).warnings
    assert "numbers of the last" in warning
    assert read_record(run, part="average").warnings == ()


def damage_results(run: Path) -> None:
    (run / "results.h5").write_bytes(b"not HDF5")


def cut_results(run: Path) -> None:
    content = (run / "results.h5").read_bytes()
    (run / "results.h5").write_bytes(content[: len(content) // 2])


def damage_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1}\n{broken\n{"step": 2}\n')


def lose_labels(run: Path) -> None:
    store = ResultStore(run / "results.h5")
    store.write("last/test[:4]", {}, {})


def forget_training(run: Path) -> None:
    (run / "DONE").unlink()


def forget_results(run: Path) -> None:
    (run / "results.h5").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damage_results, "damaged"),
        (cut_results, "damaged"),
        (damage_metrics, "metrics.jsonl"),
        (lose_labels, "not what it should be"),
        (forget_training, "training ended after epoch 2 of 5"),
        (forget_results, "not evaluated"),
    ],
)
def test_whatever_is_missing_or_damaged_is_a_sentence(tmp_path, spoil, words):
    run = make_run(tmp_path / "a" / "b")
    spoil(run)
    record = read_record(run)
    assert record.status == "partial"
    assert words in record.problem
    write_card(record)


@pytest.mark.parametrize(
    "name", ["config.yaml", "provenance.json", NOTE, "ledger.json", "results.json", "identity.yaml"]
)
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2", b"[1, 2]", b""])
def test_damage_of_other_files_is_survived(tmp_path, name, content):
    run = make_run(tmp_path / "a" / "b")
    (run / name).write_bytes(content)
    assert read_record(run).status == "done"


def test_what_train_measured_is_read_where_nothing_was_evaluated(tmp_path):
    run = make_run(tmp_path / "a" / "b", results=False)
    clean = {"error": 0.5, "error_low": 0.2, "error_high": 0.8, "loss": 1.5, "loss_standard_error": 0.1}
    flat = {
        "value": 0.75,
        "standard_error": 0.01,
        "radius": 0.5,
        "split": "test[:4]",
        "examples": 4,
        "reduction": "mean",
    }
    measured = {
        "test": {"split": "test[:4]", "count": 4, "clean": clean, "pgd20": {"robust_error": 0.75}},
        "flatness": flat,
    }
    (run / "results.json").write_text(json.dumps({"x": {"weights": {"model": measured}, "complete": True}}))
    record = read_record(run)
    assert record.status == "done"
    assert [value(record, m) for m in ("error", "robust_error", "flatness")] == [0.5, 0.75, 0.75]
    assert set(record.table["split"]) == {"test[:4]"}


def test_warnings_name_numbers_that_cannot_be_believed():
    base = {"checkpoint": "last", "split": "test", "metric": "robust_error", "stderr": 0.01}
    rows = [
        {**base, "measure": "autoattack", "value": 0.4},
        {**base, "measure": "pgd20", "value": 0.5},
        {**base, "measure": "average", "metric": "flatness", "value": -0.5},
        {**base, "measure": "pgd20", "metric": "robust_loss", "value": float("nan")},
    ]
    texts = " ".join(warnings_of(rows))
    assert "more errors (50.0%) than AutoAttack (40.0%)" in texts
    assert "average is negative" in texts
    assert "robust_loss by pgd20 is not a number" in texts
    assert list(warnings_of(rows[:1])) == []


def test_autoattack_is_compared_within_one_threat_model():
    base = {"checkpoint": "last", "split": "test", "metric": "robust_error", "norm": "linf"}
    rows = [
        {**base, "measure": "autoattack", "epsilon": 0.1, "value": 0.4},
        {**base, "measure": "pgd20", "epsilon": 0.2, "value": 0.5},
    ]
    assert list(warnings_of(rows)) == []
    assert len(list(warnings_of([rows[0], {**rows[1], "epsilon": 0.1}]))) == 1


def summarised(run: Path, *, trials: int = 3) -> None:
    flat = {"value": 0.75, "standard_error": 0.1 if trials > 1 else None, "reduction": "mean", "split": "test[:4]"}
    test = {"split": "test[:4]", "count": 4, "clean": {"error": 0.5}, "pgd20": {"robust_error": 0.75}}
    measured = {"test": test, "flatness": flat}
    (run / "results.json").write_text(json.dumps({"x": {"weights": {"model": measured}, "complete": True}}))


def test_flatness_of_a_single_draw_is_shown(tmp_path):
    run = make_run(tmp_path / "a" / "b", results=False)
    summarised(run, trials=1)
    assert headline(read_record(run)) == {"Err": "50.0 %", "RErr": "75.0 %", "flatness average": "0.750"}


def test_measuring_curvature_does_not_hide_what_training_measured(tmp_path):
    run = make_run(tmp_path / "a" / "b", results=False)
    summarised(run)
    attrs = {"kind": "sharpness", "name": "sam", "checkpoint": "last", "split": "test", "role": "test", KEY: "k"}
    ResultStore(run / "results.h5").write("last/test/measure/sam", {}, {**attrs, "value": 1.0, "examples": 4})
    record = read_record(run)
    assert "sharpness" in set(record.table["kind"])
    assert headline(record)["RErr"] == "75.0 %"


def test_folders_that_are_no_runs_are_left_out(tmp_path):
    run = make_run(tmp_path / "a" / "b")
    (tmp_path / "a" / "other").mkdir()
    assert [r.folder for r in read_records([tmp_path / "a" / "other", run])] == [run]
    with pytest.raises(UserError, match="None of 1 folders is a run"):
        read_records([tmp_path])


def test_cards_fit_the_schema(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    run = make_run(tmp_path / "a" / "b")
    path = write_card(read_record(run))
    card = json.loads(path.read_text())
    jsonschema.validate(card, card_schema())
    stamp = path.stat().st_mtime_ns
    write_card(read_record(run))
    assert path.stat().st_mtime_ns == stamp
    failed = failed_record(tmp_path / "x" / "y", "label", "family", None, "it was not started")
    jsonschema.validate(card_of(failed), card_schema())
    assert write_card(failed) is None


def test_filters_and_order(tmp_path):
    make_run(tmp_path / "digits-a" / "one")
    make_run(tmp_path / "digits-b" / "two", results=False, done=False)

    def names(where):
        return [record.run_id for record in found(tmp_path, condition_of(where))]

    assert names(None) == ["one", "two"]
    assert names("experiment=digits-b") == ["two"]
    assert names("experiment=digits-* seed=3") == ["one", "two"]
    assert names("trainer.epochs=5 status=done") == ["one"]
    assert names("trainer=trades_awp") == ["one", "two"]
    assert names({"trainer": {"epochs": 6}}) == []
    with pytest.raises(UserError, match="'epochs' is no name=value"):
        names("epochs")
    records = found(tmp_path, {})
    assert [r.run_id for r in sorted_by(records, "RErr")] == ["one", "two"]
    assert [r.run_id for r in sorted_by(records, "-run_id")] == ["two", "one"]
    with pytest.raises(UserError, match=r"no run has 'speed'.*RErr"):
        sorted_by(records, "speed")


def test_only_unfinished_runs_below_outputs_are_removed(tmp_path):
    outputs = tmp_path / "outputs"
    finished, begun = make_run(outputs / "a" / "done"), make_run(outputs / "a" / "begun", done=False)
    elsewhere = make_run(tmp_path / "other" / "a" / "b", done=False)
    (outputs / "a" / "link").symlink_to(elsewhere)
    for folder in (
        elsewhere,
        outputs / "a" / "link",
        outputs / "a",
        finished,
        outputs / "a" / ".." / ".." / "other" / "a" / "b",
    ):
        with pytest.raises(UserError, match="left as it is"):
            remove(folder, outputs)
    remove(begun, outputs)
    assert not begun.exists()
    assert finished.exists()
    assert (elsewhere / "config.yaml").exists()


def test_results_of_a_checkpoint_from_elsewhere_are_complete_and_never_removed(tmp_path, capsys):
    network = make_run(tmp_path / "net" / "0039fe6b", done=False)
    (network / "identity.yaml").write_text("model: {}\nsource: {}\nweights: f9e5799489645f94\n")
    (network / "metrics.jsonl").unlink()
    record = read_record(network)
    assert (record.status, record.problem) == ("done", "")
    job(OmegaConf.create({**asdict(RunsRoot()), "outputs": str(tmp_path), "clean": True, "confirm": True}))
    assert "There is no unfinished run." in capsys.readouterr().out
    with pytest.raises(UserError, match="left as it is"):
        remove(network, tmp_path)
    assert (network / "results.h5").exists()


def test_a_run_in_use_does_not_keep_the_others_from_being_removed(tmp_path, capsys):
    busy, damaged, begun = (make_run(tmp_path / "a" / name, done=False) for name in ("busy", "damaged", "left"))
    (damaged / "identity.yaml").write_text("{")
    held = RunFolder(busy, None)
    job(OmegaConf.create({**asdict(RunsRoot()), "outputs": str(tmp_path), "clean": True, "confirm": True}))
    held.close()
    assert busy.exists()
    assert not damaged.exists() and not begun.exists()
    printed = " ".join(capsys.readouterr().out.split())
    assert "Another process is working" in printed
    assert f"removed {busy}" not in printed and f"removed {begun}" in printed


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        ("dataset.train=train[:64]", True), ("dataset.train=train[:6]", False), ("lr=5e-4", True), ("lr=0.0005", True),
        ("sync=true", True), ("sync=false", False), ("decay=null", True), ("epochs=60", True), ("epochs=6", False),
        ("epochs=6*", True),
    ],
)  # fmt: skip
def test_values_are_compared_as_values(tmp_path, where, fits):
    run = make_run(tmp_path / "a" / "b")
    text = "dataset: {train: 'train[:64]'}\nlr: 0.0005\nsync: true\ndecay: null\nepochs: 60\n"
    (run / "config.yaml").write_text(text)
    assert bool(found(tmp_path, condition_of(where))) is fits


def test_two_runs_are_compared_or_it_is_said_that_there_are_not_two(tmp_path):
    run = make_run(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="compare takes two runs"):
        comparison([run])


def test_a_landscape_that_says_in_words_what_its_images_are_does_not_spoil_the_ledger(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits-at" / "0a1b2c3d")
    about = {"kind": "landscape", "images": "attacked anew", "seconds": 2.0, "shape": "plane", KEY: "abc"}
    ResultStore(folder / "results.h5").write("last/test[:4]/landscape/random", {"losses": np.ones((2, 2))}, about)
    ledger = read_record(folder).ledger.set_index("phase")
    assert ledger.loc["last/test[:4]/landscape/random", "seconds"] == 2.0
    assert math.isnan(ledger.loc["last/test[:4]/landscape/random", "images"])


def test_of_several_sets_of_examples_the_largest_comes_last_and_counts(tmp_path):
    """A smoke test on test[:32] must not win over test[:4] by its name (here with 2 and 4 examples)."""
    store = ResultStore(tmp_path / "results.h5")
    for split, count in {"test[:32]": 2, "test[:4]": 4}.items():
        store.write(f"last/{split}", {"labels": np.zeros(count, dtype=np.int64)}, {})
        attrs = {"split": split, "checkpoint": "last", "role": "test", "kind": "clean", KEY: split}
        store.write(f"last/{split}/clean", {"logits": np.eye(2, dtype=np.float32)[[0] * count]}, attrs)
    errors = [row["split"] for row in rows_of_run(tmp_path) if row["metric"] == "error"]
    assert errors == ["test[:32]", "test[:4]"]
