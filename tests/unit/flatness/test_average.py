"""Average-case flatness against closed forms, a literal loop over copied networks, and figures of other codes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.errors import UserError
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.protocol import protocol_by_name
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.models.modes import perturbable
from robustflat.rng import generator_for
from robustflat.types import Batch
from tests.reference.models import cnn_cifar10, figures
from tests.unit.flatness.networks import AlwaysDropout, Quadratic, convnet, examples, scaled_before_batch_norm, spectrum


def short_attack() -> Pgd:
    return Pgd(LinfBall(0.05), steps=2, step_size=0.03)


def fixed_attack() -> Pgd:
    return Pgd(LinfBall(0.05), steps=2, step_size=0.03, random_start=False)


def one_image() -> tuple[Tensor, Tensor]:
    return torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)


def moved_copy(model: nn.Module, nu: dict[str, Tensor]) -> nn.Module:
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name in nu:
                parameter += nu[name]
    return moved


@pytest.mark.parametrize(("sampling", "factor"), [("sphere", 1.0), ("ball", 6 / 8)])
def test_quadratic_loss_rises_by_the_trace(sampling: str, factor: float) -> None:
    matrix, radius = spectrum(5.0, 2.0, 1.0, 0.5, 0.1, -1.0), 0.3
    ball = WeightBall(radius, grouping="global", relative=False)
    result = AverageFlatness(ball, trials=300, loss="clean", sampling=sampling)(Quadratic(matrix), *one_image())
    expected = factor * radius**2 * 7.6 / (2 * 6)
    assert result.standard_error < 0.1 * expected
    assert result.value == pytest.approx(expected, abs=4 * result.standard_error)


def test_isotropic_quadratic_on_the_sphere_is_exact_in_every_draw() -> None:
    ball = WeightBall(0.3, grouping="global", relative=False)
    model = Quadratic(spectrum(2.0, 2.0, 2.0))
    result = AverageFlatness(ball, trials=3, loss="clean", sampling="sphere")(model, *one_image())
    assert torch.allclose(result.trials, torch.full((3,), 0.3**2, dtype=torch.float64), rtol=1e-9)


def test_robust_loss_of_a_loss_linear_in_the_images_rises_alike() -> None:
    model = Quadratic(spectrum(2.0, 2.0, 2.0), slope=0.5)
    ball = WeightBall(0.3, grouping="global", relative=False)
    attack = Pgd(LinfBall(0.1), steps=1, step_size=0.2)
    images, labels = one_image()
    result = AverageFlatness(ball, trials=2, attack=attack, sampling="sphere")(model, images, labels)
    assert result.reference_loss == pytest.approx(1 + 0.5 * 4 * 0.1, rel=1e-9)
    assert result.value == pytest.approx(0.3**2, rel=1e-9)


def test_losses_equal_a_literal_loop_over_copies_of_the_network() -> None:
    model, (images, labels) = convnet(), examples(10)
    measure = AverageFlatness(WeightBall(0.4), trials=3, attack=short_attack(), seed=7)
    result = measure(model, images, labels, batch_size=4)
    weights = perturbable(model)
    for trial in range(3):
        for index, at in enumerate(range(0, 10, 4)):
            nu = WeightBall(0.4).sample(weights, generator_for(7, "weights", trial, index), sampling="ball")
            moved, x, y = moved_copy(model, nu), images[at : at + 4], labels[at : at + 4]
            x_adv = short_attack()(moved, x, y, generator=generator_for(7, "attack", trial, index)).x_adv
            expected = F.cross_entropy(moved(x_adv), y, reduction="none").detach()
            assert torch.allclose(result.losses[trial, at : at + 4], expected, atol=1e-6)
    assert result.groups == (4, 4, 2)
    assert result.value == pytest.approx(float((result.losses - result.reference).double().mean()), abs=1e-9)


def test_reference_is_the_worst_of_ten_attacks_per_example() -> None:
    model, (images, labels) = convnet(), examples(6)
    result = AverageFlatness(trials=1, attack=short_attack(), seed=2)(model, images, labels)
    draws, losses = generator_for(2, "reference", 0), []
    for _ in range(10):
        x_adv = short_attack()(model, images, labels, generator=draws).x_adv
        losses.append(F.cross_entropy(model(x_adv), labels, reduction="none").detach())
    assert torch.allclose(result.reference, torch.stack(losses).amax(dim=0), atol=1e-6)
    assert "worst of 10" in result.reference_attack


def test_per_set_draws_share_one_displacement_and_do_not_depend_on_the_batch_size() -> None:
    model, (images, labels) = convnet(), examples(10)
    settings = {"trials": 2, "loss": "clean", "sampling": "sphere"}
    whole = AverageFlatness(draws="per_batch", **settings)(model, images, labels, batch_size=10)
    split = AverageFlatness(draws="per_set", **settings)(model, images, labels, batch_size=3)
    assert torch.allclose(whole.losses, split.losses, atol=1e-6)
    assert split.groups == (10,)


def test_more_trials_leave_the_first_ones_as_they_are() -> None:
    model, (images, labels) = convnet(), examples(4)
    few = AverageFlatness(trials=2, attack=short_attack())(model, images, labels)
    many = AverageFlatness(trials=4, attack=short_attack())(model, images, labels)
    assert torch.equal(many.losses[:2], few.losses)
    assert not torch.equal(many.losses[2], many.losses[1])


def test_batches_may_be_empty_or_of_another_floating_point_type() -> None:
    model, (images, labels) = convnet(dtype=torch.float64), examples(6)
    batches = [Batch(images[:0], labels[:0]), Batch(images[:4], labels[:4]), Batch(images[4:], labels[4:])]
    for measure in (
        AverageFlatness(trials=2, attack=fixed_attack()),
        WorstFlatness(WeightBall(0.1), restarts=2, steps=2),
    ):
        expected = measure(model, images, labels, batch_size=4)
        found = measure.measure(model, batches)
        assert torch.equal(found.losses, expected.losses)
        assert found.groups == (4, 2)
        assert found.value == expected.value


def test_a_generator_replaces_the_seed() -> None:
    model, (images, labels) = convnet(), examples(4)
    batches, measure = [Batch(images, labels)], AverageFlatness(trials=1, loss="clean")
    first, again, other = (
        measure.measure(model, batches, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first.losses, again.losses)
    assert not torch.equal(first.losses, other.losses)


@pytest.mark.parametrize("loss", ["clean", "frozen", "robust"])
def test_flatness_vanishes_with_the_radius(loss: str) -> None:
    model, (images, labels) = convnet(dtype=torch.float64), examples(6, torch.float64)
    attack = None if loss == "clean" else fixed_attack()
    values = []
    for radius in (1e-2, 1e-5):
        measure = AverageFlatness(WeightBall(radius), trials=3, loss=loss, attack=attack, reference_attack=attack)
        values.append(float(measure(model, images, labels).trials.abs().max()))
    assert values[0] > 1e-4
    assert values[1] < 1e-4


def test_frozen_loss_keeps_the_adversarial_examples_of_the_undisplaced_weights() -> None:
    model, (images, labels) = convnet(), examples(5)
    measure = AverageFlatness(WeightBall(0.4), trials=2, loss="frozen", reference_attack=fixed_attack(), seed=3)
    result = measure(model, images, labels)
    x_adv = fixed_attack()(model, images, labels).x_adv
    assert torch.allclose(result.reference, F.cross_entropy(model(x_adv), labels, reduction="none").detach())
    nu = WeightBall(0.4).sample(perturbable(model), generator_for(3, "weights", 1, 0), sampling="ball")
    expected = F.cross_entropy(moved_copy(model, nu)(x_adv), labels, reduction="none").detach()
    assert torch.allclose(result.losses[1], expected, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_scaling_layers_before_batch_norm_changes_nothing_relatively(factor: float) -> None:
    model, (images, labels) = convnet(dtype=torch.float64), examples(8, torch.float64)
    scaled = scaled_before_batch_norm(model, factor)
    relative = AverageFlatness(WeightBall(0.5), trials=3, attack=fixed_attack())
    assert relative(model, images, labels).value == pytest.approx(relative(scaled, images, labels).value, rel=1e-9)
    absolute = AverageFlatness(WeightBall(0.5, relative=False), trials=3, attack=fixed_attack())
    # The draws are the same, so every trial can be compared by itself.
    one, other = (absolute(network, images, labels).trials for network in (model, scaled))
    assert ((one - other).abs() > 0.05 * one.abs()).all()


def test_scaling_two_layers_of_a_homogeneous_network_against_each_other_changes_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    images, labels = examples(8, torch.float64)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (scaled[1].weight, scaled[1].bias):
            tensor *= 4
        scaled[3].weight /= 4
    measure = AverageFlatness(WeightBall(0.5), trials=3, attack=fixed_attack())
    assert measure(model, images, labels).value == pytest.approx(measure(scaled, images, labels).value, rel=1e-9)


def test_recalibrated_statistics_are_those_of_the_clean_images_at_the_displaced_weights() -> None:
    model, (images, labels) = convnet(), examples(12)
    measure = AverageFlatness(WeightBall(0.4), trials=1, loss="clean", batch_norm="recalibrate", seed=1)
    result = measure(model, images, labels)
    nu = WeightBall(0.4).sample(perturbable(model), generator_for(1, "weights", 0, 0), sampling="ball")
    for displacement, losses in (({}, result.reference), (nu, result.losses[0])):
        moved = moved_copy(model, displacement).train()
        for layer in moved.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # the statistics of this pass alone
        moved(images)
        expected = F.cross_entropy(moved.eval()(images), labels, reduction="none").detach()
        assert torch.allclose(losses, expected, atol=1e-5)


def test_statistics_of_a_single_value_are_refused_and_the_network_comes_back() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    images, labels = examples(9)
    before = copy.deepcopy(model.state_dict())
    measure = AverageFlatness(trials=1, loss="clean", batch_norm="recalibrate")
    with pytest.raises(UserError, match=r"one has a single example.*Choose a batch size that leaves none"):
        measure(model, images, labels, batch_size=4)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m.training for m in model.modules())
    assert math.isfinite(measure(model, images, labels, batch_size=3).value)


def test_model_comes_back_bit_for_bit_also_after_an_error() -> None:
    model, (images, labels) = convnet(), examples(4)
    model[0].train()  # a convolution: its mode changes nothing, and must come back
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model)

    class Failing(Pgd):
        calls = 0

        def __call__(self, *args, **kwargs):
            Failing.calls += 1
            if Failing.calls > 2:  # one for the ten runs of the reference, then in the second trial
                raise RuntimeError("attack failed")
            return super().__call__(*args, **kwargs)

    attack = Failing(LinfBall(0.05), steps=1, step_size=0.03)
    with pytest.raises(RuntimeError, match="attack failed"):
        AverageFlatness(trials=5, attack=attack, batch_norm="recalibrate")(model, images, labels)
    for (name, one), other in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert [getattr(m, "momentum", 0) for m in model.modules()] == [getattr(m, "momentum", 0) for m in before.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_a_given_reference_is_used() -> None:
    model, (images, labels) = convnet(), examples(4)
    reference = torch.tensor([0.5, 1.0, 1.5, 2.0])
    result = AverageFlatness(trials=1, attack=short_attack())(model, images, labels, reference=reference)
    assert torch.equal(result.reference, reference)
    again = AverageFlatness(trials=1, attack=short_attack())(model, images, labels, reference=reference.numpy())
    assert torch.equal(again.reference, reference)
    assert result.value == pytest.approx(float(result.losses.mean()) - 1.25, abs=1e-6)


def test_released_losses_are_capped_and_the_papers_are_not() -> None:
    logits, labels = torch.tensor([[200.0, 0.0], [0.3, 0.1]]), torch.tensor([1, 0])
    released = protocol_by_name("released").losses(logits, labels)
    assert float(released[0]) == pytest.approx(-math.log(1e-12), rel=1e-6)
    assert float(released[1]) == pytest.approx(math.log(1 + math.exp(-0.2)), rel=1e-5)
    assert protocol_by_name("paper").losses(logits, labels).tolist() == pytest.approx([200.0, float(released[1])])


def test_released_protocol_says_what_it_does() -> None:
    model, (images, labels) = convnet(), examples(6)
    result = AverageFlatness(trials=1, protocol="released")(model, images, labels, batch_size=3)
    assert (result.protocol, result.sampling, result.groups) == ("released", "sphere", (6,))
    assert "epsilon=0.0314" in result.attack
    assert "uniform_norm" in result.attack


def test_which_tensors_move_is_recorded() -> None:
    model, (images, labels) = convnet(), examples(2)
    counts = [
        AverageFlatness(trials=1, loss="clean", biases=b, norm_layers=n)(model, images, labels).tensors
        for b, n in ((True, False), (False, False), (True, True))
    ]
    assert counts == [6, 3, 10]


def test_uint8_numpy_images_are_taken_too() -> None:
    model, (images, labels) = convnet(), examples(3)
    bytes_ = (images * 255).round().to(torch.uint8)
    measure = AverageFlatness(trials=1, loss="clean")
    one = measure(model, bytes_.numpy(), labels.numpy())
    assert torch.allclose(one.losses, measure(model, bytes_ / 255, labels).losses, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, r"trials must lie in \[1"),
        ({"loss": "robots"}, "loss must be one of clean, frozen, robust, got 'robots'. Did you mean 'robust'"),
        ({"protocol": "mine"}, "protocol must be one of paper, released"),
        ({"draws": "per_image"}, "draws must be one of per_batch, per_set"),
        ({"sampling": "cube"}, "sampling must be one of ball, sphere"),
        ({"batch_norm": "batch"}, "batch_norm must be one of recalibrate, running"),
        ({"ball": WeightBall(0.0)}, r"radius must lie in \(0, inf\), got 0.0. At radius 0 flatness is 0"),
        ({"loss": "clean", "attack": short_attack()}, "loss='clean' uses no attack"),
        ({"seed": -1}, "seed must lie in"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AverageFlatness(**change)


def test_a_layer_that_stays_random_is_named() -> None:
    model, (images, labels) = convnet(), examples(4)
    model.insert(5, AlwaysDropout())
    with pytest.raises(UserError, match=r"first at layer '5' \(AlwaysDropout\), which stays random in eval mode"):
        AverageFlatness(trials=1, loss="clean")(model, images, labels)


def test_layers_in_training_mode_are_refused_by_name_and_dropout_in_eval_mode_is_not() -> None:
    model, (images, labels) = convnet(), examples(4)
    model.insert(6, nn.Dropout(0.5))
    AverageFlatness(trials=1, loss="clean")(model.eval(), images, labels)
    with pytest.raises(UserError, match=r"Layer '1' \(BatchNorm2d\) is in training mode.*model\.eval\(\)"):
        AverageFlatness(trials=1, loss="clean")(model.train(), images, labels)
    model.eval()
    model[6].train()
    with pytest.raises(UserError, match=r"Layer '6' \(Dropout\) is in training mode, in which it draws at random"):
        AverageFlatness(trials=1, loss="clean")(model, images, labels)


def test_images_and_answers_that_do_not_fit_are_refused_in_words() -> None:
    model, (images, labels) = convnet(), examples(4)
    measure = AverageFlatness(trials=1, loss="clean")
    with pytest.raises(UserError, match=r"Sequential fails on images of shape \(1, 6, 6\): .*expected input"):
        measure(model, images[:, :1], labels)
    model.append(Answering())
    with pytest.raises(UserError, match=r"must return logits \(B, K\), got dict"):
        measure(model, images, labels)


def test_probabilities_are_refused_and_their_logarithm_measures_the_same_as_logits() -> None:
    model, (images, labels) = convnet(), examples(4)
    measure = AverageFlatness(trials=1, loss="clean")
    with pytest.raises(UserError, match="returns probabilities"):
        measure(nn.Sequential(*model, nn.Softmax(dim=1)).eval(), images, labels)
    logarithm = measure(nn.Sequential(*model, nn.LogSoftmax(dim=1)).eval(), images, labels)
    assert logarithm.value == pytest.approx(measure(model, images, labels).value, rel=1e-4)


class Answering(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x}


def test_batch_norm_without_statistics_is_refused() -> None:
    model, (images, labels) = convnet(), examples(4)
    model[1] = nn.BatchNorm2d(4, track_running_stats=False).eval()
    with pytest.raises(UserError, match=r"Layer '1' .* normalises by the batch even in eval mode"):
        AverageFlatness(trials=1, loss="clean")(model, images, labels)


def test_weights_that_are_not_finite_are_refused() -> None:
    model, (images, labels) = convnet(), examples(4)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match=r"3.weight has 1 of 180 values that are NaN or infinite"):
        AverageFlatness(trials=1, loss="clean")(model, images, labels)


def test_a_network_without_weights_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Softmax(dim=1))
    with pytest.raises(UserError, match="no weights to perturb"):
        AverageFlatness(trials=1, loss="clean")(model, *examples(2))


def test_recalibration_without_batch_norm_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(UserError, match=r"has none\. Leave batch_norm at its default"):
        AverageFlatness(trials=1, loss="clean", batch_norm="recalibrate")(model, *examples(2))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.full((2, 2, 6, 6), 1.5), torch.tensor([0, 1]), r"images must lie in \[0, 1\]"),
        (torch.full((2, 2, 6, 6), -0.5), torch.tensor([0, 1]), r"images must lie in \[0, 1\]"),
        (torch.full((2, 2, 6, 6), math.nan), torch.tensor([0, 1]), r"images must lie in \[0, 1\]"),
        (torch.full((2, 2, 6, 6), 0.5), torch.tensor([0, 3]), "The model has 3 classes .* a label is 3"),
        (torch.full((2, 2, 6, 6), 0.5), torch.tensor([0, -1]), "labels must be 0 or more"),
        (torch.full((2, 2, 6, 6), 0.5), torch.tensor([0.0, 1.0]), r"labels must be integers of shape \(N,\)"),
        (torch.full((2, 2, 6, 6), 0.5), torch.tensor([0, 1, 2]), "one label per image"),
        (torch.zeros(0, 2, 6, 6), torch.zeros(0, dtype=torch.int64), "There are no images"),
        ([[0.5]], torch.tensor([0]), "images must be a torch tensor or a NumPy array"),
    ],
)
def test_bad_examples_are_refused(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AverageFlatness(trials=1, loss="clean")(convnet(), images, labels)


def test_a_misfitting_reference_is_refused() -> None:
    model, (images, labels) = convnet(), examples(4)
    with pytest.raises(UserError, match=r"shape \(4,\), got shape \(3,\)"):
        AverageFlatness(trials=1, loss="clean")(model, images, labels, reference=torch.zeros(3))
    with pytest.raises(UserError, match="leave reference out"):
        AverageFlatness(trials=1, loss="frozen")(model, images, labels, reference=torch.zeros(4))


def test_an_overflowing_loss_is_refused() -> None:
    model, (images, labels) = convnet(), examples(4)
    measure = AverageFlatness(WeightBall(1e30, relative=False), trials=1, loss="clean")
    with pytest.raises(UserError, match=r"not finite at 1 of 1 displaced weights. Is radius 1e\+30 too large"):
        measure(model, images, labels)


def test_mixed_labels_and_empty_sets_are_refused() -> None:
    images, _ = examples(2)
    with pytest.raises(UserError, match="one class per image"):
        AverageFlatness(trials=1).measure(convnet(), [Batch(images, torch.full((2, 3), 1 / 3))])
    with pytest.raises(UserError, match="at least one"):
        AverageFlatness(trials=1).measure(convnet(), [])


def test_reference_network_gives_the_reference_logits() -> None:
    model, images, _ = cnn_cifar10(torch.float64)
    expected = torch.tensor(figures()["clean"]["logits_first_example"], dtype=torch.float64)
    assert torch.allclose(model(images[:1])[0].detach(), expected, rtol=0, atol=1e-5)


def test_flatness_of_two_draws_lies_where_the_released_codes_draws_lie() -> None:
    model, images, labels = cnn_cifar10()
    figure = figures()["average_case_flatness_xi_0.5"]
    base = sum(figures()["pgd20"]["robust_loss_worst_of_10_restarts"]) / 5
    measure = AverageFlatness(
        WeightBall(0.5), trials=2, protocol="released", attack=Pgd(LinfBall(0.0314), steps=5, step_size=0.012)
    )
    result = measure(model, images, labels, reference=torch.full((128,), base))
    assert result.value == pytest.approx(figure["mean"], abs=3 * figure["standard_deviation"] / math.sqrt(2))


@pytest.mark.slow
@pytest.mark.parametrize(("radius", "protocol"), [(0.25, "released"), (0.5, "released"), (0.5, "paper")])
def test_flatness_agrees_with_the_released_code_within_three_standard_errors(radius: float, protocol: str) -> None:
    model, images, labels = cnn_cifar10()
    figure = figures()[f"average_case_flatness_xi_{radius}"]
    measure = AverageFlatness(WeightBall(radius), trials=10, protocol=protocol, sampling="sphere")
    result = measure(model, images, labels)
    error = math.hypot(figure["standard_error"], result.standard_error)
    assert error < figure["mean"] / 2
    assert result.value == pytest.approx(figure["mean"], abs=3 * error)
