"""Recorded steps: calls are counted by hand, shares add up, the trace is a trace."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from robustflat.errors import UserError
from robustflat.models.profiling import PYTHON, StepProfiler, stepping_with_passes


def work(profiler: StepProfiler, steps: int) -> None:
    network, x = nn.Linear(3, 2), torch.ones(4, 3)
    profiler.start()
    for _ in range(steps):
        with record_function("forward"):
            loss = network(x).sum() + network(2 * x).sum()
        with record_function("rare"):
            pass
        loss.backward()
        profiler.step()


def test_only_the_wanted_steps_are_recorded_and_operators_counted(tmp_path):
    trace = tmp_path / "deep" / "trace.json"
    profiler = StepProfiler(steps=3, warmup=2, trace=trace)
    work(profiler, 9)
    assert profiler.steps == 3
    operators = profiler.operators().set_index("operator")
    assert operators.loc["aten::addmm", "calls"] == 2.0  # per step
    assert operators.loc["autograd: AddmmBackward0", "calls"] == 2.0
    assert operators["share"].sum() == pytest.approx(1.0)
    assert PYTHON in operators.index
    assert not any(name.startswith("ProfilerStep") or name == "forward" for name in operators.index)
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::addmm", "forward"} <= names
    assert [path.name for path in trace.parent.iterdir()] == ["trace.json"]


def test_phases_add_up_to_the_whole_and_the_rest_has_a_name():
    profiler = StepProfiler(steps=2, warmup=1)
    work(profiler, 3)
    phases = profiler.phases(["forward", "rare", "never"], "rest").set_index("phase")
    assert list(phases["calls"]) == [1.0, 1.0, 0.0, 1.0]
    assert phases["share"].sum() == pytest.approx(1.0)
    assert phases.loc["forward", "ms"] > phases.loc["rare", "ms"] > phases.loc["never", "ms"] == 0
    assert phases.loc["rest", "ms"] > 0  # the backward pass
    assert list(phases.columns) == ["calls", "ms", "share"]


def test_memory_is_what_operators_keep():
    profiler, kept = StepProfiler(steps=2, warmup=1), []
    profiler.start()
    for _ in range(3):
        kept.append(torch.empty(2**18))  # 1 MiB
        profiler.step()
    assert profiler.operators().set_index("operator").loc["aten::empty", "memory_mib"] == pytest.approx(1.0, rel=0.01)


def test_recording_may_end_early_or_never_begin():
    profiler = StepProfiler(steps=10, warmup=1)
    work(profiler, 3)
    profiler.stop()
    assert 2 <= profiler.steps <= 3  # the last one was cut
    short = StepProfiler(steps=2, warmup=5)
    work(short, 2)
    short.stop()
    assert short.steps == 0
    assert list(short.operators()["operator"]) == [PYTHON]


def test_forward_passes_of_any_network_are_steps_and_the_hooks_go():
    networks = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)]
    profiler = StepProfiler(steps=2, warmup=1)
    profiler.start()
    with stepping_with_passes(profiler):
        for network in (*networks, *networks):
            network(torch.ones(1, 2))
        with pytest.raises(RuntimeError):
            networks[0](torch.ones(1, 3))
    assert profiler.steps == 2
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize(("key", "value"), [("steps", 0), ("warmup", 0)])
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=f"profile.{key}"):
        StepProfiler(**{key: value})


def test_a_trace_that_cannot_be_written_is_an_error_for_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write the trace"):
        work(StepProfiler(steps=1, warmup=1, trace=tmp_path / "file" / "trace.json"), 2)
