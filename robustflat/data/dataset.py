"""The `dataset` node of a configuration: a source, the splits to train and test on, and how batches are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from robustflat.data.images import Augmentation, BatchStream, ImagePool, ImageSet, checked_augmentations
from robustflat.data.mixture import ExtraSource, MixedStream
from robustflat.data.sources import Source
from robustflat.data.splits import parse_split, select, shared_examples
from robustflat.errors import DataError, UserError, require_one_of, require_range
from robustflat.rng import Streams

NORMS = ("linf", "l2", "l1")


class Dataset:
    """A data set as experiments use it. Images are loaded when they are first needed, once.

    >>> from robustflat.data.sources import Synthetic
    >>> source = Synthetic(classes=3, size=4, channels=1, count=20)
    >>> data = Dataset(source=source, classes=3, channels=1, mean=[0.5], std=[0.25], test="test[:5]")
    >>> len(data.train), len(data.test), data.split("train[-4:]").name
    (20, 5, 'synthetic train[-4:]')

    Args:
        source: called once, gives the image sets by name; see `robustflat.data.sources`.
        classes: number of classes the source must have.
        channels: number of channels its images must have.
        mean, std: of each channel, in [0, 1] units, for the model's first layer; images are never standardised
            here. `channel_statistics` computes them.
        train: split to train on, such as "train" or "train[:-1000]"; see `robustflat.data.splits`.
        test: split to evaluate on.
        augment: augmentations of training batches by name, applied in this order; an entry `None` is skipped.
        batch_size: training examples per step (labelled and extra ones together).
        eval_batch_size: examples per batch where a script passes over a whole split; evaluations and flatness measures
            have batch sizes of their own.
        threat: the customary threat models: norm ("linf", "l2", "l1") -> {"epsilon": ..., "step_size": ...}.
        subsets: splits that are customary for a purpose, by its name; configurations refer to them.
        device: where images live, such as "cpu" or "cuda".
        image_size: height and width that the images must have; `None`: any.
        extra: more labelled images to mix into training batches, such as pseudo-labelled or generated ones.
        extra_fraction: part of each training batch taken from `extra`, in (0, 1).
        steps_per_epoch: optimizer steps called an epoch when there is `extra`; `None`: as many as without it.

    Raises:
        UserError: for a value out of range, a split that cannot be read, `steps_per_epoch` without `extra`, or a device
            that is not there.
    """

    def __init__(  # noqa: PLR0913  (the keys of one flat configuration node)
        self,
        *,
        source: Source,
        classes: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        train: str = "train",
        test: str = "test",
        augment: Mapping[str, Augmentation | None] | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 250,
        threat: Mapping[str, Mapping[str, float]] | None = None,
        subsets: Mapping[str, str] | None = None,
        device: str = "cpu",
        image_size: int | None = None,
        extra: ExtraSource | None = None,
        extra_fraction: float = 0.5,
        steps_per_epoch: int | None = None,
    ) -> None:
        positive = {"classes": classes, "channels": channels, "batch_size": batch_size}
        for name, value in {**positive, "eval_batch_size": eval_batch_size}.items():
            require_range(f"dataset.{name}", value, low=1)
        require_range("dataset.extra_fraction", extra_fraction, low=0, high=1, low_open=True, high_open=True)
        if steps_per_epoch is not None:
            require_range("dataset.steps_per_epoch", steps_per_epoch, low=1)
            if extra is None:
                raise UserError("dataset.steps_per_epoch is for training with dataset.extra; take trainer.epochs.")
        self.mean, self.std = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
        self.threat = _checked_threat(threat)
        self.subsets = dict(subsets or {})
        self.device = _checked_device(device)
        for text in (train, test, *self.subsets.values()):
            parse_split(text)
        self.source, self.classes, self.channels, self.image_size = source, classes, channels, image_size
        self.train_split, self.test_split = train, test
        self.augment = checked_augmentations(augment)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.extra, self.extra_fraction, self.steps_per_epoch = extra, extra_fraction, steps_per_epoch

    @property
    def name(self) -> str:
        """What the source calls itself."""
        return self.source.name

    @cached_property
    def sets(self) -> Mapping[str, ImageSet]:
        """All sets of the source, on the CPU.

        Raises:
            DataError: if they cannot be loaded, or disagree with `classes`, `channels` or `image_size`.
        """
        sets = self.source()
        for data in sets.values():
            self._require_agreement(data)
        return sets

    @cached_property
    def train(self) -> ImageSet:
        """The training split, on the device."""
        return self.split(self.train_split)

    @cached_property
    def test(self) -> ImageSet:
        """The test split, on the device."""
        return self.split(self.test_split)

    @cached_property
    def extra_pool(self) -> ImagePool | None:
        """The extra training images, wherever their source keeps them; `None` without any.

        Raises:
            DataError: if they cannot be opened, or the source has no set "train".
        """
        if self.extra is None:
            return None
        pools = self.extra()
        if "train" not in pools:
            raise DataError(f"dataset.extra ({self.extra.name}) has no set train, only {', '.join(pools)}.")
        return pools["train"]

    def split(self, text: str) -> ImageSet:
        """Any split of the source, on the device; see `robustflat.data.splits`.

        Raises:
            UserError: for a text that cannot be read, an unknown set, no examples, or more than there are.
        """
        return select(self.sets, text).to(self.device)

    def train_stream(self, streams: Streams) -> BatchStream | MixedStream:
        """Endless augmented training batches of `batch_size`, with extra images where there are any.

        Raises:
            UserError: if extra and labelled images do not fit together.
        """
        if self.extra_pool is None:
            return self.train.stream(self.batch_size, self.augment, streams)
        return MixedStream(
            self.train,
            self.extra_pool,
            batch_size=self.batch_size,
            fraction=self.extra_fraction,
            augment=self.augment,
            streams=streams,
            steps=self.steps_per_epoch,
        )

    def describe(self) -> str:
        """Several lines for people: name, splits with counts, classes, image shape, memory, what stands out."""
        channels, height, width = self.train.image_shape
        lines = [
            f"data      {self.name}: {channels} x {height} x {width} {_type_name(self.train)}, "
            f"{self.classes} classes, on {self.device}",
            _line("train", self.train_split, self.train),
            _line("test", self.test_split, self.test),
        ]
        if self.extra_pool is not None:
            lines.append(f"  extra   {self.extra_pool.name}: {len(self.extra_pool)} images, "
                         f"{self.extra_fraction:.0%} of each batch")  # fmt: skip
        lines.append(f"  augment {', '.join(self.augment) or 'nothing'}; batches of {self.batch_size}")
        shared = shared_examples(self.sets, self.train_split, self.test_split)
        if shared:
            lines.append(f"  NOTE    {shared} of the {len(self.test)} test examples are also trained on.")
        if self.extra_pool is None and self.batch_size > len(self.train):
            lines.append(f"  NOTE    batch_size={self.batch_size} exceeds the training set: each step sees all of it.")
        return "\n".join(lines)

    def _require_agreement(self, data: ImageSet) -> None:
        channels, height, width = data.image_shape
        if data.classes != self.classes:
            raise DataError(
                f"dataset.classes={self.classes}, but {data.name} has {data.classes} classes. "
                f"Set dataset.classes={data.classes}, or choose the data you meant."
            )
        if channels != self.channels:
            raise DataError(
                f"dataset.channels={self.channels}, but images of {data.name} have {channels}. "
                f"Set dataset.channels={channels} (with mean and std to match), or choose the data you meant."
            )
        if self.image_size is not None and (height, width) != (self.image_size, self.image_size):
            raise DataError(
                f"dataset.image_size={self.image_size}, but images of {data.name} have {height} x {width} pixels."
            )


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != channels:
        raise UserError(f"dataset.{name} has {len(numbers)} values, but dataset.channels={channels}.")
    for number in numbers:
        require_range(
            f"dataset.{name}", number, low=0, high=1, low_open=name == "std", hint="Pixels are in [0, 1] here."
        )
    return numbers


def _checked_threat(threat: Mapping[str, Mapping[str, float]] | None) -> dict[str, dict[str, float]]:
    checked = {norm: dict(values) for norm, values in (threat or {}).items()}
    for norm, values in checked.items():
        require_one_of("A norm of dataset.threat", norm, NORMS)
        for key, value in values.items():
            require_range(f"dataset.threat.{norm}.{key}", value, low=0, high=math.inf, low_open=True, high_open=True)
    return checked


def _checked_device(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device} is none that PyTorch knows; use cpu, cuda or cuda:0.") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={device}, but PyTorch finds {torch.cuda.device_count()} CUDA devices here. Use device=cpu."
        )
    if chosen.type not in ("cpu", "cuda", "mps") or (chosen.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"device={device} is not there or not supported; use cpu, cuda or cuda:0.")
    return chosen


def _type_name(data: ImageSet) -> str:
    return str(data.images.dtype).removeprefix("torch.")


def _line(role: str, split: str, data: ImageSet) -> str:
    counts = data.class_counts()
    mebibytes = data.images.numel() * data.images.element_size() / 2**20
    return (
        f"  {role:<7} {split}: {len(data)} images, {int(counts.min())}-{int(counts.max())} per class, "
        f"{mebibytes:.1f} MiB"
    )
