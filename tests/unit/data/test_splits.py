"""Texts such as "test[:1000]" against Python's own slicing."""

from __future__ import annotations

import pytest
import torch

from robustflat.data.images import ImageSet
from robustflat.data.splits import (
    PAPER_SPLITS,
    held_out,
    parse_split,
    round_robin_order,
    select,
    shared_examples,
)
from robustflat.errors import UserError


def source(train: int = 100, test: int = 40, classes: int = 4) -> dict[str, ImageSet]:
    def made(name: str, count: int) -> ImageSet:
        images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).clone()
        return ImageSet(images, torch.arange(count) % classes, f"toy {name}", classes)

    return {"train": made("train", train), "test": made("test", test)}


def rows(data: ImageSet) -> list[int]:
    return data.images.flatten().tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train", slice(None)),
        ("train[:]", slice(None)),
        ("train[:20]", slice(None, 20)),
        ("train[-5:]", slice(-5, None)),
        ("train[10:20]", slice(10, 20)),
        ("train[:-30]", slice(None, -30)),
        ("train[-20:-10]", slice(-20, -10)),
        ("train[::2]", slice(None, None, 2)),
        ("train[1:50:7]", slice(1, 50, 7)),
        ("train[-1:-11:-1]", slice(-1, -11, -1)),
        ("train[-1:-101:-1]", slice(-1, -101, -1)),
        ("train[::-1]", slice(None, None, -1)),
        (" train[ 3 : 5 ] ", slice(3, 5)),
        ("train[:100]", slice(None)),
        ("train[-100:]", slice(None)),
        ("train[:25%]", slice(None, 25)),
        ("train[-10%:]", slice(-10, None)),
        ("train[:-0.1%]", slice(None)),
        ("train[-1:-11%:-1]", slice(-1, -11, -1)),
        ("train[12.5%:50%]", slice(12, 50)),
    ],
)
def test_a_split_is_the_slice_of_a_list(text: str, expected: slice) -> None:
    assert rows(select(source(), text)) == list(range(100))[expected]


def test_the_whole_split_is_the_very_same_set() -> None:
    sets = source()
    assert select(sets, "test") is sets["test"]


def test_a_subset_is_named_by_its_split() -> None:
    assert select(source(), "test[:10]").name == "toy test[:10]"


@pytest.mark.parametrize("text", ["", "train[", "train[5]", "train[:5", "train[a:b]", "train[:1e3]", "train[:5]/even",
                                  "train[1.5:]", "tr ain", "train[::2:3]"])  # fmt: skip
def test_a_text_that_is_no_split_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UserError, match=r"Cannot read the split.*test\[:1000\].*paper_test"):
        parse_split(text)


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'tset\[:5\]': its source must be one of test, train.*Did you mean 'test'"):
        select(source(), "tset[:5]")


def test_more_examples_than_there_are_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"'test\[:20000\]' asks for 20000 examples, but test has only 40"):
        select(source(), "test[:20000]")


@pytest.mark.parametrize("text", ["test[-41:]", "test[10:41]", "test[41:]", "test[-1:-42:-1]", "test[:41]/balanced"])
def test_bounds_beyond_the_end_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"examples, but test has only 40"):
        select(source(), text)


@pytest.mark.parametrize("text", ["test[5:5]", "test[:0]", "test[40:]", "test[20:10]", "test[:1%]", "test[:-40]",
                                  "test[-1%:]", "test[-0%:]", "test[:-100%]"])  # fmt: skip
def test_an_empty_split_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is empty: test has 40 examples"):
        select(source(), text)


def test_a_percentage_above_one_hundred_is_refused() -> None:
    with pytest.raises(UserError, match="percentage"):
        select(source(), "test[:120%]")


def test_a_step_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="must not be 0"):
        parse_split("test[::0]")


@pytest.mark.parametrize("seed", range(5))
def test_round_robin_order_gives_every_class_its_turn(seed: int) -> None:
    labels = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(seed))
    members = {k: [i for i, label in enumerate(labels.tolist()) if label == k] for k in range(5)}
    expected = []
    for turn in range(max(map(len, members.values()))):
        expected += sorted(m[turn] for m in members.values() if turn < len(m))
    assert round_robin_order(labels).tolist() == expected


def test_a_balanced_subset_of_class_sorted_data_has_every_class_equally_often() -> None:
    labels = torch.arange(4).repeat_interleave(25)
    data = {"train": ImageSet(torch.zeros(100, 1, 1, 1), labels, "sorted train", 4)}
    assert select(data, "train[:20]").class_counts().tolist() == [20, 0, 0, 0]
    assert select(data, "train[:20]/balanced").class_counts().tolist() == [5, 5, 5, 5]
    assert select(data, "train[:22]/balanced").class_counts().max() == 6
    assert select(data, "train[-20:]/balanced").class_counts().tolist() == [5, 5, 5, 5]


def test_a_balanced_subset_and_its_rest_share_nothing_and_cover_everything() -> None:
    sets = source()
    both = rows(select(sets, "train[:30]/balanced")) + rows(select(sets, "train[30:]/balanced"))
    assert sorted(both) == list(range(100))
    assert shared_examples(sets, "train[:30]/balanced", "train[30:]/balanced") == 0


def test_a_class_that_runs_out_is_named() -> None:
    labels = torch.tensor([0] * 30 + [1] * 3)
    data = {"train": ImageSet(torch.zeros(33, 1, 1, 1), labels, "uneven train", 2)}
    assert select(data, "train[:6]/balanced").class_counts().tolist() == [3, 3]
    with pytest.raises(UserError, match="class 1 has only 3 examples in train, so only slices of the first 6"):
        select(data, "train[:20]/balanced")


def test_held_out_examples_are_not_trained_on() -> None:
    train, validation = held_out(10)
    sets = source()
    assert rows(select(sets, train)) == list(range(90))
    assert rows(select(sets, validation)) == list(range(90, 100))
    assert shared_examples(sets, train, validation) == 0


def test_holding_out_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="count must lie in"):
        held_out(0)


def test_shared_examples_are_counted_by_place() -> None:
    sets = source()
    assert shared_examples(sets, "train", "train[-7:]") == 7
    assert shared_examples(sets, "train[:20]", "train[15:30]") == 5
    assert shared_examples(sets, "train[::2]", "train[1::2]") == 0
    assert shared_examples(sets, "train[-1:-11:-1]", "train[85:95]") == 5
    assert shared_examples(sets, "train", "test") == 0


@pytest.mark.parametrize(
    ("name", "first", "last", "count"),
    [
        ("paper_test", 0, 999, 1000),
        ("paper_early_stopping", 9500, 9999, 500),
        ("paper_landscape", 9900, 9999, 100),
        ("paper_clean", 0, 9999, 10000),
    ],
)
def test_the_sets_of_the_paper_are_found_by_name(name: str, first: int, last: int, count: int) -> None:
    labels = torch.zeros(10000, dtype=torch.int64)
    places = torch.arange(10000).view(-1, 1, 1, 1) / 10000
    chosen = select({"test": ImageSet(places, labels, "toy test", 1)}, name)
    assert len(chosen) == count
    assert (chosen.images[0] * 10000).round().item() == first
    assert (chosen.images[-1] * 10000).round().item() == last


def test_every_named_set_can_be_read() -> None:
    assert all(parse_split(name).source in ("train", "test") for name in PAPER_SPLITS)
