"""Trainings in float64 that two processes can share: by name, so that a worker process can build them too."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from robustflat.attacks.noise import NFgsm, RandomNoise
from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.attacks.wrappers import Fraction, OnlyCorrect, PredictedLabels, Restarts
from robustflat.geometry.input_ball import L1Ball, L2Ball, LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.gradients.adversarial_weights import AdversarialWeights
from robustflat.gradients.clipped import ClippedEntries
from robustflat.gradients.entropy_sgd import EntropySgd
from robustflat.gradients.plain import Plain
from robustflat.gradients.random_weights import RandomWeights
from robustflat.gradients.sam import Sam
from robustflat.loggers.base import Null
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.losses.mart import Mart
from robustflat.losses.rotation import Rotation
from robustflat.losses.trades import Trades
from robustflat.models.classifier import Classifier
from robustflat.models.normalize import Normalize
from robustflat.models.norms import ReBatchNorm
from robustflat.rng import Streams
from robustflat.training.callbacks import ClipWeights, WeightAverage
from robustflat.training.optimizers import sgd
from robustflat.training.schedules import constant
from robustflat.training.trainer import Trainer
from robustflat.types import Batch

LINF = Pgd(LinfBall(0.1), steps=2, step_size=0.05)

METHODS: dict[str, dict[str, Any]] = {
    "at": {},
    "standard": {"attack": NoAttack()},
    "trades": {"loss": Trades()},
    "trades_joint": {"loss": Trades(joint_forward=True), "dropout": 0.3},
    "trades_per_batch": {
        "loss": Trades(best_iterate="per_batch"), "attack": Pgd(L2Ball(0.4), steps=3, step_size=0.3, backtracking=True),
    },
    "mart": {"loss": Mart()},
    "awp": {"gradient": AdversarialWeights(WeightBall(0.05), steps=2)},
    "awp_unperturbed": {"gradient": AdversarialWeights(WeightBall(0.05), statistics="unperturbed")},
    "sam": {"gradient": Sam(rho=0.1)},
    "random_weights": {"gradient": RandomWeights(WeightBall(0.05), population=2)},
    "entropy_sgd": {"gradient": EntropySgd(inner_steps=2, noise=0.01)},
    "clipped": {"gradient": ClippedEntries(Plain(), maximum=0.01)},
    "micro_batches": {"gradient": Plain(micro_batches=2), "loss": CrossEntropy(label_noise=0.5)},
    "label_noise": {"loss": CrossEntropy(label_noise=0.4, label_smoothing=0.1)},
    "rotation": {"loss": Rotation(), "auxiliary": True},
    "half": {"wrappers": {"half": partial(Fraction, fraction=0.5)}},
    "odd_fraction": {"wrappers": {"part": partial(Fraction, fraction=0.6)}},
    "predicted": {"wrappers": {"predicted": partial(PredictedLabels, mode="train")}},
    "only_correct": {"wrappers": {"only": OnlyCorrect, "twice": partial(Restarts, n=2)}},
    "attack_in_train_mode": {"loss": CrossEntropy(attack_mode="train")},
    "l2_restarts": {"attack": Pgd(L2Ball(0.3), steps=2, step_size=0.2, restarts=3)},
    "l1": {"attack": Pgd(L1Ball(1.0), steps=2, step_size=0.6, random_start="uniform_norm")},
    "gaussian_start": {"attack": Pgd(LinfBall(0.1), steps=2, step_size=0.05, random_start="gaussian")},
    "n_fgsm": {"attack": NFgsm(LinfBall(0.1), step_size=0.1)},
    "noise": {"attack": RandomNoise(L2Ball(0.3), kind="gaussian")},
    "dropout": {"dropout": 0.4},
    "rebn": {"norm": "rebn"},
    "average": {"callbacks": {"average": WeightAverage(batch_norm="recalibrate", calibration_batches=2)}},
    "clipping": {"callbacks": {"clip": ClipWeights(maximum=0.2)}},
}  # fmt: skip


class Stream:
    """Endless batches of eight random images in float64."""

    def __init__(self, batch_size: int = 8) -> None:
        self.batch_size, self.position = batch_size, 0

    def __len__(self) -> int:
        return 2

    def __next__(self) -> Batch:
        generator = torch.Generator().manual_seed(self.position)
        self.position += 1
        x = torch.rand(self.batch_size, 1, 6, 6, dtype=torch.float64, generator=generator)
        return Batch(x, torch.randint(3, (self.batch_size,), generator=generator))

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def network(*, dropout: float = 0.0, norm: str = "bn", auxiliary: bool = False) -> Classifier:
    """Without biases before batch norm: their gradient is rounding, of which AWP would make a step of full length."""
    torch.manual_seed(3)
    second = ReBatchNorm(5) if norm == "rebn" else nn.BatchNorm1d(5, momentum=None)
    body = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(),
        nn.Linear(48, 5, bias=False), second, nn.Tanh(),
    )  # fmt: skip
    normalize = Normalize((0.5,), (0.3,), channels=1)
    return Classifier(normalize=normalize, body=body, width=5, classes=3, auxiliary=auxiliary).double()


def make(method: str, *, batch_size: int = 8, epochs: int = 2, **options: Any) -> Trainer:
    """The trainer of a method, with anything replaced."""
    chosen = copy.deepcopy(METHODS[method])  # callbacks keep state
    kind = {key: chosen.pop(key) for key in ("dropout", "norm", "auxiliary") if key in chosen}
    parts = {
        "model": network(**kind),
        "data": Stream(batch_size),
        "loss": CrossEntropy(),
        "attack": LINF,
        "gradient": Plain(),
        "make_optimizer": partial(sgd, lr=0.1, momentum=0.9, weight_decay=0.01),
        "make_schedule": constant,
        "epochs": epochs,
        "logger": Null(),
        "streams": Streams(0),
        **chosen,
        **options,
    }
    torch.manual_seed(1)
    return Trainer(**parts)


def fitted(method: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """State after training, with all networks, as plain numbers and tensors."""
    trainer = make(method, **(options or {}))
    trainer.fit()
    return {"state": trainer.state_dict(), "networks": {n: m.state_dict() for n, m in trainer.networks().items()}}


def resumed(method: str, state: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """State after going on from a state to a later epoch."""
    trainer = make(method, epochs=epochs)
    trainer.load_state_dict({**state, "schedule": {**state["schedule"], "total_steps": 2 * epochs}})
    trainer.fit()
    return trainer.state_dict()


def fails(rank_that_fails: int, step: int, with_user_error: bool) -> None:
    """A training in which one rank raises an error while it takes a step."""
    from robustflat.errors import UserError
    from robustflat.ranks import current

    trainer = make("at")
    craft = trainer.loss.craft

    def failing(*arguments: Any) -> Any:
        if current().rank == rank_that_fails and trainer.step == step:
            raise UserError("this rank has had enough") if with_user_error else ValueError("a bug")
        return craft(*arguments)

    trainer.loss.craft = failing
    trainer.fit()


def stops(rank_that_is_told: int) -> tuple[int, str]:
    """A training of which one rank is told to stop after its third step: where it stops, and how."""
    from robustflat.ranks import current
    from robustflat.training.callbacks import Callback

    class Tell(Callback):
        def after_step(self, trainer: Trainer) -> None:
            trainer.stop_requested = current().rank == rank_that_is_told and trainer.step == 3

    trainer = make("at", callbacks={"tell": Tell()})
    try:
        trainer.fit()
    except Exception as error:
        return trainer.step, type(error).__name__
    return trainer.step, "none"


def lonely_gradient() -> None:
    """A training by a gradient rule that forgets the other processes."""

    def rule(model: nn.Module, next_batch: Any, loss: Any) -> dict[str, torch.Tensor]:
        terms = loss(next_batch())
        terms.total.backward()
        return terms.parts

    make("at", gradient=rule).fit()


def first_statistics(synchronised: bool) -> list[torch.Tensor]:
    """Running mean and variance of the first batch norm after one step."""

    class Once(Stream):
        def __len__(self) -> int:
            return 1

    trainer = make("standard", data=Once(), epochs=1, sync_batch_norm=synchronised)
    trainer.fit()
    layer = trainer.model.body[1]
    return [layer.running_mean, layer.running_var]


class OddNorm(nn.BatchNorm2d):
    """A batch norm with an activation, as some libraries have it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def odd_layer(name: str, synchronised: bool) -> str:
    """A training with a layer of an unusual kind in place of the first batch norm or the dropout."""
    model = network()
    place = 1 if name == "OddNorm" else 3
    model.body[place] = OddNorm(3).double() if name == "OddNorm" else nn.Dropout2d(0.3)
    make("at", model=model, sync_batch_norm=synchronised).fit()
    return "trained"


def talk() -> dict[str, Any]:
    """What ranks tell each other by every kind of message."""
    from robustflat.ranks import current

    ranks = current()
    own = torch.tensor([1.0 + ranks.rank, 10.0 + 10 * ranks.rank])
    ranks.sum_([own])
    memory = torch.full((2,), float(ranks.rank))
    first = torch.full((2,), float(ranks.rank))
    ranks.broadcast_([first])
    ranks.wait()
    return {
        "rank": ranks.rank,
        "sum": own.tolist(),
        "means": [t.tolist() for t in ranks.means([memory, torch.tensor([10.0 * ranks.rank])])],
        "twice": ranks.means([memory, memory])[1].tolist(),
        "broadcast": first.tolist(),
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "same": [ranks.same([torch.ones(3)]), ranks.same([memory])],
    }
