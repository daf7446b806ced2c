"""The benchmarks' harness: what it writes down is what was run. No test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks import harness, timing
from benchmarks.harness import Report, Way, parser, ratio_reached
from benchmarks.literal import literal_ascent, literal_pgd, losses_at
from benchmarks.subjects import counted_gflop, forward_gflop, made_up
from benchmarks.timing import in_turn

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A report into an empty file; the machine's limits are not measured, threads stay."""
    monkeypatch.setattr(harness, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(harness, "limits", lambda device: {"convolution_fp32_gflops": 10.0})
    settings = {"device": "cpu", "rounds": 3, "results": tmp_path / "results.json", "memory": False}
    # Clocks of these tests stand in this process.
    return Report(Namespace(**settings, threads=torch.get_num_threads(), together=True))


@pytest.fixture
def clock(monkeypatch):
    """Clocks that stand still: ways move them by hand."""
    now = {"wall": 0.0, "busy": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(timing, "processor_seconds", lambda: now["busy"])
    return now


def taking(clock, seconds: list[float], result: object = None):
    """A way that takes these processor seconds, one after the other, and twice as long on the wall."""
    left = iter(seconds)

    def run():
        spent = next(left)
        clock["busy"] += spent
        clock["wall"] += 2 * spent
        return result

    return run


def test_a_card_has_its_own_limits_and_no_goals_and_a_processor_sees_none(tmp_path, monkeypatch):
    settings = {"rounds": 1, "results": tmp_path / "results.json", "memory": False, "threads": 1, "together": True}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    monkeypatch.setattr(harness, "limits", lambda device: {"convolution_fp32_gflops": 10.0})
    monkeypatch.setattr(harness, "machine", lambda device: "a card")
    ways = {"slow": Way(lambda: sum(range(100_000)), goal=1e9), "quick": Way(lambda: 0, goal=1e9)}
    rows = Report(Namespace(**settings, device="cuda")).compare("a card", ways)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert all("goal" not in row for row in rows.values())
    rows = Report(Namespace(**settings, device="cpu")).compare("a processor", ways)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # a process that knows of a card cannot fork after a gradient
    assert all("goal" in row for row in rows.values())


def test_ways_take_turns_and_medians_and_quartiles_count(clock):
    order: list[str] = []
    seconds = [9.0, 1.0, 2.0, 4.0, 8.0, 3.0]  # the first warms up
    slow = taking(clock, seconds, "found")
    found = in_turn({"a": lambda: (order.append("a"), slow())[1], "b": lambda: order.append("b")}, 5)
    assert order == ["a", "b"] * 6
    assert found["a"].processor == median(seconds[1:]) == 3.0
    assert found["a"].wall == 6.0
    assert found["a"].spread == (4.0 - 2.0) / 2
    assert found["a"].result == "found"
    assert found["b"].processor == 0.0


def test_without_warming_up_the_result_is_that_of_the_first_timed_run():
    results = iter(["first", "second"])
    assert in_turn({"a": lambda: next(results)}, 2, warm=False)["a"].result == "first"


def test_ways_as_scripts_run_here_and_others_in_a_process_that_keeps_memory(report, monkeypatch):
    monkeypatch.setattr(timing, "keep_freed_memory", lambda: monkeypatch.setenv("KEPT", "yes"))
    report.apart, found = True, {}

    def judge(results):
        found.update(results)
        return {}

    def run():
        return os.getpid(), os.environ.get("KEPT"), torch.arange(3)

    report.compare("two processes", {"script": Way(run, as_scripts=True), "ours": Way(run)}, judge=judge)
    assert found["script"][:2] == (os.getpid(), None)
    assert found["ours"][0] != os.getpid()
    assert found["ours"][1] == "yes"
    assert torch.equal(found["ours"][2], torch.arange(3))


def test_a_way_that_fails_in_its_process_ends_the_benchmark(report, capfd):
    report.apart = True
    with pytest.raises(SystemExit, match="ours: failed"):
        report.compare("failing", {"ours": Way(lambda: 1 / 0)})
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_comparison_says_ratio_goal_rate_share_and_value(report, clock, capsys):
    ways = {
        "literal": Way(taking(clock, [4.0] * 4, 1.25)),
        "ours": Way(taking(clock, [1.0] * 4, 1.5), goal=4.5, gflop=5.0),
        "better": Way(taking(clock, [0.5] * 4, 1.5), goal=4.5, gflop=lambda result: 2 * result),
    }
    rows = report.compare("work", ways, judge=lambda r: {n: {"value": v} for n, v in r.items()}, work=(10, "images"))
    assert [row["ratio"] for row in rows.values()] == [1.0, 4.0, 8.0]
    assert [row.get("reached") for row in rows.values()] == [None, False, True]
    assert rows["ours"]["share_of_limit"] == 5.0 / 1.0 / 10.0
    assert rows["better"]["gflop"] == 3.0
    assert rows["ours"]["images_per_second"] == 10 / 2.0
    printed = capsys.readouterr().out
    assert "| ours | 1 | 0 | 2 | 4.00 | at least 4.5: missed | 5 | 50% | 1.5 |" in printed
    assert "at least 4.5: reached" in printed
    assert json.loads(report.path.read_text())["work"]["ways"]["literal"]["found"] == {"value": 1.25}


def test_costs_are_ratios_the_other_way_round_with_goals_from_above(report, clock):
    ways = {"gradient": Way(taking(clock, [1.0] * 4)), "product": Way(taking(clock, [2.0] * 4), goal=2.3)}
    rows = report.compare("cost", ways, cost="gradients")
    assert rows["product"]["ratio"] == 2.0
    assert rows["product"]["reached"]


@pytest.mark.parametrize(
    ("ratio", "goal", "at_most", "reached"),
    [(2.4, 2.4, False, True), (2.396, 2.4, False, True), (2.39, 2.4, False, False), (0.46, 0.45, True, False)],
)
def test_goals_are_compared_to_the_digits_that_are_printed(ratio, goal, at_most, reached):
    assert ratio_reached(ratio, goal, at_most) is reached


def test_the_file_keeps_the_newest_of_each_title_and_the_order_of_the_ways(report, clock):
    for seconds in (1.0, 2.0):
        ways = {name: Way(taking(clock, [seconds] * 4)) for name in ("z", "a")}
        report.compare("one", ways)
    report.compare("two", {"z": Way(taking(clock, [3.0] * 4))})
    stored = json.loads(report.path.read_text())
    assert list(stored) == ["one", "two"]
    assert list(stored["one"]["ways"]) == ["z", "a"]
    assert stored["one"]["ways"]["a"]["processor"] == 2.0
    assert {"commit", "date", "machine", "unit", "device"} <= stored["one"].keys()


def test_figures_without_a_ratio_are_printed_and_kept(report, capsys):
    report.figures("memory", {"set": {"memory_mib": 12.5, "found": {"MiB now": "11"}}})
    assert "| set | 12.5 | 11 |" in capsys.readouterr().out
    assert json.loads(report.path.read_text())["memory"]["ways"]["set"]["memory_mib"] == 12.5


def test_operations_of_a_product_and_of_a_convolution():
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert counted_gflop(lambda: a @ b) == pytest.approx(2 * 3 * 5 * 7 / 1e9)
    layer = torch.nn.Conv2d(4, 8, 3, padding=1, bias=False)
    x = torch.rand(2, 4, 6, 6)
    assert forward_gflop(layer, x) == pytest.approx(2 * (2 * 8 * 6 * 6) * (4 * 9) / 1e9)


def test_literal_attacks_raise_the_loss_within_the_ball():
    model, x, y = made_up(2, 4, "cpu")
    x_adv = literal_pgd(model, x, y, 2, torch.Generator().manual_seed(0)).detach()
    assert float((x_adv - x).abs().max()) <= 8 / 255 + 1e-6
    assert float(losses_at(model, x_adv, y).mean()) > float(losses_at(model, x, y).mean())
    climbed = literal_ascent(model, x, y, steps=2, generator=torch.Generator().manual_seed(0))
    assert float(climbed.mean()) > float(losses_at(model, x, y).mean())


def test_options_that_all_have():
    given = parser("text").parse_args(["--rounds", "2", "--no-memory"])
    assert (given.rounds, given.memory, given.threads, given.device) == (2, False, 1, "cpu")


@pytest.mark.slow
def test_peak_memory_is_what_a_run_takes():
    code = (
        "import torch; from benchmarks.harness import peak_memory\n"
        "print(peak_memory(lambda: torch.ones(64 * 2**18).sum()), peak_memory(lambda: 1 / 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    used, failed = done.stdout.split()
    assert 60 < float(used) < 80
    assert failed == "nan"
    assert "ZeroDivisionError" in done.stderr
