"""The residual network of the released code, written from its description (names, formulas), as a slow reference.

Weights are a dictionary with the names of its checkpoints; the forward pass is spelled out in functions of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
State = dict[str, Tensor]
ACTIVATIONS = {
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.25 * x),
}


def random_state(
    *,
    norm: str = "rebn",
    depths: tuple[int, ...] = (1, 1),
    channels: int = 4,
    in_channels: int = 3,
    classes: int = 10,
    bottleneck: bool = False,
    bias: bool = True,
    images: str = "whiten",
    seed: int = 0,
) -> State:
    """Names and random float32 values in the order in which the released code has them."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def put_norm(name: str, width: int) -> None:
        if norm == "":
            return
        if norm != "fixedbn":
            state[f"{name}.weight"] = 0.3 * normal(width) + (0.0 if norm == "rebn" else 1.0)
            state[f"{name}.bias"] = 0.3 * normal(width)
        if norm != "gn":
            state[f"{name}.running_mean"] = 0.3 * normal(width)
            state[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=generator)
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def put_conv(name: str, outputs: int, inputs: int, size: int, with_bias: bool) -> None:
        state[f"{name}.weight"] = normal(outputs, inputs, size, size) * (2 / (inputs * size**2)) ** 0.5
        if with_bias:
            state[f"{name}.bias"] = 0.1 * normal(outputs)

    if images == "whiten":
        state["whiten.weight"] = 0.2 + 0.1 * torch.rand(in_channels, generator=generator)
        state["whiten.bias"] = 0.4 + 0.1 * torch.rand(in_channels, generator=generator)
    if images == "rescale":
        state["rescale.scale_min"], state["rescale.scale_max"] = torch.tensor([-1.0]), torch.tensor([1.0])
    put_conv("conv1", channels, in_channels, 3, bias)
    put_norm(f"{norm}1", channels)
    inputs = channels
    for stage, depth in enumerate(depths):
        width = channels * 2**stage
        outputs = 4 * width if bottleneck else width
        for position in range(depth):
            name = f"block{stage}.{position}"
            shapes = [(width, inputs, 3), (width, width, 3)]
            if bottleneck:
                shapes = [(width, inputs, 1), (width, width, 3), (outputs, width, 1)]
            for number, shape in enumerate(shapes, start=1):
                put_conv(f"{name}.conv{number}", *shape, False)
                put_norm(f"{name}.norm{number}", shape[0])
            if position == 0 and (stage > 0 or inputs != outputs):
                put_conv(f"{name}.downsample.0", outputs, inputs, 1, bias)
                put_norm(f"{name}.downsample.1", outputs)
            inputs = outputs
    state["logits.weight"] = normal(classes, inputs) / inputs**0.5
    if bias:
        state["logits.bias"] = 0.1 * normal(classes)
    return state


def forward(state: State, x: Tensor, *, norm: str = "rebn", activation: str = "relu", scale: float = 1.0) -> Tensor:
    """Images (B, C, H, W) -> logits in evaluation mode, in float64."""
    w = {name: value.double() for name, value in state.items()}
    act = ACTIVATIONS[activation]
    out = x.double().clamp(0, 1)
    if "whiten.weight" in w:
        out = (out - w["whiten.bias"][:, None, None]) / w["whiten.weight"][:, None, None]
    if "rescale.scale_min" in w:
        low, high = w["rescale.scale_min"], w["rescale.scale_max"]
        out = low + (high - low) * out
    out = act(_norm(w, f"{norm}1", F.conv2d(out, w["conv1.weight"], w.get("conv1.bias"), padding=1), norm))
    stage = 0
    while f"block{stage}.0.conv1.weight" in w:
        position = 0
        while f"block{stage}.{position}.conv1.weight" in w:
            first = stage > 0 and position == 0
            out = _block(w, f"block{stage}.{position}", out, 2 if first else 1, norm, act)
            position += 1
        stage += 1
    features = out.mean(dim=(2, 3))
    logits = features @ w["logits.weight"].T + w.get("logits.bias", 0.0)
    return scale * logits


def _block(w: State, name: str, x: Tensor, stride: int, norm: str, act) -> Tensor:
    numbers = [1, 2, 3] if f"{name}.conv3.weight" in w else [1, 2]
    strided = 2 if len(numbers) == 3 else 1
    out = x
    for number in numbers:
        weight = w[f"{name}.conv{number}.weight"]
        out = F.conv2d(out, weight, None, stride if number == strided else 1, padding=weight.shape[-1] // 2)
        out = _norm(w, f"{name}.norm{number}", out, norm)
        out = out if number == numbers[-1] else act(out)
    shortcut = x
    if f"{name}.downsample.0.weight" in w:
        bias = w.get(f"{name}.downsample.0.bias")
        shortcut = _norm(w, f"{name}.downsample.1", F.conv2d(x, w[f"{name}.downsample.0.weight"], bias, stride), norm)
    return act(out + shortcut)


def _norm(w: State, name: str, x: Tensor, norm: str) -> Tensor:
    if norm == "":
        return x
    columns = [1, -1, 1, 1]
    if norm == "gn":
        groups = next(g for g in (32, 24, 16, 8) if g <= x.shape[1] // 2 and x.shape[1] % g == 0)
        grouped = x.reshape(len(x), groups, -1)
        mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, unbiased=False, keepdim=True)
        standard = ((grouped - mean) / (var + EPS).sqrt()).reshape(x.shape)
    else:
        mean, var = w[f"{name}.running_mean"].view(columns), w[f"{name}.running_var"].view(columns)
        standard = (x - mean) / (var + EPS).sqrt()
    if norm == "fixedbn":
        return standard
    scale = w[f"{name}.weight"] + (1 if norm == "rebn" else 0)
    return standard * scale.view(columns) + w[f"{name}.bias"].view(columns)
