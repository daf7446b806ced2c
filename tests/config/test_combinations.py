"""Losses, gradient rules, wrappers, callbacks, optimizers and schedules compose freely: one real step of some."""

from __future__ import annotations

import pytest
import torch

from tests.config.tiny import tiny_trainer

AVERAGE = "+trainer.callbacks.average={_target_: robustflat.training.callbacks.WeightAverage, decay: 0.9}"
CLIP = "+trainer.callbacks.clip={_target_: robustflat.training.callbacks.ClipWeights, maximum: 0.05}"
HALF = "+trainer.wrappers.half={_target_: robustflat.attacks.wrappers.Fraction, _partial_: true, fraction: 0.5}"
COMBINATIONS = {
    "trades, awp, average, clip": ["trainer=trades", "trainer/gradient=awp", AVERAGE, CLIP],
    "mart, sam, adam, cosine": ["trainer=mart", "trainer/gradient=sam", "optimizer=adam", "schedule=cosine"],
    "smoothing, random weights, cyclic": ["trainer=label_smoothing", "trainer/gradient=random", "schedule=cyclic"],
    "self-supervised, awp, half": ["trainer=self_supervised", "trainer/gradient=awp", HALF],
    "entropy, label noise, average": ["trainer=label_noise", "trainer/gradient=entropy_sgd", AVERAGE],
    "predicted labels, half, tau": ["trainer=predicted_labels", HALF, "attack=pgd_tau"],
    "trades, entropy, bf16": ["trainer=trades", "trainer/gradient=entropy_sgd", "trainer.precision=bf16"],
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_one_step_of_a_combination_moves_the_weights_and_stays_finite(compose, name):
    torch.manual_seed(0)
    trainer = tiny_trainer(compose, *COMBINATIONS[name], "attack.steps=1", "trainer.epochs=1")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.fit()
    after = list(trainer.model.parameters())
    assert trainer.step == 2
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if CLIP in COMBINATIONS[name]:
        assert max(p.abs().max() for n, p in trainer.model.named_parameters() if n.startswith("head")) <= 0.05
