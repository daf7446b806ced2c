"""Files and settings made by somebody who means harm: nothing is executed, nothing outside the run folder written.

Every attack below, if it worked, would create the canary file. docs/security.md lists them.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from robustflat.apps.check import TRUSTED, check, refuse, resolve_target
from robustflat.apps.config import _safe_name
from robustflat.apps.surrogates import surrogate_of
from robustflat.data.folders import ImageFolder
from robustflat.data.hdf5 import read_images
from robustflat.data.safe_pickle import load_arrays
from robustflat.errors import CheckpointError, DataError, UserError
from robustflat.models.pickled import state_dict_of
from robustflat.store.results import ResultStore
from robustflat.training.checkpoint import load
from tests.integration.conftest import TINY, only_run


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that must not exist at the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something was executed"


class Payload:
    """Unpickling it creates the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def test_the_canary_can_sing(tmp_path):
    """The attacks below are real: the ordinary unpickler falls for them."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "sings")))
    assert (tmp_path / "sings").exists()


def bare(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def zipped(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": 1, "meta": {}, "parts": {"model": Payload(canary)}}, buffer)
    return buffer.getvalue()


def old_format(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": Payload(canary)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def script_archive(canary: Path) -> bytes:
    """Looks like TorchScript, which torch.load would hand to another loader."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/constants.pkl", bare(canary))
        archive.writestr("archive/data.pkl", bare(canary))
        archive.writestr("archive/version", "6\n")
    return buffer.getvalue()


FILES = [bare, zipped, old_format, script_archive]


@pytest.mark.parametrize("make", FILES)
def test_a_checkpoint_executes_nothing(tmp_path, canary, make):
    (tmp_path / "last.pt").write_bytes(make(canary))
    with pytest.raises(CheckpointError):
        load(tmp_path / "last.pt")


@pytest.mark.parametrize("make", FILES)
def test_a_resumed_run_executes_nothing(cli, tmp_path, canary, make):
    assert cli(*TINY).code == 0
    run = only_run(tmp_path)
    (run / "DONE").unlink()
    for name in ("last.pt", "previous.pt"):
        (run / "checkpoints" / name).write_bytes(make(canary))
    answer = cli(*TINY)
    assert answer.code == 1
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("make", FILES)
def test_foreign_weights_execute_nothing(tmp_path, canary, make):
    (tmp_path / "net.pt").write_bytes(make(canary))
    with pytest.raises(UserError):
        state_dict_of(tmp_path / "net.pt")


def test_a_pickled_data_set_executes_nothing(tmp_path, canary):
    (tmp_path / "data.pickle").write_bytes(pickle.dumps({"data": Payload(canary)}))
    with pytest.raises(DataError, match="Nothing was run"):
        load_arrays(tmp_path / "data.pickle")


def test_files_nested_without_end_are_damaged_files(cli, cli_of, tmp_path):
    assert cli(*TINY, "trainer.epochs=1", "attack.steps=1").code == 0
    run = only_run(tmp_path)
    config = (run / "config.yaml").read_bytes()
    for name in ("config.yaml", "identity.yaml", "ledger.json", "metrics.jsonl", "provenance.json", "results.json"):
        (run / name).write_text("[" * 3000 + "\n")
    evaluate = ["evaluate", f"run={run}", "evaluation=smoke"]
    answers = [cli_of("runs"), cli_of(*evaluate)]
    (run / "config.yaml").write_bytes(config)
    for answer in (*answers, cli_of(*evaluate)):
        assert "Traceback" not in answer.err and "RecursionError" not in answer.err, answer.err


TARGETS = [
    "os.system", "subprocess.run", "builtins.eval", "builtins.exec", "posix.system", "shutil.rmtree",
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.utils.cpp_extension.load_inline", "torch.os.system",
    "torch.serialization.os.system", "torchvision.io.read_file", "torchvision.datasets.utils.os.system",
    "robustflat.apps.main.main", "robustflat.apps.run_folder.subprocess.run",
    "robustflat.training.checkpoint.os.system",
    "robustflat.data.hdf5.os.system", "robustflat.loggers.wandb.importlib.import_module", "hydra.utils.get_method",
    "torch.nn.modules.module.torch.os.system", "torch.utils.data.dataloader.os.system", "robustflat..os.system",
    "", ".", "os", "robustflat.models.small.torch.load", "torch.fx.graph_module._exec_with_source", "torch.save",
    "torch.from_file", "torch.utils.benchmark.utils.cpp_jit.compile_timeit_template", "torchvision.utils.save_image",
    "torch.nn.attention._fa4._fa4_import_module", "torch.nn.utils._deprecation_utils.lazy_deprecated_import",
    "torchvision.models._api.WeightsEnum.get_state_dict", "torchvision.models.resnet.WeightsEnum.get_state_dict",
    "torch.nn.Module.register_forward_hook", "robustflat.models.external.optional_package",
    "robustflat.data.hdf5.write_array", "robustflat.data.sources.write_set", "robustflat.data.prepare.prepare",
    "robustflat.data.downloads.fetch_mnist", "robustflat.flatness.landscape_result.LandscapeResult.save",
    "robustflat.attacks.ensemble_progress.Progress", "robustflat.models.profiling.StepProfiler",
    "robustflat.training.profiling.Profiling", "robustflat.loggers.ledger.LedgerLogger", "robustflat.ranks.joined",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_no_target_leads_out_of_the_trusted_packages(target):
    with pytest.raises(UserError):
        resolve_target(target, TRUSTED)


def test_text_in_a_configuration_is_never_run_as_code(canary):
    source = f"import os; os.system('touch {canary}')"
    node = {"_target_": "torch.fx.graph_module._exec_with_source", "src": source, "globals": {}}
    instantiate(node, _convert_="all")  # the attack works without the check
    assert canary.exists()
    canary.unlink()
    with pytest.raises(UserError, match="outside the trusted packages"):
        refuse(check(OmegaConf.create({"model": node})))


def test_weights_of_torchvision_do_not_come_from_a_place_of_the_configurations_choice(tmp_path, canary):
    torch.save(Payload(canary), tmp_path / "evil.pth")
    weights = {
        "_target_": "torchvision.models.resnet.Weights",
        "url": (tmp_path / "evil.pth").as_uri(),
        "transforms": {"_target_": "torch.nn.Identity"},
        "meta": {},
    }
    method = {"_target_": "torchvision.models.resnet.WeightsEnum.get_state_dict", "self": weights, "progress": False}
    node = {**method, "model_dir": str(tmp_path)}
    instantiate(node)  # the attack works without the check
    assert canary.exists()
    canary.unlink()
    with pytest.raises(UserError, match="method of objects"):
        refuse(check(OmegaConf.create({"model": node})))


@pytest.mark.parametrize(
    "node",
    [
        "{_target_: robustflat.training.callbacks.Snapshots, folder: /tmp}",
        "{_target_: robustflat.training.callbacks.SaveLast, folder: ../..}",
        "{_target_: robustflat.loggers.tensorboard.TensorboardLogger, folder: /tmp}",
        "{_target_: robustflat.loggers.wandb.WandbLogger, _partial_: true, folder: /tmp}",
    ],
)
def test_a_configuration_does_not_choose_another_folder_to_write_into(node):
    with pytest.raises(UserError, match="files go into the run's folder"):
        refuse(check(OmegaConf.create(f"{{trainer: {{callbacks: {{one: {node}}}}}}}")))


def test_a_run_folder_does_not_say_whom_to_trust(tmp_path, canary):
    model = {"_target_": "os.system", "command": f"touch {canary}"}
    stored = {"model": model, "dataset": {"channels": 1, "classes": 2}, "seed": 0, "trusted_packages": ["os", "posix"]}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(stored)))
    ours = OmegaConf.create({"dataset": stored["dataset"], "trusted_packages": [], "device": "cpu"})
    with pytest.raises(UserError, match="outside the trusted packages"):
        surrogate_of(tmp_path, ours)


@pytest.mark.parametrize("target", ["os.system", "torch.os.system", "subprocess.check_output"])
def test_a_target_on_the_command_line_is_not_called(cli, tmp_path, canary, target):
    node = f"trainer.loss={{_target_:{target},command:'touch {canary}'}}"
    answer = cli(*TINY, node)
    assert answer.code == 1
    assert "Traceback" not in answer.err


RESOLVERS = [
    "name='${oc.create:{_target_:os.system}}'",
    "name='${eval:1}'",
    "name='${oc.decode:\"{_target_: os.system}\"}'",
    "trainer.epochs='${python:__import__}'",
]


@pytest.mark.parametrize("override", RESOLVERS)
def test_resolvers_execute_nothing(cli, canary, override):
    answer = cli(*TINY, override)
    assert "Traceback" not in answer.err


NAMES = ["../../escaped", "/tmp/escaped", "..", ".", "a/../../b", "$(touch canary)", "`touch canary`",
         "a;touch canary", "a|b", "a\\b", "a\nb", "~root", "-rf",
         "x" * 300, "<script>alert(1)</script>", "CON", "é/ü", "a\0b"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_harmless_part_of_a_path(tmp_path, name):
    safe = _safe_name(name)
    assert (tmp_path / "outputs" / safe).resolve().parent == tmp_path / "outputs"
    assert not set(safe) & set("/\\$`;|<>&\n\0 ")
    assert not safe.startswith(("-", "."))
    (tmp_path / safe).mkdir()


@pytest.mark.parametrize("name", ["../../escaped", "$(touch canary)", ";touch canary"])
def test_nothing_outside_the_outputs_folder_is_written(cli, tmp_path, canary, name):
    answer = cli(*TINY, "trainer.epochs=1", f"name='{name}'", "outputs=inside/outputs")
    assert answer.code == 0, answer.err
    assert {p.name for p in tmp_path.iterdir()} == {"inside"}
    assert {p.name for p in (tmp_path / "inside").iterdir()} == {"outputs"}
    assert len(list((tmp_path / "inside" / "outputs").glob("*/*/DONE"))) == 1


def external_link(path: Path, secret: Path) -> None:
    with h5py.File(path, "w") as file:
        file["tensor"] = h5py.ExternalLink(str(secret), "tensor")


def soft_link(path: Path, secret: Path) -> None:
    with h5py.File(path, "w") as file:
        file["other"] = np.zeros((1, 2, 2, 1), np.uint8)
        file["tensor"] = h5py.SoftLink("/other")


def virtual(path: Path, secret: Path) -> None:
    layout = h5py.VirtualLayout(shape=(1, 2, 2, 1), dtype=np.uint8)
    layout[:] = h5py.VirtualSource(str(secret), "tensor", shape=(1, 2, 2, 1))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("tensor", layout)


def external_storage(path: Path, secret: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("tensor", (1, 2, 2, 1), np.uint8, external=[(str(secret), 0, 4)])


def absurd(path: Path, secret: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("tensor", (10**9, 10**4, 10**4, 3), np.uint8, chunks=(1, 100, 100, 3))


def bomb(path: Path, secret: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("tensor", (10**6, 100, 100, 1), np.uint8, chunks=(1, 100, 100, 1))


@pytest.mark.parametrize("make", [external_link, soft_link, virtual, external_storage, absurd, bomb])
def test_a_data_file_leads_nowhere_and_claims_nothing(tmp_path, make):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["tensor"] = np.full((1, 2, 2, 1), 99, np.uint8)
    make(tmp_path / "train_images.h5", tmp_path / "secret.h5")
    with pytest.raises(DataError):
        read_images(tmp_path / "train_images.h5")


@pytest.mark.parametrize("link", ["external", "soft"])
def test_a_results_file_leads_nowhere(tmp_path, link):
    ResultStore(tmp_path / "results.h5").write("last/test", {"labels": np.zeros(3)}, {"key": "k"})
    with h5py.File(tmp_path / "results.h5", "r+") as file:
        place = h5py.ExternalLink("secret.h5", "/") if link == "external" else h5py.SoftLink("/last")
        file["last/test/clean"] = place
    with pytest.raises(DataError):
        ResultStore(tmp_path / "results.h5").names()


def image_root(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_an_image_folder_does_not_lead_out(tmp_path):
    root = image_root(tmp_path)
    (tmp_path / "secret.png").write_bytes((root / "a" / "0.png").read_bytes())
    (root / "a" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="never followed"):
        ImageFolder(str(root), size=8)()


def test_a_linked_class_folder_does_not_lead_out(tmp_path):
    root = image_root(tmp_path)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "0.png").write_bytes((root / "a" / "0.png").read_bytes())
    (root / "c").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError):
        ImageFolder(str(root), size=8)()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch canary) (w) file\n",
        b"\x89PNG\r\n",
    ],
    ids=["empty", "text", "postscript", "torn"],
)
def test_what_is_no_image_is_named_and_starts_no_program(tmp_path, canary, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    root = image_root(tmp_path)
    (root / "a" / "0.png").write_bytes(content)
    with pytest.raises(DataError, match=r"0\.png"):
        ImageFolder(str(root), size=8)()


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    root = image_root(tmp_path)
    Image.new("1", (20_000, 20_000)).save(root / "a" / "0.png")
    assert (root / "a" / "0.png").stat().st_size < 100_000
    with pytest.raises(DataError, match=r"max_pixels|bomb"):
        ImageFolder(str(root), size=8)()
