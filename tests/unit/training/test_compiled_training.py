"""Training with a compiled search: the same weights, two compilations in all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from robustflat.attacks import searching
from robustflat.errors import UserError
from robustflat.models.compiled import Compiled
from tests.unit.training.shared_runs import fitted, make


@pytest.mark.parametrize("method", ["at", "half"])
def test_compiled_training_is_the_same_and_compiles_once(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    graphs = list[torch.fx.GraphModule]()

    def counting(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(searching, "Compiled", lambda copy, **_: Compiled(copy, backend=counting))
    plain, ours = (fitted(method, {"search": "fp32", "compile": c, "epochs": 3}) for c in ("none", "default"))
    for name, weight in plain["networks"]["model"].items():
        torch.testing.assert_close(ours["networks"]["model"][name], weight, rtol=1e-9, atol=1e-9)
    assert len(graphs) == 2  # with the gradient and without, for six steps


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compile": "graph", "search": "fp32"}, "needs a CUDA device"),
        ({"compile": "default"}, "set search=fp32"),
        ({"compile": "fast"}, "compile must be one of"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_training(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make("at", **options)
