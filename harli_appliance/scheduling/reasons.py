"""Why a tick did what it did: every code that a decision can carry, and what it means to a person.

Imports nothing, so that the dashboard and the command line can say it in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

Reason = Literal[
    "measuring",
    "nothing_to_do",
    "nothing_to_serve",
    "no_training_work",
    "policy_serve_only",
    "policy_train_only",
    "policy_naive",
    "policy_static",
    "no_prediction",
    "corun_keeps_pace",
    "corun_spends_slack",
    "corun_fits",
    "corun_gets_ahead",
    "corun_too_slow",
    "keeps_reserve",
    "prompt_waits",
    "slack_left",
    "fused_fits",
    "no_slack",
    "its_turn",
    "not_its_turn",
    "its_tasklet",
    "fused_budget",
    "backward_between",
]

_WORDS: Final[Mapping[str, str]] = {
    "measuring": "the device is measured before requests are taken",
    "nothing_to_do": "no requests and no training work",
    "nothing_to_serve": "no requests: training has the device",
    "no_training_work": "no job, or the job waits for memory",
    "policy_serve_only": "the policy never trains",
    "policy_train_only": "the policy lets requests wait for training",
    "policy_naive": "the policy always trains beside requests",
    "policy_static": "the policy always trains on its part of the device",
    "no_prediction": "too few steps were seen to predict this one",
    "corun_keeps_pace": "with training beside it, tokens still come faster than promised",
    "corun_spends_slack": "requests are ahead of their deadlines, and training may use that up",
    "corun_fits": "the step and training together fit the promised time per token",
    "corun_gets_ahead": "a prompt waits; training goes on, since answers get ahead soon enough all the same",
    "corun_too_slow": "with training beside it, the step could miss a deadline",
    "keeps_reserve": "requests are too little ahead of their deadlines to spend any of it",
    "prompt_waits": "a prompt waits until answers are so far ahead that it may hold them up",
    "fused_fits": "training tokens join the step's own pass and it still fits",
    "slack_left": "whole work units fit before the next deadline",
    "no_slack": "not one work unit fits before the next deadline",
    "its_turn": "the policy's turn for training has come",
    "not_its_turn": "the policy's turn for training has not come yet",
    "its_tasklet": "a tasklet of fixed size runs beside every step",
    "fused_budget": "a fixed budget of training tokens goes with every step",
    "backward_between": "backward units run between steps",
}


def in_words(reason: str) -> str:
    """One clause for a code; the code itself where it is not known, as a newer appliance may have it."""
    return _WORDS.get(reason, reason)
