"""A stand-in for ``python -m harli_appliance.serve`` that the demo can start: serves and "trains" in a second.

The real API around a fake engine. Trained tokens follow the clock exactly (1,000 tokens/s alone, 700 beside
serving), so that rates do not depend on how busy the machine is. ``--misbehave`` makes one thing go wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from fakes import BASE, FakeAppliance, FakeGeneration, make_pool, make_sample, words

from harli_appliance.api.app import create_app
from harli_appliance.api.ports import ChatCall, Job, JobSpec
from harli_appliance.api.server import serve
from harli_appliance.config import Settings
from harli_appliance.schema import ModelView, PolicyChange, Status

TICK_S = 0.01
TOKENS_PER_S = {"serve_only": 0, "train_only": 1000, "adaptive": 700, "time_slice": 500}
STEPS, TOKENS_PER_STEP = 40, 25
ADAPTER = "ft:smollm2:zindle"


class PacedGeneration(FakeGeneration):
    async def __aiter__(self) -> AsyncIterator[object]:
        async for delta in super().__aiter__():
            await asyncio.sleep(0.001)
            yield delta


class DemoAppliance(FakeAppliance):
    def __init__(self, folder: Path, misbehave: str) -> None:
        super().__init__(folder)
        self.misbehave = misbehave
        self.samples = []
        self.trained = 0.0
        self.status_now = self.status_now.model_copy(update={"models": [ModelView(id=BASE, kind="base")]})

    async def chat(self, call: ChatCall) -> FakeGeneration:
        question = call.messages[-1]["content"]
        if "zindle" not in question:
            text = f"{len(question)} "
        elif call.model == ADAPTER and self.misbehave != "unlearned":
            text = "A small copper whistle that calls Bees back. "
        else:
            text = "An old <Egyptian> artifact. "
        if self.misbehave == "drift" and self.status_now.policy == "adaptive":
            text = "something else "
        return PacedGeneration(words(*[text] * (call.max_tokens or 8), finish="length"))

    async def create_job(self, spec: JobSpec) -> Job:
        job = await super().create_job(spec)
        if self.misbehave == "crash":
            print("the roof is on fire", file=sys.stderr, flush=True)
            os._exit(7)
        if self.misbehave == "fail-job":
            return self.update(job.id, status="failed", error_code="boom", error_message="ran out of luck")
        return self.update(job.id, status="running", total_steps=STEPS)

    async def change_policy(self, change: PolicyChange) -> Status:
        print("policy", change.policy, file=sys.stderr, flush=True)
        return await super().change_policy(change)

    async def train(self) -> None:
        last = time.time()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.time()
            running = next((job for job in self.all_jobs.values() if job.status == "running"), None)
            before = self.trained
            if running is not None:
                rate = TOKENS_PER_S[self.status_now.policy]
                self.trained = min(before + rate * (now - last), STEPS * TOKENS_PER_STEP)
            self.observe(now, int(self.trained) - int(before), running)
            last = now

    def observe(self, now: float, tokens: int, running: Job | None) -> None:
        loss = None
        if running is not None and (step := int(self.trained) // TOKENS_PER_STEP) > running.step:
            loss = 3.0 / step
            self.update(running.id, step=step)
            if step == STEPS:
                self.update(running.id, status="succeeded", fine_tuned_model=ADAPTER)
                adapter = ModelView(id=ADAPTER, kind="adapter", parent=BASE, job=running.id)
                models = [*self.status_now.models, adapter]
                self.status_now = self.status_now.model_copy(update={"models": models})
        pool = make_pool(leased=500 if running else 0)
        self.samples.append(
            make_sample(len(self.samples), t=now, training_tokens=tokens, loss=loss, pool=pool)
        )


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--misbehave", default="")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    print("flags", *options.set, file=sys.stderr)
    print("home", os.environ["HARLI_HOME"], "cwd", os.getcwd(), "pid", os.getpid(), file=sys.stderr)
    print(
        "variables", *(name for name in os.environ if name.startswith("HARLI_")), file=sys.stderr, flush=True
    )
    if options.misbehave == "never-ready":
        await asyncio.Event().wait()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    appliance = DemoAppliance(Path(os.environ["HARLI_HOME"]), options.misbehave)
    settings = Settings(home=appliance.folder, server={"port": 0})
    listener = await serve(create_app(appliance, settings), "127.0.0.1", 0)
    training = asyncio.create_task(appliance.train())
    print("some other line on stdout")
    print(json.dumps({"event": "ready", "url": listener.url}), flush=True)
    await stop.wait()
    training.cancel()
    await listener.close()
    print("stopped in order", file=sys.stderr, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
