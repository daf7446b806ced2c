"""What all benchmarks share: runs in turn, medians with spread, ratios, peak memory, the machine's limits, a JSON file.

Times are processor seconds of one process next to wall-clock seconds: on a machine with other jobs the first is the
figure to compare. Ratios are those of medians (of processor seconds; of wall-clock seconds on an accelerator); the
spread is half the distance between the quartiles. Every way's result is judged, so that a speed never stands without
the value that was found.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import json
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import Timing, in_turn, keeping_memory, on_cuda
from robustflat.models.fused import Fused, fast_copy
from robustflat.models.inference import keep_freed_memory

RESULTS = Path(__file__).with_name("results.json")
Found = Mapping[str, Any]
"""Name -> value that a run has found, such as a loss."""


@dataclass(frozen=True)
class Way:
    """One implementation of a piece of work, and what to say of it.

    Attributes:
        run: does the work and returns what it found.
        goal: of the issue: at least this many times as fast as the first way; with `cost`, at most this many units.
        gflop: floating-point operations (in 1e9) that the method needs for one run, or what tells them from the
            result; `None`: not stated.
        half: whether these are done in bf16, whose limit is another.
        brief: a shorter run with the same peak memory; `None`: `run`.
        as_scripts: run as scripts do, which give freed memory back to the system; our commands keep it.
    """

    run: Callable[[], object]
    goal: float | None = None
    gflop: float | Callable[[Any], float] | None = None
    half: bool = False
    brief: Callable[[], object] | None = None
    as_scripts: bool = False


def peak_memory(run: Callable[[], object], device: str = "cpu") -> float:
    """MiB that a run adds to the memory before it; NaN if it failed.

    On a CPU: to the resident memory of a process forked for it, one thread, with glibc's own thresholds. On a card:
    to what torch has allocated there.
    """
    if on_cuda(device):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    _trim()  # what is free here would be the child's peak from the start, or hide what it takes

    def child() -> None:
        torch.set_num_threads(1)
        _use_default_thresholds()
        _load_kernels()
        _trim()
        before = _resident()
        run()
        theirs.send(_peak() - before)

    process = context.Process(target=child)
    process.start()
    theirs.close()
    try:
        added: float = ours.recv()
    except EOFError:  # the child has said why
        added = math.nan
    process.join()
    return added


def _trim() -> None:
    """Hand memory that is free to the system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _use_default_thresholds() -> None:
    """Undo `keep_freed_memory`."""
    with suppress(OSError, AttributeError):
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
            ctypes.CDLL(None).mallopt(threshold, 128 * 1024)


def _load_kernels() -> None:
    """Use convolutions and a fused copy once: the code that this loads, tens of MiB, is no way's own."""
    layers = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)
    network, x = nn.Sequential(*layers).eval().requires_grad_(False), torch.rand(2, 8, 8, 8)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layer = copy.deepcopy(layers[0]).to(dtype, memory_format=torch.channels_last)
        point = x.to(dtype).requires_grad_()
        nn.functional.cross_entropy(layer(point).mean((2, 3)).float(), torch.zeros(2, dtype=torch.long)).backward()
        fast = fast_copy(network, x, precision)
        if isinstance(fast, Fused):
            fast.with_gradient(x.repeat(2**10, 1, 1, 1), lambda logits: logits.sum(1))


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@functools.cache
def limits(device: str = "cpu") -> dict[str, float]:
    """What the machine can do: rate of a large convolution in GFLOP/s by type, and of copying memory in GB/s.

    On a CPU these are rates per processor second, hence of one core; on a card fp32 may be TF32, as in the ways.
    """
    found: dict[str, float] = {}
    width, sources = (512, 2**28) if on_cuda(device) else (64, 2**26)  # a card is not filled by what fills a core
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layer = nn.Conv2d(width, width, 3, padding=1, bias=False).to(device, dtype, memory_format=torch.channels_last)
        x = torch.rand(width, width, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            timing = in_turn({"conv": lambda layer=layer, x=x: layer(x)}, 5, device=device)["conv"]
        found[f"convolution_{name}_gflops"] = 2 * x.numel() * width * 9 / timing.seconds(device) / 1e9
    source, target = torch.zeros(sources, device=device), torch.zeros(sources, device=device)
    timing = in_turn({"copy": lambda: target.copy_(source)}, 5, device=device)["copy"]
    found["copy_gb_per_second"] = 2 * source.numel() * 4 / timing.seconds(device) / 1e9
    return found


class Report:
    """Prints comparisons as Markdown, and keeps them in a JSON file: the newest of each title.

    Args:
        given: options of `parser`; threads are set here.

    Attributes:
        memory: whether peak memory is measured too.
        goals: whether goals are stated, on a CPU; they are meant for certain sizes.
        apart: whether ways run in two processes, one for those that run as scripts do (CPU, one thread); otherwise all
            run in this one and keep the memory they free.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.device, self.rounds, self.path = str(given.device), int(given.rounds), Path(given.results)
        self.memory, self.goals = bool(given.memory), True
        if not on_cuda(self.device):
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # next to a card, a process that has taken a gradient cannot fork
        torch.set_num_threads(given.threads)
        self.apart = not on_cuda(self.device) and int(given.threads) == 1 and hasattr(os, "fork") and not given.together

    def compare(
        self,
        title: str,
        ways: Mapping[str, Way],
        *,
        judge: Callable[[Mapping[str, Any]], Mapping[str, Found]] | None = None,
        work: tuple[float, str] | None = None,
        cost: str = "",
        warm: bool = True,
    ) -> dict[str, dict[str, Any]]:
        """Measure memory, then time all ways in turn, judge their results, print and store.

        Args:
            title: what is timed, on what; the key in the JSON file.
            ways: by name; ratios refer to the first.
            judge: results by way -> values found by way.
            work: how much of what one run does, such as (128, "images").
            cost: unit in which a way costs as much as the first; "": ratios say how many times as fast it is.
            warm: run each way once before.

        Returns:
            What is stored, by way.
        """
        memory = {n: peak_memory(way.brief or way.run, self.device) for n, way in ways.items()} if self.memory else {}
        timings = self._timings(ways, warm=warm)
        found = judge({name: timing.result for name, timing in timings.items()}) if judge else {}
        base = next(iter(timings.values())).seconds(self.device)
        rows: dict[str, dict[str, Any]] = {}
        for name, way in ways.items():
            timing, seconds = timings[name], timings[name].seconds(self.device)
            row = {key: getattr(timing, key) for key in ("processor", "wall", "spread", "rounds")}
            row["ratio"] = seconds / base if cost else base / seconds
            row |= _against(
                row["ratio"], way.goal if self.goals and not on_cuda(self.device) else None, at_most=bool(cost)
            )
            row |= {f"{work[1]}_per_second": work[0] / timing.wall} if work else {}
            row |= {"memory_mib": memory[name]} if memory else {}
            row |= self._share(way, timing)
            rows[name] = row | {"found": dict(found.get(name, {}))}
        self._print(title, rows, cost or "times as fast", work[1] if work else "")
        self._store(title, rows, cost)
        return rows

    def _timings(self, ways: Mapping[str, Way], *, warm: bool) -> dict[str, Timing]:
        runs = {name: way.run for name, way in ways.items()}
        if not self.apart:
            keep_freed_memory()
            return in_turn(runs, self.rounds, device=self.device, warm=warm)
        with keeping_memory({name: run for name, run in runs.items() if not ways[name].as_scripts}) as kept:
            return in_turn(runs | kept, self.rounds, warm=warm)

    def compare_memory(self, title: str, ways: Mapping[str, Way], goals: Mapping[str, float]) -> None:
        """Peak memory of ways as a share of the first's; a goal is the largest share allowed."""
        used = {name: peak_memory(way.brief or way.run, self.device) for name, way in ways.items()}
        base = next(iter(used.values()))
        rows: dict[str, dict[str, Any]] = {}
        for name, value in used.items():
            rows[name] = {"memory_mib": value, "ratio": value / base}
            rows[name] |= _against(
                value / base, goals.get(name) if self.goals and not on_cuda(self.device) else None, at_most=True
            )
        self._print(title, rows, "of the first", "")
        self._store(title, rows, "memory")

    def figures(self, title: str, rows: Mapping[str, dict[str, Any]]) -> None:
        """Print and store figures that are compared with nothing; keys as in `compare`."""
        rows = {name: {"found": {}} | row for name, row in rows.items()}
        self._print(title, rows, "", "")
        self._store(title, rows, "")

    def _share(self, way: Way, timing: Timing) -> dict[str, float]:
        if way.gflop is None:
            return {}
        gflop = way.gflop(timing.result) if callable(way.gflop) else way.gflop
        limit = limits(self.device)[f"convolution_{'bf16' if way.half else 'fp32'}_gflops"]
        return {"gflop": gflop, "share_of_limit": gflop / timing.seconds(self.device) / limit}

    def _print(self, title: str, rows: Mapping[str, Mapping[str, Any]], ratio: str, what: str) -> None:
        columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "processor s": lambda row: _number(row.get("processor")),
            "spread": lambda row: _number(row.get("spread"), 2),
            "wall s": lambda row: _number(row.get("wall")),
            ratio: lambda row: f"{row['ratio']:.2f}" if "ratio" in row else "",
            "goal": _goal,
            f"{what}/s": lambda row: _number(row.get(f"{what}_per_second")),
            "peak MiB": lambda row: _number(row.get("memory_mib")),
            "of the limit": lambda row: f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else "",
        }
        for key in dict.fromkeys(key for row in rows.values() for key in row.get("found", {})):
            columns[key] = lambda row, key=key: str(row["found"].get(key, ""))
        cells = {head: [cell(row) for row in rows.values()] for head, cell in columns.items()}
        cells = {head: column for head, column in cells.items() if any(column)}
        print(f"\n**{title}**\n\n|  | {' | '.join(cells)} |\n|---|{'---:|' * len(cells)}")
        for index, name in enumerate(rows):
            print(f"| {name} | {' | '.join(column[index] for column in cells.values())} |", flush=True)

    def _store(self, title: str, rows: Mapping[str, Any], unit: str) -> None:
        entry = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine(self.device)}
        entry |= {"device": self.device, "unit": unit or "times as fast", "ways": rows}
        if any("share_of_limit" in row for row in rows.values()):
            entry["limits"] = limits(self.device)
        stored = read_results(self.path) | {title: entry}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(_finite(dict(sorted(stored.items()))), indent=1) + "\n")
        temporary.replace(self.path)


def read_results(path: Path) -> dict[str, Any]:
    """Comparisons by title of a results file; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def _against(ratio: float, goal: float | None, *, at_most: bool) -> dict[str, Any]:
    if goal is None:
        return {}
    return {
        "goal": goal,
        "goal_is": "at most" if at_most else "at least",
        "reached": ratio_reached(ratio, goal, at_most),
    }


def ratio_reached(ratio: float, goal: float, at_most: bool) -> bool:
    """Whether a ratio is as good as its goal, to the two digits that are printed."""
    return round(ratio, 2) <= goal if at_most else round(ratio, 2) >= goal


def _goal(row: Mapping[str, Any]) -> str:
    return f"{row['goal_is']} {row['goal']:g}: {'reached' if row['reached'] else 'missed'}" if "goal" in row else ""


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else "unknown" if math.isnan(value) else f"{value:.{digits}g}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def commit() -> str:
    """Short hash of the checked-out commit, with + if files (other than results) have changed since; or "unknown"."""
    folder = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", f":!{RESULTS.parent.name}/{RESULTS.name}")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str = "cpu") -> str:
    """Processor or card, threads and torch in one line: what must be equal for seconds to be compared."""
    name = platform.machine()
    if on_cuda(device):
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(": ")[2] if lines else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def parser(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """Command line with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--rounds", type=int, default=rounds, help=f"times each way is run (default: {rounds})")
    result.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    result.add_argument("--device", default="cpu")
    result.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    result.add_argument("--together", action="store_true", help="all ways in one process that keeps freed memory")
    result.add_argument("--results", type=Path, default=RESULTS, help="JSON file that takes the results")
    return result
