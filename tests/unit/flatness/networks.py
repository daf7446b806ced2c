"""Small networks whose flatness is known, or which must be refused."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quadratic(nn.Module):
    """Cross-entropy of label 0 is exactly 1 + nu^T A nu / 2 + sum(slope * (x - 1/2)) at weights w0 + nu, in float64.

    With logits (0, log(e^q - 1)) the cross-entropy of label 0 is log(1 + e^q - 1) = q.
    """

    def __init__(self, matrix: Tensor, slope: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("start", torch.linspace(1, 2, len(matrix), dtype=torch.float64))
        self.weight = nn.Parameter(self.start.clone())
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        nu = self.weight - self.start
        q = 1 + nu @ self.matrix @ nu / 2 + self.slope * (x - 0.5).flatten(1).sum(dim=1)
        return torch.stack([torch.zeros_like(q), torch.log(torch.expm1(q))], dim=1)


def spectrum(*eigenvalues: float) -> Tensor:
    """Symmetric matrix with these eigenvalues in a random basis, float64."""
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def convnet(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two convolutions with batch norm whose statistics are not those of a new layer; 3 classes; (B, 2, 6, 6)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3, stride=2),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20, 3),
        ).to(dtype)
        for _ in range(5):
            model(torch.rand(16, 2, 6, 6, dtype=dtype))
    return model.eval()


def scaled_before_batch_norm(model: nn.Sequential, factor: float) -> nn.Sequential:
    """A copy of `convnet` with both convolutions times `factor` and their batch norms adapted: the same function."""
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for conv, norm in ((0, 1), (3, 4)):
            for tensor in (scaled[conv].weight, scaled[conv].bias, scaled[norm].running_mean):
                tensor *= factor
            scaled[norm].running_var *= factor**2
            scaled[norm].eps *= factor**2  # without this the variance's epsilon would tell the copies apart
    return scaled


def examples(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images (N, 2, 6, 6) away from the ends of [0, 1], and labels below 3."""
    draws = torch.Generator().manual_seed(3)
    return (
        0.1 + 0.8 * torch.rand(count, 2, 6, 6, generator=draws, dtype=dtype),
        torch.randint(0, 3, (count,), generator=draws),
    )


class AlwaysDropout(nn.Module):
    """Drops activations in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)
