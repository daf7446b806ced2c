"""Evaluations and flatness on several ranks: bit for bit what one process computes alone."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.autoattack import AutoAttackSearch
from robustflat.attacks.autopgd import AutoPgd
from robustflat.attacks.ensemble_progress import Progress
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.square import Square
from robustflat.errors import UserError
from robustflat.evaluation.attacked import attack_batches, autoattack_batches
from robustflat.evaluation.evaluate import evaluate
from robustflat.evaluation.periodic import PeriodicEvaluation
from robustflat.flatness.average import AverageFlatness
from robustflat.flatness.hessian import frozen_batches
from robustflat.flatness.landscape import Landscape
from robustflat.flatness.subject import subject
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall
from robustflat.ranks import current, sharing_work
from robustflat.types import Batch
from tests.forked_ranks import on_ranks

BALL = LinfBall(0.1)


def pgd(**options):
    return Pgd(BALL, steps=2, step_size=0.05, **options)


def network() -> nn.Module:
    torch.manual_seed(5)
    parts = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    return nn.Sequential(*parts).eval()


def batches(count: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    sizes = [4] * (count - 1) + [3]
    return [Batch(torch.rand(n, 1, 6, 6, generator=generator), torch.arange(n) % 4) for n in sizes]


def whole(count: int = 5) -> tuple[Tensor, Tensor]:
    x, y = zip(*batches(count), strict=True)
    return torch.cat(x), torch.cat(y)


def assert_same(one, other) -> None:
    """Equal to the last bit, times apart."""
    if isinstance(one, Tensor):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            if field.name != "seconds":
                assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other or (one != one and other != other)


def shared(work):
    def inside():
        with sharing_work():
            return work()

    return inside


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def attacked(attack, *, progress=None, count=5, at_once=8):
    return attack_batches(
        network(),
        batches(count),
        attack,
        ball=BALL,
        runs=3,
        at_once=at_once,
        search="plain",
        generator=generator(),
        progress=progress,
    )


def auto(progress=None):
    model, attack = network(), AutoAttackSearch(LinfBall(0.02), version="custom", attacks=["apgd-ce", "apgd-dlr"])
    right = [Batch(x, model(x).argmax(dim=1)) for x, _ in batches()]
    found = autoattack_batches(model, right, attack, at_once=4, generator=generator(), progress=progress)
    return found.logits, found.findings, found.verdicts, {name: cost[1:] for name, cost in found.costs.items()}


def periodic():
    callback = PeriodicEvaluation(test=batches(), train=batches(2), attack=pgd())
    return callback.measure(network())


def flat(measure):
    model = network()
    result = measure.measure(model, batches())
    assert_same(model.state_dict(), network().state_dict())
    return result


def landscape(measure):
    """Two of the points are known already, and wrongly, so that measuring them again would show."""
    done = {(0, 0): (1.0, 0.5), (1, 0): (2.0, 0.25)}
    found = measure(network(), *whole(), done=done, batch_size=4)
    assert (float(found.losses[0, 0]), float(found.errors[1, 0])) == (1.0, 0.25)
    return found, done


WORK = {
    "pgd, three runs": lambda: attacked(pgd()),
    "restarts inside": lambda: attacked(pgd(restarts=2)),
    "draws unknown": lambda: attacked(Square(BALL, queries=4)),
    "one batch": lambda: attacked(pgd(), count=1),
    "autoattack": auto,
    "front door": lambda: evaluate(network(), *whole(), attack=pgd(), batch_size=4),
    "front door, autoattack": lambda: evaluate(
        network(), *whole(), attack=AutoAttackSearch(BALL, version="custom", attacks=["apgd-ce"]), batch_size=4
    ),
    "while training": periodic,
    "average": lambda: flat(AverageFlatness(trials=3, attack=pgd())),
    "average, one draw for all": lambda: flat(AverageFlatness(trials=3, attack=pgd(), draws="per_set")),
    "average, frozen": lambda: flat(AverageFlatness(trials=2, attack=pgd(), loss="frozen", batch_norm="recalibrate")),
    "average, clean": lambda: flat(AverageFlatness(trials=2, loss="clean")),
    "worst": lambda: flat(WorstFlatness(restarts=3, steps=2, input_ball=BALL, reference_attack=pgd())),
    "worst, released": lambda: flat(WorstFlatness(restarts=3, steps=2, reference_attack=pgd(), protocol="released")),
    "landscape, lines": lambda: landscape(Landscape(trials=3, points=5, attack=pgd())),
    "landscape, frozen": lambda: landscape(Landscape(trials=2, points=3, attack=pgd(), loss="frozen")),
    "landscape, plane": lambda: Landscape(points=3, loss="clean").plane(network(), *whole(), batch_size=4),
    "landscape, path": lambda: Landscape(points=4, attack=pgd()).path(
        network(), {name: t * 1.1 for name, t in network().state_dict().items()}, *whole(), batch_norm="recalibrate"
    ),
    "frozen images": lambda: frozen_batches(
        subject(network(), batches(), norm_layers=False, biases=True), pgd(), seed=3
    ),
}


@pytest.fixture
def few_checks(monkeypatch):
    """Without the checks of gradients, which take seconds, and with short runs of APGD."""
    monkeypatch.setattr("robustflat.attacks.ensemble.AutoPgd", partial(AutoPgd, steps=6))
    monkeypatch.setattr("robustflat.attacks.autoattack.check_gradients", lambda *_: [])
    monkeypatch.setattr("robustflat.evaluation.evaluate.check_network", lambda *_: [])


@pytest.mark.slow
def test_several_ranks_check_what_one_checks(tmp_path):
    def work():
        return evaluate(network(), *whole(), epsilon=0.1, batch_size=4), auto()

    alone = work()
    for found in on_ranks(2, shared(work), tmp_path):
        assert_same(alone, found)


@pytest.mark.usefixtures("few_checks")
@pytest.mark.parametrize(("name", "count"), [*((name, 3) for name in WORK), ("pgd, three runs", 2), ("worst", 2)])
def test_several_ranks_find_what_one_finds(name, count, tmp_path):
    alone = WORK[name]()
    for found in on_ranks(count, shared(WORK[name]), tmp_path):
        assert_same(alone, found)


def test_outside_of_the_block_each_rank_computes_alone(tmp_path):
    def work():
        if current().rank == 0:  # would wait for the other for ever if it were shared
            return WORK["average"]()
        return None

    assert_same(WORK["average"](), on_ranks(2, work, tmp_path)[0])


def pieces(folder) -> Progress:
    return Progress(folder / "pieces", "key")


class StoppedError(Exception):
    """Stands for the end of a process."""


class Brittle(Progress):
    """Cannot write the second batch."""

    def save(self, attack, batch, piece):
        if batch == 1:  # on the second rank, if there is one: the first batch is written
            raise StoppedError
        super().save(attack, batch, piece)


@pytest.mark.usefixtures("few_checks")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("kind", ["pgd", "autoattack"])
def test_interrupted_and_resumed_with_another_number_of_ranks(kind, before, after, tmp_path, monkeypatch):
    work = auto if kind == "autoattack" else lambda progress=None: attacked(pgd(), progress=progress)
    expected = work()

    def interrupted():
        with monkeypatch.context() as patch:
            patch.setattr("robustflat.attacks.autoattack.Progress", Brittle)
            progress = Brittle(tmp_path / "pieces", "key")
            with pytest.raises(StoppedError), sharing_work():
                work(progress)

    pieces(tmp_path)
    for ended in on_ranks(before, interrupted, tmp_path):
        assert ended is None
    there = {path.name.split(".", 1)[1] for path in (tmp_path / "pieces").rglob("*.0*.pt")}
    assert "00000.pt" in there
    assert "00001.pt" not in there
    seen = {path: path.stat().st_mtime_ns for path in (tmp_path / "pieces").rglob("*.0*.pt")}
    for found in on_ranks(after, shared(lambda: work(pieces(tmp_path))), tmp_path):
        assert_same(expected, found)
    assert all(path.stat().st_mtime_ns == time for path, time in seen.items())


def test_an_error_on_one_rank_reaches_all(tmp_path):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            if current().rank == 1 and len(x) == 3:
                raise UserError("out of luck")
            return self.net(x)

    def work():
        with sharing_work():
            return AverageFlatness(trials=2, loss="clean").measure(Breaks().eval(), batches(4))

    for error in on_ranks(2, work, tmp_path):
        assert isinstance(error, UserError)
        assert str(error) == "out of luck"
