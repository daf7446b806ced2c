"""Sharpness of trained networks by the measures of the literature: the job behind `robustflat measure`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import Tensor, nn

from robustflat.apps.build import build
from robustflat.apps.config import resolved
from robustflat.apps.instruments import InstrumentRoot, Made, Workplace, losses_of, other_weights, start, with_precision
from robustflat.apps.networks import NetworkFile, digest_of, weights_of
from robustflat.apps.train import seeded_model
from robustflat.errors import UserError, require_one_of
from robustflat.flatness.measures.measure import SharpnessMeasure, take
from robustflat.flatness.measures.surface import LOSSES, LossSurface
from robustflat.flatness.trace import with_error
from robustflat.store.results import Stored

Anchors = dict[str, Mapping[str, Tensor]]


@dataclass
class MeasureRoot(InstrumentRoot):
    """The top level of the configuration of `robustflat measure`."""

    measure: Any = None
    measures: Any = None
    only: list[str] = field(default_factory=list)
    loss: Any = "clean"
    precision: str = "fp32"
    norm_layers: bool = False
    biases: bool = True
    other: str | None = None


ConfigStore.instance().store(name="measure_root", node=MeasureRoot)


def job(config: DictConfig) -> float:
    """Hydra's task function: measure, store, print.

    Returns:
        The last measure of the last network.
    """
    return start(config, sharpness, MeasureRoot, check_own=_complete)


def sharpness(place: Workplace) -> float:
    """Take every measure on every loss that it is defined on, unless it is stored already; print all.

    Returns:
        The value of the last one.
    """
    wanted: dict[str, SharpnessMeasure] = {name: build(node) for name, node in place.config.measures.items()}
    found: dict[str, Stored] = {}
    left_out: dict[str, str] = {}
    for file in place.files:
        model, weights = place.network(file)
        anchors = _anchors(place, model)
        model = with_precision(model, place.config.precision)
        for loss in losses_of(place.config, LOSSES):
            kept = _defined(place, wanted, loss, anchors, left_out)
            session = _Session(place, file, model, weights, loss, anchors)
            for name, measure in kept.items():
                stored = session.taken(name, measure)
                found[stored] = place.store.read(stored)
    _print(place, found, left_out)
    place.summary()
    return float(list(found.values())[-1].attrs["value"]) if found else math.nan


class _Session:
    """One network and one loss; the surface, with its attack, is made when the first measure needs it."""

    def __init__(
        self, place: Workplace, file: NetworkFile, model: nn.Module, weights: str, loss: str, anchors: Anchors
    ) -> None:
        self.place, self.file, self.model, self.weights, self.loss = place, file, model, weights, loss
        self.anchors = anchors
        self._surface: LossSurface | None = None

    def taken(self, name: str, measure: SharpnessMeasure) -> str:
        """Name of the stored reading."""
        values = resolved(self.place.config)
        decisive = {k: values[k] for k in ("precision", "norm_layers", "biases")} | {"loss": self.loss}
        decisive |= {"measure": values["measures"][name]}
        decisive |= {"attack": None if self.loss == "clean" else values["attack"]}
        compared = measure.needs == "other"
        decisive |= {"other": digest_of(self.anchors["other"])} if compared else {}

        def made() -> Made:
            reading = take({name: measure}, self.surface)[name]
            details: dict[str, Any] = {k: v for k, v in reading.to_dict().items() if k not in ("details", "seconds")}
            details |= {"value": reading.value, "details": reading.details, "examples": len(self.surface.labels)}
            details |= {"other": values["other"]} if compared else {}
            return {}, {k: v for k, v in details.items() if v is not None}

        return self.place.once(
            self.file, "sharpness", f"{self.loss}/{name}", decisive, made, weights=self.weights, model=self.model
        )

    @property
    def surface(self) -> LossSurface:
        """The loss surface, adversarial examples found."""
        if self._surface is None:
            config = self.place.config
            self._surface = LossSurface(
                self.model,
                *self.place.examples(),
                loss=self.loss,
                attack=self.place.attack_of(self.loss),
                norm_layers=config.norm_layers,
                biases=config.biases,
                batch_size=int(config.batch_size),
                seed=self.place.seed,
                anchors=self.anchors,
            )
        return self._surface


def _complete(config: DictConfig) -> None:
    """One measure by `measure=`, or the set of `measures=`, of which `only=` keeps some."""
    losses_of(config, LOSSES)
    if config.measure is not None:
        node, config.measure = config.measure, None
        OmegaConf.set_struct(config, False)
        config.measures = {_name_of(node, config): node}
    if not OmegaConf.is_dict(config.measures):
        raise UserError("measures= is a set of measures: a choice such as measures=all, or measure=<choice> for one.")
    config.measures = {name: node for name, node in config.measures.items() if node is not None}
    for name in config.only:
        require_one_of("A name in only=", name, config.measures, hint="only=[] takes all.")
    if config.only:
        config.measures = {name: config.measures[name] for name in config.only}
    if not config.measures:
        raise UserError("There is nothing to measure: measures= is empty.")


def _name_of(node: DictConfig, config: DictConfig) -> str:
    """Name of a single measure: that of the file it was chosen by."""
    from hydra.core.hydra_config import HydraConfig

    return str(HydraConfig.get().runtime.choices.get("measure") or node.get("_target_", "").rsplit(".", 1)[-1])


def _anchors(place: Workplace, model: nn.Module) -> Anchors:
    """The networks to compare with: the initial one, which a run's seed gives again, and that of `other=`."""
    anchors: Anchors = {}
    if place.stored is not None:
        initial = seeded_model(place.stored).state_dict()
        mine = model.state_dict()
        if all(name in initial and initial[name].shape == t.shape for name, t in mine.items()):
            anchors["start"] = initial
    if place.config.other is not None:
        file = other_weights(str(place.config.other), Path(place.config.outputs), place.config.part)
        anchors["other"] = weights_of(file)
    return anchors


def _defined(
    place: Workplace, wanted: Mapping[str, SharpnessMeasure], loss: str, anchors: Anchors, left_out: dict[str, str]
) -> dict[str, SharpnessMeasure]:
    """Those measures that this loss and run allow; the others are named in the summary, or refused if asked for.

    Raises:
        UserError: if one that `only=` or `measure=` names is not defined.
    """
    kept = {}
    named = set(place.config.only) | (set(wanted) if len(wanted) == 1 else set())
    asked = losses_of(place.config, LOSSES)
    for name, measure in wanted.items():
        why = ""
        if loss not in measure.losses:
            why = f"not defined on the {loss} loss, only on {' and '.join(measure.losses)}"
            if measure.losses == ("clean",):
                why = "looks at the weights alone: taken with loss=clean"
        elif measure.needs and measure.needs not in anchors:
            needs = {
                "other": "another network: other=<run or file>",
                "start": "the initial weights of a run of train.py",
            }
            why = f"needs {needs[measure.needs]}"
        if not why:
            kept[name] = measure
        elif name in named and not any(other in measure.losses for other in asked if other != loss):
            raise UserError(f"{name}: {why}.")
        else:
            left_out[f"{name} ({loss})"] = why
    return kept


def _print(place: Workplace, found: Mapping[str, Stored], left_out: Mapping[str, str]) -> None:
    """One line per measure, one column per network and loss; then what was left out."""
    columns = list(
        dict.fromkeys((str(s.attrs["checkpoint"]), str(s.attrs["name"]).split("/")[0]) for s in found.values())
    )
    cells = {(_short(s), str(s.attrs["checkpoint"]), str(s.attrs["name"]).split("/")[0]): s for s in found.values()}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("measure", no_wrap=True)
    for checkpoint, loss in columns:
        table.add_column(f"{checkpoint}, {loss}", justify="right", no_wrap=True)
    table.add_column("passes", justify="right", no_wrap=True)
    table.add_column("source", overflow="fold")
    for name in dict.fromkeys(_short(s) for s in found.values()):
        row = [cells.get((name, *column)) for column in columns]
        one = next(s for s in row if s is not None)
        texts = ["" if s is None else _text(s) for s in row]
        table.add_row(name, *texts, str(one.attrs["passes"]), str(one.attrs["source"]))
    place.console.print()
    place.console.print(table)
    for name, why in left_out.items():
        place.console.print(f"left out     {name}: {why}", style="dim", markup=False)
    parameters = {str(s.attrs["parameters"]) for s in found.values()}
    attacks = {str(s.attrs["loss"]) for s in found.values() if "attack" in str(s.attrs["loss"])}
    place.console.print(
        f"\n+- standard error over random draws, or spread of several searches; that over examples is in the table of "
        f"scripts/export.py. passes: sweeps over the examples, a gradient counts 3, a curvature product 4, attacks "
        f"are not counted. {'; '.join(parameters)}; {place.config.precision}. {' '.join(sorted(attacks))}",
        style="dim",
        markup=False,
    )


def _short(stored: Stored) -> str:
    return str(stored.attrs["name"]).split("/", 1)[1]


def _text(stored: Stored) -> str:
    return with_error(float(stored.attrs["value"]), float(stored.attrs.get("standard_error", math.nan)))
