"""Attacks that search on a copy: the same adversarial examples as on the network itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks import searching as room
from robustflat.attacks.captured import Captured
from robustflat.attacks.noise import NFgsm
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.searching import COMPILES, Searching
from robustflat.attacks.wrappers import WorstOf
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall
from robustflat.losses.rotation import Rotation
from robustflat.models.chunks import bytes_per_image
from robustflat.models.compiled import Compiled
from robustflat.models.passes import PassCounter, Passes
from robustflat.models.resnet import resnet_tiny
from robustflat.types import Batch

BALL = LinfBall(0.1)


def network(auxiliary: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return resnet_tiny(classes=3, in_channels=1, channels=4, auxiliary=auxiliary).double()


def batch(count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64),
        torch.randint(3, (count,), generator=generator),
    )


def attack(search: str) -> Searching:
    return Searching(Pgd(BALL, steps=3, step_size=0.04), search)


def found(search: str, model: nn.Module) -> Tensor:
    x, y = batch()
    return attack(search)(model, x, y, None, torch.Generator().manual_seed(1)).x_adv


def test_same_examples_as_on_the_network_itself_also_after_it_has_moved() -> None:
    model = network().eval()
    searching, (x, y) = attack("fp32"), batch()
    for _ in range(2):
        plain = Pgd(BALL, steps=3, step_size=0.04)(model, x, y, None, torch.Generator().manual_seed(1))
        ours = searching(model, x, y, None, torch.Generator().manual_seed(1))
        torch.testing.assert_close(ours.x_adv, plain.x_adv, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.value, plain.value, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            model.train()(x)
            model.eval()


@pytest.mark.parametrize("copied", [lambda a: a, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_network_with_other_layers_is_copied_anew(copied: Callable[[Searching], Searching]) -> None:
    model = network().eval()
    searching, (x, y) = attack("fp32"), batch()
    searching(model, x, y)
    searching = copied(searching)
    model.head = nn.Linear(8, 3).double()
    model.body[0].register_forward_hook(lambda layer, taken, given: 2 * given)  # type: ignore[index,union-attr]
    plain = Pgd(BALL, steps=3, step_size=0.04)(model, x, y, None, torch.Generator().manual_seed(1))
    ours = searching(model, x, y, None, torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.value, plain.value, rtol=1e-9, atol=1e-9)


def test_callables_and_networks_in_training_mode_are_attacked_as_they_are() -> None:
    model = network().train()
    calls = []

    def forward(x: Tensor) -> Tensor:
        calls.append(len(x))
        logits: Tensor = model(x)
        return logits

    x, y = batch()
    attack("fp32")(forward, x, y)
    assert len(calls) == 4
    searching = attack("fp32")
    searching(model, x, y)
    assert not len(searching._mirrors)


def test_bf16_search_stays_in_the_ball_and_reaches_nearly_the_same_loss() -> None:
    model = network().float().eval()
    x, y = batch()
    x = x.float()
    values = {}
    for search in ("plain", "bf16"):
        x_adv = attack(search)(model, x, y, None, torch.Generator().manual_seed(1)).x_adv
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6
        values[search] = nn.functional.cross_entropy(model(x_adv), y)
    assert abs(values["bf16"] - values["plain"]) < 0.02


def test_both_heads_of_self_supervision_search_on_copies() -> None:
    model, loss = network(auxiliary=True), Rotation()
    crafted = {
        search: loss.craft(model, attack(search), batch(), torch.Generator().manual_seed(3))
        for search in ("plain", "fp32")
    }
    torch.testing.assert_close(crafted["fp32"].x_adv, crafted["plain"].x_adv, rtol=0, atol=1e-9)
    assert model.training


def test_unknown_search_is_refused() -> None:
    with pytest.raises(UserError, match="search"):
        Searching(Pgd(BALL, steps=1, step_size=0.1), "fp16")


BUDGETED = {
    "best": Pgd(BALL, steps=3, step_size=0.04),
    "tau": Pgd(BALL, steps=3, step_size=0.04, tau=1, momentum=0.5),
    "restarts": Pgd(BALL, steps=2, step_size=0.04, restarts=2, backtracking=True, random_start="uniform_norm"),
}


@pytest.mark.parametrize("search", ["plain", "fp32"])
@pytest.mark.parametrize("kind", BUDGETED)
def test_pieces_within_a_budget_find_what_the_whole_batch_does(search: str, kind: str) -> None:
    model, (x, y) = network().eval(), batch(7)
    found = [
        Searching(BUDGETED[kind], search, memory_budget=budget)(model, x, y, None, torch.Generator().manual_seed(1))
        for budget in (None, "auto", 0.02, 0)
    ]
    for pieces in found[1:]:
        torch.testing.assert_close(pieces.x_adv, found[0].x_adv, rtol=0, atol=1e-9)
        torch.testing.assert_close(pieces.value, found[0].value, rtol=1e-9, atol=1e-9)
        assert torch.equal(pieces.fooled, found[0].fooled)


def test_a_budget_bounds_the_images_of_a_pass() -> None:
    model, (x, y), sizes = network().eval(), batch(8), list[int]()
    model.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    need = bytes_per_image(model, x) / 2**20
    attack = Searching(Pgd(BALL, steps=1, step_size=0.04), "plain", memory_budget=2.5 * need)
    attack(model, x, y)
    assert sizes == [2] * 8
    sizes.clear()
    attack(model, x.repeat(1, 1, 2, 1), y)  # larger images
    assert sizes == [1] * 16


def test_what_is_no_budget_is_refused() -> None:
    with pytest.raises(UserError, match="memory_budget"):
        Searching(Pgd(BALL, steps=1, step_size=0.1), "fp32", memory_budget="little")


@pytest.mark.parametrize(("channels", "sizes"), [(4, [128]), (256, [64, 64])])
def test_by_itself_it_takes_large_networks_64_images_at_once(channels: int, sizes: list[int]) -> None:
    model = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    seen, x = list[int](), torch.rand(128, 1, 16, 16)
    model.eval().register_forward_hook(lambda _, arguments, __: seen.append(len(arguments[0])))
    Searching(Pgd(BALL, steps=1, step_size=0.1), "plain")(model, x, torch.zeros(128, dtype=torch.int64))
    assert seen == 2 * sizes


def with_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let `Searching` compile without a compiler, or capture without a GPU."""
    monkeypatch.setattr(room, "Compiled", lambda copy, **_: Compiled(copy, backend=backend))
    monkeypatch.setattr(room, "require_device", lambda *_: None)

    def record(work: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        results = work()

        def replay() -> None:
            for tensor, new in zip(results, work(), strict=True):
                tensor.copy_(new)

        return results, replay

    monkeypatch.setattr(room, "Captured", partial(Captured, record=record))


@pytest.mark.parametrize("compile", ["default", "graph"])
@pytest.mark.parametrize("budget", [None, 0.02])
def test_compiled_search_finds_the_same_while_the_network_moves(
    monkeypatch: pytest.MonkeyPatch, compile: str, budget: float | None
) -> None:
    with_backend(monkeypatch, "aot_eager")
    model = network().eval()
    attacks = [Searching(BUDGETED["best"], "fp32", memory_budget=budget, compile=c) for c in ("none", compile)]
    for count in (6, 6, 5):  # a smaller last batch
        x, y = batch(count)
        plain, ours = (attack(model, x, y, None, torch.Generator().manual_seed(1)) for attack in attacks)
        torch.testing.assert_close(ours.x_adv, plain.x_adv, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.value, plain.value, rtol=1e-9, atol=1e-9)
        assert torch.equal(ours.fooled, plain.fooled)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            model.train()(x)
            model.eval()


@pytest.mark.parametrize("compile", ["default", "graph"])
@pytest.mark.parametrize("head", [False, True])
def test_counters_count_the_passes_of_a_compiled_search(
    monkeypatch: pytest.MonkeyPatch, compile: str, head: bool
) -> None:
    with_backend(monkeypatch, "eager")
    counted = {}
    for one in ("none", compile):
        model, counter, searching = network().eval(), PassCounter(), Searching(BUDGETED["best"], "fp32", compile=one)
        counter.attach(model)
        attacked = nn.Sequential(model).eval() if head else model
        for count in (6, 6, 5):
            before = counter.passes
            searching(attacked, *batch(count))
            counted[one, count] = counter.passes.since(before)
    assert counted[compile, 6] == counted["none", 6] == Passes(4, 3, 24)
    assert counted[compile, 5] == counted["none", 5] == Passes(4, 3, 20)


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["default", "reduce-overhead"])
def test_inductor_finds_the_same(compile: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x, y = batch()
    attacks = [Searching(BUDGETED["best"], "fp32", memory_budget=None, compile=c) for c in ("none", compile)]
    plain, ours = (attack(model, x.float(), y, None, torch.Generator().manual_seed(1)) for attack in attacks)
    # Where a gradient is nearly zero, rounding may turn its sign.
    assert ((ours.x_adv - plain.x_adv).abs() < 1e-5).double().mean() > 0.99
    torch.testing.assert_close(ours.value, plain.value, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["default", "reduce-overhead", "graph"])
@pytest.mark.parametrize("kind", BUDGETED)
def test_every_way_to_compile_finds_the_same_on_a_gpu(compile: str, kind: str) -> None:
    model = network().cuda().eval()
    x, y = (t.cuda() for t in batch())
    attacks = [Searching(BUDGETED[kind], "fp32", memory_budget=None, compile=c) for c in ("none", compile)]
    for _ in range(3):
        plain, ours = (attack(model, x, y, None, torch.Generator("cuda").manual_seed(1)) for attack in attacks)
        torch.testing.assert_close(ours.x_adv, plain.x_adv, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.value, plain.value, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search": "plain", "compile": "default"}, "set search=fp32"),
        ({"compile": "inductor"}, "compile must be one of default, graph, none, reduce-overhead"),
        ({"compile": "graph", "attack": NFgsm(BALL, step_size=0.1)}, "is for PGD, and this attack is NFgsm"),
        (
            {"compile": "default", "attack": WorstOf({"pgd": BUDGETED["best"], "fgsm": NFgsm(BALL, step_size=0.1)})},
            "this attack is NFgsm: set compile=none",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(options: dict[str, Any], words: str) -> None:
    chosen = {"attack": BUDGETED["best"], "search": "fp32", **options}
    with pytest.raises(UserError, match=words):
        Searching(chosen.pop("attack"), chosen.pop("search"), **chosen)


def test_graphs_need_cuda() -> None:
    assert "graph" in COMPILES
    with pytest.raises(UserError, match="needs a CUDA device, and this is cpu: set compile=default"):
        Searching(BUDGETED["best"], "fp32", compile="graph")(network().eval(), *batch())
