"""Image sets, ordered batches, and the endless training stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustflat.data.images import ImageSet, channel_statistics, to_unit_range
from robustflat.errors import DataError, UserError
from robustflat.rng import Streams


def numbered(count: int, classes: int = 3) -> ImageSet:
    """Image i is the constant i, so that every batch tells which examples it holds."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 3).clone()
    return ImageSet(images, torch.arange(count) % classes, "numbered train", classes)


def rows_of(x: Tensor) -> list[int]:
    return (x[:, 0, 0, 0] * 255).round().int().tolist()


def test_every_grey_value_becomes_the_float_nearest_to_k_over_255() -> None:
    exact = torch.tensor([k / 255 for k in range(256)], dtype=torch.float64).float()
    assert torch.equal(to_unit_range(torch.arange(256, dtype=torch.uint8)), exact)


def test_batches_cover_the_set_in_order_and_the_last_one_is_smaller() -> None:
    batches = numbered(10).batches(4)
    assert len(batches) == 3
    assert [rows_of(b.x) for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.cat([b.y for b in batches]).tolist() == [i % 3 for i in range(10)]
    assert rows_of(batches[-1].x) == [8, 9]
    assert [rows_of(b.x) for b in batches[1:]] == [[4, 5, 6, 7], [8, 9]]
    with pytest.raises(IndexError):
        batches[3]


def test_batches_can_be_walked_twice_with_the_same_result() -> None:
    batches = numbered(5).batches(2)
    assert all(torch.equal(a.x, b.x) for a, b in zip(batches, batches, strict=True))


def test_an_empty_set_has_no_batches() -> None:
    assert list(numbered(4).subset(slice(0, 0)).batches(2)) == []


@pytest.mark.parametrize("rows", [slice(2, 5), slice(None, None, 2), slice(-3, None), slice(8, 3, -2), slice(4, -1)])
def test_a_slice_picks_what_python_picks_from_a_list(rows: slice) -> None:
    subset = numbered(10).subset(rows)
    expected = list(range(10))[rows]
    assert subset.images[:, 0, 0, 0].tolist() == expected
    assert subset.labels.tolist() == [i % 3 for i in expected]


def test_an_index_tensor_picks_examples_in_its_order() -> None:
    subset = numbered(10).subset(torch.tensor([7, 0, 7]), name="chosen")
    assert subset.images[:, 0, 0, 0].tolist() == [7, 0, 7]
    assert subset.name == "chosen"


def test_a_forward_slice_shares_memory() -> None:
    data = numbered(10)
    assert data.subset(slice(2, 5)).images.data_ptr() == data.images[2:].data_ptr()


def test_float_images_are_kept_as_they_are() -> None:
    images = torch.rand(3, 1, 4, 4)
    data = ImageSet(images.double(), torch.zeros(3, dtype=torch.int32), "floats", 1)
    assert data.images.dtype == torch.float32
    assert data.labels.dtype == torch.int64
    assert torch.equal(data.batches(3)[0].x, images)


def test_moving_to_the_same_device_returns_the_same_object() -> None:
    data = numbered(3)
    assert data.to("cpu") is data


def test_a_set_describes_itself_in_one_line() -> None:
    assert repr(numbered(4)) == "ImageSet('numbered train': 4 x 2 x 3 x 3 torch.uint8, 3 classes, cpu)"


def test_class_counts_include_classes_that_do_not_occur() -> None:
    data = ImageSet(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 2, 2]), "few", 4)
    assert data.class_counts().tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2).long(), r"bad: images must have shape \(N, C, H, W\), got \(2, 3, 4\)"),
        (torch.zeros(2, 1, 4, 4).int(), torch.zeros(2).long(), "must be uint8, or floating point"),
        (torch.full((2, 1, 4, 4), 1.5), torch.zeros(2).long(), r"\[0, 1\], got values from 1.5 to 1.5"),
        (torch.full((2, 1, 4, 4), float("nan")), torch.zeros(2).long(), "got values from nan"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(3).long(), "2 images, but 3 labels"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1).long(), r"whole numbers of shape \(N,\)"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2), "whole numbers"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 2]), r"found label 2, but 2 classes allow only 0\.\.1"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([-1, 0]), "found label -1"),
    ],
)
def test_what_is_no_image_set_is_refused_by_name(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageSet(images, labels, "bad", 2)


def test_class_names_must_be_one_per_class() -> None:
    with pytest.raises(DataError, match="2 class names for 3 classes"):
        ImageSet(torch.zeros(1, 1, 2, 2), torch.zeros(1).long(), "bad", 3, ("a", "b"))


def test_batch_size_zero_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size must lie in"):
        numbered(3).batches(0)
    with pytest.raises(UserError, match="batch_size must lie in"):
        numbered(3).stream(0, None, Streams(0))


def test_an_epoch_visits_examples_at_most_once_and_drops_the_incomplete_batch() -> None:
    stream = numbered(10).stream(4, None, Streams(0))
    assert len(stream) == 2
    epochs = [[row for _ in range(2) for row in rows_of(next(stream).x)] for _ in range(3)]
    assert all(len(set(rows)) == 8 for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_images_keep_their_labels_when_shuffled() -> None:
    batch = next(numbered(30).stream(30, None, Streams(1)))
    assert [row % 3 for row in rows_of(batch.x)] == batch.y.tolist()


def test_every_example_is_equally_likely_to_be_dropped() -> None:
    stream = numbered(5).stream(4, None, Streams(0))
    missed = torch.zeros(5)
    for _ in range(2000):
        missed[list(set(range(5)) - set(rows_of(next(stream).x)))] += 1
    # 2000 draws with p = 1/5: standard deviation 18
    assert ((missed - 400).abs() < 5 * 18).all()


def test_a_set_smaller_than_the_batch_gives_one_batch_of_all_of_it() -> None:
    stream = numbered(3).stream(128, None, Streams(0))
    assert len(stream) == 1
    assert sorted(rows_of(next(stream).x)) == [0, 1, 2]
    assert sorted(rows_of(next(stream).x)) == [0, 1, 2]


def test_an_empty_training_set_is_refused() -> None:
    with pytest.raises(UserError, match="numbered train has no examples"):
        numbered(4).subset(slice(0, 0)).stream(2, None, Streams(0))


def test_the_order_depends_on_the_seed_alone() -> None:
    first, again, other = (next(numbered(50).stream(50, None, Streams(seed))) for seed in (3, 3, 4))
    assert rows_of(first.x) == rows_of(again.x) != rows_of(other.x)


def test_augmenting_does_not_change_the_order() -> None:
    plain = numbered(20).stream(4, None, Streams(0))
    noisy = numbered(20).stream(4, {"noise": add_noise}, Streams(0))
    for _ in range(8):
        assert torch.equal(next(plain).y, next(noisy).y)


def add_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return (x + 0.1 * torch.rand(x.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("before", [0, 1, 2, 5, 7])
def test_a_resumed_stream_goes_on_with_the_very_same_batches(before: int) -> None:
    streams = Streams(0)
    stream = numbered(10).stream(4, {"noise": add_noise}, streams)
    for _ in range(before):
        next(stream)
    saved, saved_streams = stream.state_dict(), streams.state_dict()
    expected = [next(stream) for _ in range(5)]

    resumed_streams = Streams(99)
    resumed = numbered(10).stream(4, {"noise": add_noise}, resumed_streams)
    next(resumed)
    resumed.load_state_dict(saved)
    resumed_streams.load_state_dict(saved_streams)
    for batch in expected:
        again = next(resumed)
        assert torch.equal(batch.x, again.x)
        assert torch.equal(batch.y, again.y)


def test_a_saved_state_does_not_change_when_the_stream_moves_on() -> None:
    stream = numbered(10).stream(4, None, Streams(0))
    next(stream)
    saved = stream.state_dict()
    order, position = saved["order"].tolist(), saved["position"]  # type: ignore[attr-defined]
    for _ in range(4):
        next(stream)
    assert saved["order"].tolist() == order  # type: ignore[attr-defined]
    assert saved["position"] == position


def test_a_state_of_another_set_is_refused() -> None:
    stream = numbered(10).stream(4, None, Streams(0))
    next(stream)
    with pytest.raises(UserError, match="training set of 10 examples, but numbered train has 8"):
        numbered(8).stream(4, None, Streams(0)).load_state_dict(stream.state_dict())


def test_augmentations_apply_in_the_order_of_the_mapping_and_none_is_skipped() -> None:
    def half(x: Tensor, generator: torch.Generator) -> Tensor:
        return x / 2

    def add(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + 0.5

    white = ImageSet(torch.ones(4, 1, 2, 2), torch.zeros(4).long(), "white", 1)
    assert next(white.stream(4, {"half": half, "off": None, "add": add}, Streams(0))).x.unique().tolist() == [1.0]
    assert next(white.stream(4, {"add": add, "half": half}, Streams(0))).x.unique().tolist() == [0.75]


class SwapHalf:
    """Mixes each example with the next one in equal parts."""

    mixes_labels = True

    def __call__(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        one_hot = torch.nn.functional.one_hot(y, classes).float()
        return (x + x.roll(1, 0)) / 2, (one_hot + one_hot.roll(1, 0)) / 2


def test_augmentations_that_mix_labels_receive_labels_and_number_of_classes() -> None:
    plain = next(numbered(6).stream(6, None, Streams(0)))
    mixed = next(numbered(6).stream(6, {"mix": SwapHalf()}, Streams(0)))
    assert mixed.y.shape == (6, 3)
    assert torch.allclose(mixed.y.sum(1), torch.ones(6))
    one_hot = torch.eye(3)[plain.y]
    assert torch.allclose(mixed.y, (one_hot + one_hot.roll(1, 0)) / 2)
    assert torch.allclose(mixed.x, (plain.x + plain.x.roll(1, 0)) / 2)


def test_an_augmentation_that_cannot_be_called_is_refused_by_name() -> None:
    entry: Any = {"padding": 4}
    with pytest.raises(UserError, match=r"augment\.crop must be an augmentation"):
        numbered(4).stream(2, {"crop": entry}, Streams(0))


def test_channel_statistics_are_those_of_all_pixels() -> None:
    images = torch.randint(0, 256, (50, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(ImageSet(images, torch.zeros(50).long(), "random", 1), chunk=7)
    pixels = images.double().permute(1, 0, 2, 3).reshape(3, -1) / 255
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-7)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-7)


def test_an_empty_set_has_no_channel_statistics() -> None:
    with pytest.raises(DataError, match="no images"):
        channel_statistics(numbered(3).subset(slice(0, 0)))


@pytest.mark.gpu
def test_images_are_the_same_bits_on_the_gpu() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_unit_range(values.cuda()).cpu(), to_unit_range(values))


@pytest.mark.gpu
def test_moving_to_cuda_twice_returns_the_same_object() -> None:
    data = numbered(3).to("cuda")
    assert data.to("cuda") is data


@pytest.mark.gpu
def test_a_stream_on_the_gpu_visits_every_example_once() -> None:
    stream = numbered(12).to("cuda").stream(4, None, Streams(0, "cuda"))
    assert sorted(row for _ in range(3) for row in rows_of(next(stream).x)) == list(range(12))
