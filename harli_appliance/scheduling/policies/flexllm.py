"""Token fusion: a fixed budget of training tokens is computed with every serving step.

FlexLLM (arXiv 2402.18789, section 6): a window of training tokens joins the serving batch's forward pass and
leaves its activations behind; once a sequence is through, its backward pass goes layer by layer between
serving steps. The budget is found beforehand from a profile: the most tokens for which a step still fits the
promised time per token. Here it is taken once, when the promise or the policy is new and the step can be
predicted, and then stays.

What differs from the paper: the window's rows and the serving batch's are not one matrix product. The
window's forward pass runs on the inference lane straight before the step, so that a step waits for it as it
would in one pass, but the weights are read twice. Where steps with fused tokens were never measured, a window
counts as a prefill step of as many tokens. The backward pass gets as much of the lane in a step as the
window's forward pass would.
"""

from __future__ import annotations

import math

from harli_appliance.scheduling.policies.policy import Policy, Situation, pause
from harli_appliance.scheduling.types import Bound, Costs, Decision, Step

BUDGETS = (512, 256, 128, 64, 32, 16, 8)
"""Training tokens of a step that are tried, the most first."""


class FlexLlm(Policy):
    fuses = True

    def __init__(self) -> None:
        self._promise = math.nan
        self._tokens = 0
        self._backward_ms = 0.0

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        solo = costs.solo(step)
        if now.tpot_ms != self._promise and step.kind == "decode":
            if solo is None or not self._profile(step, solo, now.tpot_ms, costs):
                return pause("no_prediction", solo)
            self._promise = now.tpot_ms
        if self._tokens == 0 or step.kind == "prefill":
            return pause("no_slack", solo)
        if now.outlook.fusible_tokens:
            tokens = min(self._tokens, now.outlook.fusible_tokens)
            bound = costs.fused(step, tokens)
            return Decision("fused", "fused_budget", units=1, bound=bound, fused_tokens=tokens)
        known = math.isfinite(now.outlook.unit_ms)
        units = max(1, int(self._backward_ms / now.outlook.unit_ms)) if known else 1
        return Decision("time_slice", "backward_between", units=units, bound=solo)

    def _profile(self, step: Step, solo: Bound, tpot_ms: float, costs: Costs) -> bool:
        """Set the budget; False while nothing is known that it could be set from."""
        for tokens in BUDGETS:
            window = costs.solo(Step("prefill", 1, tokens, tokens))
            fused = costs.fused(step, tokens)
            if fused is not None:
                upper = fused.upper_ms
            elif window is not None:
                upper = solo.upper_ms + window.upper_ms
            else:
                return False
            if upper <= tpot_ms:
                self._tokens, self._backward_ms = tokens, upper - solo.upper_ms
                return True
        self._tokens = 0
        return True
