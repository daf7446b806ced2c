"""Networks of other runs that transfer attacks search on: from the name of a run to its network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from robustflat.apps.build import build
from robustflat.apps.check import check, refuse
from robustflat.apps.networks import choose, digest_of, find_run, stored_config, weights_of
from robustflat.attacks.nested import nested
from robustflat.attacks.transfer import Transfer
from robustflat.errors import CheckpointError, UserError
from robustflat.training.checkpoint import load_into

TARGET = f"{Transfer.__module__}.{Transfer.__qualname__}"
HOLDERS = ("attack", "reference_attack")
"""Where flatness measures and selection rules keep their attacks."""


def name_surrogates(node: DictConfig | ListConfig, outputs: Path) -> dict[str, Path]:
    """Replace each surrogate in a configuration by "<run id>@<digest of its weights>", in place.

    So a result says which weights it was made with, wherever the run lies, and is measured anew for other weights.

    Args:
        node: anything that may hold attacks.
        outputs: where runs given by their id are looked for.

    Returns:
        New name -> run folder.

    Raises:
        UserError: if a run is not there, or has no weights.
    """
    found: dict[str, Path] = {}
    if isinstance(node, DictConfig) and node.get("_target_") == TARGET:
        run = find_run(str(node.surrogate), outputs)
        node.surrogate = f"{run.resolve().name}@{digest_of(weights_of(choose(run, 'last', 'model')[0]))}"
        found[node.surrogate] = run
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig | ListConfig):
            found |= name_surrogates(node[key], outputs)
    return found


def give_surrogates(holders: Iterable[object], config: DictConfig, runs: Mapping[str, Path] | None = None) -> None:
    """Load the networks that transfer attacks name, once each, and hand them over.

    Args:
        holders: attacks, or measures and rules that keep attacks.
        config: of the run or evaluation; its data must fit the surrogate, which goes to its device.
        runs: name -> run folder, from `name_surrogates`; other names are looked up below `config.outputs`.

    Raises:
        UserError: if a run is not there, has no weights, or is about other images or classes.
    """
    networks: dict[str, nn.Module] = {}
    for holder in holders:
        for attack in (holder, *(getattr(holder, name, None) for name in HOLDERS)):
            for part in nested(attack):
                if isinstance(part, Transfer) and isinstance(part.surrogate, str):
                    name = part.surrogate
                    run = (runs or {}).get(name) or find_run(name, Path(config.outputs))
                    networks[name] = networks.get(name) or surrogate_of(run, config)
                    part.give(networks[name])


def surrogate_of(run: Path, config: DictConfig) -> nn.Module:
    """The network of a run with its last weights, in eval mode on the device of `config`.

    Raises:
        UserError: see `give_surrogates`.
    """
    stored = stored_config(run)
    refuse(check(OmegaConf.create({"model": stored.model, "trusted_packages": config.get("trusted_packages")})))
    for key in ("channels", "classes"):
        there, here = stored.dataset.get(key), config.dataset.get(key)
        if there != here:
            raise UserError(f"The surrogate {run} was trained with dataset.{key}={there}, but here it is {here}.")
    model: nn.Module = build(stored.model)
    (file,) = choose(run, "last", "model")
    try:
        load_into(model, weights_of(file))
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    return model.to(config.device).eval()
