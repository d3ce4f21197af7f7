"""Copying away or doing again: whichever is predicted to cost less, no copy that serving waits for long."""

from __future__ import annotations

import pytest

from harli_appliance.training.swap import SwapPredictor


@pytest.fixture
def predictor() -> SwapPredictor:
    """A million bytes a millisecond."""
    made = SwapPredictor()
    made.copied(10_000_000, 10.0)
    return made


@pytest.mark.parametrize(
    ("size", "spent_ms", "unit_ms", "swaps"),
    [
        (5_000_000, 11.0, 6.0, True),
        (5_000_000, 9.9, 6.0, False),  # there and back takes 10 ms
        (5_000_000, 1000.0, 4.9, False),  # serving would wait longer than for a unit
        (0, 1.0, 1.0, True),
    ],
)
def test_the_cheaper_way_is_taken(
    predictor: SwapPredictor, size: int, spent_ms: float, unit_ms: float, swaps: bool
) -> None:
    assert predictor.swaps(size, spent_ms=spent_ms, unit_ms=unit_ms) == swaps


def test_without_a_measured_speed_nothing_is_copied() -> None:
    made = SwapPredictor()
    assert made.bytes_per_s is None
    assert not made.swaps(1, spent_ms=1e9, unit_ms=1e9)


def test_the_speed_is_learned(predictor: SwapPredictor) -> None:
    for _ in range(30):
        predictor.copied(1_000_000, 10.0)
    assert predictor.bytes_per_s == pytest.approx(1e8, rel=0.01)
    assert not predictor.swaps(5_000_000, spent_ms=11.0, unit_ms=100.0)
