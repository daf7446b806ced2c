"""Two results of the benchmarks side by side: real changes are marked, machines are not mixed up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compare import compared, main, results_of


def entry(seconds: float, *, spread: float = 0.1, rounds: int = 5, machine: str = "one") -> dict[str, object]:
    ways = {"ours": {"processor": seconds, "wall": 2 * seconds, "spread": spread, "rounds": rounds, "ratio": 2.0}}
    return {
        "commit": "abc",
        "date": "2026-01-01",
        "machine": machine,
        "unit": "times as fast",
        "device": "cpu",
        "ways": ways,
    }


@pytest.mark.parametrize(
    ("old", "new", "mark"),
    [
        (entry(2.0), entry(1.0), "faster"),
        (entry(1.0), entry(2.0), "slower"),
        (entry(1.0), entry(1.15), ""),  # less than both spreads together
        (entry(1.0), entry(1.25), "slower"),
        (entry(1.0, rounds=1, spread=0.0), entry(1.25), "slower?"),  # one run says nothing of the spread
    ],
)
def test_changes_beyond_the_spread_are_marked(old, new, mark):
    (line,) = [row for row in compared({"PGD": old}, {"PGD": new}).splitlines() if row.startswith("| ours")]
    assert line.split("|")[7].strip() == mark


def test_ratio_of_old_to_new_and_ratios_within_the_tables():
    text = compared({"PGD": entry(3.0)}, {"PGD": entry(1.5)})
    assert "| ours | 3 | 0.1 | 1.5 | 0.1 | 2.00 | faster | 2.00 | 2.00 |" in text


def test_on_a_card_wall_clock_seconds_are_compared():
    old, new = entry(3.0) | {"device": "cuda"}, entry(1.0) | {"device": "cuda"}
    assert "| ours | 6 | 0.1 | 2 |" in compared({"PGD": old}, {"PGD": new})


def test_memory_is_compared_too():
    ways = [{"ours": {"memory_mib": value, "ratio": 0.5}} for value in (100.0, 80.0, 98.0)]
    old, less, alike = ({"M": entry(1.0) | {"unit": "memory", "ways": way}} for way in ways)
    assert "| ours | 100 | 0 | 80 | 0 | 1.25 | less |" in compared(old, less)
    assert "| less |" not in compared(old, alike)


def test_other_machines_are_refused_loudly():
    old, new = {"PGD": entry(1.0)}, {"PGD": entry(1.0, machine="two")}
    with pytest.raises(ValueError, match=r"(?s)DIFFERENT MACHINES: 1 of 1.*one.*two.*--across-machines"):
        compared(old, new)
    assert compared(old, new, across_machines=True).startswith("!! DIFFERENT MACHINES")


def test_tables_of_one_side_are_named_and_nothing_in_common_is_an_error():
    text = compared({"PGD": entry(1.0), "gone": entry(1.0)}, {"PGD": entry(1.0), "new": entry(1.0)})
    assert "Only in the old one: gone" in text
    assert "Only in the new one: new" in text
    with pytest.raises(ValueError, match="no table in common"):
        compared({"a": entry(1.0)}, {"b": entry(1.0)})


def test_files_and_commits_are_read(tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    path = folder / "results.json"
    path.write_text(json.dumps({"PGD": entry(1.0)}))
    assert results_of(str(path))["PGD"]["ways"]["ours"]["processor"] == 1.0
    monkeypatch.setattr("benchmarks.compare.RESULTS", path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "results"]):
        subprocess.run([*git, *arguments], check=True)
    path.write_text(json.dumps({"PGD": entry(9.0)}))
    assert results_of("HEAD")["PGD"]["ways"]["ours"]["processor"] == 1.0
    with pytest.raises(ValueError, match=r"'nowhere' is no file, and no commit with results\.json"):
        results_of("nowhere")
    path.write_text("{")
    with pytest.raises(ValueError, match="no JSON file"):
        results_of(str(path))


def test_the_command_prints_or_says_what_is_wrong(tmp_path: Path, monkeypatch, capsys):
    paths = []
    for number, machine in enumerate(("one", "one", "two")):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps({"PGD": entry(1.0 + number, machine=machine)}))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(paths[0]), str(paths[1])])
    main()
    assert "slower" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare.py", str(paths[0]), str(paths[2])])
    with pytest.raises(SystemExit, match="DIFFERENT MACHINES"):
        main()
