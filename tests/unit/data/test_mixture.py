"""Batches of labelled and extra images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustflat.data.images import ImageSet, sample_digest
from robustflat.data.mixture import GeneratedImages, MappedImages, MixedStream
from robustflat.errors import DataError, UserError
from robustflat.rng import Streams


def constant(count: int, first: int, name: str, classes: int = 5) -> ImageSet:
    """Image i is the constant first + i."""
    images = (torch.arange(count, dtype=torch.uint8) + first).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    return ImageSet(images, torch.arange(count) % classes, name, classes)


def stream(streams: Streams | None = None, labelled: int = 50, **changes: Any) -> MixedStream:
    settings: dict[str, Any] = {"batch_size": 10, "fraction": 0.7, "augment": None, **changes}
    return MixedStream(
        constant(labelled, 0, "labelled"), constant(100, 100, "extra"), streams=streams or Streams(0), **settings
    )


def rows(x: Tensor) -> list[int]:
    return (x[:, 0, 0, 0] * 255).round().int().tolist()


def test_every_batch_has_the_fraction_asked_for_and_keeps_its_labels() -> None:
    mixed = stream()
    for _ in range(20):
        batch = next(mixed)
        found = rows(batch.x)
        assert sum(row >= 100 for row in found) == 7
        assert batch.y.tolist() == [row % 5 for row in found]


@pytest.mark.parametrize(
    ("batch_size", "fraction", "extra"), [(128, 0.7, 89), (128, 0.5, 64), (10, 0.7, 7), (3, 0.4, 1)]
)
def test_the_extra_part_is_rounded_down_as_in_the_released_code(batch_size: int, fraction: float, extra: int) -> None:
    assert stream(labelled=100, batch_size=batch_size, fraction=fraction).num_extra == extra


def test_labelled_images_are_visited_once_before_any_returns() -> None:
    mixed = stream(fraction=0.5)
    seen = [row for _ in range(10) for row in rows(next(mixed).x) if row < 100]
    assert sorted(seen) == list(range(50))


def test_both_kinds_occur_at_every_place_of_the_batch() -> None:
    """An attack on the first half of a batch must meet both."""
    mixed = stream(fraction=0.5)
    extra = torch.tensor([[row >= 100 for row in rows(next(mixed).x)] for _ in range(200)]).float().mean(0)
    assert ((extra - 0.5).abs() < 5 * (0.25 / 200) ** 0.5).all()


def test_the_seed_decides_which_extra_images_are_drawn() -> None:
    one, again, other = (sorted(row for row in rows(next(stream(Streams(seed))).x) if row >= 100) for seed in (0, 0, 1))
    assert one == again != other


def test_an_epoch_is_as_long_as_without_extra_images() -> None:
    assert len(stream()) == 5
    assert len(stream(steps=391)) == 391


@pytest.mark.parametrize("before", [0, 3, 12])
def test_a_resumed_stream_goes_on_with_the_very_same_batches(before: int) -> None:
    def noise(x: Tensor, generator: torch.Generator) -> Tensor:
        return (x + 0.1 * torch.rand(x.shape, generator=generator)).clamp(0, 1)

    streams = Streams(5)
    mixed = stream(streams, augment={"noise": noise})
    for _ in range(before):
        next(mixed)
    saved, saved_streams = mixed.state_dict(), streams.state_dict()
    expected = [next(mixed) for _ in range(20)]
    resumed_streams = Streams(5)
    resumed = stream(resumed_streams, augment={"noise": noise})
    resumed.load_state_dict(saved)
    resumed_streams.load_state_dict(saved_streams)
    for batch in expected:
        again = next(resumed)
        assert torch.equal(batch.x, again.x)
        assert torch.equal(batch.y, again.y)


def test_the_state_of_a_plain_stream_is_refused() -> None:
    plain = constant(50, 0, "labelled").stream(10, None, Streams(0))
    with pytest.raises(UserError, match="without extra data"):
        stream().load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.0}, r"extra_fraction must lie in \(0, 1\), got 0.0"),
        ({"fraction": 1.0}, "extra_fraction must lie in"),
        ({"batch_size": 1}, "batch_size must lie in"),
        ({"fraction": 0.05}, "has 10 labelled and 0 extra examples"),
        ({"batch_size": 200, "fraction": 0.5}, "has 100 labelled and 100 extra examples; .* labelled has 50"),
        ({"steps": 0}, "steps_per_epoch must lie in"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream(**changes)


def test_sets_that_do_not_fit_together_are_refused() -> None:
    settings: dict[str, Any] = {"batch_size": 10, "fraction": 0.5, "augment": None, "streams": Streams(0)}
    with pytest.raises(UserError, match="labelled has 5 classes, but extra has 6"):
        MixedStream(constant(50, 0, "labelled"), constant(9, 0, "extra", classes=6), **settings)
    small = ImageSet(torch.zeros(9, 3, 2, 2, dtype=torch.uint8), torch.zeros(9).long(), "extra", 5)
    with pytest.raises(UserError, match=r"labelled have shape \(3, 4, 4\), those of extra \(3, 2, 2\)"):
        MixedStream(constant(50, 0, "labelled"), small, **settings)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("first", [True, False])
def test_generated_images_are_taken_from_the_file_by_index(tmp_path: Path, writer: Any, first: bool) -> None:
    nhwc = np.random.default_rng(0).integers(0, 256, (20, 5, 4, 3), dtype=np.uint8)
    writer(tmp_path / "1m.npz", image=nhwc.transpose(0, 3, 1, 2) if first else nhwc, label=np.arange(20) % 5)
    pool = GeneratedImages(str(tmp_path / "1m.npz"), classes=5)()["train"]
    indices = torch.tensor([3, 19, 3])
    images, labels = pool.take(indices)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), nhwc[[3, 19, 3]])
    assert labels.tolist() == [3, 4, 3]
    assert len(pool) == 20


def test_uncompressed_generated_images_stay_on_disk(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", image=np.zeros((20, 5, 4, 3), np.uint8), label=np.zeros(20, int))
    pool = GeneratedImages(str(tmp_path / "x.npz"), classes=5)()["train"]
    assert isinstance(pool, MappedImages)
    assert isinstance(pool._images, np.memmap)


def test_images_and_labels_may_lie_in_two_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((20, 4, 4, 3), 9, np.uint8))
    np.save(tmp_path / "y.npy", np.arange(20)[:, None] % 5)
    pool = GeneratedImages(str(tmp_path / "x.npy"), labels=str(tmp_path / "y.npy"), classes=5)()["train"]
    mixed = MixedStream(constant(50, 0, "labelled"), pool, batch_size=4, fraction=0.5, augment=None, streams=Streams(0))
    assert rows(next(mixed).x).count(9) >= 2


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((6, 4, 4, 3), np.float32), np.zeros(6, int), "must be uint8 with four axes, got float32"),
        (np.zeros((6, 4, 4, 3), np.uint8), np.zeros(5, int), "6 images and 5 labels"),
        (np.zeros((6, 4, 4, 3), np.uint8), np.full(6, 5), r"labels from 5 to 5; allowed 0\.\.4"),
        (np.zeros((6, 4, 4), np.uint8), np.zeros(6, int), "four axes"),
    ],
)
def test_files_that_are_no_extra_data_are_refused(tmp_path: Path, images: Any, labels: Any, message: str) -> None:
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    with pytest.raises(DataError, match=message):
        GeneratedImages(str(tmp_path / "x.npz"), classes=5)()


def test_files_of_another_kind_are_refused_by_their_ending() -> None:
    with pytest.raises(UserError, match=r"x\.h5: the ending must be one of \.npy, \.npz, got '\.h5'"):
        GeneratedImages("x.h5", classes=5)
    with pytest.raises(UserError, match=r"y\.txt: the ending must be one of"):
        GeneratedImages("x.npy", labels="y.txt", classes=5)


def test_a_digest_tells_pools_apart_by_count_labels_and_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 4, 4, 3), dtype=np.uint8)
    labels = torch.arange(3000) % 10

    def of(images: Any, labels: Tensor = labels) -> str:
        return sample_digest(MappedImages(images, labels, name="more", classes=10))

    same = of(pixels.copy())
    assert of(pixels) == same and len(same) == 16
    changed = pixels.copy()
    changed[1500] += 1  # every third image is looked at
    assert len({same, of(changed), of(pixels, labels.flip(0)), of(pixels[:2999], labels[:2999])}) == 4
