"""Each ready study is composed as its command composes it: every run is valid, new, and where train.py puts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import robustflat.apps.study
from robustflat.apps.config import config_folder, register, run_id, run_name
from robustflat.apps.study_file import StudyFile, read_study
from robustflat.apps.study_runs import StudyRun, compose_passes, expand
from robustflat.errors import UserError

NAMES = sorted(path.stem for path in (config_folder() / "study").glob("*.yaml"))
AT_LEAST = {"digits_quick": 12, "digits_methods": 12, "digits_full": 25, "iccv21": 74, "iccv21_small": 73, "epochs": 3}
Read = Callable[..., StudyFile]


@pytest.fixture
def read() -> Iterator[Read]:
    """read(name, *overrides) -> the study; inside, configurations can be composed."""
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):

        def composed(name: str, *overrides: str) -> StudyFile:
            config = hydra.compose("study", [f"study={name}", *overrides])
            return read_study(OmegaConf.to_container(config.study, resolve=True), name)

        yield composed
    GlobalHydra.instance().clear()


def small(study: StudyFile, count: int) -> StudyFile:
    """The study with its first experiments only."""
    return StudyFile(**{**vars(study), "experiments": study.experiments[:count]})


def runs_of(study: StudyFile) -> list[StudyRun]:
    return expand(study, compose_passes(study, []), [])


def test_the_studies_are_those_that_were_promised():
    assert set(NAMES) == set(AT_LEAST)
    assert robustflat.apps.study.FOLDER not in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_study_has_its_experiments_and_the_first_of_them_compose(read, name):
    study = read(name)
    assert len(study.experiments) >= AT_LEAST[name]
    assert len({e.label for e in study.experiments}) == len(study.experiments)
    runs = runs_of(small(study, 2))
    assert len(runs) == 2 * len(study.seeds)
    assert all(run.pieces > 0 for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_of_a_study_is_valid_and_no_two_are_the_same(read, name):
    study = read(name)
    runs = runs_of(study)
    assert len({run.folder for run in runs}) == len(study.experiments) * len(study.seeds)


def test_all_of_digits_quick_compose(read):
    assert len(runs_of(read("digits_quick"))) == 12


def test_a_run_has_the_folder_that_train_gives_it(read):
    for run in runs_of(small(read("digits_methods"), 3)):
        config = hydra.compose("train", list(run.overrides), return_hydra_config=True)
        assert run.folder.parts == ("outputs", run_name(config), run_id(config))


def test_runs_of_one_seed_come_together(read):
    seeds = [run.seed for run in runs_of(small(read("digits_methods"), 2))]
    assert seeds == sorted(seeds)


def test_attacks_and_measures_are_added_to_evaluations(read):
    study = small(read("digits_quick", "study.attacks=[autoattack]", "study.measures=[worst_clean]"), 1)
    last = compose_passes(study, [])[0].config.evaluation
    assert list(last.attacks) == ["pgd20", "autoattack"]
    assert list(last.measures) == ["average", "worst", "worst_clean"]
    assert last.measures.worst.get("loss", "robust") == "robust"
    assert last.measures.worst_clean.loss == "clean"


NODE = {
    "experiments": {"a": {"overrides": ["trainer=at"]}},
    "seeds": [0],
    "evaluations": {"last": ["evaluation=smoke"]},
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experiment": {}}, ["experiment", "Did you mean 'experiments'?"]),
        ({"experiments": {}}, ["experiments is empty"]),
        ({"experiments": {"a": {"override": []}}}, ["experiments.a", "overrides"]),
        ({"experiments": {"a": {"overrides": "trainer=at"}}}, ["experiments.a.overrides", "must be a list"]),
        ({"experiments": {"a": {"overrides": ["seed=3"]}}}, ["experiments.a", "seed=3"]),
        ({"experiments": {"a": {"part": "ema"}}}, ["part", "average, model"]),
        ({"experiments": ["a"]}, ["experiments must be a mapping"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [1, 1]}, ["seeds"]),
        ({"seeds": [-1]}, ["seeds"]),
        ({"seeds": ["x"]}, ["seeds"]),
        ({"common": "trainer.epochs=1"}, ["common", "must be a list"]),
        ({"evaluations": {}}, ["evaluations is empty"]),
        ({"evaluations": {"last": ["part=average"]}}, ["evaluations.last", "part=average", "run, part"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(changes, words):
    with pytest.raises(UserError) as error:
        read_study({**NODE, **changes}, "mine")
    for word in ["study mine", *words]:
        assert word in str(error.value)


def test_a_missing_label_is_the_name_and_a_missing_family_the_label():
    (experiment,) = read_study(NODE, "mine").experiments
    assert (experiment.label, experiment.family, experiment.part) == ("a", "a", "model")


def test_every_wrong_experiment_is_named_with_what_hydra_says(read):
    experiments = {
        "fine": {"overrides": ["trainer=at"]},
        "typo": {"overrides": ["trainer=tades"]},
        "key": {"overrides": ["trainer.loss.bta=6"]},
        "value": {"overrides": ["attack.steps=seven"]},
    }
    with pytest.raises(UserError) as error:
        runs_of(read_study({**NODE, "experiments": experiments}, "mine"))
    text = str(error.value)
    assert text.startswith("3 of 4 experiments")
    for words in ("experiment 'typo'", "trades", "experiment 'key'", "bta", "experiment 'value'", "expected int"):
        assert words in text
    assert "fine" not in text.split("experiments cannot")[1].replace("defined", "")


def test_two_experiments_that_are_the_same_run_are_refused(read):
    experiments = {
        "one": {"overrides": ["trainer=trades"]},
        "two": {"overrides": ["trainer=trades", "trainer.loss.beta=6"]},
    }
    with pytest.raises(UserError, match="'one' and 'two' are the same"):
        runs_of(read_study({**NODE, "experiments": experiments}, "mine"))


def test_an_evaluation_that_does_not_compose_or_fit_is_named(read):
    with pytest.raises(UserError, match="evaluation 'last'"):
        runs_of(read_study({**NODE, "evaluations": {"last": ["evaluation=smok"]}}, "mine"))
    with pytest.raises(UserError, match=r"(?s)experiment 'a': evaluation 'last'.*steps"):
        wrong = {"last": ["evaluation=smoke", "evaluation.attacks.pgd20.steps=x"]}
        runs_of(read_study({**NODE, "evaluations": wrong}, "mine"))
