"""Warm-up and schedules of the learning rate."""

from __future__ import annotations

import math

import pytest

from harli_appliance.schema import LearningRateSchedule
from harli_appliance.training.learning_rate import learning_rate


def rates(schedule: LearningRateSchedule, steps: int, warmup: float) -> list[float]:
    return [learning_rate(schedule, 2.0, step, steps, warmup) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_warm_up_rises_in_equal_steps_to_the_peak(schedule: LearningRateSchedule) -> None:
    assert rates(schedule, 20, 0.2)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_a_warm_up_the_first_step_has_the_peak(schedule: LearningRateSchedule) -> None:
    assert rates(schedule, 20, 0.0)[0] == 2.0


@pytest.mark.parametrize(
    ("schedule", "half", "last"),
    [
        ("cosine", 1.1, 0.2 + 0.9 * (1 + math.cos(math.pi * 0.9))),
        ("linear", 1.1, 0.38),
        ("constant", 2.0, 2.0),
    ],
)
def test_what_a_schedule_falls_to(schedule: LearningRateSchedule, half: float, last: float) -> None:
    found = rates(schedule, 10, 0.0)
    assert found[5] == pytest.approx(half)
    assert found[-1] == pytest.approx(last)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 1.0])
def test_a_job_of_one_step_learns_at_the_peak(schedule: LearningRateSchedule, warmup: float) -> None:
    assert rates(schedule, 1, warmup) == [2.0]
