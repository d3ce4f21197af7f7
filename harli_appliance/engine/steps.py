"""A step as the scheduler sees it."""

from __future__ import annotations

from harli_appliance.runtime.protocol import StepPlan
from harli_appliance.scheduling.types import Step


def step_of(plan: StepPlan) -> Step:
    return Step(plan.kind, len(plan.requests), plan.context_tokens, plan.prefill_tokens)
