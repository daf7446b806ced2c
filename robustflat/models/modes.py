"""Context managers for a model's state, and the choice of the weights that may be perturbed.

Attacks and flatness measures need a model in another state for a moment: no weight gradients, evaluation mode,
displaced weights. Each manager here puts back exactly what it found, also when its body raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from robustflat.errors import UserError
from robustflat.types import Weights

_NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside, no parameter of `modules` requires a gradient; afterwards each one requires it as before.

    An attack under `frozen` pays for input gradients only, and no parameter's `.grad` changes.

    Args:
        modules: any number of modules; parameters of all their submodules are meant.
    """
    thawed = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Inside, `modules` are in evaluation mode; afterwards every submodule is in its own earlier mode.

    Submodules are remembered one by one, so a batch-norm layer kept in evaluation mode inside a training model
    comes back in evaluation mode.
    """
    before = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for submodule, training in before:
            submodule.training = training


@contextmanager
def training(*modules: nn.Module) -> Iterator[None]:
    """Inside, `modules` are in training mode; afterwards every submodule is in its own earlier mode."""
    before = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.train()
        yield
    finally:
        for submodule, was_training in before:
            submodule.training = was_training


@contextmanager
def frozen_statistics(*modules: nn.Module) -> Iterator[None]:
    """Inside, forward passes leave the running statistics of normalisation layers as they are.

    In training mode batch norm still normalises by the statistics of the batch; only `running_mean`,
    `running_var` and `num_batches_tracked` do not change. This is what the ascent pass of adversarial weight
    perturbation and of sharpness-aware minimisation needs. It covers all batch and instance norms of torch and
    their subclasses (also with `momentum=None`), and layers with the class attribute `is_normalization = True`.

    The layers work on copies of their buffers meanwhile, and get their own tensors back afterwards. Nothing is
    written to those, so a graph recorded inside can still be differentiated outside.
    """
    layers = {m for module in modules for m in module.modules() if is_norm_layer(m)}
    before = [(layer, dict(layer.named_buffers(recurse=False))) for layer in layers]
    try:
        for layer, buffers in before:
            for name, buffer in buffers.items():
                setattr(layer, name, buffer.clone())
        yield
    finally:
        for layer, buffers in before:
            for name, buffer in buffers.items():
                setattr(layer, name, buffer)


@contextmanager
def displaced(model: nn.Module, nu: Weights) -> Iterator[None]:
    """Inside, the weights of `model` are w + nu; afterwards they are w, bit for bit.

    The weights are restored from a copy, because (w + nu) - nu is not w in floating point. Whatever the body
    itself does to the named parameters is undone as well. Take gradients inside: autograd refuses to
    differentiate a graph of the displaced weights once these have moved back.

    Args:
        model: its parameters are changed in place (same tensors, so optimizers and views see it).
        nu: parameter name -> displacement of that parameter's shape; parameters without a name here stay.

    Raises:
        UserError: if a name is no parameter of the model, a shape differs, or two names mean one parameter.
    """
    parameters = _named(model, nu)
    steps = [step.detach().to(p) for p, step in zip(parameters, nu.values(), strict=True)]
    copies = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.add_(step)
        yield
    finally:
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)


def perturbable(model: nn.Module, norm_layers: bool = False, biases: bool = True, require: bool = True) -> Weights:
    """Weights that flatness measures and weight perturbations move; by default all but those of norm layers.

    The paper leaves normalisation layers out, because scaling them rescales the whole network. Which layer is
    one is decided by its type (`is_norm_layer`), not by its name. Never included: parameters that do not
    require a gradient (so call this outside `frozen`) and those of modules with the attribute
    `is_auxiliary = True`, such as a rotation head. A parameter that several modules share appears once.

    Args:
        model: any network.
        norm_layers: include scales and shifts of normalisation layers.
        biases: include parameters whose own name contains "bias" (`bias`, `in_proj_bias`, ...).
        require: refuse a model of which nothing is left, instead of returning an empty dictionary.

    Returns:
        Parameter name -> detached view. Views move with the model: compute limits and norms of them outside
        `displaced`.

    Raises:
        UserError: if nothing is left and `require` is set; the message counts what the model has.
    """
    chosen: Weights = {}
    seen: set[int] = set()
    refused: Counter[str] = Counter()
    for name, parameter, reason in _with_reasons(model):
        if reason == "norm" and norm_layers:
            reason = None
        if reason is None and not biases and "bias" in name.rpartition(".")[2]:
            reason = "bias"
        if reason is not None:
            refused[reason] += 1
        elif id(parameter) not in seen:
            chosen[name] = parameter.detach()
            seen.add(id(parameter))
    if not chosen and require:
        raise UserError(_nothing_left(model, refused))
    return chosen


def is_norm_layer(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer: one of torch, or one with `is_normalization = True`."""
    return isinstance(module, _NORM_LAYERS) or getattr(module, "is_normalization", False) is True


def _with_reasons(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str | None]]:
    """Name and parameter of every module, aliases included, and why it is not an ordinary weight (or None).

    What lies inside a normalisation layer or an auxiliary module belongs to it.
    """
    inherited: dict[str, str | None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        reason = inherited.get(path.rpartition(".")[0]) if path else None
        if getattr(module, "is_auxiliary", False) is True:
            reason = "auxiliary"
        elif reason is None and is_norm_layer(module):
            reason = "norm"
        inherited[path] = reason
        for name, parameter in module.named_parameters(path, recurse=False):
            yield name, parameter, reason if parameter.requires_grad else "frozen"


def _nothing_left(model: nn.Module, refused: Counter[str]) -> str:
    described = {
        "norm": "in normalisation layers (norm_layers=True includes them)",
        "bias": "biases (biases=True includes them)",
        "auxiliary": "in auxiliary modules",
        "frozen": "with requires_grad=False (are they frozen?)",
    }
    counts = "; ".join(f"{n} {described[reason]}" for reason, n in sorted(refused.items()))
    return (
        f"{type(model).__name__} has no weights to perturb. Its parameter tensors: {counts or 'none at all'}. "
        "At least one trainable weight outside of these is needed."
    )


def _named(model: nn.Module, nu: Weights) -> list[Tensor]:
    """Parameters of `model` in the order of `nu`, after checking names and shapes."""
    known = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in nu if name not in known]
    if unknown:
        raise UserError(
            f"{type(model).__name__} has no parameter called {', '.join(map(repr, unknown[:3]))}. Names must "
            f"be those of named_parameters(), such as {', '.join(map(repr, list(known)[:3])) or '(none)'}; "
            "perturbable(model) lists them."
        )
    for name, step in nu.items():
        if step.shape != known[name].shape:
            raise UserError(
                f"The displacement of {name!r} must have the parameter's shape {tuple(known[name].shape)}, "
                f"got {tuple(step.shape)}."
            )
    chosen = [known[name] for name in nu]
    if len({id(p) for p in chosen}) < len(chosen):
        raise UserError(
            f"Two of the names {', '.join(map(repr, nu))} mean one shared parameter of {type(model).__name__}; "
            "give a shared parameter one displacement, under one name."
        )
    return list(chosen)
