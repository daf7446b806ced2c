"""Logit-normalised variants of measures."""

from __future__ import annotations

from dataclasses import replace

from robustflat.errors import UserError, require_range
from robustflat.flatness.measures.measure import TEMPERATURE, Measure, Reading, SharpnessMeasure
from robustflat.flatness.measures.surface import LossSurface, NormalizedLogits


class LogitNormalized(Measure):
    """Another measure on the cross-entropy of logits (z - mean z) / |z - mean z| (Andriushchenko et al., ICML 2023).

    Frozen adversarial images stay those of the network itself; for the re-attacked loss the attack at every point, the
    network's own weights included, is on the normalised logits.

    Args:
        measure: any measure but those that compare with another network.
        temperature: normalised logits are divided by it, > 0.

    Raises:
        UserError: if temperature is out of range, or the measure compares with another network.
    """

    def __init__(self, measure: SharpnessMeasure, temperature: float = 1.0) -> None:
        require_range("temperature", temperature, low=0, low_open=True)
        if measure.needs:
            raise UserError(
                f"{type(measure).__name__} compares with another network, whose logits would not be normalised: take "
                f"it without LogitNormalized."
            )
        self.measure, self.temperature = measure, temperature
        self.source = f"{measure.source}, logits as Andriushchenko et al., ICML 2023"
        self.invariant = measure.invariant | {TEMPERATURE}
        self.open, self.losses = measure.open, measure.losses

    def __call__(self, surface: LossSurface) -> Reading:
        """As the measure itself, in its unit."""
        normal = surface.of(NormalizedLogits(surface.found.model, self.temperature))
        reading = self.measure(normal)
        surface.passes += normal.passes
        return replace(reading, details={**reading.details, "temperature": self.temperature})
