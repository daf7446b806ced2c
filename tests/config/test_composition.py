"""Every file under conf/ composes, fits its constructor, and is built without surprise."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from robustflat.apps.build import build
from robustflat.apps.check import check
from robustflat.apps.config import config_folder, digest, identity, run_id, run_name
from robustflat.apps.rules import check_together
from robustflat.errors import UserError
from tests.composing import forgotten

FOLDER = config_folder()
GROUPS = ("dataset", "model", "optimizer", "schedule", "attack", "trainer", "flatness", "evaluation", "logger")
NEEDS = {
    "attack=transfer": ["attack.surrogate=x"],
    "dataset=image_folder": ["dataset.source.root=x"],
    "dataset=arrays": [
        f"dataset.source.{name}=x.npy" for name in ("train_images", "train_labels", "test_images", "test_labels")
    ],
}
CHOICES = [
    f"{group}={path.stem}"
    for group in GROUPS
    for path in sorted((FOLDER / group).glob("*.yaml"))
    if path.stem != "base"
]
NESTED = [
    f"{group}={path.stem}"
    for group in ("trainer/loss", "trainer/gradient")
    for path in sorted((FOLDER / group).glob("*.yaml"))
]
GLOBAL = [
    f"+{group}={path.relative_to(FOLDER / group).with_suffix('')}"
    for group in ("experiment", "sweep")
    for path in sorted((FOLDER / group).rglob("*.yaml"))
    if path.parent.name not in ("iccv21", "iccv21_released") and path.stem != "optuna"  # they have tests of their own
]


def test_there_are_files_in_every_group():
    assert {choice.split("=")[0] for choice in CHOICES} == set(GROUPS)


BUILT = ("attack", "flatness", "schedule", "evaluation")
"""Groups whose files can be built without data or a network."""


@pytest.mark.parametrize("choice", [*CHOICES, *NESTED, *GLOBAL])
def test_every_file_composes_fits_the_constructors_and_can_be_built_where_it_is_small(compose, choice):
    config = compose(choice, *NEEDS.get(choice, ()))
    assert check(config) == []
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    group = choice.split("=")[0]
    if group in BUILT and config[group] is not None:
        assert callable(build(config[group])) or group == "evaluation"


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_file_says_what_it_is(path):
    first = next(line for line in path.read_text().splitlines() if line.strip() and "@package" not in line)
    assert first.startswith("# ") and len(first) > 12


def test_threat_model_follows_the_data_set_and_an_explicit_value_wins(compose):
    assert compose("dataset=cifar10").attack.ball.epsilon == pytest.approx(8 / 255)
    assert compose("dataset=cifar10", "attack=pgd_l2").attack.ball.epsilon == 0.5
    assert compose("dataset=cifar10", "attack.ball.epsilon=${px:9}").attack.ball.epsilon == pytest.approx(9 / 255)


@pytest.mark.parametrize("dataset", ["cifar10", "digits", "mnist"])
def test_the_step_of_fast_training_follows_epsilon(compose, dataset):
    config = compose(f"dataset={dataset}", "attack=fgsm_random_start_linf")
    assert config.attack.step_size == pytest.approx(1.25 * config.dataset.threat.linf.epsilon)
    wider = compose(f"dataset={dataset}", "attack=fgsm_random_start_linf", "attack.ball.epsilon=0.2")
    assert wider.attack.step_size == pytest.approx(0.25)
    assert compose("dataset=cifar10", "attack=fgsm_random_start_linf").attack.step_size == 10 / 255


def test_evaluation_keeps_the_norm_of_training_and_the_radius_of_the_data_set(compose):
    config = compose("attack=pgd_l2", "attack.ball.epsilon=0.1")
    assert config.evaluation.norm == "l2"
    assert config.evaluation.attacks.pgd20.ball.epsilon == config.dataset.threat.l2.epsilon


def test_standard_training_has_no_attack_and_is_evaluated_under_linf(compose):
    config = compose("trainer=standard")
    assert config.attack._target_.endswith("NoAttack")
    assert config.evaluation.norm == "linf"


def test_the_command_line_wins_over_the_attack_of_a_trainer(compose):
    assert compose("trainer=standard", "attack=pgd_l1").attack.ball._target_.endswith("L1Ball")


def test_identity_ignores_where_and_how_but_not_what(compose):
    base = run_id(compose())
    same = (
        "logger=wandb",
        "device=cpu",
        "flatness.trials=3",
        "evaluation=smoke",
        "outputs=elsewhere",
        "threads=1",
        "name=x",
    )
    for override in same:
        assert run_id(compose(override)) == base, override
    for override in (
        "seed=1",
        "trainer.epochs=3",
        "optimizer.lr=0.01",
        "trainer=trades",
        "attack=pgd_l2",
        "dataset.batch_size=8",
    ):
        assert run_id(compose(override)) != base, override


def test_equal_values_are_one_run_however_they_are_written(compose):
    a = run_id(compose("dataset=cifar10", "attack.ball.epsilon=${px:8}"))
    assert a == run_id(compose("dataset=cifar10"))


def test_whole_numbers_are_one_run_with_and_without_a_point(compose):
    a, b = (run_id(compose(f"trainer.loss.label_smoothing={text}")) for text in ("0", "0.0"))
    assert a == b == run_id(compose())
    assert digest({"a": True}) != digest({"a": 1})


def test_bounds_on_memory_decide_no_result_and_change_no_name():
    assert digest({"a": {"top": 3, "memory_budget": 100}}) == digest({"a": {"top": 3}})


def test_compiling_makes_another_run_and_leaving_it_out_none(compose):
    config = compose()
    assert config.trainer.compile == "none"
    base = run_id(config)
    assert run_id(compose("trainer.compile=default")) != base
    del config.trainer.compile  # as in runs from before the option existed
    assert run_id(config) == base


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


def test_run_name_comes_from_the_choices_and_stays_in_one_folder(compose):
    assert run_name(compose("trainer=trades", hydra_node=True)) == "digits-trades"
    for hostile in ("../../etc", "a/b", "..", "a;rm -rf b", "$(x)"):
        name = run_name(compose("name='" + hostile + "'" if "$" not in hostile else "name=x"))
        assert "/" not in name and not name.startswith(".") and ";" not in name and name


def test_plain_run_and_sweep_job_share_one_folder(compose):
    config = compose("seed=3", hydra_node=True)
    assert config.hydra.run.dir == f"{config.hydra.sweep.dir}/{config.hydra.sweep.subdir}"


def test_identity_has_no_machine_in_it(compose):
    values = identity(compose("dataset=cifar10"))
    assert "root" not in values["dataset"]["source"] and "device" not in values["dataset"]


TOGETHER = {
    "model.classes=7": "model.classes=7, but dataset.classes=10",
    "model.in_channels=3": "model.in_channels=3, but dataset.channels=1",
    "dataset.mean=[0.1,0.2]": "dataset.mean has 2 values, but dataset.channels=1",
    "trainer.epochs=0": "trainer.epochs=0",
    "threads=-1": "threads=-1: must be at least 1",
    "threads=99999": "threads=99999: at most 1024",
    "evaluation.norm=l7": "evaluation.norm=l7",
    "flatness=null": "evaluation.flatness",
}


@pytest.mark.parametrize(("override", "message"), TOGETHER.items(), ids=TOGETHER)
def test_values_that_do_not_fit_together_are_named(compose, override, message):
    overrides = (
        [override]
        if override != "evaluation.norm=l7"
        else [override, "evaluation.epsilon=0.1", "evaluation.step_size=0.1"]
    )
    if override == "flatness=null":
        overrides = ["~flatness"]
    with pytest.raises(UserError) as error:
        config = compose(*overrides)
        check_together(config)
    assert message in str(error.value)


def test_trades_without_attack_is_refused(compose):
    with pytest.raises(UserError, match="needs adversarial examples"):
        check_together(compose("trainer=trades", "attack=none"))


def test_no_run_id_looks_like_a_number():
    """Of a thousand hashes about forty would; Hydra would read them as another run, or as infinity."""
    found = {digest({"seed": seed}) for seed in range(1000)}
    assert len(found) == 1000
    for text in found:
        assert len(text) == 8
        with pytest.raises(ValueError):
            float(text)


@pytest.mark.parametrize("dataset", ["cifar10", "mnist", "digits"])
@pytest.mark.parametrize(("attack", "factor"), [("fgsm_linf", 1), ("n_fgsm_linf", 1), ("fgsm_random_start_linf", 1.25)])
def test_single_steps_are_as_long_as_the_data_ask_for(compose, dataset, attack, factor):
    config = compose(f"dataset={dataset}", f"attack={attack}")
    assert config.attack.step_size == factor * config.dataset.threat.linf.epsilon


def test_a_single_step_follows_its_own_ball_wherever_it_stands(compose):
    config = compose("+attack@evaluation.attacks.one=fgsm_linf", "evaluation.attacks.one.ball.epsilon=0.05")
    assert config.evaluation.attacks.one.step_size == 0.05


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["+experiment=robust_overfitting", "trainer=trades", "attack=pgd_l2", "~flatness"],
        ["dataset=cifar10", "+sweep=seeds", "hydra.run.dir=${px:9}", "evaluation=paper", "trainer.epochs=3"],
    ],
)
def test_what_tests_remember_composes_as_hydra_does_alone(compose, overrides):
    remembered = [OmegaConf.to_yaml(compose(*overrides, hydra_node=True)) for _ in range(2)]
    with forgotten():
        assert remembered == [OmegaConf.to_yaml(compose(*overrides, hydra_node=True))] * 2


def test_a_file_that_changes_is_read_again(tmp_path, compose):
    (tmp_path / "setting").mkdir()
    file, added = tmp_path / "setting" / "mine.yaml", f"hydra.searchpath=[{tmp_path}]"
    for seed in (3, 4):
        file.write_text(f"# @package _global_\nseed: {seed}\n")
        assert compose(added, "+setting=mine").seed == seed
