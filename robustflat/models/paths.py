"""The path norm of a network of linear layers, batch norms and rectifiers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustflat.errors import UserError
from robustflat.models.modes import evaluating, frozen
from robustflat.models.normalize import Normalize
from robustflat.models.norms import ReBatchNorm

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TOLERANCE = 1e-6


class _Diagonal(nn.Module):
    """Multiplies every channel by a number."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.get_buffer("scale").view(1, -1, *[1] * (x.ndim - 2))
        return scaled


@torch.no_grad()
def squared_path_norm(model: nn.Module, example: Tensor) -> float:
    """Sum over all paths from an input to an output of the product of the squared weights on the path.

    That is the sum of the outputs of the network with squared weights and without biases on an image of ones. The
    first layer's standardisation (`Normalize`) is left out; batch norm counts as its scaling in eval mode, squared.
    Pooling stays as it is: of the paths through a maximum only the largest counts, and a mean is not squared.

    Args:
        model: left as found.
        example: one image (1, C, H, W), for its shape, type and device.

    Raises:
        UserError: if the network has parameters in other layers, or is not positively homogeneous without its biases.
    """
    squares = copy.deepcopy(model).double()
    for path, module in list(squares.named_modules()):
        made = _squared(module)
        if made is None and list(module.parameters(recurse=False)):
            raise UserError(f"The path norm is not defined for layer '{path}' ({type(module).__name__}).")
        if made is not None and path:
            squares.set_submodule(path, made)
    ones = torch.ones_like(example, dtype=torch.float64)
    with evaluating(squares), frozen(squares):
        once, twice = squares(ones), squares(2 * ones)
    if not torch.allclose(2 * once, twice, rtol=_TOLERANCE, atol=0):
        raise UserError(
            f"The path norm is defined for positively homogeneous networks (rectifiers); doubling the input of "
            f"{type(model).__name__} without biases does not double its logits."
        )
    return float(once.sum())


def _squared(module: nn.Module) -> nn.Module | None:
    """What takes a module's place; `None` for one that stays."""
    if isinstance(module, _LINEAR):
        module.weight.square_()
        if module.bias is not None:
            module.bias.zero_()
        return module
    if isinstance(module, _BatchNorm) and module.running_var is not None:
        scale = torch.rsqrt(module.running_var.double() + module.eps)
        if isinstance(module, ReBatchNorm):
            scale = scale * module.scale.double()
        elif module.affine:
            scale = scale * module.weight.double()
        return _Diagonal(scale.square())
    return nn.Identity() if isinstance(module, Normalize) else None
