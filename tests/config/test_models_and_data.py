"""Every model file builds a network that fits every kind of data; every data file reads its format."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from robustflat.apps.build import build
from robustflat.apps.config import config_folder
from robustflat.data.dataset import Dataset
from robustflat.errors import UserError
from robustflat.rng import Streams, generator_for
from tests.config.conftest import Compose

MODELS = sorted(path.stem for path in (config_folder() / "model").glob("*.yaml"))
DATASETS = sorted(path.stem for path in (config_folder() / "dataset").glob("*.yaml"))
SHAPES = {"digits": (1, 8), "mnist": (1, 28), "cifar100": (3, 32), "imagenette": (3, 128)}
COLOUR_ONLY = {"external": "mean and std need one number per channel", "torchvision": "mean and std need one number"}
OPTIONAL = {"timm": "timm", "robustbench": "geotorch"}
"""Files of networks from packages that not everybody has, and what must be there to import them."""


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> None:
    """Skip what needs a package that is not there."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("model")
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])


def needed(model: str, size: int) -> list[str]:
    return ["model.patch=16"] if model == "vit" and size > 64 else []


@pytest.mark.parametrize("dataset", SHAPES)
@pytest.mark.parametrize("model", MODELS)
def test_every_network_fits_grey_and_colour_images_of_every_size(compose: Compose, model: str, dataset: str) -> None:
    channels, size = SHAPES[dataset]
    config = compose(f"dataset={dataset}", f"model={model}", *needed(model, size))
    if model in COLOUR_ONLY and channels == 1:
        with pytest.raises(UserError, match=COLOUR_ONLY[model]):
            build(config.model)
        return
    if model == "robustbench" and dataset != "cifar10":
        return  # its networks are for the data of their own benchmark
    with torch.device("meta"):  # shapes only: some of the networks have hundreds of millions of parameters
        network = build(config.model)
        logits = network(torch.empty(2, channels, size, size))
    assert logits.shape == (2, config.dataset.classes)
    assert network.classes == config.dataset.classes


@pytest.mark.parametrize("model", [m for m in MODELS if not m.startswith("wrn")])
def test_every_network_of_moderate_size_runs(compose: Compose, model: str) -> None:
    wrapped = model in {"external", "timm"}
    small = ["model.channels=4"] if "channels" in compose(f"model={model}").model and not wrapped else []
    network = build(compose("dataset=cifar10", f"model={model}", *small).model).eval()
    logits = network(torch.rand(2, 3, 32, 32, generator=generator_for(0, model)))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("model", MODELS)
def test_the_number_of_parameters_in_a_comment_is_right(compose: Compose, model: str) -> None:
    comment = (config_folder() / "model" / f"{model}.yaml").read_text().splitlines()[0]
    stated = re.search(r"([\d.]+) million parameters", comment)
    if stated is None:
        assert "million" not in comment
        return
    with torch.device("meta"):
        network = build(compose("dataset=cifar10", f"model={model}").model)
    assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}" == stated.group(1)


def test_an_initialisation_of_ones_own_can_be_added(compose: Compose) -> None:
    node = "+model.initialization={_target_: robustflat.models.initialize.Initialization, scale: 0.5, seed: 1}"
    half, whole = (build(compose(text).model) for text in (node, node.replace("0.5", "1.0")))
    torch.testing.assert_close(2 * half.head.weight, whole.head.weight)


def test_another_network_of_torchvision_takes_one_argument(compose: Compose) -> None:
    choice = ["dataset=cifar10", "model=external", "model.network._target_=torchvision.models.mobilenet_v3_small"]
    with torch.device("meta"):
        assert build(compose(*choice).model)(torch.empty(2, 3, 64, 64)).shape == (2, 10)


# Fixtures in the formats that users have: HDF5 of our layout, .npy and .npz, folders of PNG files.

LABELLED, EXTRA, COUNT = 100, 200, 20
"""Grey levels by which tests tell the two kinds of images apart, and examples of each set."""


def stored(
    root: Path, name: str, classes: int, shape: tuple[int, int, int], *, grey: int = LABELLED, count: int = COUNT
) -> None:
    (root / name).mkdir(parents=True)
    for split in ("train", "test"):
        for kind, array in (
            ("images", np.full((count, *shape), grey, dtype=np.uint8)),
            ("labels", np.arange(count)[:, None] % classes),
        ):
            with h5py.File(root / name / f"{split}_{kind}.h5", "w") as file:
                file["tensor"] = array


def folder(root: Path, test: str) -> None:
    for split in ("train", test):
        for label in range(10):
            (root / split / f"n{label:08d}").mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (160, 200), (LABELLED,) * 3).save(root / split / f"n{label:08d}" / f"{i}.png")


def no_files(root: Path) -> list[str]:
    return []


def cifar10(root: Path) -> list[str]:
    stored(root, "cifar10", 10, (32, 32, 3))
    return []


def cifar100(root: Path) -> list[str]:
    stored(root, "cifar100", 100, (32, 32, 3))
    return []


def svhn(root: Path) -> list[str]:
    stored(root, "svhn", 10, (32, 32, 3))
    return []


def mnist(root: Path) -> list[str]:
    stored(root, "mnist", 10, (28, 28, 1))
    return []


def fashion_mnist(root: Path) -> list[str]:
    stored(root, "fashion_mnist", 10, (28, 28, 1))
    return []


def cifar10_500k(root: Path) -> list[str]:
    stored(root, "tinyimages500k", 10, (32, 32, 3), grey=EXTRA)
    return cifar10(root)


def cifar10_generated(root: Path) -> list[str]:
    (root / "cifar10_generated").mkdir()
    images = np.full((COUNT, 32, 32, 3), EXTRA, dtype=np.uint8)
    np.savez(root / "cifar10_generated" / "1m.npz", image=images, label=np.arange(COUNT) % 10)
    return cifar10(root)


def arrays(root: Path) -> list[str]:
    np.save(root / "x.npy", np.full((COUNT, 32, 32, 3), LABELLED, dtype=np.uint8))
    np.savez(root / "test.npz", x=np.full((COUNT, 32, 32, 3), LABELLED / 255, dtype=np.float32), y=np.arange(COUNT) % 9)
    np.save(root / "y.npy", np.arange(COUNT) % 10)
    files = {"train_images": "x.npy", "train_labels": "y.npy", "test_images": "test.npz", "test_labels": "test.npz"}
    return [f"dataset.source.{key}={root / file}" for key, file in files.items()]


def image_folder(root: Path) -> list[str]:
    folder(root / "mine", "test")
    return [f"dataset.source.root={root / 'mine'}"]


def imagenette(root: Path) -> list[str]:
    folder(root / "imagenette2-160", "val")
    return []


FILES: dict[str, Callable[[Path], list[str]]] = {
    "arrays": arrays,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "cifar10_500k": cifar10_500k,
    "cifar10_500k_released": cifar10_500k,
    "cifar10_autoaugment": cifar10,
    "cifar10_generated": cifar10_generated,
    "cifar10_released": cifar10,
    "digits": no_files,
    "fashion_mnist": fashion_mnist,
    "image_folder": image_folder,
    "imagenette": imagenette,
    "mnist": mnist,
    "svhn": svhn,
    "synthetic": no_files,
}


def test_a_folder_of_images_is_read_in_grey(compose: Compose, tmp_path: Path) -> None:
    grey = ["dataset.channels=1", "dataset.mean=[0.5]", "dataset.std=[0.25]"]
    config = compose("dataset=image_folder", "device=cpu", *image_folder(tmp_path), *grey)
    data = build(config.dataset)
    assert isinstance(data, Dataset)
    assert data.train.image_shape == (1, 32, 32)


def test_every_data_file_is_tried_here() -> None:
    assert set(DATASETS) == set(FILES)


def composed(compose: Compose, name: str, root: Path, *overrides: str) -> DictConfig:
    common = ["dataset.batch_size=10", "device=cpu", f"data_root={root}"]
    return compose(f"dataset={name}", *common, *FILES[name](root), *overrides)


@pytest.mark.parametrize("name", FILES)
def test_every_data_set_is_read_augmented_and_described(compose: Compose, tmp_path: Path, name: str) -> None:
    config = composed(compose, name, tmp_path)
    dataset: Dataset = build(config.dataset)
    batch = next(dataset.train_stream(Streams(0)))
    size = config.dataset.image_size or 32
    assert batch.x.shape == (10, config.dataset.channels, size, size)
    assert batch.x.min() >= 0
    assert batch.x.max() <= 1
    assert batch.y.max() < config.dataset.classes
    assert len(dataset.test) >= COUNT
    assert f"{config.dataset.classes} classes" in dataset.describe()


@pytest.mark.parametrize("name", DATASETS)
def test_seven_steps_reach_across_every_ball(compose: Compose, tmp_path: Path, name: str) -> None:
    threat = composed(compose, name, tmp_path).dataset.threat
    assert set(threat) == {"linf", "l2", "l1"}
    for values in threat.values():
        assert values.step_size < values.epsilon <= 7 * values.step_size


@pytest.mark.parametrize(("name", "fraction"), [("cifar10_500k", 0.5), ("cifar10_generated", 0.7)])
def test_extra_images_make_up_their_part_of_each_batch(
    compose: Compose, tmp_path: Path, name: str, fraction: float
) -> None:
    off = ["dataset.augment.crop=null", "dataset.augment.flip=null"]
    dataset: Dataset = build(composed(compose, name, tmp_path, *off).dataset)
    stream = dataset.train_stream(Streams(0))
    assert len(stream) == COUNT // 10
    for _ in range(5):
        grey = (next(stream).x.mean(dim=(1, 2, 3)) * 255).round()
        assert (grey == EXTRA).sum() == 10 * fraction
        assert (grey == LABELLED).sum() == 10 - 10 * fraction


def test_the_released_code_has_70_percent_of_extra_images_and_391_steps(compose: Compose, tmp_path: Path) -> None:
    stored(tmp_path, "tinyimages500k", 10, (32, 32, 3), grey=EXTRA)
    stored(tmp_path, "cifar10", 10, (32, 32, 3), count=50)
    config = compose("dataset=cifar10_500k_released", f"data_root={tmp_path}", "device=cpu")
    stream = build(config.dataset).train_stream(Streams(0))
    assert len(stream) == 391
    assert stream.num_extra == 89


def test_augmentations_come_in_the_order_of_the_released_code(compose: Compose, tmp_path: Path) -> None:
    names = {
        name: list(build(compose(f"dataset={name}", "device=cpu").dataset).augment)
        for name in ("cifar10", "cifar10_autoaugment", "cifar10_released")
    }
    assert names == {
        "cifar10": ["crop", "flip"],
        "cifar10_autoaugment": ["crop", "flip", "policy", "cutout"],
        "cifar10_released": ["flip", "zoom"],
    }


def test_autoaugment_fills_with_the_mean_colour(compose: Compose) -> None:
    augment = build(compose("dataset=cifar10_autoaugment", "device=cpu").dataset).augment
    for name in ("crop", "policy"):
        assert [round(255 * value, 6) for value in augment[name].fill] == [125, 122, 113]
    white = torch.ones(64, 3, 32, 32)
    border = augment["crop"](white, generator_for(0))
    assert torch.unique(border[:, 0]).tolist() == pytest.approx([125 / 255, 1.0])
    covered = augment["cutout"](white, generator_for(0))
    assert torch.unique(covered[:, 2]).tolist() == pytest.approx([0.4465, 1.0])
