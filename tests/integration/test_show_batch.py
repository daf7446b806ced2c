"""`python scripts/show_batch.py`: the picture holds what training would see."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from robustflat.apps.main import run_application
from tests.integration.conftest import TINY, Answer, Cli, only_run

SMALL = ("model.channels=4", "attack.steps=2", "device=cpu", "images=6")
Show = Callable[..., Answer]


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Show:
    """show(*arguments) runs `python scripts/show_batch.py ...` in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Answer:
        capfd.readouterr()
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["show_batch.py", *arguments])
        try:
            run_application("show_batch")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capfd.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The rows of every sheet, instead of a picture of them."""
    sheets: list[dict[str, Tensor]] = []

    def keep(rows: Mapping[str, Tensor], path: Path, *, columns: int) -> Path:
        sheets.append(dict(rows))
        return path

    monkeypatch.setattr("robustflat.apps.show_batch.contact_sheet", keep)
    return sheets


def test_a_picture_is_written_and_nothing_else(show: Show, tmp_path: Path) -> None:
    answer = show(*SMALL)
    assert answer.code == 0, answer.err
    (file,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert file == tmp_path / "outputs" / "batches" / "digits-at-pgd_linf.png"
    assert str(file.relative_to(tmp_path)) in answer.out
    with Image.open(file) as picture:
        assert picture.size[0] == 6 * 150  # an inch of 150 dots for each image
    assert "network   untrained" in answer.out
    assert "LinfBall(epsilon=0.15" in answer.out


def test_originals_are_the_stored_images_under_their_labels(show: Show, drawn: list[dict[str, Tensor]]) -> None:
    assert show(*SMALL).code == 0
    (title, images), *_ = drawn[0].items()
    values, targets = load_digits(return_X_y=True)
    known = {tuple((255 * v / 16).round().astype(int)): t for v, t in zip(values, targets, strict=True)}
    found = [known[tuple((255 * image).round().int().flatten().tolist())] for image in images]
    assert title == f"original: {', '.join(map(str, found))}"
    assert len(found) == 6


def test_attacked_images_lie_in_the_ball_and_the_last_row_enlarges_the_change(
    show: Show, drawn: list[dict[str, Tensor]]
) -> None:
    assert show(*SMALL, "attack.ball.epsilon=0.03").code == 0
    _, clean, attacked, change = drawn[0].values()
    size = (attacked - clean).abs().amax(dim=(1, 2, 3))
    assert size.max() <= 0.03 + 1e-6
    assert size.min() > 0.01
    torch.testing.assert_close((change - 0.5) / 10, attacked - clean)


def test_augmentation_is_applied_to_the_very_images_shown(show: Show, drawn: list[dict[str, Tensor]]) -> None:
    flip = "+dataset.augment.flip={_target_: robustflat.data.augment.Flip, probability: 1.0}"
    assert show(*SMALL, flip).code == 0
    original, augmented, *_ = drawn[0].values()
    assert torch.equal(augmented, original.flip(-1))
    assert "augmented by flip" in list(drawn[0])[1]


def test_without_attack_nothing_changes(show: Show, drawn: list[dict[str, Tensor]]) -> None:
    assert show("trainer=standard", "model.channels=4").code == 0
    *_, clean, attacked, change = drawn[0].values()
    assert torch.equal(clean, attacked)
    assert torch.equal(change, torch.full_like(change, 0.5))


def test_wrappers_of_the_trainer_count(show: Show, drawn: list[dict[str, Tensor]]) -> None:
    assert show(*SMALL, "trainer=at_half").code == 0
    _, clean, attacked, _ = drawn[0].values()
    assert (attacked - clean).flatten(1).any(dim=1).sum() == 3


def test_the_first_training_batch_is_shown(show: Show, drawn: list[dict[str, Tensor]], cli: Cli, monkeypatch) -> None:
    seen: list[Tensor] = []
    from robustflat.losses.cross_entropy import CrossEntropy

    def spy(self: CrossEntropy, model: object, batch: object, generator: object = None) -> object:
        seen.append(batch.x)  # type: ignore[attr-defined]
        return scored(self, model, batch, generator)  # type: ignore[arg-type]

    scored = CrossEntropy.__call__
    monkeypatch.setattr(CrossEntropy, "__call__", spy)
    assert cli(*TINY, "trainer.epochs=1", "seed=3").code == 0
    assert show(*TINY, "images=5", "seed=3").code == 0
    assert torch.equal(list(drawn[0].values())[1], seen[0][:5])


def test_a_checkpoint_takes_the_place_of_the_untrained_network(show: Show, cli: Cli, tmp_path: Path) -> None:
    assert cli(*[a for a in TINY if a != "attack.steps=2"], "trainer=standard", "trainer.epochs=20").code == 0
    file = only_run(tmp_path) / "checkpoints" / "last.pt"
    images = ("trainer=standard", "model.channels=4", "images=32", "dataset.train='train[:128]'")
    fresh, trained = show(*images), show(*images, f"checkpoint={file}")
    assert trained.code == 0, trained.err
    assert str(file) in trained.out
    wrong = [int(a.out.split(" of 32 wrong")[0].split()[-1]) for a in (fresh, trained)]
    assert wrong[1] < wrong[0]


MISTAKES = {
    "a missing checkpoint": (["checkpoint=nowhere.pt"], ["no checkpoint nowhere.pt"]),
    "no images": (["images=0"], ["images must lie in"]),
    "a misspelt key": (["atack.steps=3"], ["attack.steps"]),
    "an added key": (["+epochs=3"], ["trainer.epochs"]),
    "another ending": (["file=sheet.jpg"], ["*.png"]),
    "epsilon in 0..255": (["attack.ball.epsilon=8"], ["0.03137"]),
    "a wrong type": (["images=many"], ["images"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_sentence(show: Show, tmp_path: Path, name: str) -> None:
    arguments, expected = MISTAKES[name]
    answer = show("model.channels=4", *arguments)
    assert answer.code == 1
    assert answer.err.startswith("error: ")
    for text in expected:
        assert text in answer.err
    assert "Traceback" not in answer.err
    assert not list(tmp_path.rglob("*"))


def test_each_job_of_a_sweep_draws_its_own_picture(show: Show, tmp_path: Path) -> None:
    assert show("-m", *SMALL, "seed=0,1").code == 0
    assert {p.name for p in tmp_path.rglob("*.png")} == {"digits-at-pgd_linf-0.png", "digits-at-pgd_linf-1.png"}


def test_help_says_how(show: Show) -> None:
    answer = show("--help")
    assert answer.code == 0
    assert "dataset=cifar10 attack=pgd_linf" in answer.out
