"""Clean and robust error while training runs, without any effect on the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from robustflat.attacks.describe import describe
from robustflat.attacks.strongest import SEARCHES
from robustflat.data.dataset import Dataset
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.evaluation import metrics
from robustflat.evaluation.predict import predict
from robustflat.explanation import FORWARD, Explanation, explanation_of
from robustflat.memory import MemoryBudget, require_memory_budget
from robustflat.models.precision import device_of
from robustflat.ranks import sharing_work
from robustflat.rng import generator_for
from robustflat.training.callbacks import Callback
from robustflat.types import Attack, Batch

if TYPE_CHECKING:
    from robustflat.training.trainer import Trainer


class PeriodicEvaluation(Callback):
    """Evaluates after every n-th epoch, and after the last one, on fixed examples.

    Logs, and adds to `history` and to the last entry of `trainer.history`:

    * `evaluation/test_error`, `evaluation/test_loss`, the same for `train` if there are training examples;
    * with an attack also `evaluation/test_robust_error` and `evaluation/test_robust_loss`;
    * `evaluation/robust_error_gap`, `evaluation/robust_loss_gap` (test minus train) where both exist, or
      `error_gap`, `loss_gap` without attack;
    * the same as `evaluation_average/...` for a weight average, and so on for other `trainer.networks()`.

    The attack draws from a fresh generator of the same seed every time. So epochs are compared with equal random
    starts, and no draw of the training is shifted: training with and without this callback is the same.

    Args:
        test: batches of test examples.
        train: batches of training examples, without augmentation; empty to leave them out.
        attack: `None` evaluates clean images only.
        every: epochs between two evaluations, >= 1.
        seed: of the attack's draws, >= 0.
        search: what the attack searches on: "plain", or a fast copy in "fp32" or "bf16"; the network itself judges.
        memory_budget: of one pass of the attack and its gradient, see `robustflat.attacks.searching.Searching`.

    Attributes:
        history: one dictionary per evaluation: "epoch", "step" and the values above.

    Raises:
        UserError: if a number is out of range, or there is no test batch.
    """

    def __init__(
        self,
        *,
        test: Sequence[Batch],
        train: Sequence[Batch] = (),
        attack: Attack | None = None,
        every: int = 5,
        seed: int = 0,
        search: str = "plain",
        memory_budget: MemoryBudget = "auto",
    ) -> None:
        require_range("every", every, low=1)
        require_range("seed", seed, low=0)
        require_one_of("search", search, SEARCHES)
        require_memory_budget(memory_budget)
        if not len(test):
            raise UserError("PeriodicEvaluation needs test examples; leave it out to evaluate nothing.")
        self.splits: dict[str, Sequence[Batch]] = {"test": test} | ({"train": train} if len(train) else {})
        self.attack, self.every, self.seed = attack, every, seed
        self.search, self.memory_budget = search, memory_budget
        self.history: list[dict[str, float]] = []

    def __repr__(self) -> str:
        splits = {name: sum(len(batch.x) for batch in batches) for name, batches in self.splits.items()}
        return f"PeriodicEvaluation(every={self.every}, examples={splits}, attack={describe(self.attack)})"

    def after_epoch(self, trainer: Trainer) -> None:
        """Evaluate the network in training and those derived from it, if it is time."""
        if trainer.epoch % self.every and trainer.epoch != trainer.epochs:
            return
        values: dict[str, float] = {}
        with sharing_work():  # the ranks of a training have the same network
            for name, network in trainer.networks().items():
                prefix = "evaluation" if name == "model" else f"evaluation_{name}"
                values |= {f"{prefix}/{key}": value for key, value in self.measure(network).items()}
        trainer.logger.log(values, step=trainer.step)
        if trainer.history:
            trainer.history[-1].update(values)
        self.history.append({"epoch": float(trainer.epoch), "step": float(trainer.step), **values})

    def explain(self) -> Explanation:
        """Evaluates between epochs; a step costs nothing more."""
        per_image = FORWARD if self.attack is None else FORWARD + explanation_of(self.attack).cost + FORWARD
        images = sum(len(batch.x) for batches in self.splits.values() for batch in batches)
        formula = f"errors and losses on {images} images, every {self.every} epochs"
        return Explanation(formula, note=f"each image takes {per_image}")

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Errors and losses of a network on the examples of this callback; the network is left as found."""
        values: dict[str, float] = {}
        for split, batches in self.splits.items():
            clean = predict(model, batches)
            values[f"{split}_error"] = metrics.error(*clean)
            values[f"{split}_loss"] = metrics.loss(*clean)
            if self.attack is None:
                continue
            generator = generator_for(self.seed, "periodic", split, device=device_of(model))
            found = predict(
                model,
                batches,
                attack=self.attack,
                generator=generator,
                search=self.search,
                memory_budget=self.memory_budget,
            )
            values[f"{split}_robust_error"] = metrics.robust_error(clean.logits, found.logits, clean.labels)
            values[f"{split}_robust_loss"] = metrics.robust_loss(*found)
        if "train" in self.splits:
            for kind in ("error", "loss") if self.attack is None else ("robust_error", "robust_loss"):
                gap = metrics.generalization_gap(values[f"test_{kind}"], values[f"train_{kind}"])
                values[f"{kind}_gap"] = gap
        return values

    def state_dict(self) -> dict[str, Any]:
        """All evaluations so far."""
        return {"history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved history."""
        self.history = [dict(entry) for entry in state["history"]]


def periodic_evaluation(
    dataset: Dataset,
    *,
    test: str = "test[:500]",
    train: str | None = "train[:500]",
    attack: Attack | None = None,
    every: int = 5,
    seed: int = 0,
    batch_size: int = 500,
    search: str = "plain",
    memory_budget: MemoryBudget = "auto",
) -> PeriodicEvaluation:
    """A `PeriodicEvaluation` on splits of a data set, named as in a configuration.

    Args:
        dataset: where the examples come from.
        test, train: splits such as "test[:500]"; no `train` leaves the training examples out.
        attack, every, seed, search, memory_budget: see `PeriodicEvaluation`.
        batch_size: examples per forward pass, >= 1.

    Raises:
        UserError: for a split that the data set does not have, or a number out of range.
    """
    return PeriodicEvaluation(
        test=dataset.split(test).batches(batch_size),
        train=() if train is None else dataset.split(train).batches(batch_size),
        attack=attack,
        every=every,
        seed=seed,
        search=search,
        memory_budget=memory_budget,
    )
