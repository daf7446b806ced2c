"""Which networks a landscape shows: runs, snapshots of runs, checkpoints from elsewhere, and the end of a path."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from robustflat.apps.evaluate import describe_network, take_from_run
from robustflat.apps.networks import NetworkFile, choose, find_run, stored_config
from robustflat.errors import UserError, require_one_of


class Shown(NamedTuple):
    """One network of a picture.

    Attributes:
        label: in the legend.
        run: its folder; None for a checkpoint from elsewhere.
        file: its weights.
        config: completed by what the run says.
        stored: the run's own configuration; None for a checkpoint from elsewhere.
    """

    label: str
    run: Path | None
    file: NetworkFile
    config: DictConfig
    stored: DictConfig | None


def shown_networks(config: DictConfig) -> list[Shown]:
    """The networks that a command names, in its order; `to=` last.

    Raises:
        UserError: if it names none, or both runs and checkpoints; if one is not there; or if labels do not fit.
    """
    runs, files = _several(config.run), _several(config.checkpoint)
    if bool(runs) == bool(files):
        raise UserError(
            "Say what to draw: run=<folder or id>, or run=[a,b] for several in one picture; or checkpoint=<file> with "
            "model=... and dataset=... for a network trained elsewhere."
        )
    if runs and config.name is not None:
        raise UserError("name= is for the folder of a checkpoint from elsewhere; a run's results go into its own.")
    require_one_of("part", config.part, ("model", "average"))
    if files and config.checkpoints is not None:
        raise UserError("checkpoints= chooses snapshots of a run; give the files instead: checkpoint=[a.pt,b.pt].")
    which = ",".join(_several(config.checkpoints)) or "last"
    shown = [one for text in runs for one in _of_run(config, text, which)]
    shown += [_of_file(config, text) for text in files]
    if config.to is not None:
        shown.append(
            _of_file(config, config.to) if Path(config.to).is_file() else _of_run(config, config.to, "last")[0]
        )
    return _labelled(shown, list(config.labels))


def _several(value: Any) -> list[str]:
    """A value, a list, or text with commas, as a list of text."""
    if value is None:
        return []
    if isinstance(value, ListConfig | list):
        return [str(v) for v in value]
    return [word.strip() for word in str(value).split(",")]


def _of_run(config: DictConfig, text: str, which: str) -> list[Shown]:
    run = find_run(text, Path(config.outputs))
    stored = stored_config(run)
    mine = _completed(config, stored)
    return [Shown("", run, file, mine, stored) for file in choose(run, which, config.part)]


def _of_file(config: DictConfig, text: str) -> Shown:
    mine = _completed(config, None)
    mine.checkpoint = text
    describe_network(mine)
    name = "last" if config.part == "model" else str(config.part)
    return Shown("", None, NetworkFile(name, Path(text), config.part, None), mine, None)


def _completed(config: DictConfig, stored: DictConfig | None) -> DictConfig:
    """What the command leaves to the run is filled in; `attack=` replaces the landscape's own."""
    mine = config.copy()
    OmegaConf.set_struct(mine, False)
    if mine.attack is not None:
        mine.landscape.attack = mine.attack
    if mine.to is not None:
        mine.kind = "path"
    take_from_run(mine, stored)
    return mine


def _labelled(shown: list[Shown], given: list[str]) -> list[Shown]:
    """Experiment, or file; with run id and checkpoint where needed to tell networks apart."""
    if given and len(given) != len(shown):
        raise UserError(f"labels has {len(given)} names for {len(shown)} networks.")
    labels = [_parts(one)[0] for one in shown]
    for detail in (1, 2):
        counts = Counter(labels)
        parts = [_parts(one) for one in shown]
        # Only what tells networks apart is added.
        differ = len({p[detail] for p in parts}) > 1
        labels = [
            f"{label} {p[detail]}".strip() if counts[label] > 1 and differ else label
            for label, p in zip(labels, parts, strict=True)
        ]
    labels = given or labels
    if len(set(labels)) < len(labels):
        raise UserError("The same network is named twice; give each once, or different labels=[...].")
    return [one._replace(label=label) for one, label in zip(shown, labels, strict=True)]


def _parts(one: Shown) -> tuple[str, str, str]:
    if one.run is None:
        return one.file.path.stem, str(one.file.path.parent), ""
    run = one.run.resolve()
    return run.parent.name, run.name, one.file.name
