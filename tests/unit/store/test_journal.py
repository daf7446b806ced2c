"""A journal survives a kill at any byte, and gives back the very numbers that were put into it."""

from __future__ import annotations

import math

import pytest

from robustflat.errors import UserError
from robustflat.store.journal import Journal


def test_numbers_come_back_bit_for_bit(tmp_path) -> None:
    journal = Journal(tmp_path / "deep" / "points.jsonl")
    seen: list[int] = []
    journal.changed = seen.append
    values = {(0, 0): (0.1 + 0.2, 1 / 3), (3, 1): (math.inf, 5e-324), (2, 2): (math.nan, -0.0)}
    journal.update(values)
    again = Journal(tmp_path / "deep" / "points.jsonl")
    assert repr(dict(again)) == repr(values) and seen == [1, 2, 3]


def test_a_kill_at_any_byte_loses_at_most_the_last_point(tmp_path) -> None:
    path = tmp_path / "points.jsonl"
    journal = Journal(path)
    for column in range(3):
        journal[0, column] = (column / 7, 0.5)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        cut = Journal(path)
        assert len(cut) == sum(end <= length for end in ends)
        cut[0, 2] = (2 / 7, 0.5)  # a new line, not the rest of the broken one
        assert Journal(path)[0, 2] == (2 / 7, 0.5)


def test_damage_is_named_and_removal_is_complete(tmp_path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text("[0, 0, 1.0]\nnonsense\n")
    with pytest.raises(UserError, match="damaged at the line 'nonsense'"):
        Journal(path)
    path.write_text('[0, "a", 1.0]\n')
    with pytest.raises(UserError, match="damaged"):
        Journal(path)
    path.write_text("[0, 0, 1.0]\n")
    journal = Journal(path)
    with pytest.raises(UserError, match="keeps what it has"):
        del journal[0, 0]
    journal.remove()
    assert not path.exists() and not journal


def test_a_folder_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        Journal(tmp_path / "file" / "points.jsonl")[0, 0] = (1.0,)
