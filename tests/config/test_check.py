"""The signature check: all problems at once, with suggestions, and nothing untrusted imported."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch

import pytest
import torch
from omegaconf import OmegaConf

from robustflat.apps.build import build, choose_device, named_nodes
from robustflat.apps.check import check, require_valid, resolve_target
from robustflat.apps.config import config_folder
from robustflat.errors import UserError


def problems(text: str) -> list[str]:
    return check(OmegaConf.create(text))


def test_all_problems_are_listed_together(compose):
    config = compose("+attack.ball.epsilonn=0.1", "+trainer.epochss=3", "attack.steps=seven")
    with pytest.raises(UserError) as error:
        require_valid(config)
    text = str(error.value)
    assert "3 problems" in text
    assert "LinfBall takes no argument 'epsilonn'. Did you mean 'epsilon'?" in text
    assert "Did you mean 'epochs'?" in text
    assert "attack.steps: expected int, got 'seven' (str)" in text


def test_a_radius_in_pixel_values_is_told_how_to_be_written():
    (found,) = problems("{attack: {_target_: robustflat.geometry.input_ball.LinfBall, epsilon: 8/255}}")
    assert found == "attack.epsilon: expected float, got '8/255' (str). Pixel values are written '${px:8}'."


def test_a_missing_argument_is_named():
    found = problems("{attack: {_target_: robustflat.geometry.input_ball.LinfBall}}")
    assert found == ["attack.epsilon: LinfBall needs this argument and nothing gives it."]


def test_a_partial_may_miss_arguments():
    assert problems("{optimizer: {_target_: robustflat.training.optimizers.sgd, _partial_: true}}") == []


def test_a_question_mark_value_is_asked_for(compose):
    assert any("dataset.source.root: needs a value" in p for p in check(compose("dataset=image_folder")))


TYPES = {
    "steps: 1.5": "expected int",
    "steps: true": "expected int",
    "steps: null": "expected int",
    "step_size: big": "expected float",
    "ball: 3": "expected a node with _target_",
    "ball: null": "expected a node with _target_",
}


@pytest.mark.parametrize(("line", "message"), TYPES.items(), ids=TYPES)
def test_wrong_types_are_named(line, message):
    values = {
        "_target_": "robustflat.attacks.pgd.Pgd",
        "ball": {"_target_": "robustflat.geometry.input_ball.LinfBall", "epsilon": 0.1},
        "steps": 3,
        "step_size": 0.1,
    }
    config = OmegaConf.create({"attack": OmegaConf.merge(values, OmegaConf.create(f"{{{line}}}"))})
    found = check(config)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "shutil.rmtree",
        "hydra.utils.call",
        "pickle.loads",
        "numpy.load",
        "sys.exit",
        "torch.load",
        "torch.save",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "torch.fx.graph_module._exec_with_source",
        "torchvision.datasets.utils.download_url",
    ],
)
def test_a_class_outside_the_trusted_packages_is_refused(target):
    with pytest.raises(UserError, match="outside the trusted packages"):
        resolve_target(target)


@pytest.mark.parametrize(
    "target",
    [
        "robustflat.apps.run_folder.write_text",
        "robustflat.training.checkpoint.save",
        "robustflat.training.callbacks.save",  # the same function by another name
        "robustflat.loggers.jsonl.JsonlLogger",
        "robustflat.store.tables.write_table",
    ],
)
def test_trusted_packages_have_rooms_that_stay_closed(target):
    with pytest.raises(UserError, match="may not be used"):
        resolve_target(target)


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.nn.functional.importlib.import_module",
        "torch.sys.exit",
        "robustflat.data.hdf5.os.remove",
        "torch.nn.functional.has_torch_function",
        "torchvision.models._api.load_state_dict_from_url",
    ],
)
def test_a_trusted_path_that_leads_outside_is_refused(target):
    with pytest.raises(UserError):
        resolve_target(target)


@pytest.mark.parametrize(
    "target",
    ["torch.nn.Linear", "torch.optim.SGD", "torchvision.models.resnet18", "torchvision.transforms.v2.RandomErasing"],
)
def test_layers_optimizers_and_models_of_torch_are_trusted(target):
    assert callable(resolve_target(target))


def test_nothing_is_imported_before_trust_is_checked(tmp_path, monkeypatch):
    (tmp_path / "canary_package.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"trusted_packages=\[canary_package\]"):
        resolve_target("canary_package.Thing")
    assert "canary_package" not in sys.modules


def test_a_named_package_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "my_methods.py").write_text("class Mine:\n    def __init__(self, beta: float = 1.0) -> None: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = OmegaConf.create(
        {"trusted_packages": ["my_methods"], "model": {"_target_": "my_methods.Mine", "beta": "x"}}
    )
    assert check(config) == ["model.beta: expected float, got 'x' (str)."]


@pytest.mark.parametrize(
    "target",
    ["robustflat.attacks.pgd.Pdg", "robustflat.attacks.pdg.Pgd", "robustflat.atacks.pgd.Pgd", "robustflat"],
)
def test_a_path_that_leads_nowhere_is_named(target):
    with pytest.raises(UserError, match="cannot import"):
        resolve_target(target)


def test_a_close_name_is_suggested():
    with pytest.raises(UserError, match="Did you mean 'Pgd'"):
        resolve_target("robustflat.attacks.pgd.Pdg")
    with pytest.raises(UserError, match="Did you mean 'pgd'"):
        resolve_target("robustflat.attacks.pdg.Pgd")


def test_a_constructor_error_names_its_node(compose):
    with pytest.raises(UserError, match=r"(?s)ball.*0\.03137"):
        build(compose("attack.ball.epsilon=8").attack)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:77", "is not there"), ("gpu", "is not a device"), ("meta", "is not supported")],
)
def test_devices_that_are_not_there_are_named(device, message):
    with pytest.raises(UserError, match=message):
        choose_device(device)


def test_a_chosen_card_is_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [choose_device(name) for name in ("cuda:1", "cuda", "cpu")] == ["cuda:1", "cuda", "cpu"]
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("target", "key", "value", "good"),
    [
        ("robustflat.training.schedules.multistep", "fractions", ["a", "b"], [0.5, 1]),
        ("robustflat.data.dataset.Dataset", "threat", {"linf": {"epsilon": "x"}}, {"linf": {"epsilon": 0.1}}),
        ("robustflat.evaluation.plan.EvaluationPlan", "restarts", {"pgd20": "x"}, {"pgd20": 3}),
    ],
)
def test_entries_of_lists_and_mappings_are_checked_too(target, key, value, good):
    node = {"_target_": target, "_partial_": True}
    (problem,) = check(OmegaConf.create({"schedule": {**node, key: value}}))
    assert problem.startswith(f"schedule.{key}: expected ")
    assert check(OmegaConf.create({"schedule": {**node, key: good}})) == []


@pytest.mark.parametrize("callbacks", [{}, {"callbacks": None}, {"callbacks": {"one": None}}])
def test_a_trainer_may_have_no_callbacks(callbacks):
    assert named_nodes(OmegaConf.create({"trainer": callbacks}), "callbacks") == {}


def test_a_network_without_a_rotation_head_is_told_who_asks_for_one(compose):
    (problem,) = check(compose("trainer=self_supervised", "model=lenet"))
    assert "trainer=self_supervised asks for it" in problem
    files = (config_folder() / "model").glob("*.yaml")
    with_a_head = {path.stem for path in files if "\nauxiliary:" in path.read_text()}
    named = re.search(r"apart: (.+) have one", problem)[1].replace(" and ", ", ").split(", ")
    assert all(any(fnmatch(name, pattern) for pattern in named) for name in with_a_head)
    assert all(any(fnmatch(name, pattern) for name in with_a_head) for pattern in named)
