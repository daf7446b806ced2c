"""Work shared among ranks: order, errors, and what happens inside and outside of it."""

from __future__ import annotations

import os

import pytest
import torch

from robustflat.errors import UserError
from robustflat.evaluation.turns import in_turn
from robustflat.ranks import Ranks, current, sharing_work, workers
from tests.forked_ranks import on_ranks


@pytest.mark.parametrize("items", [0, 1, 2, 7])
def test_every_item_is_done_once_and_all_ranks_get_all_in_order(items, tmp_path):
    def work():
        done = current().map(lambda i: (i, os.getpid()), range(items))
        return [i for i, _ in done], [pid for _, pid in done], os.getpid()

    answers = on_ranks(3, work, tmp_path)
    pids = [pid for _, _, pid in answers]
    for order, who, _ in answers:
        assert order == list(range(items))
        assert who == [pids[i % 3] for i in range(items)]


class OddError(Exception):
    """Cannot be made from what it prints."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


@pytest.mark.parametrize(("error", "kind"), [(UserError("no such thing"), UserError), (OddError(1, 2), RuntimeError)])
def test_an_error_on_one_rank_is_raised_on_all(error, kind, tmp_path):
    def fail(item):
        if item == 1:
            raise error
        return item

    def work():
        try:
            current().map(fail, range(4))
        except Exception as caught:
            return (type(caught) if type(caught) is not OddError else "itself"), str(caught), current().collect([1])

    first, second = on_ranks(2, work, tmp_path)
    assert first[0] is kind
    assert str(error) in first[1]
    assert second[:2] == ((kind, str(error)) if kind is UserError else ("itself", "odd"))
    assert first[2] == second[2] == [1, 1]  # the ranks still talk to each other


def test_what_the_first_rank_finds_or_cannot_do_is_known_to_all(tmp_path):
    def refuse():
        raise UserError(f"refused by {current().rank}")

    def work():
        found = current().on_first(lambda: {"rank": current().rank, "values": (torch.ones(2),)})
        with pytest.raises(UserError, match="refused by 0"):
            current().on_first(refuse)
        return found["rank"], found["values"][0].tolist()

    assert on_ranks(2, work, tmp_path) == [(0, [1.0, 1.0])] * 2


def test_work_is_shared_inside_the_block_only_and_never_twice(tmp_path):
    def work():
        outside = workers().size
        with sharing_work():
            inside, within = workers().size, workers().map(lambda _: workers().size, [0, 1])
            first = workers().on_first(lambda: workers().size)
        return outside, inside, within, first, workers().size

    assert on_ranks(2, work, tmp_path) == [(1, 2, [1, 1], 1, 1)] * 2
    with sharing_work():
        assert workers() == Ranks()


@pytest.mark.parametrize("known", [True, False])
def test_items_draw_as_if_one_came_after_the_other(known, tmp_path):
    def both(shared):
        generator = torch.Generator().manual_seed(3)

        def draw(item):
            return torch.rand(2 + item, generator=generator)

        def rehearsal(item, stand_in):
            torch.rand(2 + item, generator=stand_in)
            return known

        if not shared:
            return in_turn(draw, 5, generator, rehearsal), torch.rand(1, generator=generator)
        with sharing_work():
            return in_turn(draw, 5, generator, rehearsal), torch.rand(1, generator=generator)

    expected = both(False)
    torch.manual_seed(3)
    for item, drawn in enumerate(expected[0]):
        assert torch.equal(drawn, torch.rand(2 + item))
    for found in on_ranks(3, lambda: both(True), tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
        assert torch.equal(found[1], expected[1])


def test_a_wrong_rehearsal_is_noticed(tmp_path):
    def work():
        generator = torch.Generator().manual_seed(3)
        with sharing_work():
            return in_turn(lambda i: torch.rand(2, generator=generator), 4, generator, lambda i, g: True)

    assert all("other random numbers" in str(error) for error in on_ranks(2, work, tmp_path))
