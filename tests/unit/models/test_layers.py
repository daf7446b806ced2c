"""The choices that all blocks of a network share."""

from __future__ import annotations

import pytest
from torch import nn

from robustflat.errors import UserError
from robustflat.models.layers import Layers
from robustflat.models.norms import ReBatchNorm


def test_layers_are_fresh_and_of_the_named_kind() -> None:
    layers = Layers("rebn", "silu", 0.25)
    assert isinstance(layers.make_norm(8), ReBatchNorm)
    assert isinstance(layers.make_flat_norm(8), ReBatchNorm)
    assert isinstance(layers.make_activation(), nn.SiLU)
    assert layers.make_dropout().p == 0.25
    assert layers.make_norm(8) is not layers.make_norm(8)


def test_no_dropout_means_no_layer_at_all() -> None:
    assert isinstance(Layers("bn", "relu").make_dropout(), nn.Identity)


def test_wrong_names_and_probabilities_are_refused_before_anything_is_built() -> None:
    with pytest.raises(UserError, match=r"norm must be one of .*Did you mean 'bn'?"):
        Layers("bnn", "relu")
    with pytest.raises(UserError, match=r"activation must be one of .*Did you mean 'gelu'?"):
        Layers("bn", "gelus")
    with pytest.raises(UserError, match=r"dropout must lie in \[0, 1\), got 1"):
        Layers("bn", "relu", 1.0)
