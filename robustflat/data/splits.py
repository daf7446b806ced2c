r"""Which examples a text such as "test[:1000]" means.

    SPLIT[START:STOP:STEP][/balanced]       or a name of `PAPER_SPLITS`

START, STOP and STEP are those of a Python slice; a bound may also be a percentage, as in "train[:80%]". Unlike
Python, a bound beyond the end is refused: whoever asks for 20,000 examples of 10,000 should hear of it.
"/balanced" cuts the slice from the split in *round-robin order*: first the first example of every class, then
the second of every class, and so on. So "train[:1000]/balanced" holds each class equally often (up to one).

A validation set held out from training is the pair "train[:-1000]" and "train[-1000:]"; see `held_out`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from robustflat.data.images import ImageSet
from robustflat.errors import UserError, require_one_of, require_range

PAPER_SPLITS: Mapping[str, str] = MappingProxyType(
    {
        "paper_test": "test[:1000]",
        "paper_train": "train[:1000]",
        "paper_early_stopping": "test[-500:]",
        "paper_hessian": "test[-500:]",
        "paper_landscape": "test[-100:]",
        "paper_train_hessian": "train[-500:]",
        "paper_train_landscape": "train[-100:]",
        "paper_clean": "test",
        "paper_clean_train": "train[:10000]",
    }
)
"""The sets of "Relating Adversarially Robust Generalization to Flat Minima" (Stutz et al. 2021): robust error,
robust loss and flatness on `paper_test` (and `paper_train`), clean error on `paper_clean`. The released code
walks the sets taken from the end backwards; where batches must be the same, write "test[-1:-501:-1]"."""

_BOUND = r"-?\d+(?:\.\d+)?%|-?\d+"
_SPLIT = re.compile(
    rf"(?P<source>[A-Za-z_]\w*)"
    rf"(?:\[\s*(?P<start>{_BOUND})?\s*:\s*(?P<stop>{_BOUND})?\s*(?::\s*(?P<step>-?\d+)?\s*)?\])?"
    rf"(?P<balanced>/balanced)?"
)


class Split(NamedTuple):
    """A parsed split: `source` is the name of a set, bounds are texts such as "-500" or "80%" (or None)."""

    text: str
    source: str
    start: str | None
    stop: str | None
    step: int
    balanced: bool


def parse_split(text: str) -> Split:
    """Read a split without looking at any data.

    >>> parse_split("test[-500:]").start, parse_split("paper_test").stop
    ('-500', '1000')

    Raises:
        UserError: if the text does not have the form of a split; the message shows examples.
    """
    match = _SPLIT.fullmatch(PAPER_SPLITS.get(text.strip(), text.strip()))
    if match is None:
        raise UserError(
            f"Cannot read the split '{text}'. Write for example train, test[:1000], test[-500:], "
            f"train[100:200], test[::2], train[:80%], train[:1000]/balanced, "
            f"or one of {', '.join(PAPER_SPLITS)}."
        )
    step = int(match["step"] or 1)
    if step == 0:
        raise UserError(f"The step of the split '{text}' must not be 0.")
    return Split(text.strip(), match["source"], match["start"], match["stop"], step, bool(match["balanced"]))


def split_rows(split: Split, count: int) -> range:
    """The rows 0..count-1 of the source that a split picks (of its round-robin order if it is balanced).

    Args:
        split: from `parse_split`.
        count: number of examples that the source has.

    Raises:
        UserError: if a bound lies beyond the source, or nothing is left.
    """
    start, stop = (_bound(split, text, count) for text in (split.start, split.stop))
    rows = range(count)[start : stop : split.step]
    if not rows:
        raise UserError(f"The split '{split.text}' is empty: {split.source} has {count} examples.")
    return rows


def select_indices(sets: Mapping[str, ImageSet], text: str) -> tuple[str, Tensor | slice]:
    """Name of the source and which of its rows a split means: a slice, or int64 (M,) on the CPU.

    Raises:
        UserError: for a text that cannot be read, an unknown source, a bound beyond it, or no examples.
    """
    split = parse_split(text)
    require_one_of(f"The split '{text}': its source", split.source, sets)
    data = sets[split.source]
    rows = split_rows(split, len(data))
    if split.balanced:
        order = round_robin_order(data.labels.cpu())[list(rows)]
        _require_balance(split, data.labels.cpu()[order], data)
        return split.source, order
    if split.step < 0:
        return split.source, torch.tensor(rows, dtype=torch.int64)
    return split.source, slice(rows.start, rows.stop, rows.step)


def select(sets: Mapping[str, ImageSet], text: str) -> ImageSet:
    """The examples that a split means, as a set of its own; see the head of this file for the form.

    Args:
        sets: the image sets of a source by name, such as "train" and "test".
        text: the split.

    Raises:
        UserError: as in `select_indices`.
    """
    source, rows = select_indices(sets, text)
    data = sets[source]
    if rows == slice(0, len(data), 1):
        return data
    return data.subset(rows, name=_renamed(data.name, source, text))


def held_out(count: int, source: str = "train") -> tuple[str, str]:
    """Two splits without a common example: all but the last `count` to train, the last `count` to validate.

    >>> held_out(1000)
    ('train[:-1000]', 'train[-1000:]')

    Raises:
        UserError: if `count` is below 1.
    """
    require_range("count", count, low=1)
    return f"{source}[:-{count}]", f"{source}[-{count}:]"


def shared_examples(sets: Mapping[str, ImageSet], first: str, second: str) -> int:
    """Number of examples that two splits have in common (by place in the source, not by content)."""
    rows = [select_indices(sets, text) for text in (first, second)]
    if rows[0][0] != rows[1][0]:
        return 0
    member = torch.zeros(2, len(sets[rows[0][0]]), dtype=torch.bool)
    for seen, (_, chosen) in zip(member, rows, strict=True):
        seen[chosen] = True
    return int(member.all(dim=0).sum())


def round_robin_order(labels: Tensor) -> Tensor:
    """Order (N,) in which every class has its turn: by rank within the class, then by place.

    >>> round_robin_order(torch.tensor([0, 0, 0, 1, 1])).tolist()
    [0, 3, 1, 4, 2]
    """
    by_class = torch.sort(labels, stable=True).indices
    counts = torch.bincount(labels)
    first = torch.cumsum(counts, 0) - counts  # where each class starts in by_class
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return torch.sort(rank, stable=True).indices


def _bound(split: Split, text: str | None, count: int) -> int | None:
    if text is None:
        return None
    if text.endswith("%"):
        percent = float(text[:-1])
        require_range(f"The percentage in '{split.text}'", abs(percent), low=0, high=100)
        place = round(count * percent / 100)
        return count + place if text.startswith("-") else place  # a few per cent of few examples may be none
    value = int(text)
    if abs(value) > count and not (split.step < 0 and value == -count - 1):
        raise UserError(
            f"The split '{split.text}' asks for {abs(value)} examples, but {split.source} has only {count}."
        )
    return value


def _require_balance(split: Split, labels: Tensor, data: ImageSet) -> None:
    counts = torch.bincount(labels, minlength=data.classes)
    if int(counts.max() - counts.min()) <= 1:
        return
    available = data.class_counts()
    rarest, fewest = int(available.argmin()), int(available.min())
    raise UserError(
        f"The split '{split.text}' cannot be balanced: class {rarest} has only {fewest} examples "
        f"in {split.source}, so only slices of the first {fewest * data.classes} (step 1) are balanced."
    )


def _renamed(name: str, source: str, text: str) -> str:
    parts = name.rsplit(" ", 1)
    return f"{parts[0]} {text}" if len(parts) == 2 and parts[1] == source else f"{name} {text}"
