"""scripts/released_deviations.py: its pairs, what their released sides do, and that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.geometry.input_ball import LinfBall
from robustflat.gradients.plain import Plain
from robustflat.losses.base import TrainingLoss
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.losses.trades import Trades
from robustflat.types import AdvBatch, Batch
from scripts import released_behaviour as behaviour
from scripts import released_deviations as script
from scripts.released_behaviour import Setup
from tests.unit.training.conftest import build_trainer, small_network

TINY = ["dataset=synthetic", "device=cpu", "--steps", "4", "--channels", "2", "--batch-size", "8"]
TINY += ["--attack-steps", "1", "--evaluation-steps", "1", "--test", "16"]


def batch(seed: int = 0, size: int = 8) -> AdvBatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 1, 4, 4, generator=generator)
    return AdvBatch(x, x, torch.randint(3, (size,), generator=generator))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return small_network()


@pytest.mark.parametrize("name", script.PAIRS)
def test_a_pair_differs_in_one_setting(name):
    pair = script.PAIRS[name]
    one, other = dataclasses.asdict(pair.corrected), dataclasses.asdict(pair.released)
    assert sum(one[key] != other[key] for key in one) == 1
    assert pair.setting().count("->") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(script.PAIRS.keys() - {"trades_selection"}))  # which seldom shows so early
def test_the_setting_changes_what_is_trained(name):
    pair = script.PAIRS[name]
    dataset = script.dataset_of(["dataset=synthetic", "device=cpu"])
    values = {"steps": 8, "channels": 2, "batch_size": 8, "attack_steps": 1, "evaluation_steps": 1, "test": 8}
    states = []
    for setup in (pair.corrected, pair.released):
        setup = dataclasses.replace(setup, clip=0.002) if setup.clip else setup  # shows within a few steps
        trainer = script.make_trainer(setup, 0, script.Protocol(**values, data=""), dataset)
        trainer.fit()
        states.append(trainer.networks()["average" if setup.average else "model"].state_dict())
    assert any(not torch.equal(states[0][n], states[1][n]) for n in states[0] if n in states[1])


def test_swapped_shares_weigh_by_the_share_of_the_others(network):
    crafted = batch()
    losses = F.cross_entropy(network(crafted.x_adv), crafted.y, reduction="none")
    total = behaviour.SwappedShares(0.25)(network, crafted).total
    torch.testing.assert_close(total, 0.25 * losses[:6].mean() + 0.75 * losses[6:].mean())
    half, plain = behaviour.SwappedShares(0.5)(network, crafted).total, CrossEntropy()(network, crafted).total
    torch.testing.assert_close(half, plain)


class Jumps:
    """Logits after which the best iterate of one image is the first, of the other the last point seen."""

    def __init__(self) -> None:
        self.values = iter(([[0.0, 9.0], [5.0, 0.0]], [[0.0, 1.0], [0.0, 9.9]]))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(next(self.values)) + 0 * x.flatten(1)[:, :2]


def test_one_iterate_is_kept_for_the_whole_batch():
    x, clean = torch.full((2, 1, 1, 2), 0.5), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    kept = {}
    for name, objective in (("batch", behaviour.batch_divergence), ("example", None)):
        attack = Pgd(LinfBall(0.1), steps=1, step_size=0.1, random_start=False, objective="kl_divergence")
        kept[name] = attack(Jumps(), x, clean, objective).value
    # -log p_0 at the two points: (9, 0) and (1.3, 9.9), so per example the first and the last, as a batch the last
    first, last = (
        F.cross_entropy(torch.tensor(v), torch.zeros(2, dtype=torch.int64), reduction="none") for v in Jumps().values
    )
    torch.testing.assert_close(kept["example"], torch.maximum(first, last))
    torch.testing.assert_close(kept["batch"], last.mean().expand(2))
    assert last.mean() > first.mean()


def test_the_divergence_of_a_batch_has_the_gradient_of_its_sum(network):
    loss = behaviour.BatchwiseTrades()
    assert isinstance(loss, Trades)
    x = batch().x.requires_grad_()
    _, p = loss.objective(network.eval(), Batch(batch(1).x, batch().y))
    sums = [
        torch.autograd.grad(f(network(x), p).sum(), x)[0] for f in (behaviour.batch_divergence, behaviour.kl_divergence)
    ]
    torch.testing.assert_close(*sums)


def test_clipped_gradients_are_the_plain_ones_cut(network):
    gradients = []
    for rule in (Plain(), behaviour.ClippedGradient(0.05)):
        network.zero_grad()
        rule(network, batch, lambda crafted: CrossEntropy()(network, crafted))
        gradients.append([p.grad.clone() for p in network.parameters()])
        network[1].reset_running_stats()
    assert max(float(g.abs().max()) for g in gradients[0]) > 0.05
    for plain, clipped in zip(*gradients, strict=True):
        torch.testing.assert_close(clipped, plain.clamp(-0.05, 0.05))


def test_a_pass_in_train_mode_moves_the_statistics_and_leaves_the_mode(network):
    crafted = batch()
    network.train()
    with torch.no_grad():
        wrong = small_copy(network)(crafted.x).argmax(1) != crafted.y
    attack = behaviour.TrainModePass(Pgd(LinfBall(0.1), steps=1, step_size=0.1), "images")
    found = CrossEntropy().craft(network, attack, Batch(crafted.x, crafted.y), torch.Generator().manual_seed(0))
    assert int(network[1].num_batches_tracked) == 1
    assert network.training
    changed = (found.x_adv != crafted.x).flatten(1).any(1)
    assert 0 < wrong.sum() < len(wrong)
    assert torch.equal(changed, ~wrong)


def small_copy(network: nn.Module) -> nn.Module:
    copy = small_network()
    copy.load_state_dict(network.state_dict())
    return copy.train()


@pytest.mark.parametrize("twice", [False, True])
def test_the_released_average_copies_statistics_and_updates_twice(twice):
    average = behaviour.ReleasedAverage(0.8, copied=True, twice=twice)
    trainer = build_trainer(callbacks={"average": average}, attack=NoAttack(), epochs=1)
    weights = [trainer.model[0].weight.detach().clone()]
    trainer.callbacks["watch"] = Watch(weights)
    trainer.fit()
    expected = weights[0]
    for step, w in enumerate(weights[1:]):
        for _ in range(2 if twice and step == 0 else 1):
            expected = 0.8 * expected + 0.2 * w
    model = average.averaged_model(trainer)
    torch.testing.assert_close(model[0].weight, expected)
    assert torch.equal(model[1].running_mean, trainer.model[1].running_mean)


class Watch(behaviour.Callback):
    def __init__(self, weights: list[torch.Tensor]) -> None:
        self.weights = weights

    def after_step(self, trainer) -> None:
        self.weights.append(trainer.model[0].weight.detach().clone())


def test_clipping_before_scoring_attacks_unclipped_weights(network):
    loss: TrainingLoss = behaviour.ClipBeforeScoring(0.01, norm_layers=False)
    before = network[0].weight.detach().clone()
    loss.craft(network, NoAttack(), Batch(batch().x, batch().y))
    assert torch.equal(network[0].weight, before)
    loss(network, batch())
    assert torch.equal(network[0].weight, before.clamp(-0.01, 0.01))
    assert network[1].weight.max() == 1


def test_it_goes_on_with_what_is_missing_and_shares_trainings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main([*TINY, "--seeds", "0", "--only", "control"]) == 0
    assert script.main([*TINY, "--seeds", "0", "1", "--only", "control", "start"]) == 0
    folder = tmp_path / "outputs" / "released_deviations"
    assert len(list((folder / "trainings").iterdir())) == 6  # baseline, other seed, other start; two seeds each
    report = capsys.readouterr().out.rsplit("# Deviations", 1)[1]
    (line,) = (text for text in report.splitlines() if text.startswith("| start"))
    assert line.count("+-") == 7
    assert "start: uniform -> uniform_norm" in report
    monkeypatch.setattr(script, "make_trainer", None)
    assert script.main([*TINY, "--seeds", "0", "1", "--only", "control", "start"]) == 0
    assert capsys.readouterr().out.rsplit("# Deviations", 1)[1] == report
    assert (folder / "report.md").read_text().rstrip().endswith(report.rstrip()[-100:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "strat"], "Did you mean 'start'"),
        (["--steps", "3"], "--steps must lie in"),
        (["dataset=cifar11"], "cifar11"),
    ],
)
def test_a_mistake_gets_a_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main([*TINY, *arguments] if arguments[0][0] == "-" else [*arguments, *TINY[1:]]) == 1
    assert message in capsys.readouterr().err


def test_the_defaults_are_the_papers_baseline():
    assert isinstance(behaviour.loss(Setup(), 8), CrossEntropy)
    assert behaviour.callbacks(Setup(), 8) == {}
