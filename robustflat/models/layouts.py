"""Weights named as another program names them -> weights and constructor arguments of our networks.

Each layout is an explicit map of names. Nothing is guessed silently: names without a place are an error that lists
them, and whatever is left out, filled in or folded into other weights is a note of the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustflat.errors import CheckpointError

RELEASED_NORMS = ("rebn", "bn", "fixedbn", "gn", "fixedgn")
"""Normalisations that the released code names as we do; its '' is our "none"."""

RELEASED_BUILDERS: Mapping[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (False, (1, 1)): "resnet_tiny",
    (True, (3, 4, 6, 3)): "resnet50",
}
"""(bottleneck blocks?, blocks per stage) of the released `ResNet` -> our builder."""

PREFIXES = ("", "module.", "model.", "module.model.", "network.", "module.0.", "0.")
"""What wrappers put before all names: several GPUs, a network inside a network."""

CONSTANTS = frozenset({"mu", "sigma", "mean", "std", "normalize.mean", "normalize.std", "normalize.mu"})
"""Numbers that RobustBench's networks standardise images with, which their files need not hold."""


@dataclass(frozen=True, eq=False)
class Conversion:
    """A network in our terms.

    Attributes:
        layout: the layout it came in.
        model: `_target_` and arguments of its constructor, plain values.
        weights: by the names of that network.
        notes: sentences on what was left out, filled in, folded or assumed.
    """

    layout: str
    model: dict[str, object]
    weights: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def is_released(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a ResNet of the code released by Stutz et al. (ICCV 2021)."""
    return {"conv1.weight", "block0.0.conv1.weight", "logits.weight"} <= state.keys()


def released_settings(content: object) -> dict[str, object]:
    """Constructor arguments that a checkpoint of the released code stores beside its weights; {} without any."""
    found: dict[str, object] = {}
    for key in ("arguments", "kwargs"):
        values = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(values, Mapping):
            found.update({str(name): value for name, value in values.items()})
    return found


def released(state: Mapping[str, Tensor], settings: Mapping[str, object] | None = None) -> Conversion:
    """A ResNet of the code released by Stutz et al. (ICCV 2021) as one of ours, with equal logits.

    The frozen parameters `whiten.bias` and `whiten.weight` become mean and std, `scale` (a factor on the logits) goes
    into the last layer, and the clamp of images to [0, 1] is dropped, as images lie there anyway. The rotation head,
    which there clamps features to [0, 1], has no counterpart and is left out.

    Args:
        state: names and tensors of the file.
        settings: constructor arguments stored beside them; they tell the activation, which weights do not.

    Raises:
        CheckpointError: for names without a place (listed), or a network that none of ours equals.
    """
    settings = dict(settings or {})
    norm, notes = _released_norm(state, settings)
    depths = _released_depths(state)
    bottleneck = "block0.0.conv3.weight" in state
    if (bottleneck, depths) not in RELEASED_BUILDERS:
        raise CheckpointError(
            f"the file holds a ResNet with {', '.join(map(str, depths))} {'bottleneck' if bottleneck else 'basic'} "
            "blocks, which none of ours equals. Known: resnet18 (2, 2, 2, 2), resnet34 (3, 4, 6, 3), resnet50."
        )
    builder = RELEASED_BUILDERS[bottleneck, depths]
    weights, mean, std = _released_weights(state, norm, depths, notes)
    _require_expressible(weights, norm, settings)
    _scale_logits(weights, settings, notes)
    activation = settings.get("activation")
    if not isinstance(activation, str):
        activation = "relu"
        notes.append("The file does not say which activation it was trained with: relu is assumed.")
    model: dict[str, object] = {
        "_target_": f"robustflat.models.resnet.{builder}",
        "classes": len(weights["head.weight"]),
        "in_channels": weights["body.stem.conv.weight"].shape[1],
        "channels": len(weights["body.stem.conv.weight"]),
        "norm": norm,
        "activation": activation,
        "zero_residuals": False,  # of the initial weights, which are replaced
        "mean": mean,
        "std": std,
    }
    if settings.get("dropout") and builder != "resnet50":
        model["dropout"] = 0.1
    return Conversion("released", model, weights, tuple(notes))


def fitted(state: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str = "network.") -> Conversion:
    """Weights of a network that is wrapped in ours: the same names after what wrappers have put before them.

    Of the beginnings in `PREFIXES` (to take away) and "", "model." (to put on), those are chosen with which most
    names and shapes fit. `CONSTANTS` that the file lacks keep the architecture's own values.

    Args:
        state: names and tensors of the file.
        own: state dict of the wrapped network, without `prefix`.
        prefix: what our wrapper puts before its names.

    Returns:
        A conversion without `model`; names that still do not fit are left for loading to list.
    """
    found = max((_renamed(state, off, on) for off, on in _changes(state)), key=lambda names: _fits(names, own))
    weights, notes = dict(found), []
    for name, value in own.items():
        if name in CONSTANTS and name not in weights:
            weights[name] = value.clone()
            notes.append(f"{name} is not in the file: the architecture's own {value.flatten().tolist()} is kept.")
    return Conversion("", {}, {f"{prefix}{name}": value for name, value in weights.items()}, tuple(notes))


def _changes(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    return [(off, on) for off in PREFIXES if all(n.startswith(off) for n in state) for on in ("", "model.")]


def _renamed(state: Mapping[str, Tensor], off: str, on: str) -> dict[str, Tensor]:
    return {on + name.removeprefix(off): value for name, value in state.items()}


def _fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    return sum(name in own and own[name].shape == value.shape for name, value in state.items())


def _released_norm(state: Mapping[str, Tensor], settings: Mapping[str, object]) -> tuple[str, list[str]]:
    """Normalisation by our name, and notes."""
    seen = [norm for norm in RELEASED_NORMS if any(name.startswith(f"{norm}1.") for name in state)]
    if seen:
        return seen[0], []
    stored = settings.get("normalization")
    if stored == "fixedgn":  # has no tensors to be seen by
        return "fixedgn", []
    notes = [] if isinstance(stored, str) else ["There are no tensors of a normalisation: none is assumed."]
    return "none", notes


def _released_depths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks of each stage."""
    found = {(int(m[1]), int(m[2])) for name in state if (m := re.match(r"block(\d+)\.(\d+)\.", name))}
    stages = max((stage for stage, _ in found), default=-1) + 1
    return tuple(sum(stage == wanted for stage, _ in found) for wanted in range(stages))


def _released_weights(
    state: Mapping[str, Tensor], norm: str, depths: Sequence[int], notes: list[str]
) -> tuple[dict[str, Tensor], list[float] | None, list[float] | None]:
    """Weights by our names, mean and std; adds to `notes`."""
    left = dict(state)
    mean, std = _released_constants(left, state["conv1.weight"].shape[1])
    head = [name for name in left if name.startswith("auxiliary.")]
    for name in head:
        del left[name]
    if head:
        notes.append(f"The rotation head is left out ({', '.join(head)}): it clamps its features, ours does not.")
    weights, strange = {}, []
    for name, value in left.items():
        ours = _released_name(name, norm, depths)
        if ours is None:
            strange.append(name)
        else:
            weights[ours] = value
    if strange:
        raise CheckpointError(
            f"the layout of the released code has no place for {len(strange)} names: {', '.join(strange)}."
        )
    filled = [name for name in list(weights) if _has_bias(name) and name.replace("weight", "bias") not in weights]
    for name in filled:
        weights[name.replace("weight", "bias")] = torch.zeros(len(weights[name]), dtype=weights[name].dtype)
    if filled:
        notes.append(f"Built without biases: those beside {', '.join(filled)} are zero.")
    return weights, mean, std


def _has_bias(name: str) -> bool:
    """Whether our layer with this weight has a bias, which the released code can leave out."""
    return name in ("body.stem.conv.weight", "head.weight") or name.endswith("shortcut.conv.weight")


def _released_name(name: str, norm: str, depths: Sequence[int]) -> str | None:
    """Our name of a tensor; `None` if it has no place."""
    layer, _, rest = name.partition(".")
    simple = {"conv1": "body.stem.conv", f"{norm}1": "body.stem.norm", "logits": "head"}
    if layer in simple:
        return f"{simple[layer]}.{rest}"
    match = re.fullmatch(r"block(\d+)\.(\d+)\.(conv[123]|norm[123]|downsample\.[01])\.(\w+)", name)
    if match is None:
        return None
    position = sum(depths[: int(match[1])]) + int(match[2])
    part = {"downsample.0": "shortcut.conv", "downsample.1": "shortcut.norm"}.get(match[3], match[3])
    return f"body.blocks.{position}.{part}.{match[4]}"


def _released_constants(left: dict[str, Tensor], channels: int) -> tuple[list[float] | None, list[float] | None]:
    """Take whitening (x - bias) / weight or rescaling min + (max - min) x out of `left`; mean and std, or `None`."""
    if "whiten.bias" in left and "whiten.weight" in left:
        return left.pop("whiten.bias").flatten().tolist(), left.pop("whiten.weight").flatten().tolist()
    if "rescale.scale_min" in left and "rescale.scale_max" in left:
        low, high = float(left.pop("rescale.scale_min")), float(left.pop("rescale.scale_max"))
        return [-low / (high - low)] * channels, [1 / (high - low)] * channels
    return None, None


def _require_expressible(weights: Mapping[str, Tensor], norm: str, settings: Mapping[str, object]) -> None:
    """Refuse what the released code can build and we cannot.

    Raises:
        CheckpointError: naming it.
    """
    if len(weights["head.weight"]) == 1:
        raise CheckpointError("the network has one output for two classes, which ours do not have.")
    if norm in ("gn", "fixedgn") and len(weights["body.stem.conv.weight"]) < 16:
        raise CheckpointError("group norm of fewer than 16 channels has other groups in the released code than here.")
    if settings.get("operators"):
        raise CheckpointError("the network applies operators between its layers, which ours do not have.")


def _scale_logits(weights: dict[str, Tensor], settings: Mapping[str, object], notes: list[str]) -> None:
    scale = settings.get("scale", 1)
    if isinstance(scale, int | float) and scale != 1:
        weights["head.weight"], weights["head.bias"] = (weights[f"head.{n}"] * scale for n in ("weight", "bias"))
        notes.append(f"The factor {scale} on the logits is multiplied into the last layer.")
