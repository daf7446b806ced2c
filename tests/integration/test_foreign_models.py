"""scripts/convert_checkpoint.py, then evaluate.py: networks of other programs from file to figures."""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
import torch
import torchvision
import yaml
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from robustflat.apps.main import run_application
from robustflat.data.sources import Synthetic
from robustflat.models.external import timm_network
from robustflat.training.checkpoint import load
from scripts.convert_checkpoint import main
from tests.integration.conftest import Answer
from tests.unit.models.released import forward, random_state

DATA = ("dataset=synthetic", "dataset.source.test_count=24", "dataset.source.count=24", "device=cpu")
SMOKE = (
    "evaluation=smoke",
    "evaluation.test='test[:24]'",
    "evaluation.train=null",
    "evaluation.flatness=null",
)


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.fixture
def convert(tmp_path, monkeypatch, capfd) -> Callable[..., Answer]:
    """convert(*arguments) runs the script in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Answer:
        capfd.readouterr()
        return Answer(main(list(arguments)), *capfd.readouterr())

    return call


@pytest.fixture
def evaluated(tmp_path, monkeypatch, capfd):
    """evaluated(*arguments) runs `evaluate.py checkpoint=net.pt` and gives clean logits and the provenance."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[torch.Tensor, dict]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "checkpoint=net.pt", *DATA, *SMOKE, *arguments])
        run_application("evaluate")
        (path,) = tmp_path.glob("outputs/net/*/results.h5")
        assert "must never be printed" not in "".join(capfd.readouterr())
        with h5py.File(path) as file:
            assert file["last/test[:24]/attacks/pgd20/logits"][()].shape == (1, 24, 10)
            logits = torch.from_numpy(file["last/test[:24]/clean/logits"][()])
        return logits, json.loads((path.parent / "provenance.json").read_text())

    return call


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1] and labels of the test split of `DATA`."""
    source = Synthetic(classes=10, size=16, channels=3, count=24, test_count=24, noise=0.1, seed=0)
    x, y = source()["test"].take(torch.arange(24))
    return x / 255, y


def checked(answer: Answer, logits: torch.Tensor) -> None:
    """The self-check has counted the correct ones among these logits."""
    correct = int((logits.argmax(1) == images()[1]).sum())
    assert answer.code == 0, answer.err
    assert f"self-check: clean accuracy {correct / 24:.4f} ({correct} of 24" in answer.out


def test_a_checkpoint_of_the_released_code_is_converted_checked_and_evaluated(convert, evaluated, tmp_path):
    state = random_state()
    arguments = {"activation": "silu", "normalization": "rebn", "blocks": [1, 1], "scale": 1, "dropout": False}
    content = {
        "model": state, "model_class": "ResNet", "optimizer": {"state": {0: {"buffer": torch.ones(3)}}},
        "scheduler": Hostile(), "epoch": 150, "arguments": arguments, "kwargs": {"whiten": True},
    }  # fmt: skip
    torch.save(content, tmp_path / "classifier.pth.tar", pickle_protocol=2, _use_new_zipfile_serialization=False)
    expected = forward(state, images()[0], activation="silu")
    share = float((expected.argmax(1) == images()[1]).float().mean())
    check = ("--check", *DATA, "--expected", f"{share:.4f}", "--tolerance", "0.0001")
    answer = convert("classifier.pth.tar", "net.pt", "--layout", "auto", *check)
    checked(answer, expected)
    assert "must never be printed" not in answer.out + answer.err
    assert "layout released" in answer.out
    checked(convert("classifier.pth.tar", "without_layout.pt", *check), expected)
    logits, provenance = evaluated()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    record = provenance["converted"]
    assert (record["layout"], record["source"], record["count"]) == ("released", "classifier.pth.tar", 24)
    assert record["expected_accuracy"] == pytest.approx(share, abs=1e-4)
    assert len(record["sha256"]) == 64


def test_options_about_a_network_are_not_ignored_where_the_layout_is_not_known(convert, tmp_path):
    torch.save({"0.weight": torch.zeros(2, 3)}, tmp_path / "weights.pt")
    for option in (["--check", *DATA], ["--mean", "0.5"], ["--architecture", "resnet18"]):
        answer = convert("weights.pt", "net.pt", *option)
        assert answer.code == 1
        assert "the names do not tell the layout" in answer.err
        assert not (tmp_path / "net.pt").exists()
    assert convert("weights.pt", "net.pt").code == 0


def test_an_accuracy_that_is_not_the_expected_one_is_an_error(convert, tmp_path):
    torch.save(random_state(), tmp_path / "foreign.pt")
    answer = convert("foreign.pt", "net.pt", "--layout", "released", "--check", *DATA, "--expected", "0.95")
    assert answer.code == 1
    assert "not the expected one" in answer.err
    assert "expected 0.9500" in answer.err
    assert not (tmp_path / "net.pt").exists()


@pytest.mark.parametrize("layout", ["torchvision", "auto"])
def test_a_network_of_torchvision(convert, evaluated, tmp_path, layout):
    torch.manual_seed(0)
    architecture = "shufflenet_v2_x0_5" if layout == "torchvision" else "resnet18"
    network = torchvision.models.get_model(architecture, num_classes=10).eval()
    torch.save({"state_dict": {f"module.{n}": v for n, v in network.state_dict().items()}}, tmp_path / "foreign.pt")
    named = ("--architecture", architecture) if layout == "torchvision" else ()
    standard = ("--mean", "0.4", "0.5", "0.6", "--std", "0.2", "0.3", "0.4")
    answer = convert("foreign.pt", "net.pt", "--layout", layout, *named, *standard, "--check", *DATA)
    with torch.no_grad():
        x = torchvision.transforms.functional.normalize(images()[0], [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
        expected = network(x)
    checked(answer, expected)
    if layout == "torchvision":
        torch.testing.assert_close(evaluated()[0], expected, rtol=1e-4, atol=1e-4)


def test_a_network_of_timm_from_safetensors(convert, evaluated, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=10).eval()
    from safetensors.torch import save_file

    save_file(network.state_dict(), tmp_path / "foreign.safetensors")
    answer = convert(
        "foreign.safetensors", "net.pt", "--layout", "timm", "--architecture", "test_resnet", "--check", *DATA
    )
    with torch.no_grad():
        expected = network(images()[0])
    checked(answer, expected)
    assert "unstandardised" in answer.out
    torch.testing.assert_close(evaluated()[0], expected, rtol=1e-4, atol=1e-4)


def test_a_misspelt_network_of_timm_gets_a_suggestion():
    pytest.importorskip("timm")
    from robustflat.errors import UserError

    with pytest.raises(UserError, match="Did you mean resnet18"):
        timm_network(architecture="resnet18x", classes=3)


class Net(nn.Module):
    """Stands for a network of RobustBench: it standardises by constants that its files lack."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.4))
        self.layer = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer((x - self.mu).mean((2, 3)))


@pytest.fixture
def robustbench(monkeypatch):
    """A package of that name whose loader takes a file from the folder, as the real one after downloading."""
    data, threat = enum.Enum("Data", {"c": "cifar10"}), enum.Enum("Threat", {"a": "Linf", "b": "L2"})
    models = types.ModuleType("robustbench.model_zoo.models")
    models.model_dicts = {data.c: {threat.a: {"Somebody2020": {"model": Net}}, threat.b: {}}}
    utils = types.ModuleType("robustbench.utils")

    def load_model(model_name, model_dir, dataset, threat_model):
        net = Net()
        state = torch.load(Path(model_dir) / dataset / threat_model / f"{model_name}.pt")
        net.load_state_dict({**state, "mu": net.mu})
        return net.eval()

    utils.load_model = load_model
    packages = {n: types.ModuleType(n) for n in ("robustbench", "robustbench.model_zoo")}
    for name, module in {**packages, models.__name__: models, utils.__name__: utils}.items():
        monkeypatch.setitem(sys.modules, name, module)


NAMED = ("--layout", "robustbench", "--architecture", "Somebody2020")


@pytest.mark.parametrize("source", ["file", "package"])
def test_an_entry_of_robustbench(convert, evaluated, robustbench, tmp_path, source):
    torch.manual_seed(1)
    network = Net()
    expected = network(images()[0]).detach()
    state = {f"layer.{name}": value for name, value in network.layer.state_dict().items()}
    if source == "file":
        content = {"last": {f"module.{n}": v for n, v in state.items()}, "best": {"module.layer.weight": Hostile()}}
        torch.save(content, tmp_path / "foreign.pt")
        answer = convert("foreign.pt", "net.pt", *NAMED, "--part", "last", "--check", *DATA)
        assert "mu is not in the file" in answer.out
    else:
        folder = tmp_path / "models" / "cifar10" / "Linf"
        folder.mkdir(parents=True)
        torch.save(state, folder / "Somebody2020.pt")
        answer = convert("package", "net.pt", *NAMED, "--check", *DATA)
    checked(answer, expected)
    logits, provenance = evaluated()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    record = provenance["converted"]
    assert (record["architecture"], record["threat_model"]) == ("Somebody2020", "Linf")


def test_the_package_runs_no_pickle(convert, robustbench, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    torch.save({"layer.weight": Hostile()}, folder / "Somebody2020.pt")
    answer = convert("package", "net.pt", *NAMED)
    assert answer.code == 1
    assert "give the file in the place of 'package'" in answer.err
    assert "must never be printed" not in answer.out + answer.err
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    answer = convert("package", "net.pt", *NAMED)
    assert "Unset it" in answer.err
    assert "must never be printed" not in answer.out + answer.err


def test_the_real_package_builds_its_networks():
    pytest.importorskip("geotorch")
    pytest.importorskip("pkg_resources")
    from robustflat.models.external import robustbench_network

    model = robustbench_network(architecture="Wong2020Fast").eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_weights_with_names_of_ours(convert, evaluated, tmp_path):
    from robustflat.models.resnet import resnet_tiny

    torch.manual_seed(2)
    network = resnet_tiny(classes=10, in_channels=3, channels=4, mean=[0.5] * 3, std=[0.25] * 3).eval()
    torch.save({f"old.{name}": value for name, value in network.state_dict().items()}, tmp_path / "foreign.pt")
    model = ("--model", "resnet_tiny", "model.channels=4", "--rename", "old.=")
    answer = convert("foreign.pt", "net.pt", "--layout", "plain", *model, "--check", *DATA)
    expected = network(images()[0]).detach()
    checked(answer, expected)
    torch.testing.assert_close(evaluated()[0], expected, rtol=1e-4, atol=1e-4)
    stored = yaml.safe_load(load(tmp_path / "net.pt").meta["config"])["model"]
    assert (stored["channels"], stored["in_channels"], stored["std"]) == (4, 3, [0.25] * 3)


MISTAKES = {
    "names that do not fit": (["--layout", "torchvision", "--architecture", "resnet18"], ["missing", "unexpected"]),
    "no architecture": (["--layout", "timm"], ["--architecture"]),
    "no layout to be seen": (["--layout", "auto", "--drop", "conv1"], ["do not tell the layout"]),
    "an unknown architecture": (["--layout", "torchvision", "--architecture", "resnet19"], ["Did you mean 'resnet1"]),
    "nothing to rename": (["--layout", "auto", "--rename", "x=y"], ["no name begins with 'x'"]),
    "nothing to drop": (["--layout", "auto", "--drop", "x"], ["nothing to drop"]),
    "two names become one": (["--layout", "auto", "--rename", "whiten.weight=whiten.bias"], ["two names equal"]),
    "an entry without =": (["--layout", "auto", "--rename", "x"], ["OLD=NEW"]),
    "plain without network": (["--layout", "plain"], ["layout plain needs the network"]),
    "plain without data": (["--layout", "plain", "--model", "resnet18"], ["dataset=cifar10"]),
    "an expectation without data": (["--layout", "auto", "--expected", "0.9"], ["--check"]),
    "a part that is not there": (["--layout", "auto", "--part", "ema"], ["no part 'ema'", "conv1.weight"]),
    "data without images of that kind": (["--layout", "auto", "--check", "dataset=digits"], ["images of shape"]),
    "misspelt data": (["--layout", "auto", "--check", "dataset=cifar11"], ["cifar11"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_sentence_and_writes_nothing(convert, tmp_path, name):
    torch.save(random_state(), tmp_path / "foreign.pt")
    arguments, texts = MISTAKES[name]
    answer = convert("foreign.pt", "net.pt", *arguments)
    assert answer.code == 1
    assert answer.err.startswith("error: ")
    for text in texts:
        assert text in answer.err, answer.err
    assert not (tmp_path / "net.pt").exists()


def test_a_file_with_two_networks_asks_which(convert, tmp_path):
    one, two = random_state(seed=0), random_state(seed=1)
    torch.save({"model": one, "ema": two}, tmp_path / "foreign.pt")
    answer = convert("foreign.pt", "net.pt", "--layout", "auto")
    assert answer.code == 1
    assert "2 networks" in answer.err
    assert "--part" in answer.err
    assert convert("foreign.pt", "net.pt", "--layout", "auto", "--part", "ema").code == 0
    weights = load(tmp_path / "net.pt").parts["model"]
    assert torch.equal(weights["head.weight"], two["logits.weight"])
    assert convert("foreign.pt", "net.pt", "--layout", "auto").code == 1  # never overwritten
