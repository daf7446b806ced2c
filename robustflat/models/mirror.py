"""A rewritten copy of a network that is still being trained: it takes over the weights whenever it is asked for."""

from __future__ import annotations

import weakref
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.models.inference import BatchNorm, InferenceModel, KeptInFloat, Linear, rewrite, scale_and_shift
from robustflat.models.passes import hooks_of, uncounted

_STATE = {"training", *vars(nn.Module())}
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class Mirror:
    """Follows a network with a copy rewritten for speed (see `inference.rewrite`), whose weights are refreshed.

    Rewriting costs many forward passes, refreshing a few small operations a layer. What is folded into what is
    decided once, from `example`; the algebra of folding holds for whatever weights and statistics come later.

    Args:
        model: images in [0, 1] -> logits; followed, never changed, and not kept alive.
        example: a few images (B, C, H, W) that it takes, on its device.
        double: fold in float64 and round once, as `rewrite` does: its weights to the bit, in three times the time.
        precision: "fp32" or "bf16". The bf16 copy of an untrained network is accepted however far its logits are off.

    Raises:
        UserError: for another precision, or a model that cannot be copied.
    """

    def __init__(self, model: nn.Module, example: Tensor, *, precision: str = "fp32", double: bool = False) -> None:
        self._double, self._model = double, weakref.ref(model)
        before = _Settings(model)
        self.copy = _rewritten(model, example, precision)
        self._settings = _Settings(model)
        # What a pass itself changes, such as a count of its calls, is no setting.
        self._changing = {key for key, value in self._settings.items() if value != before.get(key)}
        norms = {norm for _, norm in self.copy.folds}
        folds = dict(self.copy.folds)
        self._folded: list[tuple[str, str, Linear]] = []
        self._own: list[tuple[str, str, Tensor]] = []
        for path, module in model.named_modules():
            if path in norms:
                continue
            mirrored = _unwrapped(self.copy.network.get_submodule(path))
            if path in folds:
                self._folded.append((path, folds[path], mirrored))  # type: ignore[arg-type]
                continue
            self._own += [(path, name, getattr(mirrored, name)) for name in _own_tensors(module)]

    def follows(self, model: nn.Module) -> bool:
        """Whether the copy still computes what a network does, but for its weights and statistics.

        Not so after its layers, their numbers or functions, the shapes or types of its weights, or hooks were replaced.
        """
        now = _Settings(model).without(self._changing)
        return self._model() is model and now == self._settings.without(self._changing)

    @torch.no_grad()
    def refreshed(self) -> InferenceModel:
        """The copy with the weights and running statistics that the network has now."""
        model = self._model()
        assert model is not None, "whoever asks for its copy has the network"
        modules: dict[str, Any] = dict(model.named_modules())
        for path, norm, mirrored in self._folded:
            self._fold(modules[path], modules[norm], mirrored)
        for path, name, target in self._own:
            target.copy_(getattr(modules[path], name))
        return self.copy

    def _fold(self, linear: Linear, norm: BatchNorm, mirrored: Linear) -> None:
        scale, bias = scale_and_shift(norm)
        if linear.bias is not None:
            bias = bias + linear.bias.double() * scale
        assert mirrored.bias is not None
        mirrored.bias.copy_(bias)
        weight = linear.weight.double() if self._double else linear.weight
        scale = scale.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))
        mirrored.weight.copy_(weight * scale)


def _rewritten(model: nn.Module, example: Tensor, precision: str) -> InferenceModel:
    """A copy that takes the images: a network that uses `view` may refuse them in channels-last order."""
    try:
        copy = rewrite(model, example, precision=precision, check_half=False)
        with torch.no_grad(), uncounted():
            copy(example)
    except RuntimeError:
        return rewrite(model, example, precision=precision, channels_last=False, check_half=False)
    return copy


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _unwrapped(module: nn.Module) -> nn.Module:
    """The layer itself, where a bf16 copy keeps it in float32 inside a wrapper."""
    return module.layer if isinstance(module, KeptInFloat) else module


class _Settings(dict[tuple[str, str], tuple[object, ...]]):
    """What a network computes besides its weights, by path and name; keeps nothing of it alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._references: list[object] = []
        shared: dict[int, int] = {}  # which tensors are one, by the order in which they come
        for path, module in model.named_modules():
            self[path, ""] = (self._identity(module), type(module), *hooks_of(module))
            for name, value in vars(module).items():
                if name in _STATE:
                    continue
                if _plain(value):
                    self[path, name] = (type(value), value)
                elif isinstance(value, Tensor):
                    self[path, name] = (self._identity(value), None if value.is_inference() else value._version)
                elif type(value).__weakrefoffset__:
                    self[path, name] = (self._identity(value),)
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    number = shared.setdefault(id(tensor), len(shared))
                    self[path, name] = () if tensor is None else (tensor.shape, tensor.dtype, tensor.device, number)

    def without(self, keys: Container[tuple[str, str]]) -> dict[tuple[str, str], tuple[object, ...]]:
        """All but some."""
        return {key: value for key, value in self.items() if key not in keys}

    def _identity(self, value: object) -> int:
        """A number that no other object has while this is kept, be the value alive or not."""
        self._references.append(weakref.ref(value))  # one for all who ask
        return id(self._references[-1])


def _plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_plain, value)))
