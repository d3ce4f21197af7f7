"""Whose turn it is: shares follow weights, nobody starves, and who waits for memory holds up nobody."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harli_appliance.training.fairness import (
    QUANTUM_MS,
    RECENT_MS,
    DeficitRoundRobin,
    FirstCome,
    Order,
    RecentShares,
    make_order,
)

WEIGHTS = st.lists(st.integers(1, 100), min_size=1, max_size=6)
LONGEST_MS = 2_000.0


def joined(order: Order, weights: list[int]) -> list[str]:
    names = [f"job-{index}" for index in range(len(weights))]
    for name, weight in zip(names, weights, strict=True):
        order.join(name, weight)
    return names


@given(weights=WEIGHTS, seed=st.integers(0, 2**32), turns=st.integers(1, 400))
def test_device_time_over_weight_is_the_same_for_all_up_to_a_turn(
    weights: list[int], seed: int, turns: int
) -> None:
    order, draw = DeficitRoundRobin(), random.Random(seed)
    names = joined(order, weights)
    longest = {name: draw.uniform(1, LONGEST_MS) for name in names}  # some jobs have long micro-batches
    spent = dict.fromkeys(names, 0.0)
    for _ in range(turns):
        name = order.next(names)
        assert name is not None
        took = draw.uniform(0.5, 1.0) * longest[name]
        order.charge(name, took)
        spent[name] += took
        fair = {n: spent[n] / w for n, w in zip(names, weights, strict=True)}
        for first, w in zip(names, weights, strict=True):
            for second in names:
                assert fair[first] - fair[second] <= QUANTUM_MS + longest[first] / w + 1e-6


@given(weights=WEIGHTS, seed=st.integers(0, 2**32))
def test_nobody_starves_however_the_others_block_join_and_leave(weights: list[int], seed: int) -> None:
    """One job is always ready; between two of its turns the others get a bounded time, whatever they do."""
    order, draw = DeficitRoundRobin(), random.Random(seed)
    names = joined(order, weights)
    patient, weight = names[0], weights[0]
    heaviest = 100 * len(names)
    rounds = LONGEST_MS / (QUANTUM_MS * weight) + 2
    bound = rounds * QUANTUM_MS * heaviest + LONGEST_MS * len(names) * 2
    others_spent, gone = 0.0, set()
    for turn in range(300):
        for name in names[1:]:
            if draw.random() < 0.02 and name not in gone:
                order.leave(name)
                gone.add(name)
            elif draw.random() < 0.02 and name in gone:
                order.join(name, draw.randint(1, 100))
                gone.discard(name)
        ready = {patient} | {n for n in names[1:] if n not in gone and draw.random() < 0.7}
        chosen = order.next(ready)
        assert chosen in ready, turn
        took = draw.uniform(0, LONGEST_MS)
        order.charge(chosen, took)
        others_spent = 0.0 if chosen == patient else others_spent + took
        assert others_spent <= bound


def test_who_was_blocked_gets_its_share_from_now_on_and_nothing_for_the_past() -> None:
    order = DeficitRoundRobin()
    joined(order, [10, 10])
    for _ in range(100):
        assert order.next({"job-0"}) == "job-0", "a blocked job holds up nobody"
        order.charge("job-0", 700.0)
    spent = {"job-0": 0.0, "job-1": 0.0}
    for _ in range(100):
        name = order.next(spent)
        assert name is not None
        order.charge(name, 700.0)
        spent[name] += 700.0
    assert abs(spent["job-0"] - spent["job-1"]) <= 2 * 700.0


def test_a_job_that_joins_later_or_changes_its_weight_is_treated_as_it_is_now() -> None:
    order = DeficitRoundRobin()
    joined(order, [10])
    for _ in range(50):
        order.charge(order.next({"job-0"}) or "", 100.0)
    order.join("late", 30)
    counts = {"job-0": 0, "late": 0}

    def turns(count: int) -> dict[str, int]:
        found = dict.fromkeys(counts, 0)
        for _ in range(count):
            name = order.next(counts)
            assert name is not None
            order.charge(name, 100.0)
            found[name] += 1
        return found

    assert turns(400)["late"] == pytest.approx(300, abs=8)
    order.reweigh("late", 10)
    assert turns(400)["late"] == pytest.approx(200, abs=8)
    order.leave("late")
    assert order.next(counts) == "job-0"
    assert order.next(set()) is None


def test_first_come_first_served_by_weight_with_others_in_the_gaps() -> None:
    order = FirstCome()
    joined(order, [10, 10, 20])
    every = {"job-0", "job-1", "job-2"}
    assert [order.next(every) for _ in range(3)] == ["job-2"] * 3
    order.charge("job-2", 1e9)
    assert order.next(every) == "job-2", "time spent does not matter"
    assert order.next({"job-1", "job-0"}) == "job-0"
    assert order.next({"job-1"}) == "job-1"
    order.reweigh("job-2", 5)
    assert order.next(every) == "job-0"
    order.leave("job-0")
    assert order.next(every) == "job-1"
    assert order.next(set()) is None


def test_orders_by_name() -> None:
    assert isinstance(make_order("fair"), DeficitRoundRobin)
    assert isinstance(make_order("fifo"), FirstCome)


def test_recent_shares_add_up_and_forget() -> None:
    shares = RecentShares()
    assert shares.of("a") == 0.0
    for _ in range(100):
        shares.add("a", 300.0)
        shares.add("b", 100.0)
    assert shares.of("a") == pytest.approx(0.75, abs=0.01)
    assert shares.of("a") + shares.of("b") == pytest.approx(1.0)
    shares.add("b", 5 * RECENT_MS)
    assert shares.of("b") > 0.99
    shares.forget("b")
    assert shares.of("a") == 1.0
