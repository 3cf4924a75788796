import itertools
import random
from collections import Counter

import pytest

from openblip2.data.web.shard_order import Order, PartTurns
from openblip2.errors import UserError


@pytest.mark.parametrize(("counts", "lanes"), [([5], 3), ([3, 7, 2, 5, 0, 11], 4), ([10] * 9, 3), ([1, 1, 40], 2)])
def test_an_epoch_has_every_sample_once(counts: list[int], lanes: int) -> None:
    order = Order(counts, lanes, seed=3)
    total = sum(counts)
    epochs = [[order(epoch * total + n) for n in range(total)] for epoch in range(3)]
    for number, spots in enumerate(epochs):
        seen = [(spot.shard, order.within(spot.epoch, spot.shard)[spot.place]) for spot in spots]
        assert sorted(seen) == [(shard, n) for shard, count in enumerate(counts) for n in range(count)]
        assert {spot.epoch for spot in spots} == {number}
    if total > 8:
        assert [spot[2:] for spot in epochs[0]] != [spot[2:] for spot in epochs[1]]  # each epoch has its own shuffle


def test_a_lane_goes_through_its_shards_one_after_the_other() -> None:
    counts = [6, 9, 4, 8, 5, 7, 6]
    order = Order(counts, 3, seed=0)
    spots = [order(n) for n in range(sum(counts))]
    for lane in range(3):
        mine = [spot for spot in spots if spot.lane == lane]
        walk = [mine[0].shard]
        for before, spot in itertools.pairwise(mine):
            if spot.shard != before.shard:
                assert (before.place, spot.place) == (counts[before.shard] - 1, 0)
                assert order.after(before) == (0, spot.shard)
                walk.append(spot.shard)
            else:
                assert spot.place == before.place + 1
        assert len(set(walk)) == len(walk)
        assert order.after(mine[-1])[0] == 1  # the next shard belongs to the next epoch
    assert [spot.lane for spot in spots[:9]] == [0, 1, 2] * 3


def test_a_position_needs_no_predecessor() -> None:
    counts = [random.Random(0).randrange(1, 50) for _ in range(40)]
    walked = Order(counts, 8, seed=5)
    expected = [walked(n) for n in range(3000)]
    asked = list(range(3000))
    random.Random(1).shuffle(asked)
    jumping = Order(counts, 8, seed=5)
    assert all(jumping(n) == expected[n] for n in asked)


def test_processes_share_no_shard_where_their_number_divides_the_lanes() -> None:
    order = Order([20] * 24, 8, seed=1)
    for rank in range(4):
        others = {order(n).shard for n in range(480) if n % 4 != rank}
        assert not others & {order(n).shard for n in range(480) if n % 4 == rank}


def test_a_mixture_has_its_weights_exactly() -> None:
    weights, row = [3, 1, 6], 4
    turns = PartTurns(weights, row, seed=2)
    found = [turns(n) for n in range(5 * 10 * row)]
    for cycle in range(5):
        part = found[cycle * 10 * row : (cycle + 1) * 10 * row]
        assert Counter(part for part, _ in part) == {0: 12, 1: 4, 2: 24}
    for part in range(3):  # the positions of each part are in order, without gaps
        assert [position for p, position in found if p == part] == list(range(5 * weights[part] * row))
    assert PartTurns(weights, row, seed=2)(137) == found[137]
    orders = {tuple(p for p, _ in found[cycle * 40 : (cycle + 1) * 40]) for cycle in range(5)}
    assert len(orders) > 1


def test_what_cannot_be_ordered() -> None:
    with pytest.raises(UserError, match="no sample"):
        Order([0, 0], 4, seed=0)
    with pytest.raises(UserError, match="weights"):
        PartTurns([99_999, 2], 16, seed=0)
