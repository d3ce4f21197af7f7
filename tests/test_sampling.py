"""What a request may ask of SGLang takes effect: seeds, filters, penalties, ends, log-probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harli_appliance.errors import UsageError
from harli_appliance.runtime.protocol import Sampling, Submission, TokenLogprob
from tests.conftest import Serving
from tests.test_runtime import greedy, prompt, serve, tokens_of

PROMPT = prompt(700, 20)
EOS = 1


def ask(serving: Serving, sampling: Sampling, ids: list[int] = PROMPT) -> list[int]:
    return tokens_of(serve(serving, [Submission("asked", ids, sampling)])["asked"])


def next_logits(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits[0, -1]
    return logits


# -- seeds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.8, "top_k": 40}, {"min_p": 0.02}], ids=["plain", "top-p", "min-p"]
)
def test_a_seed_gives_the_same_tokens_alone_and_beside_others(
    serving: Serving, filters: dict[str, Any]
) -> None:
    def seeded(seed: int | None) -> Sampling:
        return Sampling(max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True, **filters)

    alone = ask(serving, seeded(7))
    others = [
        Submission("greedy", prompt(701, 9), Sampling(max_tokens=30, ignore_eos=True)),
        Submission("unseeded", PROMPT, seeded(None)),
        Submission("asked", PROMPT, seeded(7)),
        Submission("other-seed", PROMPT, seeded(8)),
        Submission("long", prompt(702, 150), seeded(7)),
    ]
    brought = serve(serving, others)
    assert tokens_of(brought["asked"]) == alone
    assert tokens_of(brought["other-seed"]) != alone
    assert tokens_of(brought["unseeded"]) != alone


def test_the_ends_of_the_range_of_seeds_work_and_differ(serving: Serving) -> None:
    answers = {
        tuple(ask(serving, Sampling(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True)))
        for seed in (0, -1, 2**63 - 1, -(2**63))
    }
    assert len(answers) == 4


def test_a_seed_is_drawn_from_anew_at_every_position(serving: Serving) -> None:
    answer = ask(serving, Sampling(max_tokens=40, temperature=1e4, seed=11, ignore_eos=True))
    assert len(set(answer)) > 20, "all tokens are as good as equally likely"


def test_without_a_seed_answers_differ_whatever_torch_is_seeded_with(serving: Serving) -> None:
    answers = []
    for _ in range(2):
        torch.manual_seed(0)  # as training might
        answers.append(ask(serving, Sampling(max_tokens=16, temperature=1.0, ignore_eos=True)))
    assert answers[0] != answers[1]


# -- which tokens may be drawn, and how often ------------------------------------------------------------

DRAWS = 400


def top_p_set(probs: Tensor, top_p: float) -> set[int]:
    ordered, ids = probs.sort(descending=True)
    return set(ids[: int((ordered.cumsum(0) - ordered <= top_p).sum())].tolist())


@pytest.mark.parametrize(
    ("filters", "temperature", "eligible"),
    [
        ({}, 1.0, lambda p: set(range(len(p)))),
        ({}, 0.4, lambda p: set(range(len(p)))),
        ({"top_k": 3}, 1.0, lambda p: set(p.topk(3).indices.tolist())),
        ({"top_p": 0.3}, 1.0, lambda p: top_p_set(p, 0.3)),
        ({"top_p": 0.97}, 40.0, lambda p: top_p_set(p, 0.97)),  # nearly flat: most of the vocabulary
        ({"min_p": 0.4}, 1.0, lambda p: set((p >= 0.4 * p.max()).nonzero()[:, 0].tolist())),
    ],
    ids=["plain", "temperature", "top-k", "top-p", "long-tail", "min-p"],
)
def test_tokens_are_drawn_from_the_distribution_that_was_asked_for(
    serving: Serving,
    reference: Any,
    filters: dict[str, Any],
    temperature: float,
    eligible: Callable[[Tensor], set[int]],
) -> None:
    probs = torch.softmax(next_logits(reference, PROMPT) / temperature, 0)
    wanted = eligible(probs)
    drawn: Counter[int] = Counter()
    submissions = [
        Submission(f"draw-{seed}", PROMPT, Sampling(1, temperature, seed=seed, **filters))
        for seed in range(DRAWS)
    ]
    for items in serve(serving, submissions, every=1).values():
        drawn.update(tokens_of(items))
    assert sum(drawn.values()) == DRAWS
    assert set(drawn) <= wanted
    allowed = torch.tensor(sorted(wanted))
    kept = probs[allowed] / probs[allowed].sum()
    for token, p in zip(allowed.tolist(), kept.tolist(), strict=True):
        deviation = math.sqrt(DRAWS * p * (1 - p)) + 1
        assert abs(drawn[token] - DRAWS * p) < 5 * deviation
    rare = allowed[kept.argsort()[: len(kept) // 4]].tolist()
    share = float(probs[rare].sum() / probs[allowed].sum())
    assert abs(sum(drawn[token] for token in rare) - DRAWS * share) < 5 * math.sqrt(DRAWS * share) + 1


@pytest.mark.parametrize(
    ("penalties", "change"),
    [
        ({"frequency_penalty": 1.5}, lambda logits, counts: logits - 1.5 * counts),
        ({"presence_penalty": 2.0}, lambda logits, counts: logits - 2.0 * (counts > 0)),
        (
            {"repetition_penalty": 1.7},
            lambda logits, counts: torch.where(
                counts > 0, torch.where(logits < 0, logits * 1.7, logits / 1.7), logits
            ),
        ),
    ],
    ids=["frequency", "presence", "repetition"],
)
def test_penalties_are_those_of_their_formulas(
    serving: Serving, reference: Any, penalties: dict[str, float], change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    ids, answer = prompt(703, 12), []
    for _ in range(16):
        logits = next_logits(reference, [*ids, *answer])
        counts = torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=len(logits))
        answer.append(int(change(logits, counts).argmax()))
    assert answer != greedy(reference, ids, 16)
    sampling = Sampling(max_tokens=16, ignore_eos=True, **penalties)  # type: ignore[arg-type]
    beside = Submission("beside", prompt(704, 8), Sampling(max_tokens=20, ignore_eos=True))
    brought = serve(serving, [beside, Submission("penalised", ids, sampling)])
    assert tokens_of(brought["penalised"]) == answer
    assert tokens_of(brought["beside"]) == greedy(reference, list(beside.prompt), 20)


# -- ends ------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_the_answer_and_min_tokens_keeps_it_away(serving: Serving, reference: Any) -> None:
    free = greedy(reference, PROMPT, 20)
    stop = free[4]
    short = Submission("short", PROMPT, Sampling(max_tokens=20, stop_token_ids=(stop,)))
    longer = Submission("longer", PROMPT, Sampling(max_tokens=20, stop_token_ids=(stop,), min_tokens=9))
    brought = serve(serving, [short, longer])
    assert tokens_of(brought["short"]) == free[: free.index(stop) + 1]
    assert brought["short"][-1].finish == "stop"
    kept = tokens_of(brought["longer"])
    assert len(kept) >= 9
    assert stop not in kept[:9]


def test_the_models_end_token_ends_the_answer_unless_ignored_or_too_early(serving: Serving) -> None:
    def sampling(seed: int, **how: Any) -> Sampling:
        return Sampling(max_tokens=60, temperature=1.7, seed=seed, **how)

    asked = [Submission(f"end-{seed}", PROMPT, sampling(seed)) for seed in range(30)]
    ended = [
        (seed, tokens_of(items))
        for seed, items in enumerate(serve(serving, asked).values())
        if items[-1].finish == "stop"
    ]
    seed, answer = ended[0]
    assert answer[-1] == EOS
    brought = serve(
        serving,
        [
            Submission("ignored", PROMPT, sampling(seed, ignore_eos=True)),
            Submission("early", PROMPT, sampling(seed, min_tokens=len(answer) + 3)),
        ],
    )
    ignored = tokens_of(brought["ignored"])
    assert ignored[: len(answer)] == answer
    assert len(ignored) == 60
    assert brought["ignored"][-1].finish == "length"
    early = tokens_of(brought["early"])
    assert early[: len(answer) - 1] == answer[:-1]
    assert EOS not in early[: len(answer) + 3]


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(
    serving: Serving, reference: Any
) -> None:
    tokenizer = serving.runtime.scheduler.tokenizer
    free = greedy(reference, PROMPT, 20)
    stop = tokenizer.decode(free[5:7])
    stopped = ask(serving, Sampling(max_tokens=20, stop=(stop,)))
    assert stopped == free[: len(stopped)]
    assert stop in tokenizer.decode(stopped)
    assert stop not in tokenizer.decode(stopped[:-1])


# -- log-probabilities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_are_log_softmax_of_the_models_logits(
    serving: Serving, reference: Any, temperature: float
) -> None:
    ids = prompt(705, 90)  # more than a chunk
    how = {"temperature": temperature, "seed": 3, "ignore_eos": True}
    submissions = [
        Submission("plain", prompt(706, 8), Sampling(max_tokens=20, ignore_eos=True)),
        Submission("five", ids, Sampling(max_tokens=14, logprobs=5, **how)),  # type: ignore[arg-type]
        Submission("none", ids, Sampling(max_tokens=6, logprobs=0, **how)),  # type: ignore[arg-type]
    ]
    brought = serve(serving, submissions)
    assert all(item.logprobs == () for item in brought["plain"])
    for name, top in (("five", 5), ("none", 0)):
        answer = tokens_of(brought[name])
        reported = [entry for item in brought[name] for entry in item.logprobs]
        assert len(reported) == len(answer)
        with torch.inference_mode():
            logits = reference(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]
        expected = torch.log_softmax(logits, -1)
        for row, token, entry in zip(expected, answer, reported, strict=True):
            assert isinstance(entry, TokenLogprob)
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            best = row.topk(top)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


# -- choices ---------------------------------------------------------------------------------------------


def test_choices_share_the_work_of_their_prompt(serving: Serving) -> None:
    """Eight choices of one prompt, submitted in one tick, as the appliance does."""
    ids = prompt(707, 150)

    def run() -> tuple[int, int]:
        for choice in range(8):
            sampling = Sampling(4, temperature=1.0, seed=choice, ignore_eos=True)
            serving.runtime.submit(Submission(f"choice-{choice}", ids, sampling))
        computed, ended = 0, 0
        while (plan := serving.runtime.plan()) is not None:
            computed += plan.prefill_tokens
            ended += sum(item.finish == "length" for item in serving.runtime.execute(plan).tokens)
        return computed, ended

    computed, ended = serving.lane.submit(run).result()
    assert ended == 8
    assert computed <= 2 * len(ids)


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "sampling", "param", "words"),
    [
        ([5, 10**6], Sampling(), "prompt", "token 1000000 at position 1"),
        ([-1], Sampling(), "prompt", "token -1 at position 0"),
        ([], Sampling(), "prompt", "no tokens"),
        ([5], Sampling(stop_token_ids=(5, 99_999)), "stop_token_ids", "token 99999 at position 1"),
        ([5], Sampling(max_tokens=5000), "prompt", "5000 of the answer"),
        ([5], Sampling(max_tokens=3, min_tokens=4), "min_tokens", "4 is more than max_tokens 3"),
        ([5], Sampling(stop_token_ids=(5,), ignore_eos=True), "stop_token_ids", "ignore_eos"),
        ([5], Sampling(json_schema="{}", ignore_eos=True), "ignore_eos", "response_format"),
        ([5], Sampling(json_schema="{}", min_tokens=2), "min_tokens", "response_format"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    serving: Serving, ids: list[int], sampling: Sampling, param: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        serving.runtime.check(Submission("bad", ids, sampling))
    assert caught.value.param == param
