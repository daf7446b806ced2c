"""Slow versions of what a training step does, written from formulas, and a trainer to compare them with.

The slow versions share nothing with the package: a network as a function of a dictionary of weights, batch norm
and losses spelled out, gradients by autograd, Nesterov's step by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.geometry.input_ball import LinfBall
from robustflat.gradients.plain import Plain
from robustflat.loggers.base import Null
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.models.classifier import Classifier
from robustflat.models.normalize import Normalize
from robustflat.rng import Streams
from robustflat.training.callbacks import WeightAverage
from robustflat.training.optimizers import sgd
from robustflat.training.schedules import constant
from robustflat.training.trainer import Trainer
from robustflat.types import Batch

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01
EPSILON, STEP, STEPS = 0.1, 0.06, 2
Weights = dict[str, Tensor]


def network(auxiliary: bool = False) -> Classifier:
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten())
    model = Classifier(
        normalize=Normalize(None, None, channels=1), body=body, width=12, classes=3, auxiliary=auxiliary
    ).double()
    nn.init.normal_(model.body[1].weight)
    nn.init.normal_(model.body[1].bias)
    with torch.no_grad():
        model.body[1].running_mean.normal_()
        model.body[1].running_var.uniform_(0.5, 2)
    return model


class Batches:
    """Batches 0, 1, 2, ... of random images."""

    def __init__(self, classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(7)
        self.batches = [
            Batch(
                torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=generator),
                torch.randint(classes, (6,), generator=generator),
            )
            for _ in range(4)
        ]
        self.position = 0

    def __len__(self) -> int:
        return 1

    def __next__(self) -> Batch:
        self.position += 1
        return self.batches[self.position - 1]

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position}

    def load_state_dict(self, state) -> None:
        self.position = state["position"]


def trained(model: Classifier | None = None, *, attack=None, seed: int = 0, resumed=None, **options) -> Trainer:
    """A trainer after training: one epoch of one step, if not told otherwise."""
    attack = attack or Pgd(LinfBall(EPSILON), steps=STEPS, step_size=STEP, random_start=False, keep="last")
    trainer = Trainer(
        **{
            "model": model or network(),
            "data": Batches(),
            "loss": CrossEntropy(),
            "attack": attack,
            "gradient": Plain(),
            "make_optimizer": partial(sgd, lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
            "make_schedule": constant,
            "epochs": 1,
            "logger": Null(),
            "streams": Streams(seed),
            **options,
        }
    )
    if resumed is not None:
        resumed["schedule"]["total_steps"] = trainer.epochs
        trainer.load_state_dict(resumed)
    trainer.fit()
    return trainer


# The slow side.


def hidden(w: Weights, x: Tensor, *, training: bool) -> Tensor:
    h = F.conv2d(x, w["body.0.weight"], w["body.0.bias"])
    if training:
        mean, var = h.mean(dim=(0, 2, 3)), h.var(dim=(0, 2, 3), unbiased=False)
    else:
        mean, var = w["body.1.running_mean"], w["body.1.running_var"]
    h = (h - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
    h = h * w["body.1.weight"][:, None, None] + w["body.1.bias"][:, None, None]
    return h.tanh().flatten(1)


def probabilities(w: Weights, x: Tensor, *, training: bool = True) -> Tensor:
    z = hidden(w, x, training=training) @ w["head.weight"].T + w["head.bias"]
    return z.exp() / z.exp().sum(dim=1, keepdim=True)


def cross_entropy(w: Weights, x: Tensor, y: Tensor, *, training: bool = True) -> Tensor:
    p = probabilities(w, x, training=training)
    return sum(-p[i, int(y[i])].log() for i in range(len(y))) / len(y)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def slow_attack(w: Weights, x: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """PGD without random start; `objective` is the sum over examples, in eval mode."""
    point = x
    for _ in range(STEPS):
        point = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(point), point)
        point = point.detach() + STEP * gradient.sign()
        point = torch.minimum(torch.maximum(point, x - EPSILON), x + EPSILON).clamp(0, 1)
    return point


def attacked(w: Weights, batch: Batch) -> Tensor:
    return slow_attack(w, batch.x, lambda point: cross_entropy(w, point, batch.y, training=False))


def trainable(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def everything(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def gradient_at(w: Weights, names: list[str], loss: Callable[[Weights], Tensor]) -> Weights:
    leaves = {name: w[name].clone().requires_grad_() for name in names}
    slopes = torch.autograd.grad(loss({**w, **leaves}), list(leaves.values()))
    return dict(zip(names, slopes, strict=True))


def stepped(w: Weights, gradient: Weights) -> Weights:
    """First step of SGD with Nesterov momentum: the velocity is the decayed gradient itself."""
    result = {}
    for name, g in gradient.items():
        d = g + DECAY * w[name]
        result[name] = w[name] - LR * (d + MOMENTUM * d)
    return result


def moved(w: Weights, nu: Weights, factor: float = 1.0) -> Weights:
    return {name: value + factor * nu[name] if name in nu else value for name, value in w.items()}


PERTURBED = ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]


def per_layer_step(w: Weights, g: Weights, radius: float) -> Weights:
    return {name: radius * w[name].norm() * g[name] / g[name].norm() for name in PERTURBED}


def require_equal(trainer: Trainer, expected: Weights) -> None:
    found = trainable(trainer.model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def average_of(trainer: Trainer, average: WeightAverage) -> Weights:
    return everything(average.averaged_model(trainer))
