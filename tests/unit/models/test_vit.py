"""Vision transformer: torch's encoder layer as oracle, second derivatives, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.models.layers import Layers
from robustflat.models.modes import perturbable
from robustflat.models.vit import Patches, TransformerBlock, vit


def test_block_computes_what_torchs_encoder_layer_computes() -> None:
    ours = TransformerBlock(12, heads=3, layers=Layers("none", "gelu")).double()
    theirs = nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    pairs = (
        (theirs.self_attn.in_proj_weight, ours.attention.inputs.weight),
        (theirs.self_attn.in_proj_bias, ours.attention.inputs.bias),
        (theirs.self_attn.out_proj.weight, ours.attention.output.weight),
        (theirs.self_attn.out_proj.bias, ours.attention.output.bias),
        (theirs.linear1.weight, ours.expand.weight),
        (theirs.linear1.bias, ours.expand.bias),
        (theirs.linear2.weight, ours.reduce.weight),
        (theirs.linear2.bias, ours.reduce.bias),
        (theirs.norm1.weight, ours.norm1.weight),
        (theirs.norm2.bias, ours.norm2.bias),
    )
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source.normal_())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_patches_are_cut_row_by_row_and_positions_added() -> None:
    layer = Patches(1, image_size=4, patch=2, width=4)
    with torch.no_grad():
        layer.project.weight.copy_(torch.eye(4).view(4, 1, 2, 2))
        layer.project.bias.zero_()
        layer.position.weight.copy_(100 * torch.arange(4.0).view(4, 1).expand(4, 4))
    tokens = layer(torch.arange(16.0).view(1, 1, 4, 4))[0]
    expected = torch.tensor([[0.0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    torch.testing.assert_close(tokens, expected + 100 * torch.arange(4.0).view(4, 1))


def test_second_derivatives_exist() -> None:
    model = vit(classes=3, in_channels=1, image_size=8, width=12, depth=1)
    loss = model(torch.rand(2, 1, 8, 8)).square().sum()
    weight = model.body.blocks[0].attention.inputs.weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    (product,) = torch.autograd.grad((gradient * torch.randn_like(gradient)).sum(), weight)
    assert product.isfinite().all()
    assert product.any()


def test_all_weights_but_those_of_norms_can_be_perturbed() -> None:
    model = vit(classes=3, image_size=8, width=12, depth=1)
    names = {n for n, _ in model.named_parameters() if ".norm" not in n}
    assert set(perturbable(model)) == names


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="patch must divide image_size, got patch=4 and image_size=30"):
        vit(classes=3, image_size=30)
    with pytest.raises(UserError, match="heads must divide width, got heads=5 and width=12"):
        vit(classes=3, width=12, heads=5)
    with pytest.raises(UserError, match="depth must lie in"):
        vit(classes=3, depth=0)
