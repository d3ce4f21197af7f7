"""The physical limit: what requests need, and the most finetuning that this leaves room for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from harli_appliance.bench.traces import Trace, TraceRequest
from harli_appliance.planner.demand import demand_of, latest_steps
from harli_appliance.planner.device import StepWork, decode_work
from harli_appliance.planner.gpus import find_gpu
from harli_appliance.planner.limit import physical_limit, tangents
from harli_appliance.planner.roofline import Roofline
from harli_appliance.planner.shapes import model_shape


def test_the_fewest_steps_with_which_nobody_falls_behind() -> None:
    def steps(*requests: tuple[float, int], pace_s: float = 1.0, until_s: float = 20.0) -> list[float]:
        return latest_steps([TraceRequest(at, 10, tokens + 1) for at, tokens in requests], pace_s, until_s)

    assert steps() == []
    assert steps((0.5, 3), (9.0, 0)) == [1.5, 2.5, 3.5]
    assert steps((0.0, 3), (0.5, 3)) == [1.0, 2.0, 3.0], "the other has a token more than it needs each time"
    assert steps((0.0, 2), (1.5, 2)) == [1.0, 2.0, 3.5]
    assert steps((0.0, 100), until_s=2.9) == [1.0, 2.0]
    rng = random.Random(1)
    for _ in range(60):
        requests = [(rng.randrange(6) / 2, rng.randint(1, 3)) for _ in range(rng.randint(1, 4))]
        latest = steps(*requests)
        moments = [moment / 2 + 0.25 for moment in range(12)] + latest
        for count in range(len(latest)):
            for chosen in itertools.combinations(sorted(set(moments)), count):
                assert not _in_time(chosen, requests), (requests, latest, chosen)
        assert _in_time(latest, requests)


def _in_time(steps: Sequence[float], requests: Sequence[tuple[float, int]]) -> bool:
    return all(
        sum(at <= step <= at + token for step in steps) >= token
        for at, tokens in requests
        for token in range(1, tokens + 1)
    )


def test_the_limit_is_what_can_be_worked_out_by_hand() -> None:
    """A step takes 10 ms and 0.1 more for each training token; 1,000 tokens a second are trained alone.

    At a token in 20 ms, F tokens fused per second, serving leaves 500 - F / 10 ms, in which as many tokens are
    trained; F / 3 were done in steps. More than are trained, 500 + F (1/3 - 1/10), cannot be fused.
    """

    class ByHand:
        splits = ()

        def training_rate(self) -> float:
            return 1000.0

        def fused_ms(self, work: StepWork, tokens: int) -> float:
            return 10.0 + 0.1 * tokens

    one = Trace("one", (TraceRequest(0.0, 100, 10_000),), 20.0)
    found = physical_limit(ByHand(), one, 20.0, decode_only=True)  # type: ignore[arg-type]
    assert (found.steps_per_s, found.prompts) == (50.0, 0.0)
    assert found.share == pytest.approx(0.5 / (1 - (1 / 3 - 0.1)), rel=1e-3)
    nobody = Trace("nobody", (TraceRequest(0.0, 100, 1),), 20.0)
    assert physical_limit(ByHand(), nobody, 20.0, decode_only=True).share == 1.0  # type: ignore[arg-type]
    both = physical_limit(ByHand(), one, 20.0, appliances=2, decode_only=True)  # type: ignore[arg-type]
    assert both.share == pytest.approx(1.5 / (1 - (1 / 3 - 0.1)) / 2, rel=1e-3), "2,000 ms in each second"


def test_a_crowd_cannot_be_served_before_it_is_there() -> None:
    """A step takes 10 ms for up to 2 requests, and 5 for each of more. At a token in 40 ms one request takes a
    quarter of the time and four take half of it: 25 steps a second of 20 ms."""

    class Crowded:
        splits = ()

        def training_rate(self) -> float:
            return 1000.0

        def fused_ms(self, work: StepWork, tokens: int) -> float:
            return max(10.0, 5.0 * work.step.batch) + 100.0 * tokens

    alone, crowd = TraceRequest(0.0, 100, 10_000), TraceRequest(10.0, 100, 10_000)
    found = physical_limit(
        Crowded(), Trace("late", (alone, crowd, crowd, crowd), 20.0), 40.0, decode_only=True
    )  # type: ignore[arg-type]
    assert found.share == pytest.approx(1 - (0.25 + 0.5) / 2, rel=0.02)


def test_tangents_are_below_the_cost_and_close_to_it() -> None:
    device, rng = Roofline(find_gpu("a100-80"), model_shape("qwen/qwen2.5-7b")), random.Random(2)
    split = device.splits[2]
    alone = tangents(device.fused_ms, 1300, range(0, 1025, 32))
    beside = tangents(lambda work, _: device.corun_ms(work, split), 1300, (0,))
    for _ in range(500):
        batch, tokens = rng.randint(1, 400), rng.randint(0, 1000)
        work = decode_work(batch, round(batch * rng.uniform(500, 3000)))
        for planes, cost, point in (
            (alone, device.fused_ms(work, tokens), (1, batch, work.pairs, tokens)),
            (beside, device.corun_ms(work, split), (1, batch, work.pairs, 0)),
        ):
            assert 0.97 * cost < max(planes @ point) <= cost * (1 + 1e-6), point


def test_what_requests_need_adds_up() -> None:
    requests = (TraceRequest(0.2, 100, 11), TraceRequest(1.05, 50, 200))
    needed = demand_of(Trace("two", requests, 4.0), 0.1)
    assert needed.tokens.sum() == 10 + 29, "the second one's are due at 1.15 ... 3.95"
    assert needed.rows.sum() == sum(100 + i for i in range(1, 11)) + sum(50 + i for i in range(1, 30))
    assert needed.busy_s.tolist() == pytest.approx([0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert needed.present.tolist() == [1, 1, 2, 1, 1, 1, 1, 1]
    assert needed.present_rows.tolist() == [110, 110, 359, 249, 249, 249, 249, 249]
    assert needed.steps.sum() == 10 + 27, "the last two for the first one serve the second as well"


def test_what_cannot_be_served_leaves_nothing() -> None:
    """Prompts alone take more than there is."""
    long = Trace("long", tuple(TraceRequest(at / 20, 8000, 200) for at in range(400)), 20.0)
    found = physical_limit(Roofline(find_gpu("l40s"), model_shape("meta-llama/Llama-3.1-8B")), long, 60.0)
    assert found.tokens_per_s == 0.0
