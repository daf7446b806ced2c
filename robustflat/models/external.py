"""Any network from elsewhere (torchvision, timm, RobustBench, one's own) behind our model contract."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from robustflat.errors import UserError, require_one_of, require_range
from robustflat.models.normalize import Normalize


class Wrapped(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> normalise -> `network` -> logits (B, K).

    >>> model = Wrapped(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), classes=3, channels=1)

    Args:
        network: standardised images -> logits. One that standardises by itself gets no mean and std here.
        classes: K >= 2, the number of logits of `network`.
        mean, std: per channel in [0, 1] units; `None`: images reach the network unchanged.
        channels: number of channels that images must have; `None`: that of `mean`, or any without it.

    Raises:
        UserError: as `Normalize` and for classes < 2; on a call, if the network returns no (B, K) tensor.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        classes: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        require_range("classes", classes, low=2)
        self.classes = classes
        self.image_shape: tuple[int, int, int] | None = None
        self.normalize = Normalize(mean, std, channels=channels)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
        logits: object = self.network(self.normalize(x))
        if not isinstance(logits, Tensor):
            raise UserError(
                f"{type(self.network).__name__} must return one tensor of logits, got {type(logits).__name__}. "
                "Switch its auxiliary outputs off."
            )
        if logits.shape != (x.shape[0], self.classes):
            raise UserError(
                f"{type(self.network).__name__} returns shape {tuple(logits.shape)} for {x.shape[0]} images, "
                f"but classes={self.classes} asks for {(x.shape[0], self.classes)}. Build it for that number."
            )
        return logits


def torchvision_network(
    *, architecture: str, classes: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Wrapped:
    """A classification network of torchvision by name, with random weights; takes colour images.

    Args:
        architecture: such as "resnet18", see `torchvision.models.list_models`.
        classes: K >= 2.
        mean, std: per channel in [0, 1] units; `None`: images reach the network unchanged.

    Raises:
        UserError: for an unknown name, and as `Wrapped`.
    """
    models = importlib.import_module("torchvision.models")
    require_one_of("architecture", architecture, models.list_models(module=models))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The default weight initialization")  # ours come from a file
        network: nn.Module = models.get_model(architecture, weights=None, num_classes=classes)
    return Wrapped(network, classes=classes, channels=3, mean=mean, std=std)


def timm_network(
    *,
    architecture: str,
    classes: int,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Wrapped:
    """A network of the package timm (optional) by name, with random weights.

    Args:
        architecture: such as "resnet18" or "vit_tiny_patch16_224", see `timm.list_models`.
        classes: K >= 2.
        channels: of the images, >= 1.
        mean, std: per channel in [0, 1] units; `None`: images reach the network unchanged.

    Raises:
        UserError: if timm is not installed, for an unknown name, and as `Wrapped`.
    """
    require_range("channels", channels, low=1)
    timm = optional_package("timm", "pip install timm")
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"timm {timm.__version__} has no model '{architecture}'.{hint}")
    network = timm.create_model(architecture, pretrained=False, num_classes=classes, in_chans=channels)
    return Wrapped(network, classes=classes, channels=channels, mean=mean, std=std)


BENCHMARKS = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
"""Data sets of RobustBench and their numbers of classes."""

THREAT_MODELS = ("Linf", "L2", "corruptions", "corruptions_3d")
"""Threat models of RobustBench, spelled as there."""


def robustbench_network(*, architecture: str, benchmark: str = "cifar10", threat_model: str = "Linf") -> Wrapped:
    """The network of an entry of RobustBench (Croce et al., 2021; optional package), with random weights.

    Nothing is downloaded. The networks standardise their images themselves.

    Args:
        architecture: name of the entry, such as "Wong2020Fast".
        benchmark: "cifar10", "cifar100" or "imagenet".
        threat_model: "Linf", "L2", "corruptions" or "corruptions_3d".

    Raises:
        UserError: if the package is not installed or does not work, or for an unknown name.
    """
    require_one_of("benchmark", benchmark, BENCHMARKS)
    require_one_of("threat_model", threat_model, THREAT_MODELS)
    zoo = robustbench_module("robustbench.model_zoo.models").model_dicts
    entries = {
        (data.value, threat.value): models for data, threats in zoo.items() for threat, models in threats.items()
    }
    known = entries.get((benchmark, threat_model.removesuffix("_3d")), {})  # one set of networks for both corruptions
    require_one_of("architecture", architecture, known)
    network: nn.Module = known[architecture]["model"]()
    return Wrapped(network, classes=BENCHMARKS[benchmark], channels=3)


def optional_package(name: str, install: str) -> Any:
    """A module of a package that not everybody has.

    Raises:
        UserError: if it cannot be imported, with what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"This needs {name}, which cannot be imported ({error}): {install}") from error


def robustbench_module(name: str) -> Any:
    """A module of RobustBench.

    Version 1.1.1 depends on the package pyautoattack but imports it by the name that it has elsewhere, autoattack,
    and so cannot be imported after an ordinary installation. During the import it is given what it asks for.

    Raises:
        UserError: if it cannot be imported, with what to install.
    """
    with _autoattack_by_its_other_name():
        return optional_package(name, "pip install 'robustflat[robustbench]' 'setuptools<81'")


@contextmanager
def _autoattack_by_its_other_name() -> Iterator[None]:
    added = []
    if importlib.util.find_spec("autoattack") is None and importlib.util.find_spec("pyautoattack") is not None:
        for part in ("", ".state"):
            sys.modules[f"autoattack{part}"] = importlib.import_module(f"pyautoattack{part}")
            added.append(f"autoattack{part}")
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
