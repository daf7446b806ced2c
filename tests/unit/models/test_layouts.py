"""Converted networks give the logits of the network that was converted."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from robustflat.errors import CheckpointError
from robustflat.models.layouts import Conversion, fitted, is_released, released, released_settings
from tests.unit.models.released import forward, random_state


def built(conversion: Conversion) -> nn.Module:
    """The converted network in float64 and eval mode."""
    arguments = dict(conversion.model)
    module, _, name = str(arguments.pop("_target_")).rpartition(".")
    model = getattr(importlib.import_module(module), name)(**arguments)
    model.load_state_dict(conversion.weights, strict=True)
    return model.double().eval()


def images(channels: int = 3) -> torch.Tensor:
    return torch.rand(4, channels, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


CASES = {
    "the paper's": {"depths": (2, 2, 2, 2)},
    "tiny": {},
    "34 layers": {"depths": (3, 4, 6, 3), "channels": 2},
    "50 layers": {"depths": (3, 4, 6, 3), "channels": 2, "bottleneck": True},
    "bn": {"norm": "bn"},
    "fixedbn": {"norm": "fixedbn"},
    "gn": {"norm": "gn", "channels": 16},
    "no norm": {"norm": ""},
    "no biases": {"bias": False},
    "rescaled images": {"images": "rescale"},
    "grey images as they are": {"images": "none", "in_channels": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_a_released_network_keeps_its_logits(case):
    options = CASES[case]
    state = random_state(**options)
    norm = options.get("norm", "rebn")
    assert is_released(state)
    conversion = released(state, {"normalization": norm, "activation": "relu"})
    x = images(options.get("in_channels", 3))
    expected = forward(state, x, norm=norm)
    assert expected.std() > 0.05
    torch.testing.assert_close(built(conversion)(x), expected, rtol=1e-10, atol=1e-10)
    assert all("is assumed" not in note for note in conversion.notes)


@pytest.mark.parametrize("activation", ["silu", "leaky_relu"])
def test_the_stored_activation_and_factor_count(activation):
    state = random_state()
    content = {
        "model": state,
        "model_class": "ResNet",
        "arguments": {"activation": activation, "normalization": "rebn", "dropout": True, "N_class": 10},
        "kwargs": {"scale": 4.0, "whiten": True},
    }
    conversion = released(state, released_settings(content))
    expected = forward(state, images(), activation=activation, scale=4.0)  # a factor that float32 does not round
    torch.testing.assert_close(built(conversion)(images()), expected, rtol=1e-10, atol=1e-10)
    assert conversion.model["dropout"] == 0.1
    assert any("factor 4.0" in note for note in conversion.notes)


def test_what_the_file_does_not_say_is_said():
    (note,) = released(random_state()).notes
    assert "relu is assumed" in note
    notes = released(random_state(norm="")).notes
    assert any("none is assumed" in note for note in notes)


def test_the_rotation_head_is_left_out_and_named():
    state = random_state() | {"auxiliary.lin0.weight": torch.zeros(2, 2)}
    conversion = released(state, {"activation": "relu"})
    assert any("auxiliary.lin0.weight" in note for note in conversion.notes)
    built(conversion)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block1.0.extra.weight": torch.zeros(1)}, r"no place for 1 names: block1\.0\.extra\.weight"),
        ({"logits.weight": torch.zeros(1, 8), "logits.bias": torch.zeros(1)}, "one output"),
        ({"block2.0.conv1.weight": torch.zeros(1)}, r"1, 1, 1 basic blocks, which none of ours"),
    ],
)
def test_what_has_no_counterpart_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        released(random_state() | change)


def test_group_norm_of_few_channels_and_operators_are_refused():
    with pytest.raises(CheckpointError, match="fewer than 16 channels"):
        released(random_state(norm="gn", channels=16) | {"conv1.weight": torch.zeros(8, 3, 3, 3)})
    with pytest.raises(CheckpointError, match="operators"):
        released(random_state(), {"operators": ["something"]})


def own() -> dict[str, torch.Tensor]:
    return {"model.a.weight": torch.ones(2, 3), "model.a.bias": torch.ones(2), "mu": torch.full((1, 3, 1, 1), 0.5)}


@pytest.mark.parametrize("beginning", ["", "module.", "model.", "module.model.", "network."])
def test_beginnings_of_wrappers_are_taken_off_and_put_on(beginning):
    state = {f"{beginning}a.weight": torch.zeros(2, 3), f"{beginning}a.bias": torch.zeros(2)}
    conversion = fitted(state, own())
    assert {name: float(value.sum()) for name, value in conversion.weights.items()} == {
        "network.model.a.weight": 0.0,
        "network.model.a.bias": 0.0,
        "network.mu": 1.5,
    }
    assert conversion.notes == ("mu is not in the file: the architecture's own [0.5, 0.5, 0.5] is kept.",)


def test_a_constant_in_the_file_wins_and_learned_weights_are_never_filled_in():
    conversion = fitted({"mu": torch.zeros(1, 3, 1, 1), "model.a.weight": torch.zeros(2, 3)}, own())
    assert conversion.notes == ()
    assert set(conversion.weights) == {"network.mu", "network.model.a.weight"}
    assert not conversion.weights["network.mu"].any()
