"""Landscapes of trained networks, point by point into a store, and their pictures: `robustflat landscape`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from robustflat.apps.bench import forget_other_weights
from robustflat.apps.build import build, choose_device
from robustflat.apps.check import check
from robustflat.apps.config import Root, digest, resolved
from robustflat.apps.evaluate import FACTS, RESULTS, network, open_folder, same_data
from robustflat.apps.landscape_networks import Shown, shown_networks
from robustflat.apps.landscape_summary import picture_path, print_landscapes, stored_landscape, to_store
from robustflat.apps.messages import complain
from robustflat.apps.networks import digest_of, weights_of
from robustflat.apps.rules import check_together
from robustflat.apps.run_folder import provenance
from robustflat.apps.sharing import SharedStore, joined_to_share, shared_folder
from robustflat.apps.together import own_device
from robustflat.apps.train import sensible_threads
from robustflat.data.dataset import Dataset
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.direction_sources import StoredDirections, save_directions
from robustflat.flatness.landscape import Done, Landscape
from robustflat.flatness.landscape_result import LandscapeResult
from robustflat.ranks import workers
from robustflat.reporting.landscape_pictures import draw
from robustflat.reporting.landscape_plots import COLOURS
from robustflat.store.journal import Journal
from robustflat.store.results import KEY, ResultStore, group_name
from robustflat.types import Batch

KINDS = ("lines", "plane", "path")


@dataclass
class LandscapeRoot:
    """The top level of the configuration of `robustflat landscape`."""

    run: Any = None
    checkpoint: Any = None
    checkpoints: Any = None
    to: str | None = None
    part: str = "model"
    kind: str = "lines"
    examples: str = "test[:128]"
    batch_size: int = 128
    batch_norm: str = "interpolate"
    landscape: Any = None
    evaluation: Any = None
    attack: Any = None
    dataset: Any = None
    model: Any = None
    seed: int = 0
    save_directions: str | None = None
    labels: list[str] = field(default_factory=list)
    title: str | None = None
    file: str | None = None
    device: str = "auto"
    threads: int = 0
    name: str | None = None
    outputs: str = "outputs"
    data_root: str | None = None
    force: bool = False
    trusted_packages: list[str] = field(default_factory=list)


ConfigStore.instance().store(name="landscape_root", node=LandscapeRoot)


@dataclass(frozen=True)
class Survey:
    """What all networks of one picture share.

    Attributes:
        measure: the landscape.
        examples: images and labels, on the device.
        data: name of the data set.
        config: completed configuration of the first network.
        values: the same as plain values.
        name: of the landscape in the store, such as "paper_random".
        facts: provenance that is stored with every result.
        console: where progress goes.
    """

    measure: Landscape
    examples: Batch
    data: str
    config: DictConfig
    values: dict[str, Any]
    name: str
    facts: dict[str, Any]
    console: Console

    @property
    def total(self) -> int:
        """Points to measure for one network."""
        count = self.measure.points
        if self.config.kind == "lines":
            return self.measure.trials * (count - 1) + 1
        return count**2 if self.config.kind == "plane" else count


def job(config: DictConfig) -> None:
    """Hydra's task function: measure, store, draw, print.

    Args:
        config: the composed configuration.

    Raises:
        UserError: in a sweep, so that Hydra goes on with the other jobs; otherwise the message is printed.
    """
    context = HydraConfig.get()
    command, sweeping = list(context.overrides.task), context.mode is not None and context.mode.name == "MULTIRUN"
    try:
        with joined_to_share(sweeping=sweeping) as console:
            landscape(config, dict(context.runtime.choices), command=command, console=console)
    except UserError as error:
        complain(str(error))
        if sweeping:
            raise
        sys.exit(1)


def landscape(
    config: DictConfig, choices: dict[str, Any], *, command: list[str], console: Console
) -> dict[str, LandscapeResult]:
    """Everything that one command asks for; what is stored already is not measured again.

    Args:
        config: composed configuration.
        choices: group -> chosen file, as Hydra knows them; they name the landscape.
        command: the overrides that the user gave, for the record.
        console: where progress and summary go.

    Returns:
        Label of each network -> its landscape; a path has one entry.

    Raises:
        UserError: for whatever is wrong with configuration, runs, checkpoints or data.
    """
    shown = shown_networks(config)
    first = shown[0].config
    require_sound(shown)
    device = own_device(choose_device(first.device))
    for one in shown:
        one.config.device = one.config.dataset.device = device
    measure: Landscape = build(first.landscape)
    dataset: Dataset = build(first.dataset)
    workers().on_first(lambda: dataset.sets and None)  # one process fetches what is not on disk yet
    examples = _examples(dataset, first)
    torch.set_num_threads(first.threads or sensible_threads(dataset))
    survey = Survey(
        measure=measure,
        examples=examples,
        data=dataset.name,
        config=first,
        values=resolved(first),
        name=str(choices.get("landscape", "landscape")),
        facts={k: v for k, v in provenance(command).items() if k in FACTS},
        console=console,
    )
    _save_directions(survey, shown[0])
    if first.kind == "path":
        label = f"{shown[0].label} → {shown[1].label}"
        results = {label: measured(survey, shown[0], end=shown[1])}
    else:
        results = {one.label: measured(survey, one) for one in shown}
    result = next(iter(results.values()))
    caption = result.caption(f"{dataset.name} {first.examples}")
    picture, title = picture_path(first, shown, survey.name), first.title or ""
    files = workers().on_first(lambda: draw(results, picture, title=title, caption=caption))
    print_landscapes(console, results, caption, files)
    return results


def _save_directions(survey: Survey, one: Shown) -> None:
    """Those of the first network, if the command asks for it."""
    path = survey.config.save_directions
    if path is None:
        return
    model, _ = network(one.config, one.file)
    x, y = survey.examples
    ready = survey.measure.find_directions(model, x, y, batch_size=survey.config.batch_size)
    workers().on_first(lambda: save_directions(ready, path, str(survey.measure.directions)))
    survey.console.print(f"directions   {path}", markup=False)


def measured(survey: Survey, one: Shown, end: Shown | None = None) -> LandscapeResult:
    """The landscape of one network, from the store if it is there; else measured, point by point into a journal.

    Args:
        survey: what is measured.
        one: the network.
        end: of a path from it.

    Raises:
        UserError: if it cannot be measured, with its file.
    """
    model, weights = network(one.config, one.file)
    target = None if end is None else weights_of(end.file)
    key = _key(survey, weights, "" if target is None else digest_of(target))
    with shared_folder(lambda: open_folder(one.config, one.run, [one.file])) as (folder, _):
        store = SharedStore(folder / RESULTS)
        forget_other_weights(store, survey.console, one.file, weights)
        name = _place(survey, store, one, end, key)
        if store.has(name, key) and not survey.config.force:
            return stored_landscape(store, name)
        path = folder / "landscapes" / f".{survey.name}-{key}.points.jsonl"
        journal = Journal(path) if workers().first else None
        start = time.perf_counter()
        result = _measure(survey, one, model, target, journal)
        seconds = time.perf_counter() - start
        arrays, attrs = to_store(result, one, survey.values)
        made = {"name": survey.name, "weights": weights, "seconds": seconds, "split": _split(survey, one)}
        store.write(name, arrays, {**attrs, **made, **survey.facts, KEY: key})
        if journal is not None:
            journal.remove()
        survey.console.print(f"{one.label}: {survey.total} points, {seconds:.1f} s", markup=False)
    return result


def _measure(
    survey: Survey, one: Shown, model: nn.Module, target: dict[str, Tensor] | None, journal: Journal | None
) -> LandscapeResult:
    """Measure the points that the journal lacks; with force all of them. Only the first rank has one."""
    measure, config, total = survey.measure, survey.config, survey.total
    if config.force and journal is not None:
        journal.remove()
    known: Done = workers().agreed({} if journal is None else dict(journal.items()))
    done = known if journal is None else journal
    if known:
        survey.console.print(f"{one.label}: going on after {len(known)} of {total} points", markup=False)
    x, y = survey.examples
    with Progress(console=survey.console, transient=True) as progress:
        task = progress.add_task(one.label, total=total, completed=len(known))
        if journal is not None:
            journal.changed = lambda count: progress.update(task, completed=count)
        try:
            if target is not None:
                return measure.path(
                    model, target, x, y, batch_norm=config.batch_norm, done=done, batch_size=config.batch_size
                )
            draw_it = measure.plane if config.kind == "plane" else measure
            return draw_it(model, x, y, done=done, batch_size=config.batch_size)
        except UserError as error:
            raise UserError(f"{one.file.path}: {error}") from error


def require_sound(shown: Sequence[Shown]) -> None:
    """Check the completed configuration of every network, and that they belong in one picture.

    Raises:
        UserError: listing every problem.
    """
    first = shown[0].config
    known = {f.name for f in fields(LandscapeRoot)}
    also = known - {f.name for f in fields(Root)}
    problems: list[str] = []
    for one in shown:
        problems += [
            f"{key!s}: nothing reads this key at the top level." for key in one.config if str(key) not in known
        ]
        for group in ("dataset", "model"):
            if one.config[group] is None:
                problems.append(f"{group}: a checkpoint from elsewhere needs {group}=<choice> to say what it is.")
        # Hydra's root leaves these out, the evaluation node is only its threat model.
        problems += check(OmegaConf.masked_copy(one.config, [k for k in known if k in one.config]), also)
    if problems:
        lines = "\n".join(f"  - {p}" for p in dict.fromkeys(problems))
        raise UserError(f"The configuration has problems:\n{lines}")
    check_together(OmegaConf.create({k: v for k, v in resolved(first).items() if k != "flatness"}))
    require_one_of("kind", first.kind, KINDS)
    require_range("batch_size", first.batch_size, low=1)
    if first.kind == "path" and len(shown) != 2:
        raise UserError(
            f"A path leads from one network to another, got {len(shown)}: give to=<run>, checkpoints=[5,60], or "
            f"run=[a,b]."
        )
    if len(shown) > len(COLOURS):
        raise UserError(f"A picture shows at most {len(COLOURS)} networks, got {len(shown)}.")
    for one in shown[1:]:
        if not same_data(first.dataset, one.config.dataset):
            raise UserError(
                f"{shown[0].label} and {one.label} were trained on different data, so their curves would not be "
                f"comparable: give dataset=<choice> to measure all on one."
            )


def _examples(dataset: Dataset, config: DictConfig) -> Batch:
    try:
        batches = dataset.split(config.examples).batches(config.batch_size)
    except UserError as error:
        raise UserError(f"examples: {error}") from error
    return Batch(torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches]))


def _key(survey: Survey, weights: str, target: str) -> str:
    """Digest of all that decides the values."""
    config, values = survey.config, survey.values
    source = {k: v for k, v in values["dataset"]["source"].items() if k not in ("root", "download", "cache")}
    decisive = {"weights": weights, "source": source, "examples": config.examples, "kind": config.kind}
    decisive |= {"landscape": values["landscape"], "batch_size": config.batch_size}
    if config.kind == "path":
        decisive |= {"target": target, "batch_norm": config.batch_norm}
    source_of = survey.measure.directions
    if isinstance(source_of, StoredDirections) and config.kind != "path":
        decisive["directions"] = source_of.digest()
    return digest(decisive)


def _split(survey: Survey, one: Shown) -> str:
    """Name of the examples in the store: data other than the run's own carry their name."""
    own = one.stored is None or same_data(survey.config.dataset, one.stored.dataset)
    return survey.config.examples if own else f"{survey.data} {survey.config.examples}"


def _place(survey: Survey, store: ResultStore, one: Shown, end: Shown | None, key: str) -> str:
    """Where a landscape is stored: under its name, or name~key if other settings took that."""
    last = survey.name if end is None else f"{survey.name} to {end.label}"
    name = group_name(one.file.name, _split(survey, one), "landscape", last)
    return name if store.attributes(name).get(KEY) in (None, key) else f"{name}~{key}"
