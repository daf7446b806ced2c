"""The `dataset` node: loaded once, checked against its source, described for people."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import pytest
import torch

from robustflat.data.dataset import Dataset
from robustflat.data.images import ImageSet
from robustflat.data.mixture import MixedStream
from robustflat.data.sources import Digits, Synthetic
from robustflat.errors import DataError, UserError
from robustflat.rng import Streams


class Counting:
    """A source that counts how often it is loaded."""

    name = "counting"

    def __init__(self) -> None:
        self.loads = 0

    def __call__(self) -> Mapping[str, ImageSet]:
        self.loads += 1
        return Synthetic(classes=4, size=6, channels=3, count=40, test_count=20)()


def dataset(**changes: Any) -> Dataset:
    settings: dict[str, Any] = {
        "source": Synthetic(classes=4, size=6, channels=3, count=40, test_count=20),
        "classes": 4,
        "channels": 3,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "batch_size": 8,
    }
    return Dataset(**{**settings, **changes})


def test_nothing_is_loaded_before_it_is_needed_and_then_once() -> None:
    source = Counting()
    data = dataset(source=source)
    assert source.loads == 0
    assert (len(data.train), len(data.test), len(data.split("test[:5]"))) == (40, 20, 5)
    data.describe()
    data.train_stream(Streams(0))
    assert source.loads == 1
    assert data.train is data.train


def test_the_configured_splits_are_used() -> None:
    data = dataset(train="train[:-10]", test="train[-10:]")
    whole = data.split("train")
    assert torch.equal(torch.cat([data.train.images, data.test.images]), whole.images)


def test_the_stream_trains_on_the_training_split_with_the_configured_augmentation() -> None:
    def black(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros_like(x)

    data = dataset(train="train[:16]", augment={"black": black, "off": None})
    stream = data.train_stream(Streams(0))
    assert len(stream) == 2
    batch = next(stream)
    assert batch.x.shape == (8, 3, 6, 6)
    assert batch.x.max() == 0


def test_classes_that_disagree_are_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"dataset\.classes=10, but synthetic train has 4 classes"):
        _ = dataset(classes=10).train


def test_channels_that_disagree_are_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"dataset\.channels=1, but images of synthetic train have 3"):
        _ = dataset(channels=1, mean=[0.5], std=[0.5]).train


def test_image_sizes_that_disagree_are_refused_with_both_numbers() -> None:
    assert len(dataset(image_size=6).train) == 40
    with pytest.raises(DataError, match=r"dataset\.image_size=32, but images of synthetic train have 6 x 6"):
        _ = dataset(image_size=32).train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [0.5]}, r"dataset\.mean has 1 values, but dataset\.channels=3"),
        ({"std": [0.5, 0.0, 0.5]}, r"dataset\.std must lie in \(0, 1\], got 0.0"),
        ({"mean": [125.3, 123.0, 113.9]}, r"dataset\.mean must lie in \[0, 1\], got 125.3. Pixels are in"),
        ({"batch_size": 0}, r"dataset\.batch_size must lie in"),
        ({"eval_batch_size": 0}, r"dataset\.eval_batch_size must lie in"),
        ({"classes": 0}, r"dataset\.classes must lie in"),
        ({"train": "train[:"}, r"Cannot read the split 'train\[:'"),
        ({"threat": {"linff": {"epsilon": 0.1}}}, "norm of dataset.threat must be one of l1, l2, linf.*'linf'"),
        ({"threat": {"linf": {"epsilon": -0.1}}}, r"dataset\.threat\.linf\.epsilon must lie in"),
        ({"device": "gpu"}, "device=gpu is none that PyTorch knows"),
        ({"device": "cuda:99"}, r"device=cuda:99, but PyTorch finds \d+ CUDA devices here"),
        ({"device": "meta"}, "device=meta is not there or not supported"),
        ({"extra_fraction": 1.0}, r"dataset\.extra_fraction must lie in \(0, 1\), got 1.0"),
        ({"steps_per_epoch": 3}, r"dataset\.steps_per_epoch is for training with dataset\.extra"),
        ({"augment": {"crop": 4}}, r"augment\.crop must be an augmentation"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_loaded(changes: dict[str, Any], message: str) -> None:
    source = Counting()
    with pytest.raises(UserError, match=message):
        dataset(source=source, **changes)
    assert source.loads == 0


def test_more_test_examples_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="asks for 1000 examples, but test has only 20"):
        _ = dataset(test="test[:1000]").test


def test_the_threat_model_is_kept() -> None:
    data = dataset(threat={"linf": {"epsilon": 0.15, "step_size": 0.04}})
    assert data.threat["linf"]["epsilon"] == 0.15


def test_the_description_tells_what_will_be_used() -> None:
    text = dataset(test="test[:12]").describe()
    for expected in ("synthetic", "3 x 6 x 6 uint8", "4 classes", "40 images", "test[:12]: 12 images", "batches of 8"):
        assert expected in text
    assert "NOTE" not in text


def test_the_description_warns_of_test_examples_that_are_trained_on() -> None:
    text = dataset(train="train[:30]", test="train[20:]").describe()
    assert "10 of the 20 test examples are also trained on" in text


def test_the_description_warns_of_a_batch_larger_than_the_training_set() -> None:
    assert "batch_size=64 exceeds the training set" in dataset(batch_size=64).describe()


def test_extra_images_are_mixed_into_training_batches() -> None:
    extra = Synthetic(classes=4, size=6, channels=3, count=100, seed=1)
    data = dataset(extra=extra, extra_fraction=0.5, steps_per_epoch=7)
    stream = data.train_stream(Streams(0))
    assert isinstance(stream, MixedStream)
    assert (len(stream), stream.num_extra) == (7, 4)
    assert next(stream).x.shape == (8, 3, 6, 6)
    assert "100 images, 50% of each batch" in data.describe()


def test_an_extra_source_without_training_images_is_refused() -> None:
    class TestOnly(Counting):
        def __call__(self) -> Mapping[str, ImageSet]:
            return {"test": super().__call__()["test"]}

    with pytest.raises(DataError, match=r"dataset\.extra \(counting\) has no set train, only test"):
        dataset(extra=TestOnly()).train_stream(Streams(0))


def test_the_constructor_is_a_schema_that_a_configuration_can_be_checked_against() -> None:
    hints = get_type_hints(Dataset.__init__)
    parameters = inspect.signature(Dataset).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY and p.name in hints for p in parameters)


def test_digits_have_the_statistics_of_the_default_configuration() -> None:
    from robustflat.data.images import channel_statistics

    data = Dataset(source=Digits(), classes=10, channels=1, mean=[0.3053], std=[0.3760])
    mean, std = channel_statistics(data.train)
    assert mean == pytest.approx(data.mean, abs=1e-3)
    assert std == pytest.approx(data.std, abs=1e-3)
