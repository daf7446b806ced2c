"""Three lines for anybody's model: `from robustflat import ...`, no Hydra, no run folder."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import robustflat


@pytest.mark.parametrize("name", robustflat.__all__)
def test_every_public_name_leads_somewhere_and_is_documented(name):
    assert callable(getattr(robustflat, name))
    assert getattr(robustflat, name).__doc__
    assert name in dir(robustflat)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_here"):
        robustflat.nothing_here  # noqa: B018


def test_import_stays_light_and_without_hydra():
    code = "import robustflat, sys; print('torch' in sys.modules); robustflat.Pgd; print('hydra' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]


def test_a_plain_module_is_evaluated_and_measured():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images, labels = torch.rand(8, 3, 2, 2), torch.arange(8) % 3
    report = robustflat.evaluate(model, images, labels)
    assert "8" in str(report)
    assert robustflat.AverageFlatness(trials=2)(model, images, labels).value > -1
