"""What decides the images of a configuration, and what its results are called."""

from __future__ import annotations

from omegaconf import OmegaConf

from robustflat.apps.config import identity
from robustflat.apps.data_source import source_of
from robustflat.apps.evaluate import data_prefix, same_data, take_from_run

FOLDER = "robustflat.data.sources.ImageFolder"
CIFAR = "robustflat.data.sources.Cifar10"


def config(target: str, data_root: str = "data", **source: object):
    return OmegaConf.create({"dataset": {"source": {"_target_": target, **source}}, "data_root": data_root})


def test_known_data_are_the_same_wherever_they_lie() -> None:
    one, other = config(CIFAR, root="data", download=False), config(CIFAR, root="/elsewhere", download=True)
    assert source_of(one) == source_of(other) == {"_target_": CIFAR}
    assert identity(one) == identity(other)


def test_another_folder_of_images_is_other_data() -> None:
    one, other = (config(FOLDER, root=root, size=8) for root in ("/pictures/a", "/pictures/b"))
    assert not same_data(one, other)
    assert identity(one) != identity(other)
    assert data_prefix(one, one, "image_folder") == ""
    first, second = (data_prefix(c, config(CIFAR, root="data"), "image_folder") for c in (one, other))
    assert first.startswith("image_folder-") and first != second


def test_a_folder_inside_the_data_root_moves_with_it() -> None:
    run = config(FOLDER, root="data/birds", size=8)
    moved = config(FOLDER, "/new", root="/new/birds", size=8, cache="/tmp/decoded")
    assert same_data(run, moved) and identity(run) == identity(moved)
    given = OmegaConf.create({"dataset": None, "model": None, "data_root": "/new", "attack": None})
    take_from_run(given, OmegaConf.merge(run, {"model": {}}))
    assert given.dataset.source.root == "/new/birds"


def test_settings_that_make_the_data_are_told_apart_and_names_stay_where_there_are_none() -> None:
    run = config(CIFAR, root="data")
    made = [data_prefix(config("robustflat.data.sources.Synthetic", seed=seed), run, "synthetic") for seed in (0, 1)]
    assert made[0] != made[1]
    assert data_prefix(config("robustflat.data.sources.Cifar100", root="data"), run, "cifar100") == "cifar100 "


def test_a_source_that_is_no_mapping_is_left_to_the_check() -> None:
    assert source_of({"dataset": {"source": "abc"}}) == source_of({"dataset": None}) == {}
