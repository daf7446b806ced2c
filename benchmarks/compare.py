"""Two results of the benchmarks side by side, old and new, with what changed beyond the spread.

    python benchmarks/compare.py HEAD~5                        that commit's benchmarks/results.json and the file here
    python benchmarks/compare.py before.json after.json
    python benchmarks/compare.py v1.0 v1.1 --across-machines

A change counts where the medians are further apart than both spreads together; with fewer than three rounds a side the
spread says nothing, and the change is marked with a question mark. Seconds of different machines are not compared
unless asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without installation

from benchmarks.harness import RESULTS, read_results
from benchmarks.timing import on_cuda

Results = Mapping[str, Mapping[str, Any]]
ENOUGH_ROUNDS = 3


class Line(NamedTuple):
    """One way of one comparison, then and now.

    Attributes:
        name: of the way.
        old, new: the figure: seconds, or MiB.
        spreads: of both.
        mark: "faster", "slower", "less", "more", with "?" where the spread says nothing; "" within the spread.
        ratios: of the way to the first of its table, then and now, which depend less on the machine.
    """

    name: str
    old: float
    new: float
    spreads: tuple[float, float]
    mark: str
    ratios: tuple[float | None, float | None]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("old", help="a results file, or a commit")
    options.add_argument("new", nargs="?", default=str(RESULTS), help="likewise (default: the file of this checkout)")
    options.add_argument("--across-machines", action="store_true", help="compare what different machines have measured")
    given = options.parse_args()
    try:
        old, new = results_of(given.old), results_of(given.new)
        print(compared(old, new, across_machines=given.across_machines))
    except ValueError as error:
        sys.exit(f"error: {error}")


def results_of(source: str) -> Results:
    """Results of a file, or of a commit of this repository.

    Raises:
        ValueError: if it is neither, or holds no results.
    """
    path = Path(source)
    if not path.is_file():
        return _of_commit(source)
    try:
        return read_results(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is no JSON file: {error}") from error


def _of_commit(name: str) -> Results:
    root = RESULTS.parent.parent
    command = ["git", "-C", str(root), "show", f"{name}:{RESULTS.relative_to(root).as_posix()}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    if shown.returncode:
        said = (shown.stderr.strip().splitlines() or ["git failed"])[0]
        raise ValueError(f"'{name}' is no file, and no commit with {RESULTS.name} in it ({said})")
    results: Results = json.loads(shown.stdout)
    return results


def compared(old: Results, new: Results, *, across_machines: bool = False) -> str:
    """Markdown of what both hold.

    Raises:
        ValueError: if they have nothing in common, or different machines measured them and that was not asked for.
    """
    shared = [title for title in old if title in new]
    if not shared:
        raise ValueError("the two have no table in common: were they made with the same sizes?")
    strangers = [title for title in shared if old[title]["machine"] != new[title]["machine"]]
    machines = sorted({f"  {old[title]['machine']}\n  {new[title]['machine']}" for title in strangers})
    if strangers and not across_machines:
        raise ValueError(
            f"DIFFERENT MACHINES: {len(strangers)} of {len(shared)} tables were measured on another machine than the "
            "old ones, so that seconds say nothing about the code:\n"
            + "\n".join(machines)
            + "\nMeasure both on one machine, or look at the ratios with --across-machines."
        )
    parts = [_warning(machines)] if strangers else []
    parts += [_table(title, old[title], new[title]) for title in shared]
    for name, ours, theirs in (("old", old, new), ("new", new, old)):
        alone = [title for title in ours if title not in theirs]
        parts += [f"Only in the {name} one: {'; '.join(alone)}"] if alone else []
    return "\n\n".join(part for part in parts if part)


def _warning(machines: list[str]) -> str:
    return (
        "!! DIFFERENT MACHINES: seconds below compare machines, not commits; only the ratios within a table can be "
        "compared, and these with care. !!\n" + "\n".join(machines)
    )


def _table(title: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    lines = list(_lines(old, new))
    if not lines:
        return ""
    unit = "MiB" if old["unit"] == "memory" else "seconds"
    head = f"| | old {unit} | spread | new {unit} | spread | old / new | change | old ratio | new ratio |"
    rows = [
        f"| {line.name} | {line.old:.4g} | {line.spreads[0]:.2g} | {line.new:.4g} | {line.spreads[1]:.2g} | "
        f"{line.old / line.new:.2f} | {line.mark} | {_ratio(line.ratios[0])} | {_ratio(line.ratios[1])} |"
        for line in lines
    ]
    versions = f"{old['commit']} of {old['date']} and {new['commit']} of {new['date']}"
    return "\n".join([f"**{title}**, {versions}", "", head, f"|---|{'---:|' * 8}", *rows])


def _lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Line]:
    """Ways that both have and that have figures."""
    seconds = "wall" if on_cuda(old.get("device", "cpu")) else "processor"
    for name, then in old["ways"].items():
        now = new["ways"].get(name)
        key = seconds if seconds in then else "memory_mib"
        if now is None or not then.get(key) or not now.get(key):
            continue
        spreads = (then.get("spread", 0.0), now.get("spread", 0.0)) if key == seconds else (0.0, 0.0)
        yield Line(name, then[key], now[key], spreads, _mark(then, now, key), (then.get("ratio"), now.get("ratio")))


def _mark(then: Mapping[str, Any], now: Mapping[str, Any], key: str) -> str:
    difference = now[key] - then[key]
    if key == "memory_mib":  # measured once; a few per cent are the allocator's
        return "" if abs(difference) <= 0.05 * then[key] else "less" if difference < 0 else "more"
    if abs(difference) <= then["spread"] + now["spread"]:
        return ""
    known = min(then["rounds"], now["rounds"]) >= ENOUGH_ROUNDS
    return ("faster" if difference < 0 else "slower") + ("" if known else "?")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
