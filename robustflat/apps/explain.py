"""What a configuration would train, in words: formula, slots, cost of a step, steps, sources. Nothing is written."""

from __future__ import annotations

import functools

from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from robustflat.apps.build import build, named_nodes
from robustflat.apps.check import require_valid
from robustflat.apps.rules import check_together
from robustflat.data.dataset import Dataset
from robustflat.errors import UserError
from robustflat.rng import Streams
from robustflat.training.method import Method, explain_method


def print_method(config: DictConfig, console: Console) -> None:
    """Print the resolved method of a configuration.

    Raises:
        UserError: for whatever is wrong with the configuration.
    """
    require_valid(config)
    config.device = "cpu"
    check_together(config)
    _build_what_is_not_explained(config)
    dataset, problem = _dataset(config)
    console.print(str(method_of(config, dataset)), markup=False, soft_wrap=True)
    if dataset is None:
        text = "The data set could not be read; so steps, and what evaluates while training, are not shown. "
        console.print(f"\n{text}{problem}", markup=False, soft_wrap=True)
    else:
        epochs, batch = config.trainer.epochs, config.dataset.batch_size
        console.print(f"                {epochs} epochs, batches of {batch}", markup=False)


def _build_what_is_not_explained(config: DictConfig) -> None:
    """Network, evaluation and flatness, for what their constructors refuse; a network from elsewhere might download."""
    for node in (config.evaluation, config.flatness, *_own_network(config)):
        if node is not None:
            build(node)


def _own_network(config: DictConfig) -> list[DictConfig]:
    target = str(config.model["_target_"])
    own = target.startswith("robustflat.models.") and not target.startswith("robustflat.models.external.")
    return [config.model] if own else []


def method_of(config: DictConfig, dataset: Dataset | None) -> Method:
    """The method of a valid configuration; without its data the steps and what evaluates on it are left out."""
    node = config.trainer
    callbacks = {}
    for name, entry in named_nodes(config, "callbacks").items():
        made = build(entry)
        if isinstance(made, functools.partial):
            made = None if dataset is None else made(dataset)
        callbacks[name] = made
    steps = None if dataset is None else len(dataset.train_stream(Streams(config.seed, "cpu"))) * node.epochs
    make_optimizer, make_schedule = build(config.optimizer), build(config.schedule)
    make_schedule(make_optimizer(nn.Linear(1, 1)), steps or node.epochs * 100)  # refuses values out of range
    return explain_method(
        loss=build(node.loss),
        attack=build(config.attack),
        gradient=build(node.gradient),
        wrappers={name: build(wrap) for name, wrap in named_nodes(config, "wrappers").items()},
        callbacks=callbacks,
        make_optimizer=make_optimizer,
        make_schedule=make_schedule,
        steps=steps,
    )


def _dataset(config: DictConfig) -> tuple[Dataset | None, str]:
    dataset: Dataset = build(config.dataset)
    try:
        dataset.sets  # noqa: B018  # reads the files
    except UserError as error:
        return None, str(error)
    return dataset, ""
