"""Which sharpness measures move when a network's weights change and its function does not.

Transformations (Dinh et al., ICML 2017): scaling weights before batch norm, scaling a layer up and the next one down,
folding batch norm, permuting neurons; and dividing the logits, which keeps decisions but not losses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from robustflat.attacks.examples import Array, require_module
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.measures.catalogue import all_defined, chosen
from robustflat.flatness.measures.measure import (
    BATCH_NORM_FOLDING,
    BATCH_NORM_SCALING,
    FOLDING_WITHOUT_BIASES,
    LAYER_SCALING,
    PERMUTATION,
    TEMPERATURE,
    Reading,
    Readings,
    SharpnessMeasure,
)
from robustflat.flatness.measures.surface import LossSurface
from robustflat.models.modes import perturbable
from robustflat.models.rescale import rescaled
from robustflat.models.transformations import (
    Transformed,
    batch_norm_folded,
    layers_scaled,
    permuted,
    tempered,
)
from robustflat.rng import generator_for
from robustflat.types import Attack

TRANSFORMATIONS = (BATCH_NORM_SCALING, LAYER_SCALING, BATCH_NORM_FOLDING, TEMPERATURE, PERMUTATION)
SAME, WITHIN_ERROR, MOVES = "same", "within error", "moves"
_ERRORS = 3.0
"""Standard errors that a difference must exceed to count."""


@dataclass(frozen=True)
class AuditRow:
    """One measure before and after one transformation.

    Attributes:
        measure, transformation: names.
        before, after: readings on the network and on its transformed copy.
        found: "same" (within the tolerance), "within error" (three standard errors; of a search without error bar, the
            search tolerance), or "moves".
        expected: "same" or "moves" by the measure's definition; "open" if its search leaves that open.
    """

    measure: str
    transformation: str
    before: Reading
    after: Reading
    found: str
    expected: str

    @property
    def verdict(self) -> str:
        """Short for whether that was to be expected.

        "as expected"; "UNEXPECTED": moves though its definition does not; "did not move" where its definition lets it,
        by more than its error; or "open".
        """
        if self.expected == "open":
            return "open"
        if self.expected == SAME:
            return "UNEXPECTED" if self.found == MOVES else "as expected"
        return "as expected" if self.found == MOVES else "did not move"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "measure": self.measure,
            "transformation": self.transformation,
            "before": self.before.value,
            "before_error": self.before.standard_error,
            "after": self.after.value,
            "after_error": self.after.standard_error,
            "ratio": self.after.value / self.before.value if self.before.value else math.nan,
            "found": self.found,
            "expected": self.expected,
            "verdict": self.verdict,
            "source": self.before.source,
        }


@dataclass(frozen=True)
class AuditResult:
    """All rows of an audit.

    Attributes:
        rows: one for each measure and transformation.
        done: transformation -> what was done and how much the outputs changed, in words.
        not_applicable: transformation -> why this network does not allow it.
        left_out: measure -> why it could not be taken.
        described: loss, parameters, examples, tolerance and seed in words.
    """

    rows: tuple[AuditRow, ...]
    done: Mapping[str, str]
    not_applicable: Mapping[str, str]
    left_out: Mapping[str, str]
    described: str

    def to_frame(self) -> pd.DataFrame:
        """One line per row."""
        return pd.DataFrame([row.to_dict() for row in self.rows])

    def __str__(self) -> str:
        """Measures by transformations: the factor by which each moves; * where it may but did not."""
        cells = {(row.measure, row.transformation): _cell(row) for row in self.rows}
        names = list(dict.fromkeys(row.measure for row in self.rows))
        table = pd.DataFrame({t: [cells.get((n, t), "") for n in names] for t in self.done}, index=names)
        notes = [f"{name}: {what}" for name, what in self.done.items()]
        notes += [f"{name}: not applicable, {why}" for name, why in self.not_applicable.items()]
        notes += [f"{name}: left out, {why}" for name, why in self.left_out.items()]
        return "\n".join([table.to_string(), "", *notes, self.described])


@torch.inference_mode(False)
def audit(  # noqa: PLR0913  (the options of one call)
    model: nn.Module,
    images: Array,
    labels: Array,
    *,
    measures: Mapping[str, SharpnessMeasure] | Sequence[str] | None = None,
    transformations: Sequence[str] = TRANSFORMATIONS,
    factor: float = 2.0,
    temperature: float = 0.5,
    loss: str = "clean",
    attack: Attack | None = None,
    biases: bool = True,
    tolerance: float = 1e-3,
    search_tolerance: float = 0.05,
    batch_size: int = 128,
    seed: int = 0,
) -> AuditResult:
    """Take measures before and after transformations, in float64 and with the same random draws.

    >>> print(audit(model, images, labels, measures=["sam", "adaptive_average"]))  # doctest: +SKIP

    Args:
        model: images in [0, 1] -> logits; left as found.
        images, labels: (N, C, H, W) and (N,).
        measures: name -> measure, or names of standard ones; `None`: all standard ones that this network allows.
        transformations: of `TRANSFORMATIONS`; those that the network does not allow are reported as such.
        factor: of both scalings, > 0 and not 1.
        temperature: that logits are divided by, > 0 and not 1.
        loss: "clean" or "frozen": adversarial examples of the network itself, for all copies.
        attack: for the frozen loss.
        biases: whether biases belong to the weights. Norm layers never do.
        tolerance: relative difference up to which two values count as the same.
        search_tolerance: the same for searches without an error bar.
        batch_size, seed: see `LossSurface`.

    Raises:
        UserError: for an option out of range or an unknown name, and as `LossSurface`.
    """
    require_one_of("loss", loss, ("clean", "frozen"))
    require_range("tolerance", tolerance, low=0, low_open=True, high=1)
    require_range("search_tolerance", search_tolerance, low=tolerance, high=1)
    for name, value in (("factor", factor), ("temperature", temperature)):
        require_range(name, value, low=0, low_open=True)
        if value == 1:
            raise UserError(f"{name}=1 changes nothing: give another value.")
    require_module(model)
    names = [transformations] if isinstance(transformations, str) else transformations
    for name in names:
        require_one_of("transformation", name, TRANSFORMATIONS)
    wanted = measures if isinstance(measures, Mapping) else chosen(measures)
    plain = copy.deepcopy(model).double()
    surface = LossSurface(
        plain, images, labels, loss=loss, attack=attack, biases=biases, batch_size=batch_size, seed=seed
    )
    before = all_defined({n: m for n, m in wanted.items() if not m.needs}, surface)
    if measures is not None:
        before.left_out |= {n: "it compares with another network" for n, m in wanted.items() if m.needs}
    copies, refused = _copies(plain, surface.found.batches[0].x[:16], names, factor, temperature, seed)
    rows: list[AuditRow] = []
    for name, made in copies.items():
        kept = {n: wanted[n] for n in before}
        after = all_defined(kept, _moved(surface, made.model))
        before.left_out |= after.left_out
        rows += _rows(name, kept, before, after, (tolerance, search_tolerance), biases)
    return AuditResult(
        rows=tuple(rows),
        done={name: f"{made.what} (outputs changed by {made.change:.1g})" for name, made in copies.items()},
        not_applicable=refused,
        left_out=before.left_out,
        described=(
            f"{surface.described}; {len(surface.labels)} examples; {surface.parameters}; fp64; seed {seed}; same: "
            f"within {tolerance:g}; within error: {_ERRORS:g} standard errors, or {search_tolerance:g} of a search "
            f"without error bar"
        ),
    )


def _copies(
    model: nn.Module, images: Tensor, names: Sequence[str], factor: float, temperature: float, seed: int
) -> tuple[dict[str, Transformed], dict[str, str]]:
    """Transformed copies by name, and why the others could not be made."""

    def scaled_before_norms() -> Transformed:
        found = rescaled(model, factor, images, tolerance=1e-6)
        return Transformed(
            found.model, f"{len(found.factors)} layers before norm layers scaled by {factor:g}", found.change
        )

    makers: dict[str, Callable[[], Transformed]] = {
        BATCH_NORM_SCALING: scaled_before_norms,
        LAYER_SCALING: lambda: layers_scaled(model, images, factor),
        BATCH_NORM_FOLDING: lambda: batch_norm_folded(model, images),
        TEMPERATURE: lambda: tempered(model, images, temperature),
        PERMUTATION: lambda: permuted(model, images, generator_for(seed, "permutation")),
    }
    made: dict[str, Transformed] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            made[name] = makers[name]()
        except UserError as error:
            refused[name] = str(error)
    return made, refused


def _moved(surface: LossSurface, model: nn.Module) -> LossSurface:
    """The same images under a copy, whose weights may be others in number."""
    moved = surface.of(model)
    weights = perturbable(model, norm_layers=surface.norm_layers, biases=surface.biases)
    moved.parameters = f"{sum(w.numel() for w in weights.values()):,} weights in {len(weights)} tensors"
    return moved


def _rows(
    name: str,
    measures: Mapping[str, SharpnessMeasure],
    before: Readings,
    after: Readings,
    tolerances: tuple[float, float],
    biases: bool,
) -> list[AuditRow]:
    return [
        AuditRow(n, name, before[n], after[n], _found(before[n], after[n], *tolerances), _expected(m, name, biases))
        for n, m in measures.items()
        if n in after
    ]


def _expected(measure: SharpnessMeasure, transformation: str, biases: bool) -> str:
    without = transformation == BATCH_NORM_FOLDING and not biases and FOLDING_WITHOUT_BIASES in measure.invariant
    if transformation in measure.invariant or without:
        return SAME
    return "open" if transformation in measure.open else MOVES


def _found(before: Reading, after: Reading, tolerance: float, search_tolerance: float) -> str:
    if before.value == after.value:
        return SAME
    if not (math.isfinite(before.value) and math.isfinite(after.value)):
        return MOVES
    gap, size = abs(after.value - before.value), max(abs(before.value), abs(after.value))
    if gap <= tolerance * size:
        return SAME
    error = math.hypot(before.standard_error, after.standard_error)
    allowed = search_tolerance * size if math.isnan(error) else _ERRORS * error
    return WITHIN_ERROR if gap <= allowed else MOVES


def _cell(row: AuditRow) -> str:
    ratio = row.to_dict()["ratio"]
    number = f"x{ratio:.3g}" if math.isfinite(ratio) else f"{row.after.value:.3g}"
    found = row.found if row.found != MOVES else f"moves {number}"
    mark = {"UNEXPECTED": " (UNEXPECTED)", "did not move": " *"}
    return found + mark.get(row.verdict, "")
