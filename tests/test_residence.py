"""An adapter's state leaves the pool as soon as the unit in progress has ended, and comes back when it may."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from harli_appliance.memory.pool import SlotPool
from harli_appliance.training.residence import Residence
from tests.radix_slots import RadixSlots, Request

SIZE = 60


class HereAndNow:
    """A lane that runs what it is given after a turn of the loop."""

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(0)
        return function(*args)

    async def drain(self) -> None:
        return None


class Furniture:
    """A state of 20 slots that notes where it is."""

    slots = 20
    bytes = 1000

    def __init__(self) -> None:
        self.at: list[int] | None = None
        self.breaks = False

    def place(self, slots: Tensor) -> None:
        if self.breaks:
            raise MemoryError("no room")
        self.at = slots.tolist()

    def park(self) -> None:
        if self.breaks:
            raise MemoryError("no room")
        self.at = None


class Rig:
    def __init__(self) -> None:
        self.source = RadixSlots(SIZE)
        self.pool = SlotPool(self.source, watermark=0.0)
        self.state = Furniture()
        self.told = 0
        lane = HereAndNow()
        self.residence = Residence(
            self.state, self.pool, holder="job", lane=lane, memory_lane=lane, drained=lane.drain,
            on_leave=self.tell,
        )  # fmt: skip

    def tell(self) -> None:
        self.told += 1

    def leased(self) -> int:
        self.pool.settle()
        return self.pool.use().leased


async def test_a_state_comes_and_goes() -> None:
    rig = Rig()
    assert not rig.residence.settled
    assert await rig.residence.settle()
    assert rig.state.at == list(range(40, 60))
    assert await rig.residence.settle(), "and stays where it is"
    assert [(use.holder, use.purpose, use.slots) for use in rig.pool.use().leases] == [("job", "adapter", 20)]
    await rig.residence.leave()
    assert rig.state.at is None
    assert rig.leased() == 0
    await rig.residence.leave()
    assert await rig.residence.settle()


async def test_it_leaves_by_itself_when_the_unit_in_progress_has_ended() -> None:
    rig = Rig()
    await rig.residence.settle()
    async with rig.residence.in_use:
        (lease,) = rig.pool.revoke(1)
        assert not rig.residence.settled
        assert rig.told == 1
        for _ in range(5):
            await asyncio.sleep(0)
        assert rig.state.at is not None, "a unit is using it"
    await asyncio.wait_for(lease.released(), 1)
    assert rig.state.at is None
    assert rig.leased() == 0


async def test_it_waits_outside_while_serving_needs_the_slots() -> None:
    rig = Rig()
    rig.source.waiting.append(Request(45, 0))
    assert not await rig.residence.settle()
    rig.source.waiting.clear()
    assert await rig.residence.settle()


async def test_revoked_on_its_way_in_it_leaves_again() -> None:
    rig = Rig()
    coming = asyncio.create_task(rig.residence.settle())
    while not rig.pool.use().leased:  # noqa: ASYNC110  granted, not placed yet
        await asyncio.sleep(0)
    (lease,) = rig.pool.revoke(1)
    assert not await coming
    await asyncio.wait_for(lease.released(), 1)
    assert rig.state.at is None
    assert rig.leased() == 0


async def test_what_goes_wrong_on_the_way_out_is_told_and_no_slot_is_lost() -> None:
    rig = Rig()
    await rig.residence.settle()
    rig.state.breaks = True
    (lease,) = rig.pool.revoke(1)
    await asyncio.wait_for(lease.released(), 1)
    assert rig.leased() == 0
    rig.state.breaks = False
    for _ in range(2):
        with pytest.raises(MemoryError):  # it lay in slots that are another's now
            await rig.residence.settle()
    with pytest.raises(MemoryError):
        rig.residence.require()


async def test_what_goes_wrong_when_its_holder_parks_it_is_told_again() -> None:
    rig = Rig()
    await rig.residence.settle()
    rig.state.breaks = True
    with pytest.raises(MemoryError):
        await rig.residence.leave()
    rig.state.breaks = False
    with pytest.raises(MemoryError):
        await rig.residence.settle()
    assert rig.leased() == 0


async def test_what_goes_wrong_on_the_way_in_loses_no_slot() -> None:
    rig = Rig()
    rig.state.breaks = True
    with pytest.raises(MemoryError):
        await rig.residence.settle()
    assert rig.leased() == 0
