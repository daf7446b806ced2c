"""AutoAttack against the authors' figures, closed forms, an interrupted run, and everything a user can get wrong."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks import autoattack, ensemble
from robustflat.attacks.autoattack import AutoAttack, AutoAttackSearch
from robustflat.attacks.autopgd import AutoPgd
from robustflat.attacks.ensemble import ATTACKS, Counted, attack_names, member
from robustflat.attacks.ensemble_result import wilson
from robustflat.attacks.fab import Fab
from robustflat.attacks.objectives import cross_entropy
from robustflat.attacks.sanity import Finding
from robustflat.attacks.square import Square
from robustflat.errors import CheckpointError, UserError
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall
from tests.reference.models import cnn_cifar10, figures

SHAPE = (1, 4, 4)
THREATS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
BALLS = {"linf": LinfBall, "l2": L2Ball, "l1": L1Ball}
KEYS = {"linf": "autoattack_Linf", "l2": "autoattack_L2", "l1": "autoattack_L1"}


def linear(classes: int = 3, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    with torch.no_grad():
        model[1].weight.mul_(scale)
        model[1].bias.copy_(-model[1].weight.sum(1) * 0.5)
    return model.eval()


def images(count: int = 12) -> Tensor:
    return 0.45 + 0.1 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks of a few steps, for tests of everything around them."""

    def short(name: str, ball: InputBall, *, version: str = "standard") -> object:
        attack = member(name, ball, version=version)
        for setting, value in (("steps", 8), ("queries", 20)):
            if hasattr(attack, setting):
                setattr(attack, setting, value)
        if version == "rand":
            assert isinstance(attack, AutoPgd)
            attack.eot = 2
        return attack

    monkeypatch.setattr(autoattack, "member", short)


# Verdicts


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_linear_model_is_robust_exactly_where_the_closed_form_says(norm: str) -> None:
    model, x = linear(4), images(24)
    y = model(x).argmax(1)
    weight, logits = model[1].weight.detach(), model(x).detach()
    dual = {"linf": 1.0, "l2": 2.0, "l1": math.inf}[norm]
    best = torch.full((24,), math.inf)
    for k in range(4):
        gap = logits.gather(1, y[:, None])[:, 0] - logits[:, k]
        distance = gap / torch.linalg.vector_norm(weight[y] - weight[k], dual, dim=1)
        best = torch.where(y == k, best, torch.minimum(best, distance))
    radius = float(best.median())
    result = AutoAttack(norm=norm, epsilon=radius, budget="preview")(model, x, y)
    clear = (best / radius - 1).abs() > 0.05
    assert torch.equal(result.robust[clear], (best > radius)[clear])
    broken = ~result.robust
    assert bool((model(result.adversarial).argmax(1) != y)[broken].all())
    assert bool((result.size <= radius * (1 + 1e-5)).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_gradient_attacks_break_what_the_authors_break_on_hard_examples(norm: str) -> None:
    """Every sixteenth image: verdicts of APGD-CE and APGD-T differ from the authors' ensemble in one at most."""
    model, x, y = cnn_cifar10()
    some = torch.arange(0, 128, 16)
    robust = set(figures()[KEYS[norm]]["standard"]["robust_examples"])
    result = AutoAttack(norm=norm, epsilon=THREATS[norm], budget="preview", search="fp32")(model, x[some], y[some])
    ours = {int(some[row]) for row in result.robust.nonzero().flatten()}
    assert len(ours - robust) <= 1
    assert len(robust & set(some.tolist()) - ours) <= 1
    assert not result.sanity.warnings


@pytest.mark.slow
@pytest.mark.parametrize("search", ["plain", "bf16"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_standard_reaches_the_authors_robust_accuracy(norm: str, search: str) -> None:
    model, x, y = cnn_cifar10()
    expected = figures()[KEYS[norm]]["standard"]
    result = AutoAttack(norm=norm, epsilon=THREATS[norm], search=search)(model, x, y)
    assert result.robust_accuracy <= expected["robust_accuracy"]
    ours = set(result.robust.nonzero().flatten().tolist())
    assert len(ours - set(expected["robust_examples"])) <= 2
    assert not result.sanity.warnings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "square"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_each_attack_alone_is_within_two_examples_of_the_authors(norm: str, name: str) -> None:
    model, x, y = cnn_cifar10()
    expected = round(128 * figures()[KEYS[norm]][name]["robust_accuracy"])
    evaluate = AutoAttack(norm=norm, epsilon=THREATS[norm], version="custom", attacks=[name], search="fp32")
    assert abs(int(evaluate(model, x, y).robust.sum()) - expected) <= 2


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("search", ["fp32", "bf16"])
def test_a_rewritten_search_is_judged_by_the_plain_model(search: str) -> None:
    model, x, y = cnn_cifar10()
    x, y = x[:24], y[:24]
    result = AutoAttack(search=search, version="custom", attacks=["apgd-ce", "square"])(model, x, y)
    plain = AutoAttack(version="custom", attacks=["apgd-ce", "square"])(model, x, y)
    with torch.no_grad():
        logits = model(result.adversarial)
    assert torch.equal(logits.argmax(1) != y, ~result.robust)
    torch.testing.assert_close(result.loss, cross_entropy(logits, y), rtol=1e-4, atol=1e-4)
    assert int((result.robust != plain.robust).sum()) <= 1


# Record


@pytest.mark.usefixtures("quick")
def test_every_verdict_is_kept() -> None:
    model, x = linear(4, 3.0), images(20)
    y = model(x).argmax(1)
    y[3] = (y[3] + 1) % 4
    result = AutoAttack(epsilon=0.01, batch_size=6)(model, x, y)
    assert result.broken_by[3] == "clean"
    assert not bool(result.correct[3])
    left = result.correct.clone()
    for record in result.attacks:
        assert torch.equal(record.tried, left)
        left &= ~record.broken
        assert bool(record.loss[record.tried].isfinite().all())
        assert bool(record.margin[~record.tried].isnan().all())
        assert bool((record.margin[record.broken] > 0).all())
        assert bool((record.size[record.tried] <= 0.01 * (1 + 1e-5)).all())
        assert bool(((record.queries > 0) == record.tried).all())
        assert record.seconds > 0
        assert record.forwards >= int(record.queries.sum())
    assert torch.equal(left, result.robust)
    assert [name == "" for name in result.broken_by] == result.robust.tolist()
    assert {name for name in result.broken_by if name} <= {"clean", *(record.name for record in result.attacks)}


@pytest.mark.usefixtures("quick")
def test_the_result_reads_as_text_and_a_preview_says_that_it_is_an_upper_bound() -> None:
    model, x = linear(), images()
    y = model(x).argmax(1)
    full = AutoAttack(epsilon=0.01)(model, x, y)
    assert "upper bound" not in str(full)
    assert [record.name for record in full.attacks] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    preview = AutoAttack(epsilon=0.01, budget="preview")(model, x, y)
    assert preview.upper_bound
    assert "this is an upper bound of the robust accuracy" in str(preview)
    assert [record.name for record in preview.attacks] == ["apgd-ce", "apgd-t"]
    assert preview.robust_accuracy >= full.robust_accuracy
    assert "sanity: " in str(full)
    assert "ball and box" in str(full)
    assert full.seconds == sum(record.seconds for record in full.attacks)


def test_wilson_interval_is_that_of_the_textbook() -> None:
    assert wilson(7, 20) == pytest.approx((0.18119, 0.56714), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)


def test_passes_are_counted_in_images() -> None:
    counted = Counted(linear())
    x = images(5).requires_grad_()
    torch.autograd.grad(counted(x).sum(), x)
    with torch.no_grad():
        counted(x)
    assert (counted.forwards, counted.backwards) == (10, 5)


@pytest.mark.usefixtures("quick")
def test_the_model_is_left_as_found() -> None:
    model, x = linear().train(), images()
    result = AutoAttack(epsilon=0.01)(model, x, model(x).argmax(1))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [finding.check for finding in result.sanity.warnings] == ["mode"]


# Interruption


class PowerCutError(Exception):
    """Stands for the power cut."""


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("after", [1, 3, 6])
def test_interrupted_and_resumed_equals_uninterrupted(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = linear(4, 3.0), images(20)
    y = model(x).argmax(1)
    evaluate = AutoAttack(epsilon=0.001, batch_size=7)
    whole = evaluate(model, x, y)
    pieces = 0
    original = ensemble.attack_piece

    def failing(*args: object) -> object:
        nonlocal pieces
        pieces += 1
        if pieces > after:
            raise PowerCutError
        return original(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(autoattack, "attack_piece", failing)
        with pytest.raises(PowerCutError):
            evaluate(model, x, y, progress=tmp_path / "aa")
    assert len(list((tmp_path / "aa").glob("*-*.pt"))) + len(list((tmp_path / "aa").glob("square*.pt"))) == after
    resumed = evaluate(model, x, y, progress=tmp_path / "aa")
    assert torch.equal(resumed.adversarial, whole.adversarial)
    assert resumed.broken_by == whole.broken_by
    for one, other in zip(resumed.attacks, whole.attacks, strict=True):
        assert torch.equal(one.queries, other.queries)
        assert torch.equal(one.loss.nan_to_num(-1), other.loss.nan_to_num(-1))


@pytest.mark.usefixtures("quick")
def test_finished_batches_of_other_examples_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was deleted and computed again, on a GPU perhaps with another verdict, leaves other survivors."""
    model, x = linear(4, 3.0), images(20)
    y = model(x).argmax(1)
    evaluate, folder = AutoAttack(epsilon=0.001, batch_size=7), tmp_path / "aa"
    evaluate(model, x, y, progress=folder)
    (folder / "apgd-ce.00000.pt").unlink()
    original = ensemble.attack_piece

    def stronger(*args: object) -> dict[str, object]:
        piece = original(*args)  # type: ignore[arg-type]
        piece["broken"][0] = True
        return piece

    with monkeypatch.context() as patched:
        patched.setattr(autoattack, "attack_piece", stronger)
        result = evaluate(model, x, y, progress=folder)
    assert result.broken_by[0] == "apgd-ce"
    for record in result.attacks[1:]:
        assert not bool(record.tried[0])
        reached = (record.loss - cross_entropy(model(x), y))[record.tried]
        assert bool((reached.abs() < 0.05).all())  # epsilon is small: each loss is that of its own example


@pytest.mark.usefixtures("quick")
def test_progress_of_another_evaluation_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model, x = linear(), images()
    y = model(x).argmax(1)
    folder = tmp_path / "aa"
    AutoAttack(epsilon=0.01)(model, x, y, progress=folder)
    with pytest.raises(CheckpointError, match="another evaluation"):
        AutoAttack(epsilon=0.02)(model, x, y, progress=folder)
    with pytest.raises(CheckpointError, match="another evaluation"):
        AutoAttack(epsilon=0.01)(linear(3, 2.0), x, y, progress=folder)
    (folder / "square.00000.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="is damaged"):
        AutoAttack(epsilon=0.01)(model, x, y, progress=folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="must be a folder"):
        AutoAttack(epsilon=0.01)(model, x, y, progress=tmp_path / "file")


# Versions


def test_versions_have_the_published_members() -> None:
    ball = LinfBall(0.1)
    assert attack_names("standard", None, "full") == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert attack_names("plus", None, "full") == ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
    assert attack_names("rand", None, "full") == ("apgd-ce", "apgd-dlr")
    targeted = member("apgd-t", ball)
    assert isinstance(targeted, AutoPgd)
    assert (targeted.steps, targeted.restarts, targeted.targets) == (100, 1, 9)
    for norm, expected in ((ball, (1, 9)), (L1Ball(12.0), (5, 5))):
        plain, towards = (member(name, norm) for name in ("apgd-ce", "apgd-t"))
        assert isinstance(plain, AutoPgd)
        assert isinstance(towards, AutoPgd)
        assert (plain.restarts, towards.targets, towards.restarts) == (*expected, 1)
    several = member("apgd-ce", ball, version="plus")
    assert isinstance(several, AutoPgd)
    assert several.restarts == 5
    for version, restarts in (("standard", 1), ("plus", 5)):
        boundary, aimed = (member(name, ball, version=version) for name in ("fab", "fab-t"))
        assert isinstance(boundary, Fab)
        assert isinstance(aimed, Fab)
        assert (boundary.targets, boundary.restarts, boundary.steps) == (None, restarts, 100)
        assert (aimed.targets, aimed.restarts, aimed.steps) == (9, 1, 100)
    averaged = member("apgd-dlr", ball, version="rand")
    assert isinstance(averaged, AutoPgd)
    assert averaged.eot == 20
    square = member("square", ball)
    assert isinstance(square, Square)
    assert (square.queries, square.p_init) == (5000, 0.8)
    wide = member("apgd-ce", L1Ball(12.0))
    assert isinstance(wide, AutoPgd)
    assert wide.wide_start


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_few_and_many_classes_work(classes: int, version: str) -> None:
    model, x = linear(classes, 5.0), images(4)
    y = model(x).argmax(1)
    assert AutoAttack(epsilon=0.3, version=version)(model, x, y).robust_accuracy == 0.0


@pytest.mark.usefixtures("quick")
def test_a_random_model_is_judged_on_average() -> None:
    inner = linear(3, 3.0)
    noise = torch.Generator().manual_seed(0)

    def random(x: Tensor) -> Tensor:
        logits: Tensor = inner(x) + 0.01 * torch.randn(len(x), 3, generator=noise)
        return logits

    x = images()
    y = inner(x).argmax(1)
    result = AutoAttack(epsilon=0.3, version="rand")(random, x, y)
    assert result.robust_accuracy == 0.0
    assert any("rand" in finding.message for finding in result.sanity.warnings)


@pytest.mark.usefixtures("quick")
def test_gradient_masking_is_reported() -> None:
    inner = linear(3, 3.0)
    x = images()
    y = inner((x * 16).round() / 16).argmax(1)
    result = AutoAttack(epsilon=0.01)(lambda v: inner((v * 16).round() / 16 + 0 * v), x, y)
    checks = {finding.check for finding in result.sanity.warnings}
    assert "unbounded attack" in checks
    assert "gradients of the margin" in checks


# What users do


@pytest.mark.usefixtures("quick")
def test_arrays_and_bytes_give_the_same_verdicts_as_floats() -> None:
    model = linear(3, 3.0)
    bytes_ = (images() * 255).round().to(torch.uint8)
    y = model(bytes_ / 255).argmax(1)
    expected = AutoAttack(epsilon=0.01)(model, bytes_ / 255, y).broken_by
    assert AutoAttack(epsilon=0.01)(model, bytes_, y).broken_by == expected
    assert AutoAttack(epsilon=0.01)(model, bytes_.numpy(), y.numpy().astype(np.int32)).broken_by == expected


@pytest.mark.usefixtures("quick")
def test_a_constant_model_is_robust_where_it_is_right_and_reported() -> None:
    x, y = images(4), torch.tensor([0, 0, 1, 2])
    result = AutoAttack(epsilon=0.1)(lambda v: v.flatten(1)[:, :3] * 0, x, y)
    assert result.robust.tolist() == [True, True, False, False]
    assert {"unbounded attack", "gradients of the margin"} <= {f.check for f in result.sanity.warnings}


@pytest.mark.usefixtures("quick")
def test_a_model_that_is_always_wrong_has_nothing_left_to_attack() -> None:
    model, x = linear(), images()
    result = AutoAttack(epsilon=0.1)(model, x, (model(x).argmax(1) + 1) % 3)
    assert result.robust_accuracy == 0.0
    assert all(int(record.tried.sum()) == 0 for record in result.attacks)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, y: (x * 255, y), "0..255 units"),
        (lambda x, y: (x - 0.6, y), "must lie in"),
        (lambda x, y: ((x * 255).long(), y), "floating point"),
        (lambda x, y: (x, y + 3), "label is"),
        (lambda x, y: (x, y - 3), "labels must be"),
        (lambda x, y: (x, y.float()), "labels must be integers"),
        (lambda x, y: (x[:0], y[:0]), "no images"),
        (lambda x, y: (x, y[:-1]), "one label per image"),
        (lambda x, y: (x[0], y), "shape"),
        (lambda x, y: (x * torch.nan, y), "must lie in"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(change: object, text: str) -> None:
    model, x = linear(), images()
    bad_x, bad_y = change(x, model(x).argmax(1))  # type: ignore[operator]
    with pytest.raises(UserError, match=text):
        AutoAttack(epsilon=0.1)(model, bad_x, bad_y)


def test_logits_that_are_not_numbers_are_refused() -> None:
    x = images()
    with pytest.raises(UserError, match="not finite"):
        AutoAttack(epsilon=0.1)(lambda v: v.flatten(1)[:, :3] * torch.nan, x, torch.zeros(12, dtype=torch.int64))


@pytest.mark.usefixtures("quick")
def test_not_a_number_under_attack_breaks_nothing() -> None:
    x = torch.full((3, *SHAPE), 0.5)

    def fragile(v: Tensor) -> Tensor:
        logits = torch.stack([v.flatten(1).sum(1), v.flatten(1).sum(1) - 9], dim=1)
        return torch.where((v != 0.5).flatten(1).any(1, keepdim=True), logits * torch.nan, logits)

    result = AutoAttack(epsilon=0.1)(fragile, x, torch.zeros(3, dtype=torch.int64))
    assert result.robust_accuracy == 1.0


def test_a_model_of_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="one class"):
        AutoAttack(epsilon=0.1)(lambda v: v.flatten(1)[:, :1], images(), torch.zeros(12, dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"norm": "l3"}, "norm must be one of"),
        ({"epsilon": 8.0}, "0..255 units"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"version": "standart"}, "Did you mean 'standard'"),
        ({"attacks": ["square"]}, "for version='custom'"),
        ({"version": "custom"}, "needs attacks"),
        ({"version": "custom", "attacks": "square"}, "a list of names"),
        ({"version": "custom", "attacks": ["apgd"]}, "attacks must be one of"),
        ({"version": "custom", "attacks": ["square", "square"]}, "must differ"),
        ({"version": "custom", "attacks": ["square"], "budget": "preview"}, "chooses the attacks itself"),
        ({"version": "rand", "budget": "preview"}, "full budget"),
        ({"budget": "small"}, "budget must be one of"),
        ({"seed": -1}, "seed must lie in"),
        ({"batch_size": 0}, "batch_size must lie in"),
        ({"search": "fp16"}, "search must be one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        AutoAttack(**settings)  # type: ignore[arg-type]


# As an attack


@pytest.mark.usefixtures("quick")
def test_as_an_attack_it_keeps_the_contract() -> None:
    model, x = linear(4, 3.0), images(20)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    attack = AutoAttackSearch(LinfBall(0.005))
    first, second = (attack(model, x, y, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.x_adv, second.x_adv)
    assert torch.equal(first.x_adv[0], x[0])
    assert torch.equal(first.fooled, model(first.x_adv).argmax(1) != y)
    torch.testing.assert_close(first.value, cross_entropy(model(first.x_adv), y))
    assert bool((first.value >= cross_entropy(model(x), y) - 1e-6).all())
    empty = attack(model, x[:0], y[:0])
    assert empty.x_adv.shape == (0, *SHAPE)


@pytest.mark.usefixtures("quick")
def test_as_an_attack_it_agrees_with_the_evaluation() -> None:
    model, x = linear(4, 3.0), images(20)
    y = model(x).argmax(1)
    found = AutoAttackSearch(LinfBall(0.005))(model, x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(~found.fooled, AutoAttack(epsilon=0.005)(model, x, y).robust)


def test_as_an_attack_it_cannot_rewrite_a_plain_function() -> None:
    with pytest.raises(UserError, match="search=plain"):
        AutoAttackSearch(LinfBall(0.1), search="bf16")(
            lambda v: v.flatten(1)[:, :3], images(), torch.zeros(12, dtype=torch.int64)
        )


@pytest.mark.parametrize("name", ATTACKS)
def test_every_member_can_be_built_for_every_norm(name: str) -> None:
    for norm, ball in BALLS.items():
        assert callable(member(name, ball(THREATS[norm])))


def test_the_report_says_in_which_mode_a_network_came() -> None:
    model, x = linear(4), images(8)
    attack, y = AutoAttack(norm="linf", epsilon=0.1, budget="preview"), model(x).argmax(1)

    def mode(network) -> Finding:
        return next(finding for finding in attack(network, x, y).sanity.findings if finding.check == "mode")

    assert mode(model).level == "ok"
    assert mode(lambda x: model(x)).message == "a plain function, taken as it is"
    assert mode(model.train()).level == "warning" and "3 of its modules" in mode(model).message
