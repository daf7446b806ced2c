"""A training method in words: its parts, their formulas and sources, and what one optimizer step costs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from robustflat.attacks.describe import describe
from robustflat.explanation import Cost, CountsPasses, Explanation, explanation_of, unknown_cost
from robustflat.losses.base import TrainingLoss
from robustflat.training.callbacks import Callback
from robustflat.types import Attack


class Part(NamedTuple):
    """One slot of the trainer: its name, the object in it with its settings, and what that says of itself."""

    slot: str
    settings: str
    explanation: Explanation


class Method(NamedTuple):
    """The parts of a method and the cost of an optimizer step after any warm-up; str() is the text for a reader."""

    parts: tuple[Part, ...]
    cost: Cost
    steps: int | None

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        width = max(len(part.slot) for part in self.parts) + 2
        for part in self.parts:
            yield f"{part.slot:<{width}}{part.explanation.formula}"
            if part.explanation.note:
                yield f"{'':<{width}}({part.explanation.note})"
            yield f"{'':<{width}}{part.settings}"
            if part.explanation.source:
                yield f"{'':<{width}}{part.explanation.source}"
        values = ", ".join(f"{name} = {value:g}" for name, value in self.cost.symbols.items())
        yield ""
        yield f"cost of a step  {self.cost.formula}{f'   ({values})' if values else ''}"
        yield f"                = {self.cost.numbers()}"
        yield "                F: forward pass of a batch; B: backward to all weights; Bx: backward to the images only"
        yield f"steps           {'not known' if self.steps is None else f'{self.steps:,}'}"


def explain_method(
    *,
    loss: TrainingLoss,
    attack: Attack,
    gradient: object,
    wrappers: Mapping[str, Callable[[Attack], Attack] | None] | None = None,
    callbacks: Mapping[str, Callback | None] | None = None,
    make_optimizer: Callable[..., object] | None = None,
    make_schedule: Callable[..., object] | None = None,
    steps: int | None = None,
) -> Method:
    """What a trainer with these parts does; see `Trainer` for them. Nothing is run.

    Args:
        loss, attack, gradient, wrappers, callbacks, make_optimizer, make_schedule: as given to `Trainer`.
        steps: optimizer steps of the whole training, if known.
    """
    parts = [_part("loss", loss), _part("attack", attack)]
    for name, wrap in (wrappers or {}).items():
        if wrap is not None:
            attack = wrap(attack)
            parts.append(_part(f"wrapper {name}", attack))
    parts.append(_part("gradient", gradient))
    used = [c for c in (callbacks or {}).items() if c[1] is not None]
    parts += [_part(f"callback {name}", callback) for name, callback in used]
    parts += [_made(slot, f) for slot, f in (("optimizer", make_optimizer), ("schedule", make_schedule)) if f]
    cost = _step_cost(gradient, loss.craft_cost(attack), explanation_of(loss).cost)
    for _, callback in used:
        cost = cost + explanation_of(callback).cost
    return Method(tuple(parts), cost, steps)


def _step_cost(gradient: object, craft: Cost, score: Cost) -> Cost:
    if isinstance(gradient, CountsPasses):
        return gradient.step_cost(craft, score)
    return unknown_cost(type(gradient).__name__)


def _part(slot: str, thing: object) -> Part:
    return Part(slot, describe(thing), explanation_of(thing))


def _made(slot: str, make: Callable[..., object]) -> Part:
    """A part that is made later, by a function of ours: its settings, and the first sentence of its docstring."""
    bound = make if isinstance(make, functools.partial) else functools.partial(make)
    defaults = {n: p.default for n, p in inspect.signature(bound.func).parameters.items()}
    known = {n: v for n, v in {**defaults, **bound.keywords}.items() if v is not inspect.Parameter.empty}
    name = getattr(bound.func, "__name__", type(bound.func).__name__)
    settings = ", ".join(f"{n}={describe(v)}" for n, v in known.items() if v is not None)
    sentence = (inspect.getdoc(bound.func) or name).partition("\n\n")[0].replace("\n", " ")
    return Part(slot, f"{name}({settings})", Explanation(sentence))
