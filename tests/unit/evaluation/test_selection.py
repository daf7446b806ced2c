"""Which snapshot is the best, and on which examples that may be decided."""

from __future__ import annotations

import pytest
import torch

from robustflat.attacks.pgd import NoAttack
from robustflat.data.dataset import Dataset
from robustflat.data.sources import Synthetic
from robustflat.errors import UserError
from robustflat.evaluation.selection import EarlyStopping, Score, epoch_of, held_out_split, score


def dataset(train: str = "train[:-10]") -> Dataset:
    source = Synthetic(classes=3, size=4, channels=1, count=40)
    return Dataset(source=source, classes=3, channels=1, mean=[0.5], std=[0.25], train=train)


def rule(**options) -> EarlyStopping:
    return EarlyStopping(attack=NoAttack(), **options)


def test_the_lowest_criterion_wins_and_the_earliest_of_equals():
    scores = {15: Score(0.5, 1.0), 5: Score(0.5, 2.0), 10: Score(0.6, 0.5)}
    assert rule().best(scores) == 5
    assert rule(criterion="robust_loss").best(scores) == 10


def test_no_snapshot_and_no_number_are_refused():
    with pytest.raises(UserError, match="no snapshot"):
        rule().best({})
    with pytest.raises(UserError, match="epoch 10 is not a finite number"):
        rule(criterion="robust_loss").best({5: Score(0.1, 1.0), 10: Score(0.1, float("nan"))})


def test_robust_error_counts_any_run_and_robust_loss_the_highest():
    clean = torch.tensor([[5.0, 0], [5.0, 0]])
    runs = torch.tensor([[[0.0, 1], [1, 0]], [[1.0, 0], [1, 0]]])
    found = score(clean, runs, torch.tensor([0, 0]))
    assert found.robust_error == 0.5
    high, low = torch.tensor(1.0).exp().add(1).log(), torch.tensor(-1.0).exp().add(1).log()
    assert found.robust_loss == pytest.approx(float(high + low) / 2)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("train[:-500]", "train[-500:]"), ("train[500:]", "train[:500]"), ("train[:80%]", "train[80%:]")],
)
def test_what_a_split_leaves_out_is_found(train, held_out):
    assert held_out_split(train) == held_out


@pytest.mark.parametrize("train", ["train", "train[::2]", "train[5:10]", "train[:10]/balanced"])
def test_a_split_that_leaves_nothing_out_gets_advice(train):
    with pytest.raises(UserError, match=r"dataset\.train='train\[:-500\]'"):
        held_out_split(train)


def test_held_out_examples_are_the_default_and_share_none_with_training():
    data = dataset()
    assert rule().examples(data) == "train[-10:]"
    assert len(data.split("train[-10:]")) == 10
    assert rule(split="test[-5:]").examples(data) == "test[-5:]"


def test_examples_that_were_trained_on_are_refused_with_their_number():
    with pytest.raises(UserError, match=r"5 of the examples .* were trained on"):
        rule(split="train[-15:]").examples(dataset())


def test_options_are_checked():
    with pytest.raises(UserError, match="criterion must be one of"):
        rule(criterion="loss")
    with pytest.raises(UserError, match="restarts"):
        rule(restarts=0)
    with pytest.raises(UserError, match="Cannot read the split"):
        rule(split="test[:")


def test_epochs_are_read_from_names_of_snapshots():
    assert [epoch_of(name) for name in ("epoch_0150.pt", "epoch_7", "last.pt", "epoch_.pt")] == [150, 7, None, None]
