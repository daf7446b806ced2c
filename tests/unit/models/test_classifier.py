"""The model contract: features, logits, rotation head and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.models.classifier import Classifier
from robustflat.models.modes import perturbable
from robustflat.models.normalize import Normalize
from robustflat.models.resnet import resnet18, resnet_tiny


def _linear(image_shape: tuple[int, int, int] | None = None, auxiliary: bool = False) -> Classifier:
    normalize = Normalize((0.5,), (0.5,))
    return Classifier(
        normalize=normalize,
        body=nn.Flatten(),
        width=4,
        classes=3,
        image_shape=image_shape,
        auxiliary=auxiliary,
    )


def test_logits_are_head_of_body_of_normalised_images() -> None:
    model, x = _linear(), torch.rand(5, 1, 2, 2)
    flat = (x.flatten(1) - 0.5) / 0.5
    torch.testing.assert_close(model.features(x), flat)
    torch.testing.assert_close(model(x), flat @ model.head.weight.T + model.head.bias)


def test_auxiliary_forward_returns_both_logits_from_the_same_features() -> None:
    model, x = resnet_tiny(classes=5, auxiliary=True), torch.rand(6, 1, 8, 8)
    model.eval()
    logits, rotations = model(x, auxiliary=True)
    assert rotations.shape == (6, 4)
    torch.testing.assert_close(logits, model(x))
    head = model.auxiliary
    hidden = torch.relu(model.features(x) @ head.hidden.weight.T + head.hidden.bias)
    hidden = (hidden - head.norm.running_mean) / (head.norm.running_var + head.norm.eps).sqrt()
    torch.testing.assert_close(rotations, hidden @ head.logits.weight.T + head.logits.bias)


def test_rotation_head_has_the_size_of_the_paper_code() -> None:
    with torch.device("meta"):
        with_head, without = resnet18(classes=10, auxiliary=True), resnet18(classes=10)
    assert sum(p.numel() for p in with_head.auxiliary.parameters()) == 132_868
    extra = set(with_head.state_dict()) - set(without.state_dict())
    assert all(name.startswith("auxiliary.") for name in extra)


def test_rotation_head_is_no_part_of_the_perturbable_weights() -> None:
    assert list(perturbable(resnet_tiny(classes=5, auxiliary=True))) == list(perturbable(resnet_tiny(classes=5)))


def test_features_are_not_clamped_before_the_rotation_head() -> None:
    model = _linear(auxiliary=True).eval()
    dark, darker = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), -1.0)
    assert not torch.allclose(model(dark, auxiliary=True)[1], model(darker, auxiliary=True)[1])


def test_rotation_logits_without_a_head_are_refused() -> None:
    with pytest.raises(UserError, match=r"no rotation head. Build it with model.auxiliary=true"):
        resnet_tiny(classes=5)(torch.rand(2, 1, 8, 8), auxiliary=True)


def test_images_of_another_size_are_refused_where_the_size_matters() -> None:
    with pytest.raises(UserError, match=r"images of shape \(B, 1, 2, 2\), got \(3, 1, 3, 3\).*image_size"):
        _linear(image_shape=(1, 2, 2))(torch.rand(3, 1, 3, 3))


def test_fewer_than_two_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"classes must lie in \[2, inf\), got 1"):
        resnet_tiny(classes=1)
