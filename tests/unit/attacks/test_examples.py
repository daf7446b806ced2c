"""What users have as images and labels, made into batches or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robustflat.attacks.autoattack import AutoAttack
from robustflat.attacks.examples import batches_for, require_answers
from robustflat.attacks.pgd import Pgd
from robustflat.errors import UserError
from robustflat.evaluation.evaluate import evaluate
from robustflat.flatness.audit import audit
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.hessian import hessian_spectrum
from robustflat.flatness.measures.catalogue import measures

MODEL = nn.Linear(1, 1)


def test_order_and_values_are_kept_and_the_last_batch_may_be_smaller() -> None:
    images, labels = torch.rand(5, 1, 2, 2), torch.tensor([4, 3, 2, 1, 0])
    batches = batches_for(MODEL, images, labels, batch_size=2)
    assert [len(b.y) for b in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([b.x for b in batches]), images)
    assert torch.equal(torch.cat([b.y for b in batches]), labels)


def test_bytes_become_fractions_and_all_takes_the_models_type() -> None:
    images = np.array([[[[0, 51], [102, 255]]]], dtype=np.uint8)
    batch = batches_for(nn.Linear(1, 1).double(), images, np.array([1], dtype=np.int32))[0]
    assert batch.x.dtype == torch.float64
    assert batch.x.flatten().tolist() == [0.0, 0.2, 0.4, 1.0]
    assert batch.y.dtype == torch.int64


def test_arrays_that_torch_does_not_take_as_they_are_give_the_same_batch() -> None:
    """Read only, as a mapped file is; of the other byte order, as in IDX files; backwards."""
    images, labels = np.random.default_rng(0).random((3, 1, 2, 2), dtype=np.float32), np.array([2, 0, 1])
    expected = batches_for(MODEL, images, labels)[0]
    frozen = images.copy()
    frozen.flags.writeable = False
    for other in (frozen, images.astype(">f4"), images[::-1].copy()[::-1]):
        batch = batches_for(MODEL, other, labels.astype(">i4"))[0]
        assert torch.equal(batch.x, expected.x)
        assert torch.equal(batch.y, expected.y)
    batches_for(MODEL, frozen, labels)[0].x.zero_()
    assert frozen.any()


@pytest.mark.parametrize(
    ("images", "labels", "size", "message"),
    [
        (torch.rand(2, 1, 2, 2) * 255, torch.tensor([0, 1]), 2, r"Divide by 255"),
        (torch.rand(2, 4), torch.tensor([0, 1]), 2, r"images must have shape \(B, C, H, W\), got \(2, 4\)"),
        (torch.rand(2, 1, 2, 2), torch.tensor([[0], [1]]), 2, r"labels must be integers of shape \(N,\)"),
        (torch.rand(2, 1, 2, 2), torch.tensor([0]), 2, "one label per image, got 2 images"),
        (torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), 0, r"batch_size must lie in \[1"),
        (torch.rand(2, 1, 2, 2), ["cat", "dog"], 2, r"labels must be a torch tensor or a NumPy array .* got list"),
        (np.zeros((1, 1, 2, 2), dtype=np.longdouble), torch.tensor([0]), 2, r"NumPy array of numbers, got float"),
        (torch.tensor(1.0), torch.tensor([0]), 2, "images must have shape"),
        (torch.rand(2, 1, 2, 2) * 4.7 - 2.1, torch.tensor([0, 1]), 2, "Normalisation belongs into the model"),
        (torch.full((2, 1, 2, 2), torch.nan), torch.tensor([0, 1]), 2, "not a number"),
        (torch.rand(2, 1, 2, 2), torch.eye(2), 2, r"of shape \(2, 2\). For one-hot labels give labels.argmax"),
        (DataLoader(TensorDataset(torch.rand(2, 1, 2, 2))), torch.tensor([0]), 2, "got DataLoader. Join the batches"),
        (np.array(["cat"]), torch.tensor([0]), 2, r"images must be a torch tensor or a NumPy array .* got <U3"),
    ],
)  # fmt: skip
def test_other_things_are_refused(images: object, labels: object, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        batches_for(MODEL, images, labels, batch_size=size)


def test_answers_that_cannot_be_used_are_refused() -> None:
    labels = torch.tensor([0, 2])
    require_answers(torch.zeros(2, 3), labels)
    with pytest.raises(UserError, match=r"must return logits of shape \(2, K\), got \(2, 3, 1\)"):
        require_answers(torch.zeros(2, 3, 1), labels)
    with pytest.raises(UserError, match=r"The model has 2 classes \(labels 0 to 1\), but a label is 2"):
        require_answers(torch.zeros(2, 2), labels)
    with pytest.raises(UserError, match="not finite for 1 of 2 examples, first for example 1"):
        require_answers(torch.tensor([[0.0, 0.0, 0.0], [0.0, torch.inf, 0.0]]), labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_16_bits_are_attacked_in_float32_pixels_and_not_moved_in_weight_space(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 2)
    layer.bias.data = torch.tensor([0.0, -0.5])
    layer.weight.data = torch.tensor([[0.0] * 4, [3.0, -2.0, 1.0, 0.5]])
    model, labels = nn.Sequential(nn.Flatten(), layer).eval().to(dtype), torch.ones(8, dtype=torch.long)
    images = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    score, steepest = images.to(dtype).float().flatten(1) @ layer.weight.data[1].float() - 0.5, 14.25**0.5
    for norm, reach in (("linf", 6.5), ("l2", steepest)):  # the dual norm of the gradient; no image reaches its box
        expected = (score <= 0.05 * reach).float()
        assert 0 < float(expected.mean()) < 1
        assert AutoAttack(norm=norm, epsilon=0.05)(model, images, labels).robust_accuracy == 1 - expected.mean()
        result = evaluate(model, images, labels, norm=norm, epsilon=0.05)
        loss = nn.functional.softplus(0.05 * reach - score).mean()
        wanted = float(expected.mean()), float(loss)
        assert (result.robust_error, result.robust_loss) == pytest.approx(wanted, rel=5e-3)
        assert result.precision in ("fp16", "bf16")
    with pytest.raises(UserError, match=r"1\.weight is torch\.b?float16, .*model\.float\(\)"):
        AverageFlatness(loss="clean")(model, images, labels)


@pytest.mark.parametrize("measure", [evaluate, AverageFlatness(), measures, audit, hessian_spectrum])
def test_functions_are_no_networks(measure) -> None:
    with pytest.raises(UserError, match=r"must be an object of a torch\.nn\.Module, got function"):
        measure(lambda x: x.flatten(1), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize(("attack", "name"), [("pgd", "str"), (Pgd, "type"), (AutoAttack(), "AutoAttack")])
def test_what_is_no_attack_is_refused(attack, name: str) -> None:
    model = Returning(tuple).layers.eval()
    for measure in (lambda *of: evaluate(*of, attack=attack), AverageFlatness(attack=attack)):
        with pytest.raises(UserError, match=rf"attack must be an attack such as Pgd.*, got {name}\. AutoAttack is an"):
            measure(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))


class Returning(nn.Module):
    """A network that returns something else than logits."""

    def __init__(self, what: type) -> None:
        super().__init__()
        self.layers, self.what = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), what

    def forward(self, x: Tensor) -> object:
        return self.what([("logits", self.layers(x))])


@pytest.mark.parametrize("measure", [evaluate, AutoAttack(), AutoAttack(version="rand"), AverageFlatness(), measures])
def test_networks_that_do_not_take_these_images_or_return_no_logits_are_refused_by_all(measure) -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"Sequential fails on images of shape \(2, 2, 3\): "):
        measure(Returning(tuple).layers.eval(), torch.rand(2, 2, 2, 3), labels)
    for what in (tuple, dict):
        with pytest.raises(UserError, match=rf"must return logits \(B, K\), got {what.__name__}: wrap it"):
            measure(Returning(what).eval(), torch.rand(2, 1, 2, 2), labels)
