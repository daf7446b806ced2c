"""How the parts of a training method explain themselves: formula, source, and cost in passes through the network.

Every attack, loss, gradient rule and callback has a method `explain`. What it costs together is composed from what
each part says of itself, so that a part of your own fits in by saying the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Cost:
    """Passes of one batch through the network, as a formula and as numbers; half a batch is half a pass.

    >>> attack = (FORWARD + INPUT_BACKWARD).times(7, "K", K=7) + FORWARD
    >>> str(attack + FORWARD + BACKWARD)
    'K (F + Bx) + F + F + B, K = 7: 9 F + 1 B + 7 Bx'

    Attributes:
        formula: in F (forward), B (backward to all weights) and Bx (backward to the images only).
        forward, backward, input_backward: the numbers of these passes; NaN where a part does not say.
        symbols: values of the other names in the formula.
        at_most: whether the numbers are an upper bound, because the work depends on the data.
    """

    formula: str
    forward: float = 0.0
    backward: float = 0.0
    input_backward: float = 0.0
    symbols: Mapping[str, float] = field(default_factory=dict)
    at_most: bool = False

    def __add__(self, other: Cost) -> Cost:
        """Both, one after the other. A symbol that means another number in `other` gets a number of its own."""
        if not self.formula or not other.formula:
            return self if not other.formula else other
        other = other._distinct_from(self)
        return Cost(
            f"{self.formula} + {other.formula}",
            self.forward + other.forward,
            self.backward + other.backward,
            self.input_backward + other.input_backward,
            {**self.symbols, **other.symbols},
            self.at_most or other.at_most,
        )

    def times(self, factor: float, text: str, **symbols: float) -> Cost:
        """`factor` times this cost, written `text` in the formula; `symbols` give the values of names in the text."""
        if not self.formula:
            return self
        own = self._distinct_from(Cost(text, symbols=symbols))
        return replace(
            own,
            formula=f"{text} ({own.formula})" if " " in own.formula else f"{text} {own.formula}",
            forward=factor * own.forward,
            backward=factor * own.backward,
            input_backward=factor * own.input_backward,
            symbols={**symbols, **own.symbols},
        )

    def numbers(self) -> str:
        """The numbers of passes, such as "9 F + 1 B + 7 Bx"."""
        if math.isnan(self.forward):
            return "not known: a part does not say what it costs"
        named = {"F": self.forward, "B": self.backward, "Bx": self.input_backward}
        text = " + ".join(f"{value:g} {name}" for name, value in named.items() if value)
        return f"{'at most ' if self.at_most and text else ''}{text or 'nothing'}"

    def __str__(self) -> str:
        if not self.formula:
            return "nothing"
        values = "".join(f", {name} = {value:g}" for name, value in self.symbols.items())
        return f"{self.formula}{values}: {self.numbers()}"

    def _distinct_from(self, other: Cost) -> Cost:
        """The same cost, with symbols renamed (K -> K2) that have another value in `other`."""
        cost = self
        for name, value in self.symbols.items():
            if other.symbols.get(name, value) == value:
                continue
            number = 2
            while f"{name}{number}" in {**other.symbols, **cost.symbols}:
                number += 1
            fresh = f"{name}{number}"
            symbols = {fresh if n == name else n: v for n, v in cost.symbols.items()}
            cost = replace(cost, formula=re.sub(rf"\b{name}\b", fresh, cost.formula), symbols=symbols)
        return cost


NOTHING = Cost("")
FORWARD = Cost("F", forward=1)
BACKWARD = Cost("B", backward=1)
INPUT_BACKWARD = Cost("Bx", input_backward=1)


def unknown_cost(what: str) -> Cost:
    """Cost of a part that does not say it: the formula names the part, the numbers are NaN."""
    return Cost(f"cost({what})", math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Explanation:
    """What one part of a method does.

    Attributes:
        formula: as the literature writes it, w the weights, x the images, x' the attacked ones, y the labels.
        source: the paper it is from; empty where it is nobody's.
        cost: of one call on one batch: an attack, the scoring of a loss. Gradient rules put these together in
            `step_cost`; of a callback it is what one optimizer step costs more.
        note: one more sentence, such as what it costs outside of steps; may be empty.
    """

    formula: str
    source: str = ""
    cost: Cost = NOTHING
    note: str = ""


@runtime_checkable
class Explains(Protocol):
    """Whatever can say what it does."""

    def explain(self) -> Explanation:
        """Formula, source and cost with the settings of this object."""
        ...


@runtime_checkable
class CountsPasses(Protocol):
    """A gradient rule that can say what one optimizer step costs."""

    def step_cost(self, craft: Cost, score: Cost) -> Cost:
        """Cost of a step, if crafting a batch costs `craft`, and scoring it with its gradient `score`."""
        ...


def explanation_of(part: object) -> Explanation:
    """What a part says of itself; of one that says nothing, that."""
    if isinstance(part, Explains):
        return part.explain()
    name = type(part).__name__
    return Explanation(f"{name} (has no method explain)", cost=unknown_cost(name))
