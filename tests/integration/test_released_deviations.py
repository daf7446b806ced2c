"""scripts/released_deviations.py: its pairs, what their released sides do, and that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustflat.attacks.pgd import Pgd
from robustflat.geometry.input_ball import LinfBall
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.types import AdvBatch, Batch
from scripts import released_behaviour as behaviour
from scripts import released_deviations as script
from scripts.released_behaviour import Setup
from tests.unit.training.conftest import small_network

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
    assert isinstance(behaviour.loss(Setup()), CrossEntropy)
    assert behaviour.callbacks(Setup(), 8) == {}
