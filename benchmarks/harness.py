"""What all benchmarks share: runs in turn, medians with spread, ratios, peak memory, the machine's limits, a JSON file.

Times are processor seconds of one process next to wall-clock seconds: on a machine with other jobs the first is the
figure to compare. Ratios are those of medians; the spread is half the distance between the quartiles.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

Way = Callable[[], object]
"""One implementation of a piece of work, ready to run."""

RESULTS = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Timing:
    """Times of one way: processor and wall-clock seconds (medians), and the spread of the first."""

    processor: float
    wall: float
    spread: float
    rounds: int


def synchronize(device: str | torch.device = "cpu") -> None:
    """Wait for an accelerator; nothing to do on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def in_turn(ways: Mapping[str, Way], rounds: int, *, device: str = "cpu", warm: bool = True) -> dict[str, Timing]:
    """Run all ways `rounds` times, one after the other each time, so that a change of the machine hits all alike."""
    if warm:
        for run in ways.values():
            run()
    busy: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            synchronize(device)
            start, start_busy = time.perf_counter(), time.process_time()
            run()
            synchronize(device)
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - start_busy)
    return {name: Timing(median(busy[name]), median(wall[name]), _spread(busy[name]), rounds) for name in ways}


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4)
    return (high - low) / 2


def peak_memory(run: Way) -> float:
    """MiB that a run adds to the peak of a process forked for it (CPU only; torch's threads must not run yet)."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        torch.set_num_threads(1)
        before = _resident()
        run()
        theirs.send(_peak() - before)

    process = context.Process(target=child)
    process.start()
    added: float = ours.recv()
    process.join()
    return added


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def limits(device: str = "cpu") -> dict[str, float]:
    """What the machine can do: rate of a large convolution in GFLOP/s by type, and of copying memory in GB/s."""
    found: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layer = nn.Conv2d(64, 64, 3, padding=1, bias=False).to(device, dtype, memory_format=torch.channels_last)
        x = torch.rand(64, 64, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            timing = in_turn({"conv": lambda layer=layer, x=x: layer(x)}, 5, device=device)["conv"]
        found[f"convolution_{name}_gflops"] = 2 * x.numel() * 64 * 9 / timing.wall / 1e9
    source, target = torch.zeros(2**26, device=device), torch.zeros(2**26, device=device)
    timing = in_turn({"copy": lambda: target.copy_(source)}, 5, device=device)["copy"]
    found["copy_gb_per_second"] = 2 * source.numel() * 4 / timing.wall / 1e9
    return found


class Table:
    """Rows of one comparison: printed as Markdown when it is left, and kept in the JSON file of this commit.

    Args:
        title: what was timed, on what; the key in the JSON file.
        first: name of the way that ratios refer to ("literal", say): how many times as fast as it.
        images: images handled by one run, for images per second; None leaves that out.
    """

    def __init__(self, title: str, first: str, *, images: int | None = None) -> None:
        self.title, self.first, self.images = title, first, images

    def report(self, timings: Mapping[str, Timing], notes: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Print, and write into `results.json` (replacing the same title).

        Args:
            timings: by way.
            notes: by way, further columns, such as the value found.
        """
        notes = notes or {}
        extra = list(dict.fromkeys(key for way in notes.values() for key in way))
        head = ["", "processor s", "spread", "wall s", "times as fast"]
        head += ["images/s"] * (self.images is not None) + extra
        print(f"\n{self.title}\n\n| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
        base = timings[self.first].processor
        for way, t in timings.items():
            cells = [way, f"{t.processor:.4g}", f"{t.spread:.2g}", f"{t.wall:.4g}", f"{base / t.processor:.2f}"]
            cells += [f"{self.images / t.wall:.4g}"] if self.images is not None else []
            cells += [str(notes.get(way, {}).get(key, "")) for key in extra]
            print(f"| {' | '.join(cells)} |", flush=True)
        rows = {
            way: asdict(t) | {"ratio": base / t.processor, "notes": dict(notes.get(way, {}))}
            for way, t in timings.items()
        }
        _store(self.title, rows)


def _store(title: str, rows: Mapping[str, Any]) -> None:
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    stored[title] = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine(), "ways": rows}
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    temporary.replace(RESULTS)


def commit() -> str:
    """Short hash of the checked-out commit, with + if files have changed since; "unknown" outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + "+" * bool(dirty.stdout.strip())


def machine() -> str:
    """Processor or card, threads and torch in one line."""
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(": ")[2] if lines else name
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Command line with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--rounds", type=int, default=5, help="times each way is run, in turn (default: 5)")
    result.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    result.add_argument("--device", default="cpu")
    return result
