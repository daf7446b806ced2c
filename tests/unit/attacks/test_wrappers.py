"""Wrappers around attacks whose results are known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.objectives import cross_entropy, kl_divergence, margin
from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.attacks.wrappers import Fraction, OnlyCorrect, PredictedLabels, Restarts, WorstOf
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall
from robustflat.types import Forward, Found, Objective

ATTACK = Pgd(LinfBall(0.1), steps=4, step_size=0.05)
TARGETED = Pgd(LinfBall(0.1), steps=2, step_size=0.05, targeted=True)


class Scripted:
    """Returns prepared values and verdicts, run after run, and images that carry the number of the run."""

    def __init__(self, *runs: tuple[list[float], list[bool]], objective: Objective = cross_entropy) -> None:
        self.runs = runs
        self.calls: list[tuple[Tensor, Objective | None]] = []
        self.objective = objective

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        values, fooled = self.runs[len(self.calls)]
        self.calls.append((y, objective))
        return Found(torch.full_like(x, len(self.calls)), torch.tensor(values), torch.tensor(fooled))


class Linear(nn.Module):
    """Two pixels, two classes; logits are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.norm(x.flatten(1))
        return logits


def three() -> tuple[Tensor, Tensor]:
    """Three images of class 0; the last one is misclassified."""
    x = torch.tensor([[0.9, 0.1], [0.6, 0.5], [0.2, 0.8]]).view(3, 1, 1, 2)
    return x, torch.zeros(3, dtype=torch.int64)


def which(found: Found) -> list[float]:
    return found.x_adv[:, 0, 0, 0].tolist()


def test_restarts_keep_the_largest_value_and_the_first_among_equals() -> None:
    script = Scripted(
        ([1.0, 5.0, 2.0], [True, False, False]),
        ([2.0, 4.0, 2.0], [False, True, False]),
        ([0.0, 4.5, 2.0], [True, True, False]),
    )
    found = Restarts(script, 3)(Linear(), *three())
    assert which(found) == [2, 1, 1]
    assert found.value.tolist() == [2, 5, 2]
    assert found.fooled.tolist() == [False, False, False]


def test_restarts_can_prefer_fooled_results() -> None:
    script = Scripted(
        ([1.0, 5.0, 2.0], [True, False, False]),
        ([2.0, 4.0, 3.0], [False, True, False]),
        ([0.0, 4.5, 2.0], [True, True, False]),
    )
    found = Restarts(script, 3, keep="fooled")(Linear(), *three())
    assert which(found) == [1, 3, 2]
    assert found.fooled.tolist() == [True, True, False]


def test_restarts_use_fresh_randomness_for_each_run() -> None:
    x, y = three()
    single = Pgd(LinfBall(0.1), steps=1, step_size=1e-9)
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([single(Linear(), x, y, generator=generator).value for _ in range(5)])
    found = Restarts(single, 5)(Linear(), x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.value, values.amax(0))
    assert (values.std(0) > 0).all()


def test_worst_of_prefers_fooled_then_larger_values() -> None:
    first = Scripted(([9.0, 1.0, 1.0], [False, True, False]))
    second = Scripted(([1.0, 9.0, 2.0], [True, False, False]))
    found = WorstOf({"first": first, "second": second})(Linear(), *three())
    assert which(found) == [1, 1, 1]  # each script counts its own calls
    assert found.value.tolist() == [1, 1, 2]
    assert found.fooled.tolist() == [True, True, False]


def test_worst_of_judges_attacks_with_different_objectives_by_that_of_the_first() -> None:
    x, y = three()
    first = Scripted(([100.0] * 3, [False] * 3))
    second = Scripted(([-100.0] * 3, [False] * 3), objective=margin)
    model = Linear().eval()
    found = WorstOf({"first": first, "second": second})(model, x, y)
    torch.testing.assert_close(found.value, cross_entropy(model(found.x_adv), y))
    # With one objective for all there is nothing to judge again.
    first.calls.clear()
    second.calls.clear()
    assert WorstOf({"first": first, "second": second})(model, x, y, margin).value.tolist() == [100.0] * 3
    assert first.calls[0][1] is margin


@pytest.mark.parametrize(
    ("fraction", "size", "clean"), [(0.5, 3, 1), (0.5, 4, 2), (1.0, 3, 0), (0.9, 10, 1), (0.5, 1, 0), (0.1, 1, 0)]
)
def test_fraction_leaves_the_first_images_clean(fraction: float, size: int, clean: int) -> None:
    x = torch.rand(size, 1, 1, 2)
    y = torch.randint(2, (size,))
    attack = Pgd(LinfBall(0.1), steps=1, step_size=0.1, random_start=False, keep="last")
    found = Fraction(attack, fraction)(Linear(), x, y)
    assert torch.equal(found.x_adv[:clean], x[:clean])
    torch.testing.assert_close(found.x_adv[clean:], attack(Linear(), x[clean:], y[clean:]).x_adv)
    torch.testing.assert_close(found.value, cross_entropy(Linear().eval()(found.x_adv), y))


def test_fraction_hands_on_the_labels_of_the_attacked_part() -> None:
    script = Scripted(([1.0, 2.0], [True, True]))
    x, _ = three()
    probabilities = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    Fraction(script, 0.5)(Linear(), x, probabilities, kl_divergence)
    assert torch.equal(script.calls[0][0], probabilities[1:])


def test_predicted_labels_move_a_misclassified_image_away_from_its_wrong_class() -> None:
    x, y = three()
    model = Linear()
    found = PredictedLabels(ATTACK)(model, x, y)
    plain = ATTACK(model, x, y)
    torch.testing.assert_close(found.value[:2], cross_entropy(model.eval()(found.x_adv), y)[:2])
    assert found.value[2] < plain.value[2]
    assert (found.x_adv[2] - x[2]).flatten().tolist() == pytest.approx([0.1, -0.1])
    assert found.fooled.tolist() == [False, True, True]


def test_predicted_labels_predict_in_eval_mode() -> None:
    x, y = three()
    model = Linear().train()
    script = Scripted(([0.0] * 3, [False] * 3))
    PredictedLabels(script)(model, x + torch.tensor([0.0, 0.05]), y)
    assert script.calls[0][0].tolist() == [0, 0, 1]
    assert model.training
    assert model.norm.num_batches_tracked == 0


def test_in_train_mode_the_clean_batch_decides_and_enters_the_statistics() -> None:
    x, y = three()
    shifted = x + torch.tensor([0.0, 0.5])  # by the running statistics all are of class 1, by the batch's the last
    for wrapper, runs in ((PredictedLabels, 1), (OnlyCorrect, 1)):
        model, script = Linear().eval(), Scripted(([0.0] * 3, [False] * 3))
        found = wrapper(script, mode="train")(model, shifted, y)
        assert model.norm.num_batches_tracked == runs
        torch.testing.assert_close(model.norm.running_mean, 0.1 * shifted.flatten(1).mean(dim=0))
        assert not model.training
        if wrapper is PredictedLabels:
            assert script.calls[0][0].tolist() == [0, 0, 1]
        else:
            assert which(found)[:2] == [1, 1]
            assert torch.equal(found.x_adv[2], shifted[2])


def test_train_mode_needs_the_model_and_other_modes_are_refused() -> None:
    with pytest.raises(UserError, match="attack_mode=eval"):
        OnlyCorrect(ATTACK, mode="train")(lambda x: x.flatten(1), *three())
    with pytest.raises(UserError, match="mode must be one of"):
        PredictedLabels(ATTACK, mode="both")


def test_only_correct_leaves_misclassified_images_clean() -> None:
    x, y = three()
    found = OnlyCorrect(ATTACK)(Linear(), x, y)
    assert torch.equal(found.x_adv[2], x[2])
    assert (found.x_adv[:2] != x[:2]).all()
    assert found.fooled.tolist() == [False, True, True]
    torch.testing.assert_close(found.value, cross_entropy(Linear().eval()(found.x_adv), y))


def test_only_correct_works_with_probabilities() -> None:
    x, _ = three()
    found = OnlyCorrect(ATTACK)(Linear(), x, torch.tensor([[0.8, 0.2]] * 3))
    assert torch.equal(found.x_adv[2], x[2])


def test_only_correct_leaves_images_clean_that_already_are_the_target() -> None:
    x, y = three()
    found = OnlyCorrect(TARGETED)(Linear(), x, y)
    assert torch.equal(found.x_adv[:2], x[:2])
    assert found.fooled.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "wrapped",
    [Restarts(TARGETED, 2), WorstOf({"a": TARGETED}), Fraction(TARGETED, 0.5), OnlyCorrect(TARGETED)],
    ids=lambda w: type(w).__name__,
)
def test_a_wrapped_targeted_attack_stays_targeted(wrapped: Restarts) -> None:
    x, y = three()
    found = wrapped(Linear(), x, 1 - y)
    logits = Linear().eval()(found.x_adv)
    assert torch.equal(found.fooled, logits.argmax(1) == 1 - y)
    torch.testing.assert_close(found.value, -cross_entropy(logits, 1 - y))


def test_wrappers_pass_on_the_own_objective_of_the_attack() -> None:
    inner = NoAttack("margin")
    x, y = three()
    expected = margin(Linear().eval()(x), y)
    for attack in (
        Restarts(inner, 1),
        WorstOf({"a": inner}),
        Fraction(inner, 0.5),
        PredictedLabels(inner),
        OnlyCorrect(inner),
        Fraction(OnlyCorrect(Restarts(inner, 2)), 0.4),
    ):
        torch.testing.assert_close(attack(Linear(), x, y).value, expected)


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"n must lie in \[1, inf\), got 0"):
        Restarts(ATTACK, 0)
    with pytest.raises(UserError, match="keep must be one of best, fooled, got 'last'"):
        Restarts(ATTACK, 2, keep="last")
    with pytest.raises(UserError, match="at least one attack"):
        WorstOf({})
    with pytest.raises(UserError, match=r"cannot mix \(a: untargeted, b: targeted\)"):
        WorstOf({"a": ATTACK, "b": TARGETED})
    with pytest.raises(UserError, match=r"fraction must lie in \(0, 1\], got 0.*attack=none"):
        Fraction(ATTACK, 0)
    with pytest.raises(UserError, match="would look for no change"):
        PredictedLabels(TARGETED)
