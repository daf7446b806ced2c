"""The measures of the literature with their customary settings, by name, and all of them in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from robustflat.attacks.examples import Array
from robustflat.errors import UserError, require_one_of
from robustflat.flatness.measures.average import AdaptiveAverage, LocalEntropy, LowPassFilter, PacBayesSigma
from robustflat.flatness.measures.between import DistanceFromStart, InterpolationBarrier
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
from robustflat.flatness.measures.measure import Readings, SharpnessMeasure, take
from robustflat.flatness.measures.normalized import LogitNormalized
from robustflat.flatness.measures.surface import LossSurface
from robustflat.flatness.measures.worst import (
    AdaptiveSharpness,
    FirstOrderFlatness,
    KeskarSharpness,
    PacBayesWorstCase,
    SamSharpness,
)
from robustflat.geometry.weight_ball import WeightBall
from robustflat.types import Attack

STANDARD: Mapping[str, SharpnessMeasure] = MappingProxyType(
    {
        "average_flatness": AverageRise(),
        "worst_flatness": WorstRise(),
        "average_flatness_filter": AverageRise(WeightBall(0.5, grouping="filter")),
        "keskar": KeskarSharpness(),
        "sam": SamSharpness(),
        "sam_ascent": SamSharpness(steps=20),
        "sam_m128": SamSharpness(m=128),
        "adaptive_worst_linf": AdaptiveSharpness(),
        "adaptive_worst_l2": AdaptiveSharpness(0.5, norm=2),
        "adaptive_average": AdaptiveAverage(),
        "adaptive_worst_linf_normalized": LogitNormalized(AdaptiveSharpness()),
        "adaptive_average_normalized": LogitNormalized(AdaptiveAverage()),
        "sam_normalized": LogitNormalized(SamSharpness()),
        "gradient_norm": GradientNorm(),
        "first_order_flatness": FirstOrderFlatness(),
        "lambda_max": LargestEigenvalue(),
        "trace": HessianTrace(),
        "scaled_trace": ScaledTrace(),
        "scaled_trace_filter": ScaledTrace(grouping="filter"),
        "fisher_rao": FisherRao(),
        "relative_flatness": RelativeFlatness(),
        "pac_bayes_sigma": PacBayesSigma(),
        "pac_bayes_sigma_magnitude": PacBayesSigma(magnitude_aware=True),
        "pac_bayes_worst": PacBayesWorstCase(),
        "pac_bayes_worst_magnitude": PacBayesWorstCase(magnitude_aware=True),
        "low_pass_filter": LowPassFilter(),
        "local_entropy": LocalEntropy(),
        "noise_radius": InverseNoiseRadius(),
        "curve_area": CurveArea(),
        "interpolation_barrier": InterpolationBarrier(),
        "weight_norm": WeightNorm(),
        "distance_from_start": DistanceFromStart(),
        "spectral_norms": SpectralNorms(),
        "path_norm": PathNorm(),
        "inverse_margin": InverseMargin(),
    }
)
"""Name -> measure; `conf/measure/` has a file for each, with the same settings."""


def chosen(names: Sequence[str] | None) -> dict[str, SharpnessMeasure]:
    """Standard measures by name, `None`: all.

    Raises:
        UserError: for an unknown name.
    """
    names = [names] if isinstance(names, str) else names
    for name in names or ():
        require_one_of("measure", name, STANDARD)
    return {name: STANDARD[name] for name in (STANDARD if names is None else names)}


def measures(
    model: nn.Module,
    images: Array,
    labels: Array,
    *,
    only: Sequence[str] | None = None,
    loss: str = "clean",
    attack: Attack | None = None,
    norm_layers: bool = False,
    biases: bool = True,
    batch_size: int = 128,
    seed: int = 0,
    anchors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Readings:
    """Sharpness of any network by the measures of the literature, in one call.

    >>> print(measures(model, images, labels, only=["sam", "lambda_max"]))  # doctest: +SKIP

    Args:
        model: images in [0, 1] -> logits; left as found.
        images, labels: (N, C, H, W), floating point in [0, 1] or uint8, and (N,).
        only: names of `STANDARD`; `None`: all that are defined on this loss and for this network.
        loss, attack, norm_layers, biases, batch_size, seed, anchors: see `LossSurface`.

    Raises:
        UserError: see `LossSurface`; and if a measure that was named is not defined.
    """
    surface = LossSurface(
        model,
        images,
        labels,
        loss=loss,
        attack=attack,
        norm_layers=norm_layers,
        biases=biases,
        batch_size=batch_size,
        seed=seed,
        anchors=anchors,
    )
    if only is not None:
        return take(chosen(only), surface)
    return all_defined(chosen(None), surface)


def all_defined(wanted: Mapping[str, SharpnessMeasure], surface: LossSurface) -> Readings:
    """Readings of those measures that this surface and network allow; `left_out` of the result says which do not."""
    readings = Readings()
    for name, measure in wanted.items():
        try:
            readings |= take({name: measure}, surface)
        except UserError as error:
            readings.left_out[name] = str(error)
    return readings
