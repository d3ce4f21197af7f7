"""A finetuning job that lasts: training has something to do in every run of a comparison.

Knows data sets and jobs. What is learned does not matter, how long the examples are does.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Final

from harli_appliance.bench.exact_prompts import Prompts
from harli_appliance.bench.system import System
from harli_appliance.errors import JobFailed
from harli_appliance.training.hyperparameters import MAX_EPOCHS

EXAMPLES: Final = 1_000
BATCH_SIZE: Final = 4
LEARNED_SHARE: Final = 0.5
MARGIN_TOKENS: Final = 32
"""Left free in a sequence for what the chat template adds to an example."""
START_TIMEOUT_S: Final = 120.0
SPENT: Final = 0.9
"""Share of a job's steps after which the next one is queued."""


def write_lesson(path: Path, prompts: Prompts, sequence_tokens: int) -> None:
    """Examples that fill a packed sequence of `sequence_tokens` each, half of it learned."""
    words = max(2, sequence_tokens - MARGIN_TOKENS)
    learned = max(1, round(LEARNED_SHARE * words))
    lines = []
    for index in range(EXAMPLES):
        turns = [
            {"role": "user", "content": prompts.words(words - learned, f"ask {index}")},
            {"role": "assistant", "content": prompts.words(learned, f"answer {index}")},
        ]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class TrainingLoad:
    """Keeps a job running on `system`."""

    def __init__(self, system: System, model: str, prompts: Prompts, sequence_tokens: int) -> None:
        self._system = system
        self._model = model
        self._prompts = prompts
        self._sequence_tokens = sequence_tokens
        self._file = ""

    async def start(self) -> None:
        """Upload the data, begin a job, and wait for its first trained tokens; the policy must allow them.

        Raises:
            JobFailed: it failed, or trains nothing.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lesson.jsonl"
            await asyncio.to_thread(write_lesson, path, self._prompts, self._sequence_tokens)
            self._file = (await self._system.upload(path)).id
        await self.keep_up()
        before = (await self._system.status()).training.tokens
        deadline = time.monotonic() + START_TIMEOUT_S
        while (await self._system.status()).training.tokens <= before:
            await self._raise_if_failed()
            if time.monotonic() > deadline:
                raise JobFailed(f"the finetuning job trained nothing in {START_TIMEOUT_S:g} s; see the log")
            await asyncio.sleep(0.2)

    async def keep_up(self) -> None:
        """Queue a job when none is queued and the running one is nearly done."""
        await self._raise_if_failed()
        jobs = (await self._system.status()).jobs
        if any(job.status == "queued" for job in jobs):
            return
        running = [job for job in jobs if job.status == "running"]
        if all(job.step > SPENT * job.total_steps for job in running if job.total_steps):
            await self._system.create_job(self._model, self._file, n_epochs=MAX_EPOCHS, batch_size=BATCH_SIZE)

    async def _raise_if_failed(self) -> None:
        failed = next((job for job in (await self._system.status()).jobs if job.status == "failed"), None)
        if failed is not None:
            raise JobFailed(f"finetuning job {failed.id} failed: {failed.error or 'no reason is known'}")
