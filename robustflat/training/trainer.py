"""The one training loop. A training method is a choice of what is plugged in; the loop itself never changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from robustflat.attacks.pgd import NoAttack
from robustflat.attacks.searching import COMPILES, Searching, require_device
from robustflat.attacks.shareable import require_shareable
from robustflat.attacks.strongest import SEARCHES
from robustflat.errors import CheckpointError, UserError, require_one_of, require_range
from robustflat.loggers.base import Null
from robustflat.losses.base import TrainingLoss
from robustflat.memory import MemoryBudget, require_memory_budget
from robustflat.models.precision import device_of
from robustflat.rng import Streams
from robustflat.training.callbacks import Callback
from robustflat.training.checkpoint import load_into
from robustflat.training.clock import Clock
from robustflat.training.means import RunningMeans
from robustflat.training.schedules import Schedule
from robustflat.training.team import Team
from robustflat.types import AdvBatch, Attack, Batch, Logger, LossTerms

PRECISIONS = ("fp32", "bf16")


class DivergenceError(UserError):
    """The loss or a weight became infinite or not a number; the last checkpoint is from before."""


class TrainingStopped(UserError):  # noqa: N818  # nothing went wrong: somebody asked for it
    """Training stopped early because `stop_requested` was set; resuming goes on from the last saved step."""


class BatchSource(Protocol):
    """Endless training batches; `len` is the number of optimizer steps that count as an epoch."""

    def __len__(self) -> int:
        """Optimizer steps per epoch."""
        ...

    def __next__(self) -> Batch:
        """The next batch; never ends."""
        ...

    def state_dict(self) -> dict[str, object]:
        """Position in the stream."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue at a saved position."""
        ...


class GradientRule(Protocol):
    """Fills `p.grad` of the model and leaves its weights as found, bit for bit."""

    def __call__(
        self, model: nn.Module, next_batch: Callable[[], AdvBatch], loss: Callable[[AdvBatch], LossTerms]
    ) -> Mapping[str, Tensor]:
        """`next_batch()` crafts a batch, `loss(batch)` scores it; returns detached 0-dim values to log."""
        ...


@runtime_checkable
class FollowsTraining(Protocol):
    """A gradient rule that wants to know how far training is: for a warm-up, a growing strength, or random draws.

    It keeps no state of its own, so that a resumed run needs none.
    """

    def follow(self, *, epoch: int, step: int, generator: torch.Generator) -> None:
        """Called before each step with finished epochs and steps, and with the generator to draw from."""
        ...


class Trainer:
    """Trains a model: batches are crafted, scored, differentiated and stepped; the plugged-in objects say how.

    Training images are read from `data` as an endless stream, an epoch is `len(data)` optimizer steps, and the
    model is in train mode except where a context manager says otherwise. Scalars stay on the device and are
    read every `log_every` steps; there, and at the end of an epoch, values that are not finite end training.

    Everything that `state_dict` holds is enough to continue bit for bit on a CPU: 2 + 2 epochs equal 4.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K), on the device of the data.
        data: endless batches.
        loss: crafts and scores.
        attack: what `loss.craft` attacks with.
        gradient: at which weights the gradient is taken.
        make_optimizer: model -> optimizer; see `optimizers`.
        make_schedule: (optimizer, total optimizer steps) -> learning-rate schedule; see `schedules`.
        callbacks: by name, called in this order, first those that change weights; an entry `None` is left out.
        wrappers: by name, applied to the attack in this order: each takes an attack and returns one (half of the
            batch, predicted labels, ...; see `attacks.wrappers`). An entry `None` is left out.
        epochs: >= 1.
        logger: takes "train/*" every `log_every` steps, "epoch/*" after each epoch, and "time/*" with both.
        streams: named random generators: "attack", "loss" and, by gradient rules, "weights" are used here, others
            by the data.
        precision: "fp32", or "bf16": crafting and scoring under autocast, weights and optimizer in float32.
        search: what the attack searches on: "plain" (the network itself), or a copy with batch norm folded, channels
            last, in "fp32" or "bf16" (see `attacks.searching`); a loss that attacks in training mode ignores it.
        sync_batch_norm: where several processes share the batches (see `Team`), whether batch norm uses the statistics
            of the whole batch; a single process has no use for it.
        memory_budget: of a pass of the attack and its gradient, in eval mode: MiB, "auto" or `None`; see
            `attacks.searching`.
        compile: how the copy is run: "none" (as it is), "default", "reduce-overhead" or "graph"; see `Searching`.
        log_every: optimizer steps between two reads of the device, >= 1.
        folder: where callbacks save checkpoints, or `None` if none does.

    Attributes:
        epoch, step: finished epochs and optimizer steps.
        history: one dictionary of mean values per finished epoch; callbacks may add to the last.
        stop_requested: set it (from a signal handler, say) to stop before the next step.
        meta: plain values (config, code version) that callbacks store in every checkpoint.

    Raises:
        UserError: for values outside these ranges.
    """

    def __init__(  # noqa: PLR0913  # one argument per slot of a training method
        self,
        *,
        model: nn.Module,
        data: BatchSource,
        loss: TrainingLoss,
        attack: Attack,
        gradient: GradientRule,
        make_optimizer: Callable[[nn.Module], Optimizer],
        make_schedule: Callable[[Optimizer, int], Schedule],
        epochs: int,
        logger: Logger,
        streams: Streams,
        callbacks: Mapping[str, Callback | None] | None = None,
        wrappers: Mapping[str, Callable[[Attack], Attack] | None] | None = None,
        precision: str = "fp32",
        search: str = "plain",
        sync_batch_norm: bool = True,
        memory_budget: MemoryBudget = "auto",
        compile: str = "none",
        log_every: int = 50,
        folder: str | Path | None = None,
    ) -> None:
        require_range("epochs", epochs, low=1)
        require_range("log_every", log_every, low=1)
        require_one_of("precision", precision, PRECISIONS)
        require_one_of("search", search, SEARCHES)
        require_memory_budget(memory_budget)
        require_one_of("compile", compile, COMPILES)
        require_device(compile, device_of(model))
        if len(data) < 1:
            raise UserError("the training set is smaller than one batch; reduce dataset.batch_size.")
        if ((search, compile) != ("plain", "none") or memory_budget is not None) and not isinstance(attack, NoAttack):
            # Inside the wrappers, which may need the network itself.
            attack = Searching(attack, search, memory_budget=memory_budget, compile=compile)
        for wrap in (wrappers or {}).values():
            attack = attack if wrap is None else wrap(attack)
        self.model, self.data, self.loss, self.attack, self.gradient = model, data, loss, attack, gradient
        self.optimizer = make_optimizer(model)
        self.schedule = make_schedule(self.optimizer, epochs * len(data))
        used = [(name, callback) for name, callback in (callbacks or {}).items() if callback is not None]
        self.callbacks = dict(sorted(used, key=lambda entry: not entry[1].changes_weights))
        self._team = Team(sync_batch_norm=sync_batch_norm, batch_size=getattr(data, "batch_size", None))
        if self._team.ranks.size > 1:
            require_shareable(self.attack)
        self.epochs, self.streams = epochs, streams
        self.logger: Logger = logger if self._team.ranks.first else Null()
        self.precision, self.log_every = precision, log_every
        self.folder = None if folder is None else Path(folder)
        self.meta: dict[str, Any] = {}
        self.epoch = self.step = 0
        self.history: list[dict[str, float]] = []
        self.stop_requested = False
        self._means = RunningMeans()
        self._share = 0
        self._clock = Clock()

    def fit(self) -> None:
        """Train until `epochs` epochs are done; returns at once if they are.

        Raises:
            DivergenceError: if loss or weights stop being finite and no callback knows a way back; nothing is
                saved then.
            TrainingStopped: if `stop_requested` is set; callbacks have saved what they save then.
        """
        self._clock = Clock()
        self._team.begin(self.model)
        self.model.train()
        for callback in self.callbacks.values():
            callback.on_fit_start(self)
        while self.epoch < self.epochs:
            try:
                self._train_epoch()
            except DivergenceError:
                if not any([callback.on_divergence(self) for callback in self.callbacks.values()]):
                    raise

    def networks(self) -> dict[str, nn.Module]:
        """The network in training ("model") and those that callbacks derive from it, such as "average"."""
        derived: dict[str, nn.Module] = {"model": self.model}
        for callback in self.callbacks.values():
            derived.update(callback.networks(self))
        return derived

    def state_dict(self) -> dict[str, Any]:
        """Named parts of tensors and plain values from which training continues; take it between two steps."""
        random = {"cpu": torch.get_rng_state()}  # layers such as dropout draw from torch's own generators
        if self._device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._device)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "streams": self.streams.state_dict(),
            "data": self.data.state_dict(),
            "callbacks": {name: callback.state_dict() for name, callback in self._saved_callbacks.items()},
            "random": random,
            "means": self._means.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict` of a trainer of the same configuration.

        Raises:
            CheckpointError: naming parts, callbacks or weights that are missing, left over or do not fit; for random
                streams of another kind of device, unless training has ended and draws nothing any more.
        """
        state = {"means": {}, **state}  # checkpoints of version 0.1.0 were written after an epoch only
        _require_same_names("parts", self.state_dict(), state)
        _require_same_names("callbacks", self._saved_callbacks, state["callbacks"])
        load_into(self.model, state["model"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint's optimizer does not fit this one: {error}") from error
        self.schedule.load_state_dict(state["schedule"])
        self._load_streams(state)
        self.data.load_state_dict(state["data"])
        for name, callback in self._saved_callbacks.items():
            callback.load_state_dict(state["callbacks"][name])
        torch.set_rng_state(state["random"]["cpu"])
        if self._device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self._device)
        self._means.load_state_dict(state["means"], self._device)
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self.history = [dict(entry) for entry in state["history"]]

    def _load_streams(self, state: Mapping[str, Any]) -> None:
        try:
            self.streams.load_state_dict(state["streams"])
        except RuntimeError as error:  # torch's generators on a GPU keep another kind of state than those on a CPU
            if int(state["epoch"]) < self.epochs:
                raise CheckpointError(
                    f"the checkpoint holds random streams of another kind of device than {self.streams.device.type}, "
                    "which cannot go on here: resume with the device of the interrupted run (device=cuda or cpu)."
                ) from error

    @property
    def _saved_callbacks(self) -> dict[str, Callback]:
        return {name: callback for name, callback in self.callbacks.items() if callback.in_checkpoints}

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _next_batch(self) -> AdvBatch:
        with record_function("data"):
            whole = next(self.data)
        self._clock.images += len(whole.x)
        batch = self._team.share(whole)
        self._share = len(batch.x)
        with record_function("craft"), self._autocast(), self._team.working(self.model, self._share):
            crafted = self.loss.craft(self.model, self.attack, batch, self.streams["attack"])
        for callback in self.callbacks.values():
            callback.after_craft(self)
        return crafted

    def _score(self, batch: AdvBatch) -> LossTerms:
        self._team.working_on_part(len(batch.x), of=self._share)
        with record_function("score"), self._autocast(), self._team.working(self.model, len(batch.x)):
            return self.loss(self.model, batch, self.streams["loss"])

    def _train_epoch(self) -> None:
        while self.step < (self.epoch + 1) * len(self.data):
            if self._team.ranks.any(self.stop_requested):
                self._stop()
            self._train_step()
        with record_function("epoch end"):
            self._end_epoch()

    def _stop(self) -> None:
        """Let callbacks save the state between two steps, unless it is not worth saving, and end training."""
        if not (self._means.finite() and all_finite(self.model)):
            self.diverged("the loss or a weight is infinite or not a number")
        for callback in self.callbacks.values():
            callback.on_stop(self)
        self.stop_requested = False
        raise TrainingStopped(
            f"Training was stopped after {self.epoch} of {self.epochs} epochs (step {self.step}). "
            "The same command goes on from the last step that was saved."
        )

    def _train_step(self) -> None:
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.gradient, FollowsTraining):
            self.gradient.follow(epoch=self.epoch, step=self.step, generator=self.streams["weights"])
        self._means.add(self._team.mean(self.gradient(self.model, self._next_batch, self._score)))
        self._team.settle(self.model)
        with record_function("update"):
            self.optimizer.step()
            self.schedule.step()
        self.step += 1
        self._clock.steps += 1
        if self._clock.steps == 1:
            self._team.require_in_step(self.model)
        for callback in self.callbacks.values():
            callback.after_step(self)
        if self.step % self.log_every == 0:
            values = {f"train/{name}": value for name, value in self._read_means().items()}
            self.logger.log({**values, "train/learning_rate": rate, **self._timings()}, step=self.step)

    def _read_means(self) -> dict[str, float]:
        means = self._means.read()
        if not math.isfinite(means.get("loss", 0.0)):
            self.diverged(f"the loss is {means['loss']}")
        return means

    def _end_epoch(self) -> None:
        self._read_means()
        if not all_finite(self.model):
            self.diverged("a weight is infinite or not a number")
        self._team.require_in_step(self.model)
        self.epoch += 1
        self.history.append({"epoch": float(self.epoch), **self._means.read_all()})
        values = {f"epoch/{name}": value for name, value in self.history[-1].items() if name != "epoch"}
        self.logger.log({"epoch": self.epoch, **values, **self._timings()}, step=self.step)
        for callback in self.callbacks.values():
            callback.after_epoch(self)
        for callback in self.callbacks.values():
            callback.on_epoch_end(self)
        self._clock.skip()

    def diverged(self, what: str) -> None:
        """Say that training is lost from the running epoch on, for the reason `what`.

        Raises:
            DivergenceError: always.
        """
        before = max(self.step - 1, 0) // len(self.data)
        raise DivergenceError(
            f"Training diverged in epoch {before + 1}, at or before step {self.step}: {what}. "
            f"The checkpoint of epoch {before}, if one was saved, is from before. Use a smaller "
            "optimizer.lr, a warm-up (schedule=cosine schedule.warmup=0.1), a smaller loss weight, or "
            "let it go back by itself: +trainer/callback@trainer.callbacks.rewind=rewind."
        )

    def _timings(self) -> dict[str, float]:
        """What differs between two identical runs: seconds since the start, speed, memory, time left."""
        left = self.epochs * len(self.data) - self.step
        timings = self._clock.read(left) | {"time/progress": self.step / (self.step + left)}
        if self._device.type == "cuda":
            timings["time/memory_mib"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        return timings


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter of a model is finite; waits for the device once."""
    flags = [p.detach().isfinite().all() for p in model.parameters()]
    return bool(torch.stack(flags).all()) if flags else True


def _require_same_names(what: str, own: Mapping[str, object], found: Mapping[str, object]) -> None:
    missing, left_over = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    if missing or left_over:
        raise CheckpointError(
            f"the checkpoint's {what} do not fit this run: missing {', '.join(missing) or 'none'}; unexpected "
            f"{', '.join(left_over) or 'none'}. Resume with the configuration that wrote the checkpoint."
        )
