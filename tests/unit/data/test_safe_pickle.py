"""Pickles of arrays are read; everything else in them is refused and never run."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustflat.data.safe_pickle import load_arrays, loads_arrays
from robustflat.errors import DataError


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">i4", "bool", "float16"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back_as_an_ordinary_unpickler_reads_them(protocol: int, dtype: str, order: Any) -> None:
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 7, dtype=dtype, order=order)
    content = pickle.dumps({"data": array, "again": array}, protocol)
    found = loads_arrays(content, name="file")
    for key in ("data", "again"):
        read = found[key]
        assert isinstance(read, np.ndarray)
        assert read.dtype == array.dtype
        assert np.array_equal(read, array)


def test_plain_values_and_nested_lists_come_back_too() -> None:
    content = {
        "labels": [np.int64(3), 1], "names": ["a.png"], "half": np.float32(0.5), "nested": [(np.ones(2), None)],
        "empty": np.zeros((0, 3)),
    }  # fmt: skip
    found: Any = loads_arrays(pickle.dumps(content), name="file")
    assert found["labels"] == [3, 1]
    assert found["names"] == ["a.png"]
    assert found["half"] == 0.5
    assert found["nested"][0][0].tolist() == [1.0, 1.0]
    assert found["empty"].shape == (0, 3)


def test_a_pickle_of_python_2_is_read() -> None:
    """Python 2 stores bytes as its `str`, so the array's content arrives as a text."""
    data = bytes(range(250, 256)) + bytes(6)
    content = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x06\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T" + struct.pack("<i", len(data)) + data + b"tbs."
    )  # fmt: skip
    reference = pickle.loads(content, encoding="latin1")["data"]
    read = loads_arrays(content, name="file")["data"]
    assert np.array_equal(read, reference)  # type: ignore[arg-type]
    assert reference.tolist()[0] == [250, 251, 252, 253, 254, 255]


class _Evil:
    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, print, __import__, open])
def test_no_function_is_called(tmp_path: Path, protocol: int, function: Any) -> None:
    marker = tmp_path / "made"
    content = pickle.dumps({"data": _Evil(function, f"touch {marker}")}, protocol)
    with pytest.raises(DataError, match=r"asks for .*, which is not part of an array. Nothing was run"):
        loads_arrays(content, name="file")
    assert not marker.exists()


@pytest.mark.parametrize("value", [OrderedDict(a=1), np.array([None], dtype=object), {1, 2}.__class__, np.zeros,
                                   np.zeros(2, dtype=[("a", "i4")]), np.array(["text"]), np.dtype("u1"), np.ndarray,
                                   np.zeros(1, "datetime64[s]"), io.StringIO])  # fmt: skip
def test_everything_but_arrays_of_numbers_is_refused(value: Any) -> None:
    with pytest.raises(DataError):
        loads_arrays(pickle.dumps({"data": value}), name="file")


def test_the_stand_ins_can_be_neither_misused_nor_altered() -> None:
    attempts = {
        "calls numpy.ndarray": b"cnumpy\nndarray\n(I9\ntR.",
        "alter a function": b"c_codecs\nencode\n}S'x'\nI1\nsb.",
        "encoding": b"c_codecs\nencode\n(S'x'\nS'zlib_codec'\ntR.",
        "with 3 bytes": b"cnumpy._core.numeric\n_frombuffer\n(S'abc'\ncnumpy\ndtype\n(S'u1'\ntR(I999999999\ntS'C'\ntR.",
        "of shape": b"cnumpy._core.numeric\n_frombuffer\n(S'abc'\ncnumpy\ndtype\n(S'u1'\ntR(I-3\ntS'C'\ntR.",
        "unknown form": b"cnumpy._core.numeric\n_frombuffer\n(S'abc'\nS'u1'\n(I3\ntS'C'\ntR.",
        "without content": b"(S'a'\ncnumpy.core.multiarray\n_reconstruct\n(tRd.",
        "dictionary": b"I5\n.",
        "texts as keys": b"(I5\nI6\nd.",
    }
    for message, content in attempts.items():
        with pytest.raises(DataError, match=message):
            loads_arrays(content, name="file")


@pytest.mark.parametrize("keep", [0, 1, 30, 100, 150])
def test_a_truncated_file_is_called_damaged(keep: int) -> None:
    content = pickle.dumps({"data": np.arange(100, dtype=np.uint8)})
    with pytest.raises(DataError, match=r"file is damaged or no pickle of arrays"):
        loads_arrays(content[:keep], name="file")


def test_rubbish_is_refused_and_never_escapes_as_another_error() -> None:
    generator = np.random.default_rng(0)
    content = bytearray(pickle.dumps({"data": np.arange(50, dtype=np.uint8), "labels": [1, 2, 3]}))
    refused = 0
    for _ in range(2000):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 2):
            damaged[place] = generator.integers(0, 256)
        try:
            loads_arrays(bytes(damaged), name="file")
        except DataError:
            refused += 1
    assert refused > 500


def test_a_file_is_read_by_its_path_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps({"data": np.arange(3)}))
    assert np.array_equal(load_arrays(path)["data"], [0, 1, 2])  # type: ignore[arg-type]
    path.write_bytes(b"no pickle")
    with pytest.raises(DataError, match=r"x\.pickle is damaged"):
        load_arrays(path)
    with pytest.raises(DataError, match="There is no file"):
        load_arrays(tmp_path / "y.pickle")
