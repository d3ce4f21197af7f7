"""What a predictor knows when the appliance opens: the calibration of the first start, on a simulated device.

Steps of all sizes, alone and beside training, on every split, with the noise that steps have. Knows the
predictor and the device's costs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from harli_appliance.planner.device import Device, StepWork
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.types import Split, Step

SAMPLES = 64
"""Steps of each kind, on each split and beside each thing."""
RATES = 8
LARGEST_BATCH = 128
CONTEXTS = (64, 4096)
FUSED = (32, 640)


def taught(device: Device, *, chunk_tokens: int, seed: int) -> Predictor:
    """A predictor that was calibrated on `device`; the same arguments give the same one."""
    predictor, rng, now = Predictor(), random.Random(seed), 0.0

    def took(cost_ms: float) -> float:
        nonlocal now
        ms = device.pace(now) * device.noise(rng) * cost_ms
        now += ms / 1e3
        return ms

    whole: tuple[Split | None, ...] = (None,)
    for split in whole + device.splits:
        for work in _steps(chunk_tokens, rng):
            predictor.observe(work.step, took(device.solo_ms(work, split)), split=split)
        if split is not None or not device.splits:
            for work in _steps(chunk_tokens, rng):
                predictor.observe(work.step, took(device.corun_ms(work, split)), corun=True, split=split)
        beside = split is not None or not device.splits
        rate = device.corun_training_rate(split) if beside else device.training_rate()
        for _ in range(RATES):
            predictor.observe_training(rate / device.noise(rng), 1.0, split)
    if device.fuses:
        for work in _steps(chunk_tokens, rng):
            tokens = rng.randrange(*FUSED)
            predictor.observe(work.step, took(device.fused_ms(work, tokens)), fused_tokens=tokens)
    return predictor


def _steps(chunk_tokens: int, rng: random.Random) -> Iterator[StepWork]:
    for _ in range(SAMPLES):
        batch = round(2.0 ** rng.uniform(0.0, LARGEST_BATCH.bit_length() - 1))
        context = batch * rng.randrange(*CONTEXTS)
        yield StepWork(Step("decode", batch, context), float(context))
        tokens = rng.randrange(16, chunk_tokens + 1)
        before = rng.randrange(CONTEXTS[1])
        yield StepWork(Step("prefill", 1, before + tokens, tokens), tokens * (before + tokens / 2))
