"""Runs and results are told apart by their images: folders of one's own by the folder, known data sets by name."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from robustflat.apps.config import run_id
from robustflat.apps.data_source import deciding_source, moved, same_data
from robustflat.apps.evaluate import data_prefix, take_from_run
from robustflat.errors import UserError

FOLDER, STORED = "robustflat.data.folders.ImageFolder", "robustflat.data.sources.Cifar10"
ARRAYS = "robustflat.data.sources.ArrayFiles"


def about(target: str, data_root: str = "data", **source: object) -> dict[str, object]:
    return {"dataset": {"source": {"_target_": target, **source}}, "data_root": data_root, "model": {"_target_": "x"}}


def identity_of(target: str, data_root: str = "data", **source: object) -> str:
    return run_id(OmegaConf.create(about(target, data_root, **source)))


def test_two_folders_of_images_are_two_runs():
    assert identity_of(FOLDER, root="cats", size=8) != identity_of(FOLDER, root="flowers", size=8)
    assert not same_data(about(FOLDER, root="cats"), about(FOLDER, root="flowers"))


@pytest.mark.parametrize("other", ["cats/", "./cats", "pets/../cats"])
def test_one_folder_written_in_two_ways_is_one_run(other):
    assert identity_of(FOLDER, root="cats") == identity_of(FOLDER, root=other)


def test_a_folder_below_the_data_folder_is_the_same_wherever_that_lies():
    here, there = about(FOLDER, "/a", root="/a/imagenette"), about(FOLDER, "/b/c", root="/b/c/imagenette")
    assert same_data(here, there)
    assert not same_data(here, about(FOLDER, "/ab", root="/abc/imagenette"))


def test_known_data_sets_and_caches_may_lie_anywhere():
    assert identity_of(STORED, root="here", download=True) == identity_of(STORED, root="there", download=False)
    assert identity_of(FOLDER, root="cats", cache="x") == identity_of(FOLDER, root="cats", cache=None)


def test_a_configuration_without_a_source_has_an_identity():
    assert deciding_source({"dataset": None}) == deciding_source({"dataset": {"source": "???"}}) == {}


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/old", "/new"), ("/old/a/b", "/new/a/b"), ("/older/a", "/older/a"), ("a/old", "a/old")],
)
def test_only_what_lies_below_moves(path, expected):
    assert moved(path, "/old", "/new") == expected


def test_other_data_of_one_name_have_places_of_their_own():
    run = OmegaConf.create(about(STORED, root="data"))
    fog, snow = (OmegaConf.create(about(ARRAYS, test_images=f"{name}.npy")) for name in ("fog", "snow"))
    places = [data_prefix(other, run, "arrays") for other in (fog, snow)]
    assert len(set(places)) == 2
    assert all(place.startswith("arrays~") and place.endswith(" ") for place in places)
    svhn = OmegaConf.create(about("robustflat.data.sources.Svhn", root="data"))
    assert data_prefix(svhn, run, "svhn") == "svhn "  # the name says it all
    assert data_prefix(run, run, "cifar10") == ""


@pytest.mark.parametrize(("given", "expected"), [(None, "/a/imagenette"), ("/b", "/b/imagenette")])
def test_the_data_of_a_run_are_found_where_they_lie_now(given, expected):
    stored = OmegaConf.create({**about(FOLDER, "/a", root="/a/imagenette"), "attack": None})
    config = OmegaConf.create({"dataset": None, "model": None, "attack": None, "data_root": given})
    take_from_run(config, stored)
    assert config.dataset.source.root == expected
    assert same_data(OmegaConf.to_container(config), OmegaConf.to_container(stored))


@pytest.mark.parametrize(("model", "refused"), [({"activation": "gelu"}, True), ({"activation": "relu"}, False)])
def test_the_weights_of_a_run_are_not_put_into_another_network(model, refused):
    network = {"_target_": "x", "activation": "relu"}
    stored = OmegaConf.create({**about(STORED), "model": network, "attack": None})
    config = OmegaConf.create({"dataset": None, "model": model, "attack": None, "data_root": None})
    if refused:
        with pytest.raises(UserError, match=r"model.activation: relu there, gelu here"):
            take_from_run(config, stored)
    else:
        take_from_run(config, stored)
        assert config.model == network
