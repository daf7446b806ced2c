"""Named streams: independent, reproducible, and restored exactly."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from robustflat.errors import UserError
from robustflat.rng import Streams, derived_seed, generator_for


def test_drawing_from_one_stream_never_shifts_another():
    a, b = Streams(3), Streams(3)
    torch.rand(1000, generator=a["augment"])
    assert torch.equal(torch.rand(5, generator=a["attack"]), torch.rand(5, generator=b["attack"]))


def test_streams_and_seeds_differ():
    draws = {tuple(torch.rand(2, generator=Streams(s)[n]).tolist()) for s in range(20) for n in ("a", "b")}
    assert len(draws) == 40


def test_a_restored_stream_goes_on_where_it_was():
    streams = Streams(0)
    torch.rand(7, generator=streams["a"])
    state = streams.state_dict()
    expected = torch.rand(5, generator=streams["a"])
    fresh = Streams(99)
    torch.rand(3, generator=fresh["left over"])
    fresh.load_state_dict(state)
    assert torch.equal(torch.rand(5, generator=fresh["a"]), expected)
    assert torch.equal(torch.rand(5, generator=fresh["new"]), torch.rand(5, generator=Streams(0)["new"]))


def test_seeds_do_not_depend_on_the_process():
    code = "from robustflat.rng import derived_seed; print(derived_seed(5, 'a', 3))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == derived_seed(5, "a", 3)
    assert 0 <= derived_seed(5, "a", 3) < 2**63


def test_names_are_kept_apart():
    assert derived_seed(0, "a", "b") != derived_seed(0, "ab")
    assert torch.equal(torch.rand(2, generator=generator_for(0, "x")), torch.rand(2, generator=generator_for(0, "x")))


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="seed must lie in"):
        Streams(-1)
