"""Named random streams: one `torch.Generator` per purpose, so that a draw for one never shifts another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from robustflat.errors import require_range


def derived_seed(seed: int, *names: str | int) -> int:
    """Seed in [0, 2**63) that depends on `seed` and all `names`, the same everywhere."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Fresh generator on `device`, seeded with `derived_seed(seed, *names)`."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, *names))


class Streams:
    """Random generators by name, created at first use and saved together.

    >>> a, b = Streams(0), Streams(0)
    >>> bool((torch.rand(3, generator=a["attack"]) == torch.rand(3, generator=b["attack"])).all())
    True

    Args:
        seed: the run's seed, >= 0; every stream's own seed is derived from it and the stream's name.
        device: where the generators live (images of that device can be drawn for directly).

    Raises:
        UserError: if seed is negative.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        require_range("seed", seed, low=0)
        self.seed = seed
        self.device = torch.device(device)
        self._generators: dict[str, torch.Generator] = {}

    def __getitem__(self, name: str) -> torch.Generator:
        """The generator called `name`; its draws depend only on seed, name and its earlier draws."""
        if name not in self._generators:
            self._generators[name] = generator_for(self.seed, name, device=self.device)
        return self._generators[name]

    def state_dict(self) -> dict[str, object]:
        """Seed and the state of every stream used so far (uint8 tensors), for a checkpoint."""
        return {"seed": self.seed, "states": {name: g.get_state() for name, g in self._generators.items()}}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Bring every stream back to where `state_dict` saw it; streams not in `state` start afresh."""
        self.seed = int(str(state["seed"]))
        self._generators.clear()
        states = state["states"]
        assert isinstance(states, dict)
        for name, value in states.items():
            assert isinstance(value, Tensor)
            self[str(name)].set_state(value.cpu())
