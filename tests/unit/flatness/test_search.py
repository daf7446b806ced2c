"""Searching on a rewritten copy: the same flatness, judged by the network itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.attacks.pgd import Pgd
from robustflat.attacks.strongest import SearchCopy, search_model, strongest
from robustflat.errors import UserError
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.direction_sources import HessianDirections
from robustflat.flatness.hessian import HessianSpectrum
from robustflat.flatness.landscape import Landscape
from robustflat.flatness.measures.catalogue import measures
from robustflat.flatness.measures.measure import Reading
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.models.modes import displaced, perturbable
from robustflat.models.resnet import resnet_tiny
from tests.unit.flatness.networks import convnet, examples

ATTACK = Pgd(LinfBall(0.05), steps=5, step_size=0.02)


@pytest.mark.parametrize(("search", "tolerance"), [("fp32", 1e-3), ("bf16", 0.02)])
def test_average_flatness_is_that_of_the_plain_search(search, tolerance):
    model, (x, y) = convnet(), examples(40)
    found = [
        AverageFlatness(WeightBall(1.0), trials=3, attack=ATTACK, search=way)(model, x, y) for way in ("plain", search)
    ]
    assert found[0].value > 0.01
    assert [f.to_dict()["search"] for f in found] == ["plain", search] and f"search {search}" in str(found[1])
    assert found[1].value == pytest.approx(found[0].value, rel=tolerance)
    assert torch.allclose(found[1].reference, found[0].reference, atol=tolerance)


def test_worst_flatness_is_that_of_the_plain_search():
    model, (x, y) = convnet(), examples(40)
    found = [
        WorstFlatness(WeightBall(0.1), restarts=2, steps=5, input_ball=LinfBall(0.05), search=way)(model, x, y)
        for way in ("plain", "fp32")
    ]
    assert found[0].value > 0.01
    assert found[1].value == pytest.approx(found[0].value, rel=1e-3)
    assert [f.search for f in found] == ["plain", "fp32"]
    assert torch.allclose(found[0].trace, found[1].trace, atol=1e-4)


def test_the_network_is_left_as_it_was_found():
    model, (x, y) = convnet(), examples(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    AverageFlatness(WeightBall(0.3), trials=1, attack=ATTACK, search="bf16")(model, x, y)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_plain_network_judges_what_the_copy_has_found():
    model, (x, y) = convnet(), examples(8)
    found = strongest(model, x, y, ATTACK, generator=torch.Generator().manual_seed(0), search="bf16")
    with torch.no_grad():
        assert torch.equal(found.logits, model(found.x_adv))


def test_bf16_that_changes_the_logits_beyond_use_falls_back_to_float32(monkeypatch):
    model, (x, _) = convnet(), examples(8)
    from robustflat.models import inference

    monkeypatch.setattr(inference, "_HALF_TOLERANCE", 0.0)
    copy = search_model(model, x, "bf16")
    with torch.no_grad():
        assert torch.allclose(copy(x), model(x), atol=1e-5)


def test_measures_that_share_a_reference_say_so_alike():
    ball, options = LinfBall(0.05), {"search": "fp32"}
    average = AverageFlatness(attack=Pgd(ball, steps=20, step_size=0.007), **options)
    worst = WorstFlatness(input_ball=ball, **options)
    assert average.reference_settings == worst.reference_settings
    assert average.reference_settings != WorstFlatness(input_ball=ball).reference_settings
    assert AverageFlatness(loss="clean").reference_settings == WorstFlatness(loss="clean").reference_settings
    assert AverageFlatness(loss="frozen").reference_settings is None
    released = AverageFlatness(protocol="released")
    assert released.reference_settings != AverageFlatness().reference_settings


def test_equal_reference_settings_and_seed_give_the_same_reference():
    model, (x, y) = convnet(), examples(12)
    ball = LinfBall(0.05)
    attack = Pgd(ball, steps=20, step_size=0.01)
    average = AverageFlatness(trials=1, attack=attack, seed=4)
    worst = WorstFlatness(restarts=1, steps=1, input_ball=ball, input_step=0.01, seed=4)
    assert average.reference_settings == worst.reference_settings
    assert torch.equal(average(model, x, y).reference, worst(model, x, y).reference)


def test_another_search_is_refused():
    for make in (AverageFlatness, WorstFlatness):
        with pytest.raises(UserError, match="search must be one of"):
            make(search="fp8")


class Viewing(nn.Module):
    """Takes its images in one memory order only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(48, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).view(len(x), -1))


@pytest.mark.parametrize("search", ["fp32", "bf16"])
def test_a_network_that_needs_its_memory_order_is_measured_too(search):
    torch.manual_seed(0)
    model, (x, y) = Viewing().eval(), examples(8)
    found = [
        AverageFlatness(WeightBall(0.5), trials=1, attack=ATTACK, search=way)(model, x, y % 2)
        for way in ("plain", search)
    ]
    assert found[1].value == pytest.approx(found[0].value, abs=0.01)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_copy_that_follows_is_to_the_bit_one_made_anew(channels):
    torch.manual_seed(0)
    model = resnet_tiny(classes=3, in_channels=channels, channels=4, mean=[0.5] * channels, std=[0.2] * channels)
    x, draws = torch.rand(9, channels, 8, 8), torch.Generator().manual_seed(1)
    model(x)
    copy = SearchCopy(model.eval(), "fp32")
    for _ in range(3):
        with displaced(model, WeightBall(0.5).sample(perturbable(model), draws)):
            points = [x.clone().requires_grad_() for _ in range(2)]
            logits = [network(z) for network, z in zip((copy(x), search_model(model, x, "fp32")), points, strict=True)]
            grads = [torch.autograd.grad(z.square().sum(), point)[0] for z, point in zip(logits, points, strict=True)]
        assert torch.equal(*logits)
        assert torch.equal(*grads)


def test_one_copy_serves_all_draws_of_a_measurement(monkeypatch):
    from robustflat.models import mirror

    model, (x, y), made = convnet(), examples(8), []
    rewrite = mirror.rewrite
    monkeypatch.setattr(mirror, "rewrite", lambda *args, **options: made.append(1) or rewrite(*args, **options))
    given = torch.zeros(8)
    AverageFlatness(WeightBall(0.3), trials=4, attack=ATTACK, search="fp32")(model, x, y, reference=given)
    assert len(made) == 1


def test_a_search_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="search"):
        SearchCopy(convnet(), "fp8")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "measure",
    [
        AverageFlatness(WeightBall(0.3), trials=1, attack=ATTACK, search="fp32"),
        WorstFlatness(WeightBall(0.1), restarts=1, steps=2, search="fp32"),
        WorstFlatness(WeightBall(0.1), restarts=1, steps=2, loss="clean"),
        HessianSpectrum(top=1, bottom=0, attack=ATTACK),
        lambda *args: Landscape(directions=HessianDirections(), attack=ATTACK, points=3, trials=1)(*args),
        lambda *args: measures(*args, only=["sam", "first_order_flatness"])["sam"],
    ],
)
def test_a_callers_grad_mode_changes_nothing(measure, context):
    model, (x, y) = convnet(), examples(8)

    def told(found) -> str:
        return str(found if isinstance(found, Reading) else found.losses if hasattr(found, "losses") else found.value)

    expected = told(measure(model, x, y))
    with context():
        assert told(measure(model, x + 0, y + 0)) == expected  # in inference mode, these are tensors of its own kind
