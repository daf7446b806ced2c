"""Networks scaled without changing their function, measured like the original: the job behind `robustflat rescale`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.table import Table
from torch import nn

from robustflat.apps.bench import Bench, measure_network
from robustflat.apps.build import build
from robustflat.apps.config import _safe_name, resolved
from robustflat.apps.evaluate import network, require_examples, require_pieces
from robustflat.apps.evaluation_summary import SHOWN
from robustflat.apps.hessian import spectrum
from robustflat.apps.instruments import InstrumentRoot, Workplace, other_weights, start
from robustflat.apps.networks import NetworkFile, digest_of
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.evaluation.plan import EvaluationPlan
from robustflat.evaluation.rows import Row
from robustflat.flatness.spectrum_result import converged_digits
from robustflat.models.rescale import Rescaled, rescaled, rescaled_like
from robustflat.store.tables import write_table
from robustflat.training.checkpoint import save

LOSSES = ("clean",)


@dataclass
class RescaleRoot(InstrumentRoot):
    """The top level of the configuration of `robustflat rescale`."""

    factors: list[float] = field(default_factory=lambda: [0.5, 2.0])
    like: str | None = None
    per_layer: bool = False
    norm: float = 2.0
    absorb_epsilon: bool = True
    tolerance: float = 1e-3
    save: bool = False
    only: list[str] = field(default_factory=list)
    loss: str = "clean"
    hessian: Any = None
    vectors: bool = False


ConfigStore.instance().store(name="rescale_root", node=RescaleRoot)


class Variant(NamedTuple):
    """A network of the study: where its results go, itself, digest of its weights, factor, and change of its logits."""

    file: NetworkFile
    model: nn.Module
    weights: str
    factor: str
    change: float


def job(config: DictConfig) -> float:
    """Hydra's task function: scale, check, measure, store, print.

    Returns:
        Largest relative change of a logit.
    """
    return start(config, study, RescaleRoot, check_own=_check)


def study(place: Workplace) -> float:
    """Measure the original and every scaled copy; print the table, and write it as CSV and Markdown.

    Returns:
        Largest relative change of a logit that scaling made.
    """
    plan: EvaluationPlan = build(place.config.evaluation)
    require_examples(plan, place.dataset)
    require_pieces(place.config.only, plan)
    if plan.selection is not None:
        raise UserError("rescale chooses no snapshot: take an evaluation without selection, and checkpoints=<epoch>.")
    bench = Bench(
        plan=plan,
        dataset=place.dataset,
        store=place.store,
        settings=resolved(place.config),
        console=place.console,
        facts=place.facts,
        prefix=place.prefix,
    )
    lines: list[dict[str, object]] = []
    changes = [0.0]
    for file in place.files:
        for variant in list(_variants(place, file)):  # all are checked before anything long starts
            rows = bench.rows(measure_network(bench, variant.file, variant.model, variant.weights))
            curvature = spectrum(place, variant.file, variant.model, variant.weights, place.config.loss)
            lines.append(_line(place, variant, rows, curvature))
            changes.append(variant.change)
    _report(place, plan, pd.DataFrame(lines))
    return max(changes)


def _check(config: DictConfig) -> None:
    require_one_of("loss", config.loss, LOSSES)
    require_range("tolerance", config.tolerance, low=0, low_open=True)
    for factor in config.factors:
        require_range("factors", factor, low=0, low_open=True, high=math.inf, high_open=True)
    if not config.factors and config.like is None:
        raise UserError("There is nothing to scale: give factors=[0.5,2], or like=<run or checkpoint>.")


def _variants(place: Workplace, file: NetworkFile) -> Iterator[Variant]:
    """The original and its scaled copies.

    Raises:
        UserError: if a copy's outputs differ from the original's by more than the tolerance.
    """
    config = place.config
    model, weights = place.network(file)
    yield Variant(file, model, weights, "original", 0.0)
    images = place.examples()[0]
    options = {"absorb_epsilon": bool(config.absorb_epsilon), "tolerance": float(config.tolerance)}
    for factor in config.factors:
        made = rescaled(model, float(factor), images, **options)  # type: ignore[arg-type]
        yield _variant(place, file, made, f"x{float(factor):g}")
    if config.like is not None:
        other = other_weights(str(config.like), Path(config.outputs), config.part)
        reference, _ = network(config, other)
        made = rescaled_like(
            model,
            reference,
            images,
            norm=float(config.norm),
            per_layer=config.per_layer,
            absorb_epsilon=config.absorb_epsilon,
            tolerance=config.tolerance,
        )
        yield _variant(place, file, made, f"like_{_safe_name(Path(str(config.like)).stem)}")


def _variant(place: Workplace, file: NetworkFile, made: Rescaled, label: str) -> Variant:
    name = f"{file.name}_{label}"
    path = place.folder / "rescaled" / f"{name}.pt"
    state = {key: tensor.detach().cpu() for key, tensor in made.model.state_dict().items()}
    if place.config.save:
        save(path, {"model": state}, {"scaled": label, "epoch": file.epoch})
        place.console.print(f"network      {path}", markup=False)
    factors = set(made.factors.values())
    shown = f"x{next(iter(factors)):.4g}" if len(factors) == 1 else f"x{min(factors):.3g} .. x{max(factors):.3g}"
    scaled_file = NetworkFile(name, path, file.part, file.epoch)
    return Variant(scaled_file, made.model, digest_of(state), shown, made.change)


def _line(place: Workplace, variant: Variant, rows: list[Row], curvature: str) -> dict[str, object]:
    """One line of the table: what is measured, with its standard error in a column of its own."""
    line: dict[str, object] = {"network": variant.file.name, "scale": variant.factor, "logit_change": variant.change}
    for row in rows:
        if row["metric"] in SHOWN and row["role"] in ("test", "train") and "_on_" not in row["metric"]:
            if row["metric"] == "robust_error_at_99tpr":
                continue
            measure = str(row["measure"]).partition("~")[0]  # one name in all lines, whatever else is in the store
            key = " ".join((str(row["role"]), str(row["metric"]), measure)).removesuffix(" clean")
            line |= {key: row["value"], f"{key} stderr": row["stderr"]}
    arrays = place.store.read(curvature).arrays
    for label, end in (("lambda_max", "top"), ("lambda_min", "bottom")):
        if len(arrays[end]):
            line |= {label: float(arrays[end][0]), f"{label} residual": float(arrays[f"{end}_residuals"][0])}
    return line


def _report(place: Workplace, plan: EvaluationPlan, table: pd.DataFrame) -> None:
    files = [place.folder / f"rescale.{ending}" for ending in ("csv", "md")]
    shown = pd.DataFrame([_texts(line) for line in table.to_dict("records")])
    write_table(table, files[0])
    write_table(shown, files[1])
    printed = Table(box=None, pad_edge=False, header_style="dim")
    printed.add_column("", no_wrap=True)
    for name in shown["network"]:
        printed.add_column(str(name), justify="right", no_wrap=True)
    for column in shown.columns[1:]:
        printed.add_row(str(column), *map(str, shown[column]))
    place.console.print()
    place.console.print(printed)
    absorbed = "absorbed" if place.config.absorb_epsilon else "not absorbed"
    place.console.print(
        f"\nThreat model {plan.norm}, epsilon {plan.epsilon:.5g}; +- standard error over examples (errors, losses), "
        f"over draws (average case), or over restarts (worst case: how far these differ). Logits agree to "
        f"{place.config.tolerance:g} of the largest; batch norm's epsilon is {absorbed}. "
        f"The scaled layers' Hessian block goes with 1 / scale^2; other layers' blocks stay.",
        style="dim",
        markup=False,
    )
    for file in files:
        place.console.print(f"table        {file}", markup=False)
    place.summary()


def _texts(line: dict[Any, Any]) -> dict[str, str]:
    """A line with errors joined to their values, in percent where it is a fraction."""
    texts = {"network": str(line["network"]), "scale": str(line["scale"])}
    for key, value in line.items():
        error = line.get(f"{key} stderr", math.nan)
        if key.endswith(("stderr", "residual")) or key in texts:
            continue
        if key in ("lambda_max", "lambda_min"):
            texts[key] = converged_digits(value, line[f"{key} residual"])
        elif key == "logit_change":
            texts[key] = f"{value:.1e}"
        elif "error" in key:
            texts[f"{_label(key)} (%)"] = f"{100 * value:.1f} +- {100 * error:.1f}"
        else:
            texts[_label(key)] = f"{value:.4g}" + (f" +- {error:.2g}" if math.isfinite(error) else "")
    return texts


def _label(key: str) -> str:
    """From "test robust_loss pgd20" to "RLoss pgd20, test"."""
    role, metric, *measure = key.split(" ")
    words = SHOWN.get(metric, metric)
    return f"{' '.join([words, *measure])}, {role}"
