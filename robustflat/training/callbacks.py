"""What may happen around the training loop: snapshots, checkpoints, weight averaging, weight clipping."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustflat.errors import CheckpointError, UserError, require_one_of, require_range
from robustflat.explanation import Explanation
from robustflat.models.modes import perturbable
from robustflat.models.precision import device_of
from robustflat.ranks import current
from robustflat.training.checkpoint import LAST, PREVIOUS, load_into, remove_unfinished, save

if TYPE_CHECKING:
    from robustflat.training.trainer import Trainer


class Callback:
    """Hooks of the training loop, which all do nothing here.

    Where several processes train together they are called on all of them, and must leave the same state on all; only
    the first writes files and prints (`ranks.current().first`).

    Attributes:
        in_checkpoints: whether checkpoints hold its state; a run that was saved with such a callback needs it again.
        changes_weights: such callbacks are called before the others, which so see the weights that training goes on
            with.
    """

    in_checkpoints = True
    changes_weights = False

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first step; after a resume `load_state_dict` has been called already."""

    def after_craft(self, trainer: Trainer) -> None:
        """Between the attack on a batch and its scoring; must not wait for the device."""

    def after_step(self, trainer: Trainer) -> None:
        """After each step of optimizer and schedule; must not wait for the device."""

    def after_epoch(self, trainer: Trainer) -> None:
        """After each epoch, when its means are in `trainer.history`: the place to evaluate and log."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After `after_epoch` of all callbacks: the place to save."""

    def on_stop(self, trainer: Trainer) -> None:
        """Between two steps, when training was asked to stop and is about to: the place to save."""

    def on_divergence(self, trainer: Trainer) -> bool:
        """When loss or weights are not finite: whether this callback has put training back where it can go on."""
        return False

    def networks(self, trainer: Trainer) -> dict[str, nn.Module]:
        """Networks, by name and in eval mode, derived from the one in training."""
        return {}

    def explain(self) -> Explanation:
        """What it does, and what it costs per optimizer step; a callback of your own may say more."""
        words = " ".join((type(self).__doc__ or "").strip().partition("\n")[0].split())
        return Explanation(words or type(self).__name__)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""


class SaveLast(Callback):
    """Writes `last.pt`, from which training resumes, after every n-th epoch, after the last one, and
    when training is asked to stop.

    Should be the last of the callbacks, since it saves the state of all.

    Args:
        folder: where to write; `None`: the trainer's folder.
        every: epochs between two saves, >= 1.
        keep_previous: keep the file before as `previous.pt`, to fall back on if the disk damages the newer one.

    Raises:
        UserError: if every < 1; when training starts, if there is no folder.
    """

    def __init__(self, folder: str | Path | None = None, *, every: int = 1, keep_previous: bool = True) -> None:
        require_range("every", every, low=1)
        self.folder = folder
        self.every = every
        self.keep_previous = keep_previous

    def on_fit_start(self, trainer: Trainer) -> None:
        """Refuse to train without a folder, and clear away what a killed process has left there half-written."""
        _clear(_folder(self.folder, trainer), LAST)

    def explain(self) -> Explanation:
        """Saves only."""
        return Explanation(f"saves the state to resume from, every {self.every} epochs")

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Save everything that resuming needs."""
        if trainer.epoch % self.every == 0 or trainer.epoch == trainer.epochs:
            self._save(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        """Save in the middle of an epoch: a machine that is taken back costs no step."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        folder = _folder(self.folder, trainer)
        keep = folder / PREVIOUS if self.keep_previous else None
        if current().first:  # all have the same state
            save(folder / LAST, trainer.state_dict(), _meta(trainer), keep=keep)


class Snapshots(Callback):
    """Writes `epoch_<n>.pt` with the weights after every n-th epoch and after the last one.

    Early stopping chooses among them later. Parts: "model" and those of `Trainer.networks`, such as "average".

    Args:
        every: epochs between two snapshots, >= 1 (paper: 5).
        folder: where to write; `None`: the trainer's folder.

    Raises:
        UserError: if every < 1; when training starts, if there is no folder.
    """

    def __init__(self, *, every: int = 5, folder: str | Path | None = None) -> None:
        require_range("every", every, low=1)
        self.every = every
        self.folder = folder

    def on_fit_start(self, trainer: Trainer) -> None:
        """Refuse to train without a folder, and clear away what a killed process has left there half-written."""
        _clear(_folder(self.folder, trainer), "epoch_*.pt")

    def explain(self) -> Explanation:
        """Saves only."""
        return Explanation(f"saves the weights, every {self.every} epochs: early stopping chooses among them")

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Save the weights."""
        if trainer.epoch % self.every and trainer.epoch != trainer.epochs:
            return
        parts = {name: network.state_dict() for name, network in trainer.networks().items()}
        if current().first:
            save(_folder(self.folder, trainer) / f"epoch_{trainer.epoch:04d}.pt", parts, _meta(trainer))


class WeightAverage(Callback):
    """Exponential moving average of the weights, avg <- tau * avg + (1 - tau) * w after every step.

    Izmailov et al., UAI 2018; Gowal et al., 2020; in the paper tau is 0.9975. It starts as a copy of the
    weights. Batch norm's running statistics are averaged alike, whole-number buffers copied. (The paper's
    released code copies the statistics of the last weights, updates twice at the start of an epoch and forgets
    the average on resume.) The average is in every checkpoint. A training has one.

    Args:
        decay: tau in [0, 1); 0 follows the weights.
        warmup: use min(tau, (1 + t) / (10 + t)) in step t = 0, 1, ..., so that early weights fade fast.
        batch_norm: statistics of the averaged network. "average": as above. "recalibrate": measured anew with
            the averaged weights on `calibration_batches` batches crafted as in training, each time the network
            is asked for; the run's own data stream and generators are put back afterwards. "copy": those of the
            last weights, as in the released code.
        calibration_batches: number of batches for "recalibrate", >= 1.
        twice_per_epoch: update once more between two epochs, as in the released code.

    Raises:
        UserError: for values outside these ranges; when training starts, if another callback averages too.
    """

    def __init__(
        self,
        *,
        decay: float = 0.9975,
        warmup: bool = False,
        batch_norm: str = "average",
        calibration_batches: int = 50,
        twice_per_epoch: bool = False,
    ) -> None:
        require_range("decay", decay, low=0, high=1, high_open=True)
        require_one_of("batch_norm", batch_norm, ("average", "copy", "recalibrate"))
        require_range("calibration_batches", calibration_batches, low=1)
        self.decay = decay
        self.warmup = warmup
        self.batch_norm = batch_norm
        self.calibration_batches = calibration_batches
        self.twice_per_epoch = twice_per_epoch
        self._copied: set[str] = set()
        self._average: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}
        self._updates = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the average at the weights, or bring a loaded one to their device."""
        averages = [name for name, callback in trainer.callbacks.items() if isinstance(callback, WeightAverage)]
        if len(averages) > 1:
            raise UserError(
                f"{len(averages)} callbacks average weights ({', '.join(averages)}), but results have room for one "
                "'average': leave the others out, or train them as runs of their own."
            )
        self._live = trainer.model.state_dict()
        buffers = {name for name, _ in trainer.model.named_buffers()} if self.batch_norm == "copy" else set()
        self._copied = buffers | {name for name, w in self._live.items() if not w.is_floating_point()}
        loaded, self._average = self._average, {name: w.clone() for name, w in self._live.items()}
        if not loaded:
            return
        if loaded.keys() != self._average.keys():
            raise CheckpointError("the checkpoint's weight average does not have the names of this model's weights.")
        for name, value in loaded.items():
            self._average[name].copy_(value)

    @torch.no_grad()
    def after_step(self, trainer: Trainer) -> None:
        """Move the average towards the weights."""
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        averaged = [name for name in self._average if name not in self._copied]
        if averaged:
            ours, theirs = [self._average[n] for n in averaged], [self._live[n] for n in averaged]
            torch._foreach_lerp_(ours, theirs, 1 - decay)
        for name, value in self._average.items():
            if name in self._copied:
                value.copy_(self._live[name])

    def after_epoch(self, trainer: Trainer) -> None:
        """The released code's extra update, which leaves the weights of the last epoch as they are."""
        if self.twice_per_epoch and trainer.epoch < trainer.epochs:
            self.after_step(trainer)

    def explain(self) -> Explanation:
        """The average; a step costs nothing more."""
        tau = f"min({self.decay:g}, (1 + t) / (10 + t))" if self.warmup else f"{self.decay:g}"
        statistics = {"average": "averaged alike", "copy": "copied from w", "recalibrate": "measured anew"}
        note = f"batch-norm statistics: {statistics[self.batch_norm]}"
        if self.batch_norm == "recalibrate":
            note += f" on {self.calibration_batches} crafted batches each time the average is evaluated"
        return Explanation(f"avg <- tau avg + (1 - tau) w, tau = {tau}", "Izmailov et al., UAI 2018", note=note)

    def averaged_model(self, trainer: Trainer) -> nn.Module:
        """A new network with the averaged weights, in eval mode.

        Raises:
            UserError: before training has started, when there is no average yet.
        """
        if not self._average:
            raise UserError("there is no weight average yet: it starts with training.")
        model = copy.deepcopy(trainer.model)
        load_into(model, self._average)
        if self.batch_norm == "recalibrate":
            with _borrowed_stream(trainer):
                self._recalibrate(model, trainer)
        return model.eval()

    def networks(self, trainer: Trainer) -> dict[str, nn.Module]:
        """The averaged network, as "average"."""
        return {"average": self.averaged_model(trainer)}

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates."""
        return {"average": dict(self._average), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved average."""
        self._average = dict(state["average"])
        self._updates = int(state["updates"])

    @torch.no_grad()
    def _recalibrate(self, model: nn.Module, trainer: Trainer) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
        if not layers:
            return
        crafted = []
        for _ in range(self.calibration_batches):  # all before the reset: attacks need sound statistics
            with torch.enable_grad():
                batch = trainer.loss.craft(model, trainer.attack, next(trainer.data), trainer.streams["attack"])
            crafted.append(batch.x_adv)
        before = [(layer, layer.momentum, copy.deepcopy(layer.state_dict())) for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # plain mean over all batches
        model.train()
        for x_adv in crafted:
            model(x_adv)
        for layer, momentum, state in before:
            layer.momentum = momentum
            if not layer.num_batches_tracked:  # of a rotation head, say, which the class logits do not need
                layer.load_state_dict(state)


class ClipWeights(Callback):
    """Clips every weight to [-maximum, maximum] before the first and after each step (Stutz et al., ICCV 2021).

    Weights of auxiliary heads are left out, those of normalisation layers unless asked for; see `perturbable`.

    Args:
        maximum: > 0 (paper: 0.005, 0.01, 0.025).
        norm_layers: also clip scales and shifts of normalisation layers, as the paper's released code does;
            sound only where a scale of 0 means "unchanged", as in `norm=rebn`.
        timing: "after_step", as above; or "before_scoring", as the released code has it: a batch is attacked at the
            weights that the last step left, which are clipped only then, and at the end of each epoch.

    Raises:
        UserError: if maximum is not positive, or for another timing.
    """

    changes_weights = True

    def __init__(self, *, maximum: float, norm_layers: bool = False, timing: str = "after_step") -> None:
        require_range("maximum", maximum, low=0, low_open=True)
        require_one_of("timing", timing, ("after_step", "before_scoring"))
        self.maximum = maximum
        self.norm_layers = norm_layers
        self.timing = timing
        self._weights: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        """Clip the initial weights."""
        self._weights = list(perturbable(trainer.model, norm_layers=self.norm_layers).values())
        if self.timing == "after_step":
            self._clip()

    def after_craft(self, trainer: Trainer) -> None:
        """Clip before a batch is scored, if that is the time."""
        if self.timing == "before_scoring":
            self._clip()

    def after_step(self, trainer: Trainer) -> None:
        """Clip after each step, or after the last of an epoch only."""
        if self.timing == "after_step" or trainer.step % len(trainer.data) == 0:
            self._clip()

    def explain(self) -> Explanation:
        """The clipping; a step costs nothing more."""
        when = "after each step" if self.timing == "after_step" else "between attacking and scoring a batch"
        which = "scales and shifts of normalisation layers too" if self.norm_layers else "normalisation layers excluded"
        return Explanation(
            f"w <- clip(w, -{self.maximum:g}, {self.maximum:g}) {when}", "Stutz et al., ICCV 2021", note=which
        )

    @torch.no_grad()
    def _clip(self) -> None:
        torch._foreach_clamp_min_(self._weights, -self.maximum)
        torch._foreach_clamp_max_(self._weights, self.maximum)


@contextmanager
def _borrowed_stream(trainer: Trainer) -> Iterator[None]:
    """Inside, training batches may be drawn; afterwards data stream and generators are where they were."""
    data, streams, device = trainer.data.state_dict(), trainer.streams.state_dict(), device_of(trainer.model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws from torch's own
            yield
    finally:
        trainer.data.load_state_dict(data)
        trainer.streams.load_state_dict(streams)


def _folder(folder: str | Path | None, trainer: Trainer) -> Path:
    chosen = folder if folder is not None else trainer.folder
    if chosen is None:
        raise UserError("checkpoints need a folder: give Trainer(folder=...), or leave the callbacks that save out.")
    return Path(chosen)


def _clear(folder: Path, names: str) -> None:
    if current().first:
        remove_unfinished(folder, names)


def _meta(trainer: Trainer) -> dict[str, object]:
    return {**trainer.meta, "epoch": trainer.epoch, "step": trainer.step}
