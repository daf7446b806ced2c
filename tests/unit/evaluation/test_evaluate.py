"""The front door: reference figures, a linear network in closed form, text, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from robustflat.attacks.pgd import Pgd
from robustflat.attacks.sanity import report
from robustflat.attacks.wrappers import Restarts
from robustflat.data.dataset import Dataset
from robustflat.data.images import ImageSet
from robustflat.data.sources import Digits
from robustflat.errors import UserError
from robustflat.evaluation.evaluate import EvaluationResult, evaluate, standard_attack
from robustflat.evaluation.plan import EvaluationPlan
from robustflat.evaluation.predict import Prediction
from robustflat.geometry.input_ball import LinfBall
from robustflat.types import Found
from tests.reference.models import cnn_cifar10, figures, mlp_digits


def linear() -> nn.Module:
    """Logits (0, s) with s = 2 * sum(x) - 4 on images of 4 pixels: class 1 where the mean pixel is above 1/2."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0] * 4, [2.0] * 4]))
        layer.bias.copy_(torch.tensor([0.0, -4.0]))
    return nn.Sequential(nn.Flatten(), layer)


def grey(*levels: float) -> torch.Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()


def test_linear_network_in_closed_form() -> None:
    images, labels = grey(0.3, 0.45, 0.52, 0.9), torch.tensor([0, 0, 1, 0])
    result = evaluate(linear(), images, labels, epsilon=0.1)
    assert result.error == 0.25
    assert result.robust_error == 0.75  # 0.45 and 0.52 can cross 1/2; 0.9 is wrong already
    worst = torch.tensor([0.4, 0.55, 0.42, 1.0])
    s = 8 * worst - 4
    expected = torch.nn.functional.cross_entropy(torch.stack([torch.zeros(4), s], dim=1), labels)
    assert result.robust_loss == pytest.approx(float(expected), abs=1e-5)


def test_text_states_count_attack_errors_and_losses() -> None:
    result = evaluate(linear(), grey(0.3, 0.45, 0.52, 0.9), torch.tensor([0, 0, 1, 0]), epsilon=0.1)
    text = str(result)
    assert text.startswith("4 examples, linf epsilon 0.1, fp32, seed 0")
    assert "Pgd(ball=LinfBall(epsilon=0.1" in text
    assert "worst of 10 runs" in text
    assert "error         25.00%  (95 % interval 4.56% to 69.94%)" in text
    assert "robust error  75.00%  (95 % interval 30.06% to 95.44%)" in text
    assert "robust loss" in text


def test_dictionary_is_valid_json_for_a_single_example() -> None:
    plain = evaluate(linear(), grey(0.3), torch.tensor([0]), epsilon=0.1).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False))["loss_standard_error"] is None
    assert plain["examples"] == 1


def test_the_same_seed_gives_the_same_and_numpy_bytes_are_taken() -> None:
    model, images, labels = mlp_digits()
    attack = Pgd(LinfBall(0.1), steps=2, step_size=0.05)
    bytes_ = (images[:20] * 255).round().to(torch.uint8)
    first, again, other = (
        evaluate(model, bytes_.numpy(), labels[:20].numpy(), attack=attack, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.adversarial.logits, again.adversarial.logits)
    assert not torch.equal(first.adversarial.logits, other.adversarial.logits)
    assert (first.norm, first.epsilon, first.restarts) == ("linf", 0.1, 1)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8 / 255), ("l2", 0.5), ("l1", 4.0)])
def test_every_norm_has_an_attack_that_stays_in_its_ball_and_raises_the_loss(norm: str, epsilon: float) -> None:
    model, images, labels = mlp_digits()
    attack = standard_attack(norm, epsilon)
    x, y = images[:20], labels[:20]
    found = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    assert float(attack.ball.size(found.x_adv, x).max()) <= epsilon * (1 + 1e-5)
    clean = torch.nn.functional.cross_entropy(model(x), y, reduction="none").detach()
    assert float(found.value.mean()) > 1.5 * float(clean.mean())


def test_default_step_is_the_papers() -> None:
    assert standard_attack("linf", 8 / 255).step_size == pytest.approx(0.007)


def test_misuse_is_refused() -> None:
    images, labels = grey(0.3), torch.tensor([0])
    with pytest.raises(UserError, match="norm must be one of l1, l2, linf, got 'l-inf'"):
        evaluate(linear(), images, labels, norm="l-inf")
    with pytest.raises(UserError, match="norm must be one of l1, l2, linf, got 'l-inf'"):
        evaluate(linear(), images, labels, norm="l-inf", attack=Scripted(images))
    with pytest.raises(UserError, match=r"Write 8/255 as 0\.03137"):
        evaluate(linear(), images, labels, epsilon=8)
    with pytest.raises(UserError, match="Divide by 255"):
        evaluate(linear(), 255 * images, labels)
    with pytest.raises(UserError, match="a label is 5"):
        evaluate(linear(), images, np.array([5]))


def test_clean_figures_of_the_reference_network() -> None:
    model, images, labels = cnn_cifar10()
    # A one-step attack: only the clean figures matter here.
    result = evaluate(model, images, labels, attack=Pgd(LinfBall(0.01), steps=1, step_size=0.01))
    assert 1 - result.error == figures()["clean"]["accuracy"]
    assert result.loss == pytest.approx(figures()["clean"]["cross_entropy"], abs=1e-6)


def test_one_run_of_pgd20_agrees_with_the_released_code() -> None:
    model, images, labels = cnn_cifar10()
    attack = Pgd(LinfBall(0.0314), steps=20, step_size=0.007, random_start="uniform_norm")
    result = evaluate(model, images, labels, attack=attack)
    single = sum(figures()["pgd20"]["robust_loss_single_restart_mean"]) / 5
    assert result.robust_loss == pytest.approx(single, abs=1e-3)


class Scripted:
    """Returns prepared images, others at every call."""

    def __init__(self, *images: torch.Tensor) -> None:
        self.images = list(images)

    def __call__(self, forward, x, y, objective=None, generator=None) -> Found:
        return Found(self.images.pop(0), torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bool))


def test_an_example_that_any_run_fools_counts_even_if_the_run_with_the_highest_loss_does_not() -> None:
    model = nn.Flatten()  # three pixels are the logits
    x, fooled, right = (torch.tensor(z).view(1, 3, 1, 1) for z in ([0.9, 0.1, 0.1], [0.9, 0.95, 0], [0.34, 0.33, 0.33]))
    y = torch.tensor([0])
    losses = [float(torch.nn.functional.cross_entropy(z.flatten(1), y)) for z in (fooled, right)]
    assert losses[0] < losses[1]
    runs = torch.stack([fooled.flatten(1), right.flatten(1)])
    about = {"attack": "", "norm": "linf", "epsilon": 1.0, "precision": "fp32", "seed": 0, "seconds": 0.0}
    result = EvaluationResult(clean=Prediction(x.flatten(1), y), runs=runs, sanity=report(()), **about)
    assert (result.error, result.robust_error, result.restarts) == (0.0, 1.0, 2)
    assert result.robust_loss == pytest.approx(losses[1])
    assert result.compare(result).differences[2].first == 1.0
    data = Dataset(source=Digits(), classes=10, channels=1, mean=[0.3], std=[0.4])
    data.__dict__["sets"] = {"test": ImageSet((x * 255).to(torch.uint8), y, "test", 10)}
    attacks = {"scripted": Scripted(fooled, right)}
    plan = EvaluationPlan(norm="linf", epsilon=1, step_size=1, attacks=attacks, restarts={"scripted": 2}, test="test",
                          train=None, flatness=None, attack_batch=1)  # fmt: skip
    measured = plan.measure_split(model, data, "test", seed=0)["scripted"]
    assert (measured["robust_error"], measured["robust_loss"]) == (1.0, pytest.approx(losses[1]))


@pytest.mark.parametrize(
    ("trained", "measured", "strangers"),
    [("train[:64]", "train[:500]", 436), ("train[:-500]", "train", 500), ("train[::2]", "train[1:11]", 5),
     ("train[:-500]", "train[:797]", 0), ("train", "train[:500]/balanced", 0)],
)  # fmt: skip
def test_examples_that_are_called_training_examples_but_are_not_are_pointed_out(trained, measured, strangers) -> None:
    data = Dataset(source=Digits(), classes=10, channels=1, mean=[0.3], std=[0.4], train=trained)
    splits = {"test": "test", "train": measured, "flatness": None}
    notes = EvaluationPlan(norm="linf", epsilon=1, step_size=1, attacks={}, **splits).notes(data)
    assert len(notes) == bool(strangers)
    if strangers:
        assert f"evaluation.train='{measured}': {strangers} of its {len(data.split(measured))} examples" in notes[0]
        assert f"(dataset.train='{trained}')" in notes[0]


def test_images_of_many_pixels_are_attacked_one_by_one_at_least() -> None:
    plan = EvaluationPlan(norm="linf", epsilon=1, step_size=1, attacks={}, test="test", train=None, flatness=None)
    assert plan._at_once(torch.zeros(1, 3, 384, 384)) == 1
    assert plan._at_once(torch.zeros(1, 3, 32, 32)) == 128


@pytest.mark.slow
@pytest.mark.parametrize("start", ["uniform_norm", "uniform"])
def test_pgd20_with_ten_restarts_agrees_with_the_released_code_and_autoattack(start: str) -> None:
    model, images, labels = cnn_cifar10()
    attack = Restarts(Pgd(LinfBall(0.0314), steps=20, step_size=0.007, random_start=start), 10)
    result = evaluate(model, images, labels, attack=attack)
    worst = sum(figures()["pgd20"]["robust_loss_worst_of_10_restarts"]) / 5
    assert result.robust_loss == pytest.approx(worst, abs=1e-3)
    auto = figures()["autoattack_Linf"]
    assert auto["standard"]["robust_accuracy"] <= 1 - result.robust_error <= auto["apgd-ce"]["robust_accuracy"] + 0.01
