"""The table of invariances: which measure must hold under which transformation, over all measures."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.flatness.audit import TRANSFORMATIONS, AuditResult, AuditRow, audit
from robustflat.flatness.measures.average import AdaptiveAverage, LocalEntropy, LowPassFilter, PacBayesSigma
from robustflat.flatness.measures.catalogue import STANDARD
from robustflat.flatness.measures.controls import InverseMargin, PathNorm, SpectralNorms, WeightNorm
from robustflat.flatness.measures.curves import AverageRise, CurveArea, InverseNoiseRadius, WorstRise
from robustflat.flatness.measures.local import (
    FisherRao,
    GradientNorm,
    HessianTrace,
    LargestEigenvalue,
    RelativeFlatness,
    ScaledTrace,
)
from robustflat.flatness.measures.measure import Reading, SharpnessMeasure
from robustflat.flatness.measures.normalized import LogitNormalized
from robustflat.flatness.measures.worst import (
    AdaptiveSharpness,
    FirstOrderFlatness,
    KeskarSharpness,
    PacBayesWorstCase,
    SamSharpness,
)
from robustflat.geometry.weight_ball import WeightBall

# The standard measures with less work.
SMALL: Mapping[str, SharpnessMeasure] = {
    "average_flatness": AverageRise(draws=3),
    "worst_flatness": WorstRise(restarts=1, steps=5),
    "average_flatness_filter": AverageRise(WeightBall(0.5, grouping="filter"), draws=3),
    "keskar": KeskarSharpness(0.01, steps=4, restarts=1),
    "sam": SamSharpness(0.05),
    "sam_ascent": SamSharpness(0.05, steps=4, restarts=1),
    "sam_m128": SamSharpness(0.05, m=12),
    "adaptive_worst_linf": AdaptiveSharpness(0.01, steps=4, restarts=1),
    "adaptive_worst_l2": AdaptiveSharpness(0.2, norm=2, steps=4, restarts=1),
    "adaptive_average": AdaptiveAverage(0.1, 3),
    "adaptive_worst_linf_normalized": LogitNormalized(AdaptiveSharpness(0.01, steps=4, restarts=1)),
    "adaptive_average_normalized": LogitNormalized(AdaptiveAverage(0.1, 3)),
    "sam_normalized": LogitNormalized(SamSharpness(0.05)),
    "gradient_norm": GradientNorm(),
    "first_order_flatness": FirstOrderFlatness(0.1, steps=3, restarts=1),
    "lambda_max": LargestEigenvalue(),
    "trace": HessianTrace(30),
    "scaled_trace": ScaledTrace(5),
    "scaled_trace_filter": ScaledTrace(5, grouping="filter"),
    "fisher_rao": FisherRao(),
    "relative_flatness": RelativeFlatness(draws=5),
    "pac_bayes_sigma": PacBayesSigma(0.2, draws=4),
    "pac_bayes_sigma_magnitude": PacBayesSigma(0.2, draws=4, magnitude_aware=True, floor=0.05),
    "pac_bayes_worst": PacBayesWorstCase(0.2, steps=4),
    "pac_bayes_worst_magnitude": PacBayesWorstCase(0.2, steps=4, magnitude_aware=True, floor=0.05),
    "low_pass_filter": LowPassFilter(0.2, 4),
    "local_entropy": LocalEntropy(30.0, draws=4),
    "noise_radius": InverseNoiseRadius(0.3, draws=3),
    "curve_area": CurveArea(points=3, draws=3),
    "weight_norm": WeightNorm(),
    "spectral_norms": SpectralNorms(),
    "path_norm": PathNorm(),
    "inverse_margin": InverseMargin(0.3),
}
RELATIVE = {
    *("average_flatness", "worst_flatness", "average_flatness_filter", "noise_radius", "curve_area"),
    *("adaptive_worst_linf", "adaptive_worst_l2", "adaptive_average"),
    *("adaptive_worst_linf_normalized", "adaptive_average_normalized"),
    *("scaled_trace", "scaled_trace_filter", "fisher_rao", "relative_flatness", "path_norm", "inverse_margin"),
}
ELEMENTWISE = {name for name in RELATIVE if name.startswith(("adaptive", "fisher"))}
HOLD = {
    "layer_scaling": RELATIVE | {"spectral_norms"},
    "batch_norm_scaling": RELATIVE,
    "batch_norm_folding": ELEMENTWISE | {"relative_flatness", "path_norm", "inverse_margin"},  # without biases
    "temperature": {name for name in SMALL if name.endswith("_normalized")}
    | {"pac_bayes_sigma", "pac_bayes_sigma_magnitude", "weight_norm", "spectral_norms"},
    "permutation": set(SMALL),
}
OPEN = {("pac_bayes_worst", "temperature"), ("pac_bayes_worst_magnitude", "temperature")}
"""A search by the loss for the error: the error does not depend on temperature, the path of the search does."""


def network() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network that allows every transformation, with labels that it gets right."""
    draws = torch.Generator().manual_seed(2)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.8 * torch.randn(p.shape, generator=draws, dtype=torch.float64))
        model[4].running_var.copy_(0.5 + torch.rand(5, generator=draws, dtype=torch.float64))
        model[4].weight.abs_().add_(0.3)
    x = torch.rand(24, 2, 2, 2, generator=draws, dtype=torch.float64)
    return model.eval(), x, model.eval()(x).argmax(dim=1)


@pytest.fixture(scope="module")
def audited() -> AuditResult:
    model, x, y = network()
    return audit(model, x, y, measures=SMALL, biases=False, seed=1)


def row(result: AuditResult, measure: str, transformation: str) -> AuditRow:
    return next(r for r in result.rows if (r.measure, r.transformation) == (measure, transformation))


def test_the_table_covers_every_standard_measure_and_transformation(audited: AuditResult) -> None:
    assert set(SMALL) == {name for name, measure in STANDARD.items() if not measure.needs}
    assert {type(SMALL[name]) for name in SMALL} == {type(m) for m in STANDARD.values() if not m.needs}
    assert set(audited.done) == set(TRANSFORMATIONS) == set(HOLD)
    assert not audited.left_out and not audited.not_applicable
    assert len(audited.rows) == len(SMALL) * len(TRANSFORMATIONS)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("measure", SMALL)
def test_a_measure_holds_exactly_under_the_transformations_it_should(
    audited: AuditResult, measure: str, transformation: str
) -> None:
    found = row(audited, measure, transformation)
    if (measure, transformation) in OPEN:
        assert found.verdict == "open"
    elif measure not in HOLD[transformation]:
        assert found.expected == "moves" and found.found != "same", found.to_dict()
    else:
        assert found.expected == "same" and found.verdict == "as expected", found.to_dict()
        if transformation != "permutation":  # where draws are the same
            assert found.found == "same"


def test_what_cannot_be_done_or_taken_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    _, x, y = network()
    result = audit(model, x, y, measures=["path_norm", "gradient_norm", "distance_from_start"])
    assert set(result.done) == {"temperature", "permutation"}
    assert set(result.not_applicable) == {"batch_norm_scaling", "layer_scaling", "batch_norm_folding"}
    assert "positively homogeneous" in result.left_out["path_norm"]
    assert result.left_out["distance_from_start"] == "it compares with another network"
    text = str(result)
    for part in ("layer_scaling: not applicable", "path_norm: left out", "gradient_norm", "24 examples", "seed 0"):
        assert part in text
    assert len(result.to_frame()) == 2


def test_an_audit_works_within_inference_mode() -> None:
    model, x, y = network()
    with torch.inference_mode():
        result = audit(model, x + 0, y + 0, measures=["sam"], transformations=["permutation"])
    assert result.rows[0].found == "same"


def test_a_measure_that_moves_against_its_word_is_unexpected() -> None:
    class Liar(WeightNorm):
        invariant = frozenset({"layer_scaling"})

    model, x, y = network()
    result = audit(model, x, y, measures={"liar": Liar()}, transformations=["layer_scaling"])
    assert result.rows[0].verdict == "UNEXPECTED" and "(UNEXPECTED)" in str(result)


def test_errors_decide_what_counts_as_moving() -> None:
    def verdict(before: Reading, after: Reading) -> str:
        from robustflat.flatness.audit import _found

        return _found(before, after, 1e-3, 0.05)

    assert verdict(Reading(1.0), Reading(1.0005)) == "same"
    assert verdict(Reading(1.0), Reading(1.01)) == "moves"
    assert verdict(Reading(1.0, 0.1), Reading(1.2, 0.1)) == "within error"
    assert verdict(Reading(1.0, math.nan), Reading(1.04, math.nan)) == "within error"
    assert verdict(Reading(math.inf), Reading(math.inf)) == "same"
    assert verdict(Reading(math.inf), Reading(1.0)) == "moves"


def test_wrong_options_are_refused() -> None:
    model, x, y = network()
    with pytest.raises(UserError, match="factor=1 changes nothing"):
        audit(model, x, y, factor=1)
    with pytest.raises(UserError, match="transformation must be one of"):
        audit(model, x, y, transformations=["rotation"])
    with pytest.raises(UserError, match="loss must be one of"):
        audit(model, x, y, loss="robust")
