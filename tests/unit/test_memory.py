"""Free memory as the kernel states it, and what users may write for a budget."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from robustflat.errors import UserError
from robustflat.memory import MIB, budget_bytes, free_memory, require_memory_budget

GIB = 2**30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal:  33554432 kB\nMemAvailable:   {8 * GIB // 1024} kB\nHugePages_Total:       0\n"}


def test_without_groups_it_is_what_the_kernel_calls_available(tmp_path):
    assert free_memory(root=tree(tmp_path, MEMINFO)) == 8 * GIB


@pytest.mark.parametrize("where", ["", "job/", "job/step/"], ids=["container", "outer", "own"])
def test_the_tightest_group_of_version_2_decides_and_its_page_cache_is_free(tmp_path, where):
    group = f"sys/fs/cgroup/{where}"
    files = {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": "max\n",
        "sys/fs/cgroup/job/memory.current": f"{GIB}\n",
        f"{group}memory.max": f"{4 * GIB}\n",
        f"{group}memory.current": f"{3 * GIB}\n",
        f"{group}memory.stat": f"anon 5\ninactive_file {GIB // 2}\nfile 9\n",
    }
    assert free_memory(root=tree(tmp_path, MEMINFO | files)) == GIB + GIB // 2


def test_groups_of_version_1(tmp_path):
    group = "sys/fs/cgroup/memory/a/b"
    files = {
        "proc/self/cgroup": "4:memory:/a/b\n1:cpu:/\n0::/\n",
        f"{group}/memory.limit_in_bytes": str(2 * GIB),
        f"{group}/memory.usage_in_bytes": str(GIB),
        f"{group}/memory.stat": "inactive_file 1\ntotal_inactive_file 1000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",  # no limit
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(30 * GIB),
    }
    assert free_memory(root=tree(tmp_path, MEMINFO | files)) == GIB + 1000


def test_a_group_over_its_limit_leaves_nothing_rather_than_less(tmp_path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "1000",
        "sys/fs/cgroup/memory.current": "3000",
    }
    assert free_memory(root=tree(tmp_path, MEMINFO | files)) == 0


def test_a_system_that_tells_nothing_has_some(tmp_path):
    assert 0 < free_memory(root=tmp_path) < 2**45


def test_this_machine_has_memory_left():
    assert 10 * MIB < free_memory() < 2**45
    assert budget_bytes("auto") == pytest.approx(free_memory() / 2, rel=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_the_allocator_keeps_on_a_card_is_free():
    kept = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    before = free_memory("cuda")
    del kept
    assert free_memory("cuda") >= before + 60 * MIB


def test_budgets_are_mebibytes_auto_or_none():
    assert budget_bytes(3) == 3 * 2**20
    assert budget_bytes(0) == 0
    assert budget_bytes(None) == math.inf


@pytest.mark.parametrize("wrong", [-1, math.nan, True, "lots", "8 GiB", ""])
def test_anything_else_is_refused_in_words(wrong):
    with pytest.raises(UserError, match="memory_budget must be a number of MiB"):
        require_memory_budget(wrong)
