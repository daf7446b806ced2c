"""The path norm of networks with batch norm against the sum over all paths, written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.models.norms import ReBatchNorm
from robustflat.models.paths import squared_path_norm


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, ReBatchNorm])
def test_batch_norm_counts_by_its_scale_in_eval_mode(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), norm(3), nn.ReLU(), nn.Linear(3, 2))
    layer = model[2]
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        tensor.uniform_(0.5, 2.0)
    scale = layer.weight if norm is nn.BatchNorm1d else 1 + layer.weight
    exact = 0.0
    for i in range(4):
        for j in range(3):
            for k in range(2):
                path = model[1].weight[j, i] * scale[j] / (layer.running_var[j] + layer.eps).sqrt()
                exact += (path * model[4].weight[k, j]).item() ** 2
    assert squared_path_norm(model, torch.rand(1, 1, 2, 2)) == pytest.approx(exact, rel=1e-5)


def test_what_is_not_positively_homogeneous_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    with pytest.raises(UserError, match="does not double its logits"):
        squared_path_norm(model, torch.rand(1, 1, 2, 2))
