"""Draw what the network sees, clean and attacked: the job behind `python scripts/show_batch.py`.

The configuration is that of training, so any training command also shows its images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn

from robustflat.apps.build import build, choose_device, named_nodes
from robustflat.apps.check import require_valid
from robustflat.apps.config import Root
from robustflat.apps.messages import complain
from robustflat.apps.rules import check_together
from robustflat.apps.surrogates import give_surrogates
from robustflat.apps.train import seeded_model
from robustflat.attacks.describe import describe
from robustflat.attacks.objectives import labels_of
from robustflat.data.dataset import Dataset
from robustflat.data.images import augmented
from robustflat.errors import CheckpointError, UserError, require_range
from robustflat.losses.base import TrainingLoss
from robustflat.models.modes import evaluating
from robustflat.reporting.contact_sheet import contact_sheet
from robustflat.rng import Streams
from robustflat.training.checkpoint import load, load_into
from robustflat.types import AdvBatch, Attack, Batch

OWN_KEYS = frozenset({"checkpoint", "images", "file"})
ENLARGED = 10
"""Factor on the difference between attacked and clean images, which is otherwise hard to see."""


@dataclass
class ShowBatch(Root):
    """The root of this application: that of training, and what to draw where."""

    checkpoint: str | None = None
    images: int = 8
    file: str | None = None


ConfigStore.instance().store(name="show_batch_root", node=ShowBatch)


def job(config: DictConfig) -> None:
    """Hydra's task function: write one contact sheet and say where it is.

    Args:
        config: the composed configuration.

    Raises:
        UserError: for whatever is wrong with configuration, data or checkpoint.
    """
    context = HydraConfig.get()
    choices = context.runtime.choices
    sweeping = context.mode is not None and context.mode.name == "MULTIRUN"
    number = f"-{context.job.num}" if sweeping else ""
    name = "-".join(choices[group] for group in ("dataset", "trainer", "attack")) + f"{number}.png"
    path = Path(config.file or Path(config.outputs) / "batches" / name)
    try:
        show(config, path, Console(highlight=False, soft_wrap=True))
    except UserError as error:
        complain(str(error))
        if sweeping:
            raise  # Hydra goes on with the other jobs and reports this one at the end
        sys.exit(1)


def show(config: DictConfig, path: Path, console: Console) -> Path:
    """Draw the first images of the first training batch: as stored, augmented, attacked, and what changed.

    Args:
        config: composed configuration.
        path: PNG file to write.
        console: where the facts are printed.

    Returns:
        The path of the file.

    Raises:
        UserError: for whatever is wrong with configuration, data or checkpoint.
    """
    require_valid(OmegaConf.masked_copy(config, [str(key) for key in config if key not in OWN_KEYS]))
    require_range("images", config.images, low=1)
    if config.threads:
        torch.set_num_threads(config.threads)
    config.device = choose_device(config.device)
    check_together(config)
    loss, attack = build(config.trainer.loss), wrapped_attack(config)
    model = _network(config)
    dataset: Dataset = build(config.dataset)
    console.print(dataset.describe(), markup=False)
    streams = Streams(config.seed, config.device)
    plain, batch = first_batch(dataset, streams, config.images)
    shown = _attacked(loss, model, attack, batch, streams)
    names = dataset.train.class_names or tuple(map(str, range(dataset.classes)))
    clean, fooled = (_predicted(model, x) for x in (shown.x, shown.x_adv))
    rows = {
        f"original: {_listed(labels_of(plain.y), names)}": plain.x,
        f"augmented by {', '.join(dataset.augment) or 'nothing'}; predicted: {_listed(clean, names)}": shown.x,
        f"attacked; predicted: {_listed(fooled, names)}": shown.x_adv,
        f"{ENLARGED} times what the attack changed (grey: nothing)": 0.5 + ENLARGED * (shown.x_adv - shown.x),
    }
    contact_sheet(rows, path, columns=config.images)
    truth = labels_of(shown.y)
    console.print(
        f"network   {config.checkpoint or 'untrained'}: {int((clean != truth).sum())} of {len(truth)} wrong, "
        f"{int((fooled != truth).sum())} when attacked\nattack    {describe(attack)}\nwritten   {path}",
        markup=False,
    )
    return path


def wrapped_attack(config: DictConfig) -> Attack:
    """The attack of a configuration inside the wrappers of its trainer."""
    attack: Attack = build(config.attack)
    give_surrogates([attack], config)
    for node in named_nodes(config, "wrappers").values():
        attack = build(node)(attack)
    return attack


def first_batch(dataset: Dataset, streams: Streams, count: int) -> tuple[Batch, Batch]:
    """The first `count` examples of training's first batch, as stored and as augmented.

    Args:
        dataset: where they come from.
        streams: the run's random streams; the draws are those of training.
        count: examples wanted, >= 1; a batch may have fewer.

    Returns:
        Two batches of the same examples in the same order.
    """
    stream = dataset.train_stream(streams)
    stream.augment = {}  # augmentations have a random stream of their own, so they can be applied afterwards
    plain = next(stream)
    batch = augmented(plain, dataset.augment, dataset.classes, streams["augment"])
    return Batch(plain.x[:count], plain.y[:count]), Batch(batch.x[:count], batch.y[:count])


def _network(config: DictConfig) -> nn.Module:
    """The network of the configuration with the weights of the checkpoint, or those that training starts from."""
    model = seeded_model(config)
    if config.checkpoint is not None:
        parts = load(config.checkpoint).parts
        if "model" not in parts:
            raise CheckpointError(f"{config.checkpoint} holds no model, but {', '.join(parts)}.")
        load_into(model, parts["model"])
    return model.to(config.device)


def _attacked(loss: TrainingLoss, model: nn.Module, attack: Attack, batch: Batch, streams: Streams) -> AdvBatch:
    model.train()  # as in training; the loss chooses the mode of the attack itself
    return loss.craft(model, attack, batch, streams["attack"])


def _predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(model):
        classes: Tensor = model(x).argmax(dim=1)
    return classes


def _listed(labels: Tensor, names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join(known[label] for label in labels.tolist())
