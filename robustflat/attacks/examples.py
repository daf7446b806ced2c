"""Images and labels as a user has them (uint8 or float, NumPy or torch) into checked batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustflat.attacks.inputs import check_images
from robustflat.errors import UserError, require_range
from robustflat.models.precision import device_of, dtype_of
from robustflat.types import Batch, Forward

Array: TypeAlias = "Tensor | NDArray[Any]"
"""A torch tensor or a NumPy array."""


def batches_for(model: nn.Module, images: Array, labels: Array, *, batch_size: int = 128) -> list[Batch]:
    """Batches in the given order, on the model's device and in its floating-point type.

    Args:
        model: decides device and type.
        images: (N, C, H, W); floating point in [0, 1], or uint8 in 0..255, which are divided by 255.
        labels: integers (N,).
        batch_size: examples in a batch, >= 1; the last one may hold fewer.

    Returns:
        Batches with x (B, C, H, W) in [0, 1] and y int64 (B,).

    Raises:
        UserError: if the model is no module, there are no examples, or images or labels have a wrong shape, type or
            range.
    """
    require_range("batch_size", batch_size, low=1)
    require_module(model)
    x, y = _tensor("images", images), _tensor("labels", labels)
    if x.shape[:1] == (0,):
        raise UserError("There are no images: a measure needs at least one.")
    if y.is_floating_point() or y.ndim != 1:
        hint = " For one-hot labels give labels.argmax(1)." if y.ndim == 2 and y.shape[1] > 1 else ""
        raise UserError(f"labels must be integers of shape (N,), got {y.dtype} of shape {tuple(y.shape)}.{hint}")
    x = x.to(device_of(model))
    x = x.to(dtype_of(model)).div(255) if x.dtype == torch.uint8 else x
    y = y.to(device=x.device, dtype=torch.int64)
    check_images(x, y)
    if x.dtype != dtype_of(model):
        x = x.to(dtype_of(model))
    return [Batch(x[at : at + batch_size], y[at : at + batch_size]) for at in range(0, len(y), batch_size)]


def require_module(model: object) -> None:
    """Refuse what is no network.

    Raises:
        UserError: with its type.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"The model must be an object of a torch.nn.Module, got {type(model).__name__}.")


def _tensor(name: str, values: Array) -> Tensor:
    """`values` as a detached tensor, without copying where possible."""
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, np.ndarray) and values.dtype.kind in "uif" and values.dtype.itemsize <= 8:
        # Torch knows neither foreign byte order nor arrays that must not be written to, such as files read as needed.
        return torch.from_numpy(np.require(values, values.dtype.newbyteorder("="), ["C", "W"]))
    kind = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
    hint = " Join the batches of a loader by torch.cat." if hasattr(values, "dataset") else ""
    raise UserError(f"{name} must be a torch tensor or a NumPy array of numbers, got {kind}.{hint}")


class InFloat32(nn.Module):
    """A network of 16 bits behind float32 images and logits: half precision resolves neither small steps nor balls.

    Args:
        model: images in its own type -> logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype_of(model)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> float32 logits (B, K)."""
        logits: Tensor = self.model(x.to(self.dtype))
        return logits.float()


def searchable(model: nn.Module, batches: Sequence[Batch]) -> tuple[nn.Module, list[Batch]]:
    """The network and its examples; a network of 16 bits as `InFloat32`, its examples in float32."""
    if dtype_of(model).itemsize >= 4:
        return model, list(batches)
    return InFloat32(model), [Batch(batch.x.float(), batch.y) for batch in batches]


def answer(model: Forward, x: Tensor) -> Tensor:
    """What a model says about images x (B, C, H, W), for the first pass of an evaluation or a measure.

    Raises:
        UserError: if it fails on these images, or returns no tensor.
    """
    try:
        logits = model(x)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if "can't allocate memory" in str(error):
            raise
        raise UserError(f"{type(model).__name__} fails on images of shape {tuple(x.shape[1:])}: {error}.") from error
    if isinstance(logits, Tensor):
        return logits
    raise UserError(
        f"The model must return logits (B, K), got {type(logits).__name__}: wrap it so that it returns them alone."
    )


def are_probabilities(logits: Tensor) -> bool:
    """Whether logits (N, K) look like the output of a softmax: in [0, 1], sums 1, and not the same for all images."""
    wide = logits.double()
    sums_to_one = bool(((wide.sum(dim=1) - 1).abs() < 1e-3).all())
    return sums_to_one and bool((wide >= 0).all()) and bool((wide != wide[:1]).any())


def require_answers(logits: Tensor, labels: Tensor) -> None:
    """Refuse logits that are not (N, K) for labels (N,), have no column for a label, or are not finite.

    Reads values, so it waits for a GPU: call it once per data set.

    Raises:
        UserError: naming the first bad example.
    """
    if logits.ndim != 2 or logits.shape[0] != labels.shape[0]:
        raise UserError(f"The model must return logits of shape ({labels.shape[0]}, K), got {tuple(logits.shape)}.")
    highest = int(labels.max())
    if highest >= logits.shape[1]:
        raise UserError(
            f"The model has {logits.shape[1]} classes (labels 0 to {logits.shape[1] - 1}), but a label is "
            f"{highest}. Model and data set do not belong together."
        )
    bad = ~logits.isfinite().all(dim=1)
    if bool(bad.any()):
        raise UserError(
            f"The model's logits are not finite for {int(bad.sum())} of {len(bad)} examples, first for example "
            f"{int(bad.int().argmax())}. Did its training diverge, or does it overflow in half precision?"
        )
