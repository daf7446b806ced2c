"""Image sets as tensors on the device: subsets, ordered batches, and the endless stream that training reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, overload

import torch
from torch import Tensor

from robustflat.errors import DataError, UserError, require_range
from robustflat.rng import Streams
from robustflat.types import Batch

Augmentation: TypeAlias = Callable[..., Any]
"""(x (B, C, H, W) in [0, 1], generator) -> x; with attribute `mixes_labels = True` instead
(x, y, classes, generator) -> (x, y as probabilities (B, K))."""


class ImagePool(Protocol):
    """A store of labelled images from which rows can be taken by index; not necessarily in memory."""

    @property
    def name(self) -> str:
        """What the images are called in messages."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes K."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) as stored (uint8, or float32 in [0, 1]) and labels int64 (B,) at `indices`."""
        ...


SAMPLED = 1000
"""Images of a pool whose pixels `sample_digest` reads; pools may be larger than memory."""


def sample_digest(pool: ImagePool) -> str:
    """SHA-256 of the number of images and of `SAMPLED` of them, evenly spaced, with labels: 16 hexadecimal digits."""
    count = min(len(pool), SAMPLED)
    images, labels = pool.take(torch.arange(count) * len(pool) // count)
    found = hashlib.sha256(f"{len(pool)} {tuple(images.shape)} {images.dtype}".encode())
    for rows in (images, labels):
        found.update(rows.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def to_unit_range(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 k becomes the float nearest to k/255; float32 stays as it is."""
    if images.dtype != torch.uint8:
        return images.float()
    # CUDA divides by a Python number through its reciprocal, which is off by one bit for some k; by a tensor it
    # divides exactly, so images are the same bits on every device.
    return images.float().div_(torch.full((), 255.0, device=images.device))


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Labelled images of one split, all on one device.

    >>> zeros = ImageSet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), name="zeros", classes=4)
    >>> len(zeros), len(zeros.subset(slice(1, 3))), zeros.batches(3)[1].x.shape
    (4, 2, torch.Size([1, 3, 8, 8]))

    Args:
        images: uint8 (N, C, H, W), or floating point in [0, 1] where the source is not 8-bit (kept as float32).
        labels: whole numbers (N,) in 0..classes-1 (kept as int64).
        name: what the set is called in messages and tables, such as "cifar10 test".
        classes: number of classes K, which may be more than occur.
        class_names: K names, or empty.

    Raises:
        DataError: for another shape, type or range, lengths that differ, or a label outside 0..K-1.
    """

    images: Tensor
    labels: Tensor
    name: str
    classes: int
    class_names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        _check_images(self.images, self.name)
        _check_labels(self.labels, len(self.images), self.name, self.classes)
        if self.class_names and len(self.class_names) != self.classes:
            raise DataError(f"{self.name}: {len(self.class_names)} class names for {self.classes} classes.")
        if self.images.is_floating_point():
            object.__setattr__(self, "images", self.images.float())
        object.__setattr__(self, "labels", self.labels.to(self.images.device, torch.int64))
        object.__setattr__(self, "class_names", tuple(self.class_names))

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.images.shape))
        return f"ImageSet({self.name!r}: {shape} {self.images.dtype}, {self.classes} classes, {self.device})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where images and labels live."""
        return self.images.device

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on `device`; the very same object if it is there already."""
        images = self.images.to(device)  # itself where "cuda" is cuda:0
        return self if images is self.images else replace(self, images=images, labels=self.labels.to(device))

    def subset(self, rows: slice | Tensor, name: str | None = None) -> ImageSet:
        """The examples that `rows` picks: a slice (any step) or an index tensor int64 (M,), in its order.

        A slice with a positive step shares memory with this set.
        """
        if isinstance(rows, slice) and (rows.step or 1) < 0:
            rows = torch.tensor(range(len(self))[rows], dtype=torch.int64)
        if isinstance(rows, Tensor):
            rows = rows.to(self.device)
        return replace(self, images=self.images[rows], labels=self.labels[rows], name=name or self.name)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Stored images and labels at `indices` int64 (B,); see `ImagePool`."""
        indices = indices.to(self.device)
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def digest(self) -> str:
        """SHA-256 of images (shape, type, values) and labels, 16 hexadecimal digits: which data this is."""
        found = hashlib.sha256(f"{tuple(self.images.shape)} {self.images.dtype}".encode())
        chunks = [self.images[start : start + 4096] for start in range(0, len(self), 4096)]
        for rows in (*chunks, self.labels):
            found.update(rows.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def class_counts(self) -> Tensor:
        """Number of examples of each class, int64 (K,), on the CPU."""
        return torch.bincount(self.labels.cpu(), minlength=self.classes)

    def batches(self, batch_size: int) -> Batches:
        """The set in order, un-augmented, in batches; the last one may be smaller.

        Raises:
            UserError: if `batch_size` is below 1.
        """
        require_range("batch_size", batch_size, low=1)
        return Batches(self, batch_size)

    def stream(
        self, batch_size: int, augment: Mapping[str, Augmentation | None] | None, streams: Streams
    ) -> BatchStream:
        """Endless shuffled and augmented batches for training; see `BatchStream`."""
        return BatchStream(self, batch_size=batch_size, augment=augment, streams=streams)


class Batches(Sequence[Batch]):
    """The ordered batches of a set; each is converted to float32 when it is asked for, so none is stored."""

    def __init__(self, data: ImageSet, batch_size: int) -> None:
        self.data = data
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start = range(0, len(self.data), self.batch_size)[index]
        rows = slice(start, start + self.batch_size)
        return Batch(to_unit_range(self.data.images[rows]), self.data.labels[rows])


class BatchStream(Iterator[Batch]):
    """Endless batches: a fresh permutation each epoch, augmented, the incomplete last batch left out.

    A set smaller than `batch_size` gives one batch of all of it. `len(stream)` is the number of batches of an
    epoch. Draws come from `streams["shuffle"]` and `streams["augment"]`; with their state saved beside
    `state_dict`, a resumed stream goes on with the very batches the interrupted one would have given.

    Args:
        data: the training set.
        batch_size: examples of a batch, >= 1.
        augment: augmentations by name, applied in the order of the mapping; an entry `None` is skipped.
        streams: where randomness comes from; it should live on the device of the images.

    Raises:
        UserError: if `batch_size` is below 1, the set is empty, or an augmentation cannot be called.
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        batch_size: int,
        augment: Mapping[str, Augmentation | None] | None,
        streams: Streams,
    ) -> None:
        require_range("batch_size", batch_size, low=1)
        if len(data) == 0:
            raise UserError(f"{data.name} has no examples to train on.")
        self.data = data
        self.batch_size = min(batch_size, len(data))
        self.augment = checked_augmentations(augment)
        self.streams = streams
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __next__(self) -> Batch:
        images, labels = self.data.take(self.next_indices())
        batch = Batch(to_unit_range(images), labels)
        return augmented(batch, self.augment, self.data.classes, self.streams["augment"])

    def next_indices(self) -> Tensor:
        """Rows of the next batch, int64 (B,) on the device of the images; moves the stream on."""
        if self._position + self.batch_size > len(self._order):
            generator = self.streams["shuffle"]
            order = torch.randperm(len(self.data), generator=generator, device=generator.device)
            self._order, self._position = order.to(self.data.device), 0
        indices = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        return indices

    def state_dict(self) -> dict[str, object]:
        """The current permutation int64 (N,) and the position in it; the streams are saved by their owner."""
        return {"order": self._order.cpu().clone(), "position": self._position}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where `state_dict` saw a stream over the same set.

        Raises:
            UserError: if the state belongs to a set of another size.
        """
        order = state["order"]
        assert isinstance(order, Tensor)
        if len(order) not in (0, len(self.data)):
            raise UserError(
                f"The saved position belongs to a training set of {len(order)} examples, but "
                f"{self.data.name} has {len(self.data)}. Resume with the data the run was started with."
            )
        self._order, self._position = order.to(self.data.device), int(str(state["position"]))


def checked_augmentations(augment: Mapping[str, Augmentation | None] | None) -> dict[str, Augmentation]:
    """The augmentations that are switched on, in order.

    Raises:
        UserError: if an entry is neither `None` nor callable.
    """
    chosen = {name: entry for name, entry in (augment or {}).items() if entry is not None}
    for name, entry in chosen.items():
        if not callable(entry):
            raise UserError(
                f"augment.{name} must be an augmentation (a _target_ of robustflat.data.augment) or null, "
                f"got {entry!r}."
            )
    return chosen


def augmented(batch: Batch, augment: Mapping[str, Augmentation], classes: int, generator: torch.Generator) -> Batch:
    """Apply augmentations in order to x (B, C, H, W); those that mix labels also turn y into (B, K)."""
    x, y = batch
    for entry in augment.values():
        if getattr(entry, "mixes_labels", False):
            x, y = entry(x, y, classes, generator)
        else:
            x = entry(x, generator)
    return Batch(x, y)


def channel_statistics(data: ImageSet, chunk: int = 4096) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of each channel over all pixels, in [0, 1] units.

    Args:
        data: a set with at least one image.
        chunk: images converted at a time, which bounds the memory.

    Raises:
        DataError: if the set is empty.
    """
    if len(data) == 0:
        raise DataError(f"{data.name} has no images, so no mean and no standard deviation.")
    total = torch.zeros(data.image_shape[0], dtype=torch.float64, device=data.device)
    squares = torch.zeros_like(total)
    for batch in data.batches(chunk):
        x = batch.x.double()
        total += x.sum(dim=(0, 2, 3))
        squares += x.square().sum(dim=(0, 2, 3))
    pixels = data.images.numel() // data.image_shape[0]
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _check_images(images: Tensor, name: str) -> None:
    if images.ndim != 4 or min(images.shape[1:]) < 1:
        raise DataError(f"{name}: images must have shape (N, C, H, W), got {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise DataError(f"{name}: images must be uint8, or floating point in [0, 1]; got {images.dtype}.")
    if images.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(images))
    if not (low >= 0.0 and high <= 1.0):  # also true for not-a-number
        raise DataError(
            f"{name}: floating-point images must lie in [0, 1], got values from {low:g} to {high:g}. "
            "Divide 0..255 images by 255 or store them as uint8."
        )


def _check_labels(labels: Tensor, count: int, name: str, classes: int) -> None:
    require_range("classes", classes, low=1)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            f"{name}: labels must be whole numbers of shape (N,), got {labels.dtype} {tuple(labels.shape)}."
        )
    if len(labels) != count:
        raise DataError(f"{name}: {count} images, but {len(labels)} labels.")
    if count == 0:
        return
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise DataError(f"{name}: found label {wrong}, but {classes} classes allow only 0..{classes - 1}.")
