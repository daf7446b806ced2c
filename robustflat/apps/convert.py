"""Networks of other programs -> checkpoints that `evaluate.py` takes: the job behind scripts/convert_checkpoint.py."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from robustflat.apps.build import build, choose_device
from robustflat.apps.check import check, refuse
from robustflat.apps.config import config_folder, register
from robustflat.data.dataset import Dataset
from robustflat.errors import CheckpointError, UserError, require_one_of
from robustflat.evaluation.accuracy import Accuracy
from robustflat.evaluation.metrics import wrong
from robustflat.evaluation.predict import predict
from robustflat.models.external import Wrapped, robustbench_module
from robustflat.models.layouts import Conversion, fitted, is_released, released, released_settings
from robustflat.models.pickled import content_of, state_dict_of
from robustflat.training.checkpoint import load_into, save

LAYOUTS = ("auto", "released", "plain", "robustbench", "torchvision", "timm")
PACKAGE = "package"
"""Stands for a file where RobustBench's own package is to fetch the weights."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert, and what is known of it.

    Attributes:
        source: file, or "package".
        layout: one of `LAYOUTS`.
        architecture: its name in torchvision, timm or RobustBench.
        model: overrides such as "resnet18", "model.channels=16" and "dataset=cifar10" (layout "plain").
        classes: of an architecture of torchvision or timm; `None`: as many as the file has outputs.
        mean, std: what images are standardised with before an architecture of torchvision or timm.
        benchmark, threat_model: of the entry of RobustBench.
        folder: where RobustBench's package keeps what it downloads.
        part: key of the file under which the network is.
        rename: (beginning of a name, what to put in its place), in this order.
        drop: beginnings of names to leave out, after renaming.
    """

    source: str
    layout: str = "auto"
    architecture: str | None = None
    model: Sequence[str] = ()
    classes: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    benchmark: str = "cifar10"
    threat_model: str = "Linf"
    folder: str = "models"
    part: str | None = None
    rename: Sequence[tuple[str, str]] = ()
    drop: Sequence[str] = ()


def convert(request: Request) -> tuple[Conversion, nn.Module]:
    """The network that a request names, in our terms, and built with its weights (eval mode, CPU).

    Raises:
        UserError: for a file that cannot be read, an unknown layout or architecture, or names and shapes that do not
            fit; these are listed.
    """
    require_one_of("layout", request.layout, LAYOUTS)
    if request.source == PACKAGE:
        conversion = _from_package(request)
    else:
        state = renamed(state_dict_of(request.source, part=request.part), request.rename, request.drop)
        layout = _detected(state, request) if request.layout == "auto" else request.layout
        conversion = _CONVERTERS[layout](state, replace(request, layout=layout))
    model = _built(conversion.model)
    try:
        load_into(model, conversion.weights)
    except CheckpointError as error:
        raise CheckpointError(f"{request.source} as layout {conversion.layout}: {error}") from error
    return conversion, model.eval()


def renamed(
    state: Mapping[str, Tensor], rename: Sequence[tuple[str, str]], drop: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Names with their beginnings replaced, then without those of the beginnings `drop`.

    Raises:
        UserError: if an entry applies to no name, or two names become one.
    """
    for old, new in rename:
        if not any(name.startswith(old) for name in state):
            raise UserError(f"no name begins with '{old}'; there are {', '.join(list(state)[:8])} ...")
        changed = {new + n.removeprefix(old) if n.startswith(old) else n: value for n, value in state.items()}
        if len(changed) != len(state):
            raise UserError(f"replacing '{old}' by '{new}' makes two names equal.")
        state = changed
    for beginning in drop:
        if not any(name.startswith(beginning) for name in state):
            raise UserError(f"no name begins with '{beginning}', so there is nothing to drop.")
        state = {name: value for name, value in state.items() if not name.startswith(beginning)}
    return dict(state)


def clean_accuracy(model: nn.Module, overrides: Sequence[str]) -> Accuracy:
    """Accuracy of a network on the test split of a data set.

    Args:
        model: images in [0, 1] -> logits.
        overrides: as on the command line: dataset=cifar10 data_root=... 'dataset.test="test[:1000]"' device=cpu.

    Raises:
        UserError: if the data set cannot be built or does not fit the network.
    """
    dataset = dataset_of(overrides)
    model = model.to(dataset.device)
    logits, labels = predict(model, dataset.test.batches(dataset.eval_batch_size))
    correct = int((~wrong(logits, labels)).sum())
    return Accuracy(correct, len(labels), f"{dataset.name} {dataset.test_split}")


def dataset_of(overrides: Sequence[str]) -> Dataset:
    """The data set that a command line names: dataset=cifar10 data_root=... device=cpu ...

    Raises:
        UserError: if none is named, or it cannot be built.
    """
    config = _composed([*overrides])
    if config.dataset is None:
        raise UserError("say which data: dataset=<choice>.")
    config.device = choose_device(config.device)
    config.data_root = config.data_root or os.environ.get("ROBUSTFLAT_DATA", "data")
    refuse(check(OmegaConf.masked_copy(config, ["dataset", "device", "data_root"])))
    dataset: Dataset = build(config.dataset)
    return dataset


def write(
    target: Path,
    conversion: Conversion,
    request: Request,
    *,
    accuracy: Accuracy | None = None,
    expected: float | None = None,
) -> dict[str, object]:
    """Write a checkpoint that holds the weights, the network they belong to, and where they come from.

    Returns:
        The record of the conversion, as the checkpoint's meta data have it under "converted".

    Raises:
        UserError: if the file exists or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} exists already: remove it or choose another name.")
    of_benchmark = conversion.layout == "robustbench"
    record: dict[str, object] = {
        "layout": conversion.layout,
        "source": Path(request.source).name,
        "sha256": None if request.source == PACKAGE else _sha256(Path(request.source)),
        "architecture": request.architecture,
        "benchmark": request.benchmark if of_benchmark else None,
        "threat_model": request.threat_model if of_benchmark else None,
        "expected_accuracy": expected,
        "accuracy": None if accuracy is None else accuracy.value,
        "correct": None if accuracy is None else accuracy.correct,
        "count": None if accuracy is None else accuracy.count,
        "data": None if accuracy is None else accuracy.data,
        "notes": list(conversion.notes),
    }
    save(target, {"model": conversion.weights}, {"config": model_yaml(conversion), "converted": record})
    return record


def model_yaml(conversion: Conversion) -> str:
    """The network as the `model` node of a configuration."""
    return OmegaConf.to_yaml(OmegaConf.create({"model": conversion.model}))


def _detected(state: Mapping[str, Tensor], request: Request) -> str:
    """The layout that names show.

    Raises:
        UserError: if they show none.
    """
    if is_released(state):
        return "released"
    if request.model:
        return "plain"
    if {"fc.weight", "layer1.0.conv1.weight"} <= {name.removeprefix("module.") for name in state}:
        return "torchvision"
    raise UserError(
        f"the names do not tell the layout ({', '.join(list(state)[:5])} ...). Say --layout torchvision, timm or "
        "robustbench with --architecture <name>, or --layout plain with --model resnet18 model.channels=64 ..."
    )


def _released(state: Mapping[str, Tensor], request: Request) -> Conversion:
    pickled = not request.source.endswith(".safetensors")
    return released(state, released_settings(content_of(request.source)) if pickled else {})


def _plain(state: Mapping[str, Tensor], request: Request) -> Conversion:
    if not request.model:
        raise UserError("layout plain needs the network: --model resnet18 model.channels=64 model.norm=rebn ...")
    chosen = [text if "=" in text else f"model={text}" for text in request.model]
    if not any(text.startswith("dataset=") for text in chosen):
        raise UserError("layout plain needs the data that the network is for: --model ... dataset=cifar10")
    given = {"mean": request.mean, "std": request.std}
    config = _composed([*chosen, *(f"model.{key}={list(value)}" for key, value in given.items() if value is not None)])
    node = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(node, dict)
    model = {str(key): value for key, value in node.items()}
    prefixed = all(name.startswith("module.") for name in state)
    weights = {name.removeprefix("module."): v for name, v in state.items()} if prefixed else dict(state)
    return Conversion("plain", model, weights)


def _library(state: Mapping[str, Tensor], request: Request) -> Conversion:
    """torchvision, timm and RobustBench: the architecture by name, wrapped."""
    model = _architecture_node(state, request)
    network = _built(model)
    assert isinstance(network, Wrapped)
    found = fitted(state, network.network.state_dict())
    notes = found.notes
    if request.layout != "robustbench" and request.mean is None:
        notes += ("Images reach the network unstandardised: no --mean and --std were given.",)
    return Conversion(request.layout, model, found.weights, notes)


def _architecture_node(state: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
    """`_target_` and arguments of the network around an architecture.

    Raises:
        UserError: without architecture, or if the number of classes is not to be seen.
    """
    name = request.architecture or (_torchvision_resnet(state) if request.layout == "torchvision" else None)
    if name is None:
        raise UserError(f"layout {request.layout} needs --architecture <name>.")
    node: dict[str, Any] = {"_target_": f"robustflat.models.external.{request.layout}_network", "architecture": name}
    if request.layout == "robustbench":
        return node | {"benchmark": request.benchmark, "threat_model": request.threat_model}
    for key, value in (("mean", request.mean), ("std", request.std)):
        node[key] = None if value is None else list(value)
    node["classes"] = _classes(state, node) if request.classes is None else request.classes
    return node


def _classes(state: Mapping[str, Tensor], node: Mapping[str, Any]) -> int:
    """Rows that the file's last layer has: those of the tensors that have two in the architecture for two classes.

    Raises:
        UserError: if these are not the same number everywhere.
    """
    network = _built({**node, "classes": 2})
    own = network.state_dict()
    found = {n: v for n, v in fitted(state, network.get_submodule("network").state_dict()).weights.items() if n in own}
    rows = {len(v) for n, v in found.items() if v.shape != own[n].shape and own[n].shape[:1] == (2,) and v.ndim}
    if len(rows) > 1:
        raise UserError(f"the number of classes cannot be told from the file ({sorted(rows)}): give --classes.")
    return rows.pop() if rows else 2


def _torchvision_resnet(state: Mapping[str, Tensor]) -> str | None:
    """The residual network of torchvision that has these names and shapes but for the last layer, if there is one."""
    import torchvision.models as models

    shapes = _body_shapes({n.removeprefix("module."): v for n, v in state.items()})
    for name in models.list_models(module=models, include=["resnet*", "wide_resnet*", "resnext*"]):
        with torch.device("meta"):
            own = models.get_model(name, weights=None).state_dict()
        if _body_shapes(own) == shapes:
            return str(name)
    return None


def _body_shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items() if not name.startswith("fc.")}


def _from_package(request: Request) -> Conversion:
    """Weights of an entry of RobustBench as its own package fetches and loads them.

    Raises:
        UserError: if the package cannot, with its reason.
    """
    if request.layout not in ("auto", "robustbench") or request.architecture is None:
        raise UserError("'package' loads an entry of RobustBench by name: --layout robustbench --architecture <name>.")
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        raise UserError(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: the package would run what is in its files. Unset it."
        )
    request = replace(request, layout="robustbench")
    model = _architecture_node({}, request)
    _built(model)  # an unknown name is told before anything is downloaded
    load_model = robustbench_module("robustbench.utils").load_model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the package's own use of torch and timm
            network = load_model(
                model_name=request.architecture,
                model_dir=request.folder,
                dataset=request.benchmark,
                threat_model=request.threat_model,
            )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the file of {request.architecture} below {request.folder} holds more than tensors, and was not loaded. "
            "Convert it: give the file in the place of 'package'."
        ) from error
    except Exception as error:  # what downloads and a foreign package raise cannot be listed
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"robustbench could not load {request.architecture} ({reason}).") from error
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    return Conversion("robustbench", model, weights, ("Loaded by the package robustbench.",))


_CONVERTERS = {
    "released": _released, "plain": _plain, "robustbench": _library, "torchvision": _library, "timm": _library,
}  # fmt: skip


def _built(node: Mapping[str, Any]) -> nn.Module:
    config = OmegaConf.create({"model": dict(node)})
    refuse(check(config))
    model: nn.Module = build(config.model)
    return model


def _composed(overrides: list[str]) -> DictConfig:
    """The configuration of `evaluate.py` with these overrides."""
    from robustflat.apps import evaluate  # noqa: F401  # makes its root known to Hydra

    register()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = hydra.compose("evaluate", ["evaluation=smoke", *overrides])  # not needed: the quickest to compose
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error)) from error
    OmegaConf.set_struct(config, False)
    return config


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
