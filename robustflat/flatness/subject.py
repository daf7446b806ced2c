"""The network and the examples of a measurement, checked before anything long starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from robustflat.attacks.examples import answer, are_probabilities, require_answers
from robustflat.attacks.inputs import check_images
from robustflat.attacks.judging import held_still
from robustflat.attacks.objectives import predicted_wrong
from robustflat.attacks.strongest import judged_logits
from robustflat.errors import UserError
from robustflat.models.modes import perturbable
from robustflat.models.precision import device_of, dtype_of
from robustflat.ranks import workers
from robustflat.types import Batch, Weights


class Subject(NamedTuple):
    """A network, its examples on its device, and the weights that are displaced (detached views)."""

    model: nn.Module
    batches: list[Batch]
    weights: Weights

    @property
    def device(self) -> torch.device:
        """Where everything lives."""
        return self.batches[0].x.device

    @property
    def size(self) -> int:
        """Number of examples."""
        return sum(len(batch.y) for batch in self.batches)

    def groups(self, draws: str) -> list[list[int]]:
        """Indices of the batches that share a displacement: each its own, or all of them."""
        indices = range(len(self.batches))
        return [[i] for i in indices] if draws == "per_batch" else [list(indices)]

    def group_sizes(self, draws: str) -> tuple[int, ...]:
        """Examples in each of these groups."""
        return tuple(sum(len(self.batches[i].y) for i in group) for group in self.groups(draws))

    def described(self, norm_layers: bool, biases: bool) -> str:
        """The displaced parameters in words."""
        total = sum(w.numel() for w in self.weights.values())
        kinds = f"{'with' if biases else 'without'} biases, {'with' if norm_layers else 'without'} norm layers"
        return f"{total:,} weights in {len(self.weights)} tensors {kinds}"


def subject(model: nn.Module, batches: Sequence[Batch], *, norm_layers: bool, biases: bool) -> Subject:
    """Check model and examples, and bring the examples to the model's device and floating-point type.

    Empty batches are left out.

    Raises:
        UserError: if there is no example; images or labels are out of range; a layer is in training mode; a weight,
            statistic or logit is not finite; no weight can be displaced, or one has 16 bits; the network does
            not take these images, returns something else than logits (probabilities, too), or mixes the examples of a
            batch; or two passes differ.
    """
    device, dtype = device_of(model), dtype_of(model)
    moved = [Batch(*(_usable(t.to(device)) for t in batch)) for batch in batches if len(batch.y)]
    if not moved:
        raise UserError("There are no examples: a flatness measure needs at least one.")
    for batch in moved:
        check_images(batch.x, batch.y)
        if batch.y.is_floating_point():
            raise UserError("A flatness measure needs one class per image, got mixed labels (probabilities).")
    moved = [Batch(batch.x.to(dtype), batch.y) for batch in moved]
    require_evaluation_mode(model)
    require_finite_weights(model)
    weights = perturbable(model, norm_layers=norm_layers, biases=biases)
    require_resolution(weights)
    require_own_statistics(model)
    workers().on_first(lambda: require_deterministic(model, moved[0].x))
    logits = workers().map(lambda batch: judged_logits(model, batch.x), moved)
    require_answers(torch.cat(logits).to(device), torch.cat([batch.y for batch in moved]))
    if are_probabilities(torch.cat(logits)):
        raise UserError(
            "The network returns probabilities (rows >= 0 that sum to 1), but the loss takes logits: leave its softmax "
            "out, or wrap it so that it returns their logarithm."
        )
    return Subject(model, moved, weights)


def _usable(t: Tensor) -> Tensor:
    """`t`, or a copy if autograd refuses it; measures leave inference mode, which has its own kind of tensors."""
    return t.clone() if t.is_inference() else t


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Which examples logits (B, K) get wrong, bool (B,): also those whose logits are not finite."""
    return predicted_wrong(logits, y) | ~logits.isfinite().all(dim=1)


def require_evaluation_mode(model: nn.Module) -> None:
    """Refuse a network in which a layer that works differently in training is in training mode.

    Measuring it in evaluation mode instead would give figures for another function than the one that was handed over.

    Raises:
        UserError: naming the first such layer.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, _NormBase | _DropoutNd):
            mixes = isinstance(module, _NormBase)
            what = "mixes the examples of a batch" if mixes else "draws at random"
            raise UserError(
                f"Layer '{name}' ({type(module).__name__}) is in training mode, in which it {what}, so the loss of an "
                f"example is not defined. Call model.eval() first."
            )


def require_finite_weights(model: nn.Module) -> None:
    """Refuse a network with a parameter or statistic that is NaN or infinite.

    Raises:
        UserError: naming the first such tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{name} has {bad} of {tensor.numel()} values that are NaN or infinite: flatness around these "
                f"weights means nothing. Did training diverge, or is the checkpoint damaged?"
            )


def require_resolution(weights: Weights) -> None:
    """Refuse weights of 16 bits: neighbouring values are further apart than most measures move a weight.

    Raises:
        UserError: naming the first such tensor.
    """
    for name, w in weights.items():
        if w.dtype.itemsize < 4:
            raise UserError(
                f"{name} is {w.dtype}, in which small displacements of the weights are lost to rounding. "
                f"Measure model.float(), a network of the same weights in float32."
            )


def require_own_statistics(model: nn.Module) -> None:
    """Refuse batch norms that normalise by the batch even in eval mode.

    Raises:
        UserError: naming the first such layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise UserError(
                f"Layer '{name}' ({type(module).__name__}) has no running statistics and normalises by the "
                f"batch even in eval mode, so the loss of an example would depend on the others. Build it with "
                f"track_running_stats=True."
            )


@torch.no_grad()
def require_deterministic(model: nn.Module, x: Tensor) -> None:
    """Refuse a network whose answers to the same images (B, C, H, W) differ between two passes in eval mode.

    Raises:
        UserError: naming the innermost layer that gives two outputs for one input; or if the network fails on these
            images, or returns no tensor.
    """
    with held_still(model):
        first, second = answer(model, x), model(x)
        if _agree(first, second):
            return
        name, kind = _random_layer(model, x)
    raise UserError(
        f"Two passes over the same images differ, first at layer '{name}' ({kind}), which stays random in eval "
        f"mode. Flatness compares losses, so it needs a deterministic network: switch that randomness off."
    )


def _random_layer(model: nn.Module, x: Tensor) -> tuple[str, str]:
    """Name and type of the first module, innermost first, with equal inputs and different outputs."""
    first, second = _record(model, x), _record(model, x)
    for (name, kind, before, after), (_, _, before_again, after_again) in zip(first, second, strict=False):
        if _agree(before, before_again) and not _agree(after, after_again):
            return name or "(the network itself)", kind
    return "(the network itself)", type(model).__name__


def _record(model: nn.Module, x: Tensor) -> list[tuple[str, str, list[Tensor], list[Tensor]]]:
    """Inputs and outputs of every module, in the order in which they finish."""
    seen: list[tuple[str, str, list[Tensor], list[Tensor]]] = []
    with _hooks(model, seen):
        model(x)
    return seen


@contextmanager
def _hooks(model: nn.Module, seen: list[tuple[str, str, list[Tensor], list[Tensor]]]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():

        def keep(m: nn.Module, inputs: object, output: object, name: str = name) -> None:
            # Cloned: a later layer may work in place.
            seen.append((name, type(m).__name__, _tensors(inputs), _tensors(output)))

        handles.append(module.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: object) -> list[Tensor]:
    parts = value if isinstance(value, tuple | list) else [value]
    return [part.detach().clone() for part in parts if isinstance(part, Tensor)]


def _agree(one: Tensor | list[Tensor], other: Tensor | list[Tensor]) -> bool:
    """Equal up to the noise of parallel sums."""
    ones, others = (t if isinstance(t, list) else [t] for t in (one, other))
    return len(ones) == len(others) and all(
        torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(ones, others, strict=True)
    )
