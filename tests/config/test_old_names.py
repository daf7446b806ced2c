"""Names generated from the grammar of the released registry: each leads to commands that compose and are valid."""

from __future__ import annotations

import shlex
from itertools import product

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from robustflat.apps import evaluate as _evaluate  # noqa: F401  # registers the root of evaluate.yaml
from robustflat.apps.check import check
from robustflat.apps.config import Root, config_folder, register
from robustflat.apps.evaluate import complete
from robustflat.apps.old_attack_names import LISTS, find_evaluation
from robustflat.apps.rules import check_together
from scripts.find_experiment import UnknownNameError, find, main

one = st.sampled_from
EPSILON = one(["00235", "00275", "00314", "00352"])
RANDOM_XI = one(["1", "075", "05", "04", "03", "025", "02", "01", "005"])
WORST_XI = one(["005", "001", "00075", "0005", "0004", "0003", "00025", "0002", "0001", "000075", "00005", "00001"])


def join(*parts: str | st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*(st.just(p) if isinstance(p, str) else p for p in parts)).map("".join)


T = join("linf_gd_normalized_lr0007_mom0_i", one(["1", "3", "5", "7", "14"]), "_e", EPSILON)
ENDINGS = [
    "", *(f"_b{b}" for b in (4, 8, 16, 32, 64, 256, 512)), "_wa098", "_wa0985", "_wa099",
    "_wa", "_wa_extr", "_wa099_extr_uncal", "_adam", "_esgd1", "_esgd2", "_esgd3", "_esgd5",
    "_late", "_lrf0316", "_lr02", "_lr01", "_lr001", "_const01",
    "_const001", "_const0005", "_cyc", "_cyc2", "_cyc3", "_cyc4", "_nowd", *(f"_wd{d}" for d in ("005", "001", "0005",
    "0001", "00001")), *(f"_ls{v}" for v in ("001", "005", "01", "02", "03", "04", "05")),
    *(f"_ln{v}" for v in ("005", "01", "02", "03", "04", "05")), "_s05", "_s2", "_slog05", "_slog2",
]  # fmt: skip
PREFIXES = [
    "at_pll_", "at_ii_", *(f"{m}{b}_" for m, b in product(("mart", "trades"), (1, 3, 6, 9))),
    *(f"at_ssl{w}_" for w in ("05", "1", "2", "4", "8")), "0005p_at_", "001p_at_", "0015p_at_", "002p_at_",
]  # fmt: skip
SCALING = one(["_lwrl2normalized", "_rl2normalized", "_l2normalized", ""])
AWIT = join(one(["threshold", "simple"]), "_awit_")
POPULATION = one(["_pop1", "_pop3"])
T7 = join("_linf_gd_normalized_lr0007_mom0_i7_e", EPSILON)
TRAINING = st.one_of(
    st.just("normal_training"), join("at_", T), join("at_", T, "_f100", one(ENDINGS)), join(one(PREFIXES), T, "_f100"),
    join("at_tau", one(list("01234")), T7, "_f100"),
    join(AWIT, one(["nonb_l2_gd", "nonb2_l2_gd_normalized"]), SCALING, one(["_lr001_mom0_i", "_lr1_mom0_i"]),
         one(list("135")), "_e", WORST_XI, T7, POPULATION),
    join(AWIT, "nonb_l2_gd_fgsm_lwrl2normalized_e", WORST_XI, T7, POPULATION),
    join(AWIT, "nonb_l2_random_e", RANDOM_XI, T7, POPULATION),
    one(["aa_", "500k_"]).map(lambda p: f"{p}at_linf_gd_normalized_lr0007_mom0_i7_e00314_f100"),
)  # fmt: skip
STEPS = one(["7", "10", "20"])
ATTEMPTS = one(["1", "3", "5", "10", "25"])
INPUT = join("_linf_gd_normalized_lr0007_e", EPSILON, "_i", STEPS, "_at10")
NORMS = one(["", "_nonorm2"])
ATTACKS = st.one_of(
    join("input_linf_gd_normalized_lr0007_mom", one(["0", "09"]), "_i", STEPS, "_e", EPSILON, "_at", ATTEMPTS,
         one(["", "_es", "_train"])),
    join("input_linf_aa_standard_e", EPSILON, one(["", "_train"])),
    join("weight_l2_random", NORMS, one(["", "_filter", "_relative"]), "_e", RANDOM_XI, "_at",
         one(["1", "3", "5", "10", "25", "50"]), one(["", "_test", "_es", "_set", "_train", "_train_set"])),
    join("weight_l2_gd", NORMS, one(["", "_filter", "_relative", "_absolute"]), SCALING, one(["", "_backtrack"]), "_i",
         STEPS, "_lr", one(["00001", "0001", "001", "01", "1", "10"]), "_mom", one(["0", "09"]), "_e", WORST_XI, "_at",
         ATTEMPTS, one(["_test", "_test_test", "_es", "_test_set", "_train_test", "_train_test_set"])),
    join("sequential2_weight_input_l2_random_nonorm2", one(["", "_filter"]), "_e", RANDOM_XI, INPUT,
         one(["_test", "_train_test"])),
    join("joint_weight_input_l2_gd", NORMS, one(["", "_filter", "_relative"]), "_lwrl2normalized_lr",
         one(["0001", "001"]), "_e", WORST_XI, INPUT, one(["_test", "_train_test", "_test_batch"])),
    one(sorted(set(LISTS) - {"cifar10_models"})),
)  # fmt: skip
SLOWLY = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def stored():
    """The configuration of the run that is evaluated."""
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield hydra.compose("train", ["dataset=cifar10", "model=resnet18", "device=cpu"])
    GlobalHydra.instance().clear()


@SLOWLY
@given(name=TRAINING, stopped=st.booleans(), module=one(["cifar10_noaa", "cifar10", "cifar10_500k"]))
def test_every_training_name_leads_to_a_valid_training(stored, name, stopped, module):
    words = shlex.split(find(f"{name}_es" if stopped else name, module).command())
    assert words[:2] == ["python", "train.py"]
    config = hydra.compose("train", words[2:])
    assert check(config) == []
    check_together(config)


def evaluation_of(stored, command: str):
    """The completed evaluation of the first job of a command of evaluate.py."""
    words = shlex.split(command)
    assert words[:2] == ["python", "evaluate.py"]
    many = words[2] == "-m"
    words = [word.partition(",")[0] if many else word for word in words[2 + many :]]
    config = hydra.compose("evaluate", words)
    OmegaConf.set_struct(config, False)
    choices = {w.partition("=")[0]: w.partition("=")[2] for w in words}
    complete(config, stored, choices)
    shared = [key for key in Root.__dataclass_fields__ if key in config]
    assert check(OmegaConf.masked_copy(config, shared)) == [], command
    return config


@SLOWLY
@given(name=ATTACKS, checkpoints=one([None, "all", "50"]))
def test_every_attack_name_leads_to_valid_evaluations(stored, name, checkpoints):
    found = find_evaluation(name, checkpoints)
    assert found is not None and found.commands
    for command in found.commands:
        config = evaluation_of(stored, command)
        assert config.evaluation.attacks or config.evaluation.measures
        assert checkpoints is None or config.checkpoints is not None


MEANT = {
    "input_linf_gd_normalized_lr0007_mom09_i20_e00352_at25_train": {
        "attacks.pgd20.steps": 20, "attacks.pgd20.restarts": 25, "attacks.pgd20.momentum": 0.9, "epsilon": 9 / 255,
        "train": "train[:1000]", "test": None,
    },
    "input_linf_gd_normalized_lr0007_mom0_i7_e00314_at5_es": {"attacks.pgd20.restarts": 5, "test": "test[-500:]"},
    "input_linf_aa_standard_e00314": {"attacks.autoattack.version": "standard", "test": "test[:1000]"},
    "weight_l2_random_nonorm2_filter_e025_at50_test": {
        "measures.average_clean.ball.radius": 0.25, "measures.average_clean.ball.grouping": "filter",
        "measures.average_clean.trials": 50, "measures.average_clean.sampling": "sphere", "flatness": "test[:1000]",
    },
    "weight_l2_gd_nonorm2_lwrl2normalized_i20_lr001_mom0_e000075_at10_test_test": {
        "measures.worst_clean.ball.radius": 0.00075, "measures.worst_clean.steps": 20,
        "measures.worst_clean.weight_step": 0.01, "measures.worst_clean.restarts": 10,
    },
    "weight_l2_gd_absolute_i7_lr1_mom0_e5_at1_es": {
        "measures.worst_clean.ball.relative": False, "measures.worst_clean.norm_layers": True,
        "flatness": "test[-500:]",
    },
    "sequential2_weight_input_l2_random_nonorm2_e05_linf_gd_normalized_lr0007_e00314_i20_at10_test": {
        "measures.average_robust.ball.radius": 0.5, "measures.average_robust.attack.steps": 20,
    },
    "joint_weight_input_l2_gd_lwrl2normalized_lr001_e0003_linf_gd_normalized_lr0007_e00275_i10_at10_test_batch": {
        "measures.worst_robust.ball.radius": 0.003, "measures.worst_robust.steps": 10, "flatness": "test[-100:]",
        "measures.worst_robust.input_ball.epsilon": 7 / 255,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_an_attack_name_means_what_it_says(stored, name):
    (command,) = find_evaluation(name).commands
    config = evaluation_of(stored, command)
    for key, value in MEANT[name].items():
        assert OmegaConf.select(config.evaluation, key) == (value if value is None else pytest.approx(value)), key


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("weight_l2_gd_nonorm2_lwrl2normalized_i7_lr001_mom0_e001_at1_train_test_set", "in spite of its name"),
        ("weight_l2_gd_nonorm2_l2normalized_i7_lr001_mom09_e001_at1_test", "momentum or backtracking"),
        ("weight_l2_random_relative_e05_at10", "share of all parameters"),
        ("input_linf_aa_standard_e00314_train", "no Square"),
        ("input_linf_gd_normalized_lr0007_mom0_i7_e00314_at5_es", "last 500 test examples"),
        ("cifar10_models", "74 rows"),
    ],
)
def test_where_an_attack_name_was_not_kept_a_sentence_says_so(name, text):
    assert any(text in note for note in find_evaluation(name).notes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("at_linf_gd_normalized_lr0007_mom0_i7_e00314_f100_wd07", "'wd07' is in no name; nearest: wd0"),
        ("cifar10_benchmrk", "Did you mean 'cifar10_benchmark'?"),
        ("input_linf_gd_normalized_lr0007_mom0_i8_e00314_at10", "'i8' is in no name"),
        ("f100_at", "not in this order"),
    ],
)
def test_an_unknown_name_gets_the_nearest_valid_parts(name, text):
    with pytest.raises(UnknownNameError, match="is not a name") as error:
        find(name)
    assert text in str(error.value)


def test_the_script_answers_for_all_kinds_and_for_snapshots(capsys):
    name = "at_linf_gd_normalized_lr0007_mom0_i7_e00314_f100_wd005"
    assert main([name, "cifar10_benchmark", "--epochs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "python train.py +experiment=iccv21/weight_decay_005"
    assert "+experiment=iccv21_released/weight_decay" in lines[2]
    assert sum("checkpoints=all" in line for line in lines) == 4
    assert main(["input_linf_aa_standard_e00314", "--epoch", "50"]) == 0
    assert "checkpoints=50" in capsys.readouterr().out
