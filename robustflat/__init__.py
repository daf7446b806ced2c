"""robustflat: train, attack and measure adversarially robust networks.

>>> from robustflat import Pgd, LinfBall
>>> Pgd(LinfBall(8 / 255), steps=20, step_size=0.007, restarts=10).steps
20
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from robustflat.attacks.autoattack import AutoAttack
    from robustflat.attacks.pgd import Pgd
    from robustflat.evaluation.evaluate import evaluate
    from robustflat.flatness.audit import audit
    from robustflat.flatness.average import AverageFlatness
    from robustflat.flatness.hessian import HessianSpectrum, hessian_spectrum
    from robustflat.flatness.landscape import Landscape
    from robustflat.flatness.measures.catalogue import measures
    from robustflat.flatness.worst import WorstFlatness
    from robustflat.geometry.input_ball import L1Ball, L2Ball, LinfBall
    from robustflat.geometry.weight_ball import WeightBall

__all__ = [
    "AutoAttack",
    "AverageFlatness",
    "HessianSpectrum",
    "L1Ball",
    "L2Ball",
    "Landscape",
    "LinfBall",
    "Pgd",
    "WeightBall",
    "WorstFlatness",
    "audit",
    "evaluate",
    "hessian_spectrum",
    "measures",
]

_ROOMS = {
    "AutoAttack": "attacks.autoattack",
    "HessianSpectrum": "flatness.hessian",
    "Landscape": "flatness.landscape",
    "audit": "flatness.audit",
    "hessian_spectrum": "flatness.hessian",
    "measures": "flatness.measures.catalogue",
    "AverageFlatness": "flatness.average",
    "L1Ball": "geometry.input_ball",
    "L2Ball": "geometry.input_ball",
    "LinfBall": "geometry.input_ball",
    "Pgd": "attacks.pgd",
    "WeightBall": "geometry.weight_ball",
    "WorstFlatness": "flatness.worst",
    "evaluate": "evaluation.evaluate",
}


def __getattr__(name: str) -> object:
    """Import the public names when they are first used, so that `import robustflat` stays quick."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'robustflat' has no attribute '{name}'")
    return getattr(importlib.import_module(f"robustflat.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return [*__all__, "__version__"]
