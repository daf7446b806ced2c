"""The results file: what comes back, what a kill leaves, and what hostile files get."""

from __future__ import annotations

import errno
import os
import resource
import signal

import h5py
import numpy as np
import pytest

from robustflat.errors import DataError, UserError
from robustflat.store.results import ResultStore, group_name

LOGITS = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
NAME = "last/test[:4]/attacks/pgd20"


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "results.h5")


def test_arrays_and_attributes_come_back_and_plain_h5py_reads_them(store):
    store.write(NAME, {"logits": LOGITS}, {"key": "abc", "seed": 3, "config": {"steps": 20}, "epoch": None, "t": 0.5})
    arrays, attrs = store.read(NAME)
    assert np.array_equal(arrays["logits"], LOGITS)
    assert arrays["logits"].dtype == np.float32
    assert attrs == {"key": "abc", "seed": 3, "config": '{"steps": 20}', "t": 0.5}
    with h5py.File(store.path) as file:
        assert np.array_equal(file[f"{NAME}/logits"][1], LOGITS[1])
        assert file[NAME].attrs["seed"] == 3


def test_large_arrays_are_chunked_and_come_back(store):
    values = np.random.default_rng(0).normal(size=(10, 1000, 10)).astype(np.float32)
    store.write(NAME, {"logits": values}, {"key": "k"})
    assert np.array_equal(store.read(NAME).arrays["logits"], values)
    with h5py.File(store.path) as file:
        assert file[f"{NAME}/logits"].chunks is not None


def test_writing_again_replaces_the_arrays_but_not_what_lies_below(store):
    store.write("last/test/clean", {"logits": LOGITS[0]}, {"key": "k"})
    store.write("last/test", {"labels": np.zeros(4, dtype=np.int64), "old": LOGITS}, {"split": "test"})
    store.write("last/test", {"labels": np.ones(4, dtype=np.int64)}, {})
    arrays, attrs = store.read("last/test")
    assert list(arrays) == ["labels"]
    assert arrays["labels"].tolist() == [1, 1, 1, 1]
    assert attrs == {}
    assert store.has("last/test/clean")


def test_one_attribute_of_all_finished_results(store):
    assert store.marked("weights") == {}
    store.write("last/test/sanity", {}, {"key": "b", "weights": "w", "epochs": 3})
    store.write("last/test/clean", {"logits": LOGITS[0]}, {"key": "a", "weights": "v"})
    store.write("last/test", {"labels": np.zeros(4)}, {"weights": "of no finished result"})
    assert list(store.marked("weights").items()) == [("last/test/clean", "v"), ("last/test/sanity", "w")]
    assert store.marked("epochs") == {"last/test/sanity": 3}


def test_only_groups_with_a_key_are_finished_results(store):
    assert store.names() == []
    store.write("last/test", {"labels": np.zeros(4)}, {})
    store.write("last/test/clean", {"logits": LOGITS[0]}, {"key": "k"})
    assert store.names() == ["last/test/clean"]
    assert store.has("last/test/clean", "k")
    assert not store.has("last/test/clean", "other")
    assert not store.has("last/test")
    assert not store.has("last/nothing/here")


def test_a_group_is_removed_with_all_below_it(store):
    store.remove("last")
    store.write("last/test/clean", {"logits": LOGITS}, {"key": "k"})
    store.write("epoch_0005/test/clean", {"logits": LOGITS}, {"key": "k"})
    store.remove("last")
    store.remove("never there")
    assert store.names() == ["epoch_0005/test/clean"]


def test_an_interrupted_write_leaves_the_file_as_it_was(store, monkeypatch):
    store.write("a", {"x": LOGITS}, {"key": "k"})
    before = store.path.read_bytes()

    class Killed(BaseException):
        pass

    def killed(*_args, **_rest):
        raise Killed

    monkeypatch.setattr(h5py.Group, "create_dataset", killed)
    with pytest.raises(Killed):
        store.write("b", {"x": LOGITS}, {"key": "k"})
    assert store.path.read_bytes() == before
    assert [p.name for p in store.path.parent.iterdir()] == ["results.h5"]


def test_a_full_disk_is_a_sentence_and_keeps_the_file(store, monkeypatch):
    store.write("a", {"x": LOGITS}, {"key": "k"})

    def full(*_args, **_rest):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.path))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"No space left.*intact"):
        store.write("b", {"x": LOGITS}, {"key": "k"})
    assert store.names() == ["a"]


@pytest.mark.parametrize("size", [3_000, 30_000, 300_000])
def test_a_write_that_the_system_refuses_half_way_is_a_sentence_and_keeps_the_file(store, size):
    """As a full disk: no file may grow beyond `size` bytes. HDF5 itself crashes the process there."""
    store.write("a", {"x": LOGITS}, {"key": "k"})
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(UserError, match=r"Cannot write .*results\.h5: File too large\..* is intact"):
            store.write("b", {"x": np.random.default_rng(0).random((6000, 10))}, {"key": "k"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.names() == ["a"]
    assert [p.name for p in store.path.parent.iterdir()] == ["results.h5"]


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"\x00" * 600 + b[600:], lambda b: b"hello"])
def test_a_damaged_file_is_named_and_not_overwritten(store, spoil):
    store.write(NAME, {"logits": LOGITS}, {"key": "k"})
    store.path.write_bytes(spoil(store.path.read_bytes()))
    spoiled = store.path.read_bytes()
    for act in (store.names, lambda: store.read(NAME), lambda: store.write("b", {"x": LOGITS}, {"key": "k"})):
        with pytest.raises(DataError, match=r"results\.h5 is damaged.*Move it away"):
            act()
    assert store.path.read_bytes() == spoiled
    assert [p.name for p in store.path.parent.iterdir()] == ["results.h5"]


def test_a_missing_file_and_a_missing_result_are_named(store):
    with pytest.raises(DataError, match="no results file"):
        store.read("a")
    store.write("a", {"x": LOGITS}, {"key": "k"})
    with pytest.raises(DataError, match="no result 'b/c'"):
        store.read("b/c")
    with pytest.raises(DataError, match="no result 'a/x'"):
        store.read("a/x")


def test_links_to_other_files_are_refused(store, tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file.create_group("g").attrs["key"] = "k"
        file["g/logits"] = LOGITS
    store.write("a", {"x": LOGITS}, {"key": "k"})
    with h5py.File(store.path, "a") as file:
        file["b"] = h5py.ExternalLink("secret.h5", "/g")
    secret = (tmp_path / "secret.h5").read_bytes()
    write = [lambda name=name: store.write(name, {"x": LOGITS}, {"key": "k"}) for name in ("b", "b/c")]
    for act in (store.names, lambda: store.read("b"), lambda: store.read("b/c"), *write):
        with pytest.raises(DataError, match="'b' is a link to another place"):
            act()
    assert (tmp_path / "secret.h5").read_bytes() == secret


def test_soft_links_are_refused(store):
    store.write("a", {"x": LOGITS}, {"key": "k"})
    with h5py.File(store.path, "a") as file:
        file["a/y"] = h5py.SoftLink("/a/x")
    with pytest.raises(DataError, match="'y' is a link"):
        store.read("a")


def test_arrays_kept_in_other_files_are_refused(store, tmp_path):
    (tmp_path / "raw").write_bytes(b"x" * 96)
    with h5py.File(store.path, "w") as file:
        group = file.create_group("a")
        group.attrs["key"] = "k"
        group.create_dataset("x", (24,), dtype="f4", external=[(str(tmp_path / "raw"), 0, 96)])
    with pytest.raises(DataError, match="other files"):
        store.read("a")


def test_absurd_sizes_are_refused_before_memory_is_taken(store):
    with h5py.File(store.path, "w") as file:
        file.create_group("a").attrs["key"] = "k"
        file["a"].create_dataset("x", (2**40,), dtype="f4", chunks=(1024,))
    with pytest.raises(DataError, match="cannot be right"):
        store.read("a")


def test_groups_that_contain_themselves_end(store):
    with h5py.File(store.path, "w") as file:
        file.create_group("a/b")
        file["a/b/again"] = file["a"]
    with pytest.raises(DataError, match="same group as another"):
        store.names()


def test_arrays_of_text_or_objects_are_refused(store):
    with h5py.File(store.path, "w") as file:
        file["a/x"] = "text"
    with pytest.raises(DataError, match="must hold numbers"):
        store.read("a")


def test_a_newer_format_is_refused(store):
    with h5py.File(store.path, "w") as file:
        file.attrs["format"] = 99
    with pytest.raises(DataError, match="format 99"):
        store.names()


@pytest.mark.parametrize("part", ["", "..", ".", "a\nb", "\x00"])
def test_names_that_are_no_names_are_refused(part):
    with pytest.raises(UserError, match="cannot be the name"):
        group_name("last", part)


def test_slashes_in_a_split_make_no_group_of_their_own():
    assert group_name("last", "train[:10]/balanced", "clean") == "last/train[:10]-balanced/clean"


def test_an_attribute_that_hdf5_cannot_hold_is_named(store):
    with pytest.raises(UserError, match="'config' of a result has"):
        store.write("a", {}, {"config": "x" * 70_000})
