"""A copy of a network rewritten for fast evaluation, and memory that the process keeps for its next step.

The rewritten copy is for searching only: whatever an attack finds with it is judged by the plain network.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from robustflat.errors import UserError, require_one_of
from robustflat.models.consumers import alone
from robustflat.models.likeness import alike, answer, fewest, moved
from robustflat.models.modes import evaluating, frozen
from robustflat.models.normalize import Normalize
from robustflat.models.norms import ReBatchNorm
from robustflat.models.passes import has_hooks, uncounted
from robustflat.models.precision import exact_float32
from robustflat.models.rectifiers import rectify_in_place_

PRECISIONS = ("fp32", "bf16")
"""Arithmetic of a rewritten network; bf16 keeps the normalisation of images and the logits in float32."""

Linear: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | ReBatchNorm

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, ReBatchNorm)

_TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest logit, that folding may make: rounding, and no more."""

# Of gradients, in which ReLUs open and close: beyond this something else is computed.
_LOOSE = 0.1

# Beyond this a half-precision copy no longer resembles the network, and a search with it would be wasted.
_HALF_TOLERANCE = 0.25


class InferenceModel(nn.Module):
    """A rewritten copy of a network: images (B, C, H, W) in [0, 1] -> float32 logits (B, K). Made by `rewrite`.

    Args:
        network: the rewritten network, in eval mode and without weight gradients.
        dtype: type that images are given to it in.
        channels_last: whether images are brought to channels-last order first.
        notes: what was and what was not rewritten, one line each.
        folds: paths of (linear layer, batch norm that was folded into it).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        dtype: torch.dtype,
        channels_last: bool,
        notes: tuple[str, ...],
        folds: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.channels_last = channels_last
        self.notes = notes
        self.folds = folds

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, K) in at least float32; differentiable with respect to x."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(x.to(self.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@uncounted()
def rewrite(
    model: nn.Module,
    example: Tensor,
    *,
    precision: str = "fp32",
    channels_last: bool = True,
    fold_batch_norm: bool = True,
    check_half: bool = True,
) -> InferenceModel:
    """Copy of `model` that computes the same logits faster in eval mode; `model` itself is not touched.

    Batch norm is folded into the convolution or linear layer before it, W' = s W, b' = s (b - mean) + shift with
    s = scale / sqrt(var + eps), wherever one pass of `example` shows that the layer's output goes straight into
    the batch norm. Logits of `example` before and after are compared: where they differ by more than rounding,
    folding is undone. ReLU layers overwrite their input where that is harmless, and pooling over all pixels passes
    gradients on in the order of its input. `notes` of the result says what happened.

    Args:
        model: images in [0, 1] -> logits (B, K).
        example: a few images (B, C, H, W) that the model takes, on its device; two are enough.
        precision: "fp32", or "bf16" for a search whose result is judged by the plain network. In bf16 the first
            normalisation and the last linear layer stay in float32: rounded to 8 bits, neither images nor small
            differences of logits would be usable.
        channels_last: memory order in which convolutions are fastest.
        fold_batch_norm: whether to fold.
        check_half: whether to refuse a bf16 copy whose logits are far from the network's.

    Raises:
        UserError: for another precision, a model that cannot be copied, or one that bf16 changes beyond use.
    """
    require_one_of("precision", precision, PRECISIONS)
    if torch.is_inference_mode_enabled():  # whose tensors do not say when they are changed
        with torch.inference_mode(False):
            again = functools.partial(rewrite, precision=precision, channels_last=channels_last)
            return again(model, example.clone(), fold_batch_norm=fold_batch_norm, check_half=check_half)
    plain = _logits(model, example)
    notes: list[str] = []
    network = _copy(model)
    folds: tuple[tuple[str, str], ...] = ()
    if fold_batch_norm:
        network, folds = _folded_or_not(model, network, example, plain, notes)
    rectify_in_place_(network, network, example)
    _pool_in_order_(network)
    channels_last = channels_last and _to_channels_last_(network, example, notes)
    dtype = example.dtype
    if precision == "bf16":
        dtype = _to_half_(network, example)
        notes.append("bf16, with images normalised and logits computed in float32")
    result = InferenceModel(network, dtype=dtype, channels_last=channels_last, notes=tuple(notes), folds=folds)
    result.eval().requires_grad_(False)
    if precision == "bf16" and check_half and not _close(_logits(result, example), plain, _HALF_TOLERANCE):
        raise UserError("In bf16 this model's logits differ by more than a quarter: use precision fp32.")
    return result


def keep_freed_memory() -> bool:
    """Let this process keep memory it frees, instead of handing it to the system and faulting it in again.

    An attack frees and takes the same tens of megabytes every step; page faults were a third of the time of a
    small network on a CPU. Sets the thresholds of glibc's `mallopt` for the whole process; it costs resident
    memory and nothing else. Does nothing on other C libraries, and has no influence on a GPU's memory.

    Returns:
        Whether the thresholds were set.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    # Older versions refuse more than 32 MiB as the mmap threshold.
    mapped = any(mallopt(mmap_threshold, size) == 1 for size in (1 << 30, 1 << 25))
    return bool(mapped and mallopt(trim_threshold, 1 << 30) == 1)


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    # Exactly: in TF32, or under the autocast of a training, folding changes logits by more than is allowed.
    with frozen(model), evaluating(model), exact_float32(x.device):
        logits: Tensor = model(x)
    return logits


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval().requires_grad_(False)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be copied for rewriting ({error}). Search with the plain model."
        ) from error


def _folded_or_not(
    model: nn.Module, network: nn.Module, example: Tensor, plain: Tensor, notes: list[str]
) -> tuple[nn.Module, tuple[tuple[str, str], ...]]:
    """`network` with batch norm folded where that leaves the logits alone, else a fresh copy; and what was folded."""
    total = sum(isinstance(m, _BATCH_NORM) for m in network.modules())
    pairs = _pairs(network, example)
    for linear_path, norm_path in pairs:
        linear, norm = network.get_submodule(linear_path), network.get_submodule(norm_path)
        assert isinstance(linear, _LINEAR)
        assert isinstance(norm, _BATCH_NORM)
        _fold_(linear, norm)
        for path, module in list(network.named_modules(remove_duplicate=False)):
            if module is norm:
                network.set_submodule(path, nn.Identity())
    if pairs and not _keeps_logits(network, example, plain):
        notes.append("batch norm left as it is: folding it changed the logits")
        return _copy(model), ()
    notes.append(f"{len(pairs)} of {total} batch norms folded" if total else "no batch norm to fold")
    return network, tuple(pairs)


def _keeps_logits(network: nn.Module, example: Tensor, plain: Tensor) -> bool:
    try:
        return _close(_logits(network, example), plain, _TOLERANCE)
    except (AttributeError, RuntimeError):  # code that looks at a layer which is not there any more
        return False


def _close(logits: Tensor, plain: Tensor, tolerance: float) -> bool:
    """Whether logits differ by at most `tolerance` of the largest of the plain ones."""
    difference = (logits.double() - plain.double()).abs().max()
    return bool(difference <= tolerance * plain.double().abs().max().clamp_min(1e-6))


class MeanOfPixels(nn.Module):
    """What adaptive pooling to one pixel computes, bit for bit.

    Its gradient is divided before it is spread over the pixels. Torch divides afterwards, which lays the gradient out
    in the usual order and slows down the layers before, whose tensors are channels-last: 7 % of a small ResNet's pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Values (B, C, H, W) -> their means over pixels (B, C, 1, 1)."""
        # In float16 the sum itself may be too large.
        total = x.sum((-2, -1), keepdim=True, dtype=torch.float32 if x.dtype == torch.float16 else None)
        return (total / (x.shape[-2] * x.shape[-1])).to(x.dtype)


def _pool_in_order_(network: nn.Module) -> None:
    """Replace pooling over all pixels by `MeanOfPixels`."""
    for path, module in list(network.named_modules()):
        single = type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))
        if single and path and not has_hooks(module):
            network.set_submodule(path, MeanOfPixels())


def _to_channels_last_(network: nn.Module, example: Tensor, notes: list[str]) -> bool:
    """Channels-last weights, unless the network takes tensors apart in a way that needs the usual order."""
    if has_instance_norm(network):
        notes.append("channels-last left out: not for instance norm")
        return False
    forward = network.forward  # makes no pass that anyone counts
    few = fewest(forward, example)
    with moved(network):
        usual = answer(forward, few)
    network.to(memory_format=torch.channels_last)
    with moved(network):
        if alike(usual, answer(forward, few.contiguous(memory_format=torch.channels_last)), _LOOSE):
            return True
    network.to(memory_format=torch.contiguous_format)
    notes.append("channels-last left out: the network does not take it")
    return False


def has_instance_norm(network: nn.Module) -> bool:
    """Whether it must stay in the usual order.

    PyTorch (2.14) computes wrong gradients of instance norm from channels-last gradients of a single image.
    """
    return any(isinstance(module, _InstanceNorm) for module in network.modules())


def _pairs(network: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Paths of (linear layer, batch norm) where the first one's output is the second one's input."""
    made_by: dict[tuple[int, int], str] = {}  # (identity, version) of a tensor; the events keep it alive
    calls: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []
    with _watching(network) as events:
        _logits(network, example)
    for event in events:
        calls[event.path] += 1
        source = made_by.get((id(event.taken), event.taken_version))
        if isinstance(event.module, _BATCH_NORM) and source is not None:
            pairs.append((source, event.path))
        # Batch norm takes the second dimension for channels, as layers give it but for some other shapes.
        if isinstance(event.module, _LINEAR) and event.given.ndim == event.module.weight.ndim:
            made_by[id(event.given), event.given_version] = event.path
    takers = Counter(linear for linear, _ in pairs)
    fitting = alone(network, example, pairs)
    return [(a, b) for a, b in pairs if calls[a] == calls[b] == takers[a] == 1 and a in fitting]


class _Event(NamedTuple):
    """One call of a layer; versions tell whether a tensor was changed in place since."""

    path: str
    module: nn.Module
    taken: Tensor
    taken_version: int
    given: Tensor
    given_version: int


@contextmanager
def _watching(network: nn.Module) -> Iterator[list[_Event]]:
    """Records (path, layer, input, output) of every foldable layer as it is called."""
    events: list[_Event] = []
    handles = []
    for path, module in network.named_modules():
        # Exact types only, and no hooks: a subclass or a hook may compute something else.
        if type(module) in _LINEAR + _BATCH_NORM and not has_hooks(module) and _foldable(module):

            def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor, path: str = path) -> None:
                if args:
                    events.append(_Event(path, layer, args[0], args[0]._version, output, output._version))

            handles.append(module.register_forward_hook(note))
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


def _foldable(module: nn.Module) -> bool:
    return not isinstance(module, _BATCH_NORM) or module.running_var is not None


def scale_and_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """What a batch norm with running statistics does to channel c: x_c -> scale_c * x_c + shift_c, in float64 (C,)."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if isinstance(norm, ReBatchNorm):
        scale = scale * norm.scale.double()
    elif norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _fold_(linear: Linear, norm: BatchNorm) -> None:
    """Make linear(x) what norm(linear(x)) was, computed in float64."""
    scale, bias = scale_and_shift(norm)
    if linear.bias is not None:
        bias = bias + linear.bias.double() * scale
    weight = linear.weight.double() * scale.view(-1, *[1] * (linear.weight.ndim - 1))
    dtype = linear.weight.dtype
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


class KeptInFloat(nn.Module):
    """A layer that stays in float32 inside a half-precision network."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class _ThenHalf(KeptInFloat):
    """The first such layer: its output goes on in half precision."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(layer)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output.to(self.dtype)


class _InFloat(KeptInFloat):
    """A later one, behind layers in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x.float())
        return output


def _to_half_(network: nn.Module, example: Tensor) -> torch.dtype:
    """bf16 weights but for a leading `Normalize` and the layer that makes the logits; type of the input."""
    head = _last_layer(network, example)
    first = next((path for path, m in network.named_modules() if type(m) is Normalize), None)
    kept = {path: copy.deepcopy(network.get_submodule(path)) for path in (head, first) if path}
    network.to(torch.bfloat16)
    if head:
        network.set_submodule(head, _InFloat(kept[head]))
    if first is None:
        return torch.bfloat16
    network.set_submodule(first, _ThenHalf(kept[first], torch.bfloat16))
    return example.dtype


def _last_layer(network: nn.Module, example: Tensor) -> str | None:
    """Path of the linear layer whose output the network returns, if it has that form."""
    with _watching(network) as events:
        logits = _logits(network, example)
    ends = [event.path for event in events if event.given is logits and isinstance(event.module, nn.Linear)]
    return ends[-1] if ends else None
