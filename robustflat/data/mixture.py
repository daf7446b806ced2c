"""Training batches that mix a labelled set with many more images, which need not fit into memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustflat.data.arrays import channel_axis, image_keys, label_keys, open_array, open_labels
from robustflat.data.images import (
    Augmentation,
    BatchStream,
    ImagePool,
    ImageSet,
    augmented,
    checked_augmentations,
    to_unit_range,
)
from robustflat.errors import DataError, UserError, require_one_of, require_range
from robustflat.rng import Streams, generator_for
from robustflat.types import Batch


class ExtraSource(Protocol):
    """Anything that gives an image pool called "train" when it is called: every source, and `GeneratedImages`."""

    @property
    def name(self) -> str:
        """What the data set is called."""
        ...

    def __call__(self) -> Mapping[str, ImagePool]:
        """Open the pools."""
        ...


class MappedImages:
    """Labelled uint8 images whose pixels stay on disk until they are taken; an `ImagePool`.

    Args:
        images: uint8, four axes, usually memory-mapped.
        labels: int64 (N,).
        name: for messages.
        classes: number of classes K.
        channels_first: whether `images` is N x C x H x W; otherwise N x H x W x C.

    Raises:
        DataError: for another type or shape, other lengths, or a label outside 0..K-1.
    """

    def __init__(
        self, images: NDArray[Any], labels: Tensor, *, name: str, classes: int, channels_first: bool = False
    ) -> None:
        if images.ndim != 4 or images.dtype != np.uint8:
            raise DataError(f"{name}: extra images must be uint8 with four axes, got {images.dtype} {images.shape}.")
        if len(images) != len(labels) or len(images) == 0:
            raise DataError(f"{name}: {len(images)} images and {len(labels)} labels; need one label per image.")
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise DataError(
                f"{name}: labels from {int(labels.min())} to {int(labels.max())}; allowed 0..{classes - 1}."
            )
        _expect_random_reads(images)
        self._images = images
        self._labels = labels
        self._channels_first = channels_first
        self.name = name
        self.classes = classes

    def __len__(self) -> int:
        return len(self._labels)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Read images uint8 (B, C, H, W) and labels int64 (B,) at `indices` int64 (B,), on the CPU."""
        indices = indices.cpu()
        rows = torch.from_numpy(np.asarray(self._images[indices.numpy()]))
        return rows if self._channels_first else rows.permute(0, 3, 1, 2), self._labels[indices]


def _expect_random_reads(images: NDArray[Any]) -> None:
    """Tell the system not to read ahead in a memory-mapped file: neighbours of a random row are not needed.

    With 1 M images this kept 229 MiB instead of 1.6 GiB of the file in memory.
    """
    mapped = getattr(images, "_mmap", None)  # of numpy.memmap
    if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)


class GeneratedImages:
    """Extra training images in an .npz (or a pair of .npy) of uint8 images and labels, such as a diffusion model's.

    Called, it gives one pool, "train". Arrays stored without compression are memory-mapped, so a file of many
    gigabytes costs no memory; compressed ones are unpacked into memory.

    Args:
        images: .npz or .npy file with uint8 images.
        labels: file with their labels; default: the same .npz.
        classes: number of classes.
        layout: "nhwc", "nchw" or "auto".
        name: what the extra data is called.
        images_key, labels_key: names of the arrays in the .npz; default: customary ones are tried.

    Raises:
        UserError: for an unknown layout, classes below 1, or files with another ending.
    """

    def __init__(
        self,
        images: str,
        *,
        labels: str | None = None,
        classes: int,
        layout: str = "auto",
        name: str = "generated",
        images_key: str | None = None,
        labels_key: str | None = None,
    ) -> None:
        require_one_of("layout", layout, ("auto", "nhwc", "nchw"))
        require_range("classes", classes, low=1)
        self.images = Path(images).expanduser()
        self.labels = Path(labels or images).expanduser()
        for path in (self.images, self.labels):
            require_one_of(f"{path}: the ending", path.suffix, (".npy", ".npz"))
        self.classes, self.layout, self.name = classes, layout, name
        self.images_key, self.labels_key = images_key, labels_key

    def __call__(self) -> Mapping[str, ImagePool]:
        """Open the pool "train".

        Raises:
            DataError: for a missing or damaged file, or content that is not images and labels.
        """
        images = open_array(self.images, (self.images_key,) if self.images_key else image_keys("train"))
        labels = open_labels(self.labels, (self.labels_key,) if self.labels_key else label_keys("train"))
        first = images.ndim == 4 and channel_axis(self.images, images, self.layout) == 1
        name = f"{self.name} train"
        return {"train": MappedImages(images, labels, name=name, classes=self.classes, channels_first=first)}


class MixedStream(Iterator[Batch]):
    """Endless batches of labelled and extra images in a fixed ratio, in mixed order, augmented together.

    Of B examples, floor(B * fraction) come from `extra`, drawn with replacement; the others from the labelled set
    as in `BatchStream` (Carmon et al. 2019; the paper's code has fraction 0.7, its text 0.5). The draws of a step
    depend on the seed and the number of the step alone.

    Args:
        data: the labelled set; its device is that of the batches.
        extra: the other images, of the same shape and classes.
        batch_size: labelled and extra examples of a batch together, >= 2.
        fraction: part of a batch that comes from `extra`, in (0, 1).
        augment: as for `BatchStream`.
        streams: "shuffle" orders the labelled images, "augment" augments.
        steps: batches of an epoch, `len(stream)`; default: as many as the labelled set alone would give.

    Raises:
        UserError: for a value out of range, a batch that one of the two would not be part of, or sets that do not
            fit together.
    """

    def __init__(
        self,
        data: ImageSet,
        extra: ImagePool,
        *,
        batch_size: int,
        fraction: float,
        augment: Mapping[str, Augmentation | None] | None,
        streams: Streams,
        steps: int | None = None,
    ) -> None:
        require_range("batch_size", batch_size, low=2)
        require_range("extra_fraction", fraction, low=0, high=1, low_open=True, high_open=True)
        # The tiny addend keeps 10 * 0.7 from becoming 6 where the product falls just below a whole number.
        self.num_extra = int(batch_size * fraction + 1e-9)
        num_labelled = batch_size - self.num_extra
        if self.num_extra == 0 or num_labelled > len(data):
            raise UserError(
                f"A batch of {batch_size} with extra_fraction={fraction} has {num_labelled} labelled and "
                f"{self.num_extra} extra examples; there must be some of each, and {data.name} has {len(data)}."
            )
        _require_alike(data, extra)
        self.labelled = BatchStream(data, batch_size=num_labelled, augment=None, streams=streams)
        self.extra = extra
        self.batch_size = batch_size
        self.augment = checked_augmentations(augment)
        self.streams = streams
        self.steps = steps if steps is not None else max(1, len(data) // batch_size)
        require_range("steps_per_epoch", self.steps, low=1)
        self._step = 0

    def __len__(self) -> int:
        return self.steps

    def __next__(self) -> Batch:
        data = self.labelled.data
        # Drawn on the CPU from a generator of its own: pixels on disk need their indices here, and a generator on
        # the GPU would make every step wait for it.
        generator = generator_for(self.streams.seed, "extra", self._step)
        indices = torch.randint(len(self.extra), (self.num_extra,), generator=generator)
        order = torch.randperm(self.batch_size, generator=generator).to(data.device, non_blocking=True)
        self._step += 1
        images, labels = data.take(self.labelled.next_indices())
        more_images, more_labels = (t.to(data.device, non_blocking=True) for t in self.extra.take(indices))
        x = torch.cat([to_unit_range(images), to_unit_range(more_images)])[order]
        y = torch.cat([labels, more_labels])[order]
        return augmented(Batch(x, y), self.augment, data.classes, self.streams["augment"])

    def state_dict(self) -> dict[str, object]:
        """Position in the labelled set and number of steps so far."""
        return {"labelled": self.labelled.state_dict(), "step": self._step}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where `state_dict` saw a stream over the same sets.

        Raises:
            UserError: if the state belongs to a labelled set of another size, or to a stream without extra data.
        """
        labelled = state.get("labelled")
        if not isinstance(labelled, Mapping):
            raise UserError("The saved position belongs to training without extra data (dataset.extra).")
        self.labelled.load_state_dict(labelled)
        self._step = int(str(state["step"]))


def _require_alike(data: ImageSet, extra: ImagePool) -> None:
    if data.classes != extra.classes:
        raise UserError(f"{data.name} has {data.classes} classes, but {extra.name} has {extra.classes}.")
    images, _ = extra.take(torch.zeros(1, dtype=torch.int64))
    if tuple(images.shape[1:]) != data.image_shape:
        raise UserError(
            f"Images of {data.name} have shape {data.image_shape}, those of {extra.name} {tuple(images.shape[1:])}."
        )
