"""Curvature of the loss of trained networks: the job behind `robustflat hessian`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import nn

from robustflat.apps.build import build
from robustflat.apps.config import resolved
from robustflat.apps.instruments import InstrumentRoot, Made, Workplace, losses_of, start
from robustflat.apps.networks import NetworkFile
from robustflat.errors import UserError
from robustflat.flatness.hessian import HessianSpectrum
from robustflat.flatness.spectrum_result import SpectrumResult, converged_digits
from robustflat.flatness.trace import Estimate
from robustflat.reporting.density_plots import density_picture
from robustflat.store.results import KEY, ResultStore, Stored

VECTORS = "hessian_vectors.h5"
LOSSES = ("clean", "frozen")
MANY = 3
"""From this number of results on, one line each."""


@dataclass
class HessianRoot(InstrumentRoot):
    """The top level of the configuration of `robustflat hessian`."""

    hessian: Any = None
    loss: Any = "clean"
    vectors: bool = False


ConfigStore.instance().store(name="hessian_root", node=HessianRoot)


def job(config: DictConfig) -> float:
    """Hydra's task function: measure, store, draw, print.

    Returns:
        The largest eigenvalue of the last network.
    """
    return start(config, spectra, HessianRoot, check_own=_check)


def spectra(place: Workplace) -> float:
    """Measure every network on every loss that is asked for, unless it is stored already; print what was found.

    Returns:
        The largest eigenvalue of the last network on the last loss; NaN if none was asked for.
    """
    names = []
    for file in place.files:
        model, weights = place.network(file)
        names += [spectrum(place, file, model, weights, loss) for loss in losses_of(place.config, LOSSES)]
    found = {name: place.store.read(name) for name in names}
    _print(place, found)
    _draw(place, found)
    place.summary()
    last = found[names[-1]].arrays["top"]
    return float(last[0]) if len(last) else float("nan")


def _check(config: DictConfig) -> None:
    losses_of(config, LOSSES)
    if not OmegaConf.is_dict(config.hessian):
        raise UserError("hessian= is a node of settings: hessian.top=3, hessian.trace_products=60, ...")
    if config.hessian.get("attack") is not None:
        raise UserError("Give the attack of the frozen loss as attack=<choice> with loss=frozen.")


def spectrum(place: Workplace, file: NetworkFile, model: nn.Module, weights: str, loss: str) -> str:
    """Measure one network on one loss by the node `hessian`, unless that is stored.

    Returns:
        The name of the result in the store.
    """
    values = resolved(place.config)
    decisive = {"loss": loss, "hessian": values["hessian"], "attack": None if loss == "clean" else values["attack"]}

    measured: list[SpectrumResult] = []

    def measure(**options: int) -> SpectrumResult:
        spectrum: HessianSpectrum = build(
            place.config.hessian, attack=place.attack_of(loss), seed=place.seed, **options
        )
        return spectrum.measure(model, place.batches())

    def made() -> Made:
        measured.append(measure())
        return _arrays(measured[0]), _details(measured[0])

    name = place.once(file, "hessian", loss, decisive, made, weights=weights, model=model)
    if place.config.vectors:
        _keep_vectors(place, name, lambda: measured[0] if measured else measure(trace_products=0, density_probes=0))
    return name


def _arrays(result: SpectrumResult) -> dict[str, Any]:
    arrays = {
        "top": result.top.values.double().numpy(),
        "top_residuals": result.top.residuals.double().numpy(),
        "bottom": result.bottom.values.double().numpy(),
        "bottom_residuals": result.bottom.residuals.double().numpy(),
    }
    if result.density is not None:
        arrays["density_nodes"] = result.density.nodes.double().numpy()
        arrays["density_weights"] = result.density.weights.double().numpy()
    return arrays


def _details(result: SpectrumResult) -> dict[str, object]:
    lists = ("largest", "largest_residuals", "smallest", "smallest_residuals", "density_nodes", "density_weights")
    return {k: v for k, v in result.to_dict().items() if k not in (*lists, "seed", "seconds")}


def _keep_vectors(place: Workplace, name: str, measured: Callable[[], SpectrumResult]) -> None:
    """Eigenvectors as rows, in a file of their own; `names` and `shapes` say where each tensor is in a row."""
    checkpoint, split, _, last = name.split("/")
    kept, where, key = (
        ResultStore(place.folder / VECTORS),
        f"{checkpoint}/{split}/{last}",
        place.store.attributes(name)[KEY],
    )
    if place.config.force or not kept.has(where, key):
        result = measured()
        arrays = {"top": result.top.vectors.numpy(), "bottom": result.bottom.vectors.numpy()}
        attrs = {"names": list(result.names), "shapes": [list(shape) for shape in result.shapes], KEY: key}
        kept.write(where, arrays, attrs)
    place.console.print(f"eigenvectors {kept.path}, {where}", markup=False)


def _print(place: Workplace, found: dict[str, Stored]) -> None:
    if len(found) >= MANY:
        place.console.print(_overview(found))
        return
    for stored in found.values():
        attrs = stored.attrs
        place.console.print(f"\n[bold]{attrs['checkpoint']}[/bold], {attrs['curvature']} of the {attrs['loss']} loss")
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in _figures(stored).items():
            table.add_row(label, value)
        place.console.print(table)
        place.console.print(
            f"{attrs['reduction']} of {attrs['examples']} examples in {attrs['batches']} batch(es); "
            f"{attrs['parameters']}; attack {attrs['attack']}; {attrs['precision']}; {attrs['products']} products in "
            f"{attrs['seconds']:.1f} s",
            style="dim",
            markup=False,
        )


def _figures(stored: Stored) -> dict[str, str]:
    """Label -> text, digits that have not converged left out."""
    arrays, attrs = stored
    figures = {}
    for label, end in (("largest", "top"), ("smallest", "bottom")):
        pairs = zip(arrays[end].tolist(), arrays[f"{end}_residuals"].tolist(), strict=True)
        if len(arrays[end]):
            figures[f"{label} eigenvalues"] = "  ".join(converged_digits(*pair) for pair in pairs)
    if not attrs["converged"]:
        figures["not converged"] = "raise hessian.lanczos.max_products; '?' has no certain digit"
    if len(arrays["top"]) and len(arrays["bottom"]):
        figures["|lambda_min| / |lambda_max|"] = _ratio(stored)
    for metric, label in (("trace", "trace"), ("frobenius", "Frobenius norm")):
        if metric in attrs:
            figures[label] = str(Estimate(attrs[metric], attrs.get(f"{metric}_standard_error", float("nan"))))
    return figures


def _ratio(stored: Stored) -> str:
    top, bottom = float(stored.arrays["top"][0]), float(stored.arrays["bottom"][0])
    if top == 0:
        return "?"
    ratio = abs(bottom / top)
    errors = float(stored.arrays["bottom_residuals"][0]) + ratio * float(stored.arrays["top_residuals"][0])
    return converged_digits(ratio, errors / abs(top))


def _overview(found: dict[str, Stored]) -> Table:
    """One line per network and loss."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "loss", "lambda_max", "lambda_min", "|min|/|max|", "trace", "Frobenius norm"):
        table.add_column(heading, justify="left" if heading in ("", "loss") else "right")
    for stored in found.values():
        figures = _figures(stored)
        ends = [figures.get(f"{end} eigenvalues", "").split("  ")[0] for end in ("largest", "smallest")]
        rest = [figures.get(k, "") for k in ("|lambda_min| / |lambda_max|", "trace", "Frobenius norm")]
        table.add_row(str(stored.attrs["checkpoint"]), str(stored.attrs["loss"]), *ends, *rest)
    return table


def _draw(place: Workplace, found: dict[str, Stored]) -> None:
    drawn = {
        f"{s.attrs['checkpoint']}, {s.attrs['loss']} loss": (
            np.asarray(s.arrays["density_nodes"]),
            np.asarray(s.arrays["density_weights"]),
        )
        for s in found.values()
        if "density_nodes" in s.arrays
    }
    if not drawn:
        return
    first = next(iter(found.values())).attrs
    probes = len(next(iter(drawn.values()))[0])
    title = f"{first['curvature']}, {place.split}, {first['examples']} examples, {probes} probes, {first['precision']}"
    for file in density_picture(drawn, place.folder / "hessian_density.png", title=title):
        place.console.print(f"picture      {file}", markup=False)
