"""Names of the released registry: each leads to a command that composes and means what the name says."""

from __future__ import annotations

import shlex

import pytest
from omegaconf import OmegaConf

from robustflat.apps.check import check
from robustflat.apps.rules import check_together
from scripts.find_experiment import UnknownNameError, find, main, number

T = "linf_gd_normalized_lr0007_mom0_i7_e00314"
MEANT = {
    "normal_training": {"trainer.loss.label_noise": 0.0},
    f"at_{T}": {"trainer.wrappers.half.fraction": 0.5},
    f"at_{T}_f100": {"trainer.epochs": 150, "attack.steps": 7},
    "at_linf_gd_normalized_lr0007_mom0_i14_e00352_f100": {"attack.steps": 14, "attack.ball.epsilon": 9 / 255},
    f"at_{T}_f100_b4": {"dataset.batch_size": 4},
    f"at_{T}_f100_b512": {"dataset.batch_size": 512},
    f"at_{T}_f100_wa0985": {"trainer.callbacks.weight_average.decay": 0.985},
    f"at_{T}_f100_wa_extr": {"trainer.callbacks.weight_average.decay": 0.9975},
    f"at_{T}_f100_adam": {"optimizer.lr": 0.1},
    f"at_{T}_f100_esgd3": {"trainer.gradient.inner_steps": 3, "trainer.epochs": 50},
    f"at_{T}_f100_late": {"schedule.factor": 0.1},
    f"at_{T}_f100_lrf0316": {"schedule.factor": 0.316},
    f"at_{T}_f100_lr02": {"optimizer.lr": 0.2},
    f"at_{T}_f100_const01": {"optimizer.lr": 0.1},
    f"at_{T}_f100_const001": {"optimizer.lr": 0.01},
    f"at_{T}_f100_cyc4": {"schedule.cycles": 4, "trainer.epochs": 120},
    f"at_{T}_f100_cyc": {"schedule.cycles": 1, "trainer.epochs": 30},
    f"at_{T}_f100_nowd": {"optimizer.weight_decay": 0.0},
    f"at_{T}_f100_wd00001": {"optimizer.weight_decay": 0.0001},
    f"at_{T}_f100_wd005": {"optimizer.weight_decay": 0.05},
    f"at_{T}_f100_ls01": {"trainer.loss.label_smoothing": 0.1},
    f"at_{T}_f100_ls005": {"trainer.loss.label_smoothing": 0.05},
    f"at_{T}_f100_ln04": {"trainer.loss.label_noise": 0.4},
    f"at_{T}_f100_ln005": {"trainer.loss.label_noise": 0.05},
    f"at_pll_{T}_f100": {"trainer.wrappers.predicted._partial_": True},
    f"at_ii_{T}_f100": {"trainer.wrappers.only_correct._partial_": True},
    f"mart9_{T}_f100": {"trainer.loss.beta": 9.0},
    f"trades6_{T}_f100": {"trainer.loss.beta": 6.0},
    f"at_ssl05_{T}_f100": {"trainer.loss.weight": 0.5, "model.auxiliary": True},
    f"at_tau3_{T}_f100": {"attack.tau": 3},
    f"at_tau4_{T}_f100": {"attack.tau": 4},
    f"0015p_at_{T}_f100": {"trainer.callbacks.clip.maximum": 0.015},
    f"0005p_at_{T}_f100": {"trainer.callbacks.clip.maximum": 0.005},
    f"simple_awit_nonb_l2_gd_fgsm_lwrl2normalized_e001_{T}_pop1": {"trainer.gradient.ball.radius": 0.01},
    f"threshold_awit_nonb_l2_gd_lwrl2normalized_lr1_mom0_i5_e00025_{T}_pop3": {
        "trainer.gradient.ball.radius": 0.0025, "trainer.gradient.steps": 5, "trainer.gradient.step_size": 1,
    },
    f"simple_awit_nonb2_l2_gd_normalized_lr001_mom0_i3_e005_{T}_pop1": {"trainer.gradient.step_size": 0.01},
    f"threshold_awit_nonb_l2_random_e05_{T}_pop3": {
        "trainer.gradient.ball.radius": 0.5, "trainer.gradient.population": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT, ids=lambda name: name.replace(T, "T"))
def test_a_name_leads_to_a_valid_command_that_means_it(compose, name):
    words = shlex.split(find(name).command())
    assert words[:2] == ["python", "train.py"]
    config = compose(*words[2:])
    assert check(config) == []
    check_together(config)
    for key, value in MEANT[name].items():
        assert OmegaConf.select(config, key) == pytest.approx(value), key


NOTES = {
    f"at_{T}_f100_wd005": "weight decay 0.001",
    f"at_{T}_f100_wa098": "0.9975",
    f"at_{T}_f100_cyc2": "one cycle",
    f"at_{T}_f100_ls03": "all classes",
    f"at_{T}_f100_esgd2": "constant rate",
    f"at_ssl4_{T}_f100": "half of the batch clean",
    f"simple_awit_nonb_l2_gd_fgsm_lwrl2normalized_e001_{T}_pop1": "1 acted as 0",
    f"simple_awit_nonb_l2_gd_rl2normalized_lr1_mom0_i3_e001_{T}_pop3": "population of 3",
    f"simple_awit_nonb_l2_random_e05_{T}_pop3": "ignores the population",
    f"threshold_awit_nonb_l2_random_e05_{T}_pop1": "below 2.1",
    f"at_{T}_f100_es": "500 test examples",
}


@pytest.mark.parametrize("name", NOTES, ids=lambda name: name.replace(T, "T"))
def test_where_the_name_was_not_kept_a_note_says_so(name):
    assert any(NOTES[name] in note for note in find(name).notes)


@pytest.mark.parametrize("name", [f"at_{T}_f100", f"at_{T}_f100_wd0001", f"trades6_{T}_f100", f"at_{T}_f100_wa"])
def test_where_it_was_kept_there_is_nothing_to_note(name):
    assert find(name).notes == ()


def test_early_stopping_and_old_modules_become_overrides():
    assert "evaluation=early_stopping" in find(f"at_{T}_f100_es").command()
    assert "dataset=cifar10_autoaugment" in find(f"at_{T}_f100", "cifar10").command()
    extra = find(f"at_{T}_f100", "cifar10_500k")
    assert "dataset=cifar10_500k" in extra.command()
    assert "70 %" in extra.notes[0]


@pytest.mark.parametrize(
    ("text", "value"), [("00314", "0.0314"), ("05", "0.5"), ("1", "1"), ("10", "10"), ("00001", "0.0001")]
)
def test_numbers_without_their_point_are_read(text, value):
    assert number(text) == value


@pytest.mark.parametrize("name", ["nonsense", f"at_{T}_f100_wd7", "at_linf_gd_normalized_lr0007_mom0_i9_e00314_f100"])
def test_another_name_is_refused(name):
    with pytest.raises(UnknownNameError, match="is not a name"):
        find(name)


def test_an_unknown_module_is_refused():
    with pytest.raises(UnknownNameError, match="cifar10_noaa"):
        find("normal_training", "mnist")


def test_the_script_prints_commands_and_fails_for_unknown_names(capsys):
    assert main([f"at_{T}_f100_ls01"]) == 0
    assert "+experiment=iccv21/label_smoothing_01" in capsys.readouterr().out
    assert main(["nonsense"]) == 1
    assert "is not a name" in capsys.readouterr().err
