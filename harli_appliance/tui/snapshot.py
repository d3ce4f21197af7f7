"""`harli top --once`: the dashboard as plain text, once."""

from __future__ import annotations

import asyncio
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harli_appliance.client import HarliClient
from harli_appliance.errors import ApplianceUnavailable
from harli_appliance.schema import Status
from harli_appliance.tui import words
from harli_appliance.tui.bars import GLYPHS, Share, bar, legend
from harli_appliance.tui.feed import Feed, Reading

PIPE_WIDTH = 100
COLOURS = {"serving": "blue", "cached": "cyan", "leased": "yellow", "free": "bright_black"}
VERDICTS = {"success": "green", "warning": "yellow", "error": "red", None: "default"}
BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_CELLS = 60


def print_snapshot(client: HarliClient) -> None:
    """Print the state of the appliance to stdout.

    Raises:
        ApplianceUnavailable: there is none to be seen.
    """

    async def look() -> Reading:
        async with client:
            return await Feed(client).read()

    reading = asyncio.run(look())
    if reading.status is None:
        raise ApplianceUnavailable(reading.trouble or "the appliance does not answer")
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    for line in snapshot(reading, reading.status, console.width):
        console.print(line)


def snapshot(reading: Reading, status: Status, width: int) -> list[Text | Table]:
    serving, training, slo = status.serving, status.training, status.slo
    lines: list[Text | Table] = [
        Text(
            f"Harli {status.version} · {status.state} for {words.duration(status.uptime_s)} · {status.model} · "
            f"{status.device} · policy {status.policy}",
            style="bold",
        ),
        Text(),
        _latency(reading, status),
        Text(
            f"TTFT        p50 {words.ms(serving.ttft_ms.p50)}, p99 {words.ms(serving.ttft_ms.p99)}, "
            f"target {words.ms(slo.ttft_ms)}"
        ),
        Text("attainment  ").append(
            words.percent(slo.attainment), style=VERDICTS[words.attainment_verdict(slo.attainment)]
        ),
        *([Text(f"classes     {classes}")] if (classes := words.classes(slo)) else []),
        Text(
            f"serving     {serving.output_tokens_per_s:.1f} tokens/s, "
            f"{serving.running} running, {serving.waiting} waiting"
        ),
        Text(f"training    {training.tokens_per_s:.1f} tokens/s"),
        Text(f"mode        {words.mode(status)}"),
    ]
    lines += _shared_out("partition", words.partition_shares(status, COLOURS), width)
    lines += _shared_out("pool", words.pool_shares(status.pool, COLOURS), width)
    if read := words.hardware(status):
        lines.append(Text(f"device      {read}"))
    if status.jobs:
        lines += [Text(), _jobs(status)]
    lines += [Text(), Text("models      " + ", ".join(model.id for model in status.models))]
    return lines


def _latency(reading: Reading, status: Status) -> Text:
    tpot, target = status.serving.tpot_ms, status.slo.tpot_ms
    live = reading.history.live_tpot(reading.now)
    text = Text("TPOT        now ")
    text.append(words.ms(live), style=VERDICTS[words.verdict(live, target)])
    text.append(f", p50 {words.ms(tpot.p50)}, p99 ")
    text.append(words.ms(tpot.p99), style=VERDICTS[words.verdict(tpot.p99, target)])
    text.append(f", target {words.ms(target)}")
    values = [value for run in reading.history.tpot(reading.now) for value in run[1]][-SPARK_CELLS:]
    if values:
        text.append(f"\n            {sparkline(values, target)}")
    return text


def sparkline(values: list[float], target: float) -> str:
    """Blocks against the target: the highest one is at or above it."""
    return "".join(BLOCKS[min(int(value / target * (len(BLOCKS) - 1)), len(BLOCKS) - 1)] for value in values)


def _shared_out(name: str, shares: list[Share], width: int) -> list[Text]:
    room = max(width - 12, 10)
    glyphs = GLYPHS if len(shares) == len(GLYPHS) else GLYPHS[::2]
    return [
        Text(f"{name:<12}", no_wrap=True).append_text(bar(shares, room, glyphs)),
        Text(" " * 12, no_wrap=True).append_text(legend(shares, room, glyphs=glyphs)),
    ]


def _jobs(status: Status) -> Table:
    table = Table(
        "JOB", "STATUS", "PROGRESS", "LEFT", "LOSS", "PRIORITY", "ADAPTER", box=None, pad_edge=False
    )
    for job in status.jobs:
        loss = "" if job.loss is None else f"{job.loss:.3f}"
        left = "" if job.remaining_s is None else words.duration(job.remaining_s)
        adapter = job.fine_tuned_model or job.suffix or ""
        if job.waits_for:
            adapter = f"waits for {job.waits_for}"
        table.add_row(
            words.job_name(job.id), job.status, words.progress(job), left, loss, str(job.priority), adapter
        )
    return table
