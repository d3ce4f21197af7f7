"""`harli status`, `ps` and `top`: what the appliance does right now."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from harli_appliance.cli.connect import Json, Url, connect, talk
from harli_appliance.cli.output import number, print_json, print_table, state, steps
from harli_appliance.scheduling.reasons import in_words

if TYPE_CHECKING:
    from harli_appliance.schema import RunningJobView, SloView

NICENESS = 10
"""The dashboard may share cores with what it watches, and must not slow it down."""


def status(json: Json = False, url: Url = None) -> None:
    """Show state, latency against its target, throughput, memory and jobs."""
    now = talk(url, lambda client: client.status())
    if json:
        print_json(now.model_dump(mode="json"))
        return
    serving, training, pool = now.serving, now.training, now.pool
    attainment = number(now.slo.attainment, ".1%")
    facts = {
        "state": f"{now.state} for {duration(now.uptime_s)}, version {now.version}",
        "model": f"{now.model} on {now.device}",
        "policy": f"{now.policy}, now {now.mode}: {in_words(now.reason)}",
        "TPOT": f"p50 {ms(serving.tpot_ms.p50)}, p99 {ms(serving.tpot_ms.p99)}, target {ms(now.slo.tpot_ms)}",
        "TTFT": f"p50 {ms(serving.ttft_ms.p50)}, p99 {ms(serving.ttft_ms.p99)}, target {ms(now.slo.ttft_ms)}",
        "attainment": f"{attainment} of recent requests met both targets{by_class(now.slo)}",
        "requests": f"{serving.running} running, {serving.waiting} waiting, "
        f"{serving.requests} in all, {serving.failed} failed",
        "serving": f"{serving.output_tokens_per_s:.1f} tokens/s",
        "training": f"{training.tokens_per_s:.1f} tokens/s, {jobs(training.running)}",
        "partition": f"inference {now.partition.inference}, training {now.partition.training}",
        "pool": f"{pool.slots} slots: {pool.serving} serving, {pool.cached} cached, "
        f"{pool.leased} leased, {pool.free} free",
    }
    for job in training.running:
        facts[f"  {job.job}"] = (
            f"step {job.step}/{job.total_steps}, loss {number(job.loss)}, "
            f"{job.device_share:.0%} of the training time, {left(job.remaining_s)}"
        )
    if now.hardware is not None:
        from harli_appliance.tui.words import hardware

        facts["hardware"] = hardware(now)
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {value}")


def jobs(running: Sequence[RunningJobView]) -> str:
    return f"{len(running)} job{'' if len(running) == 1 else 's'} running" if running else "no job runs"


def left(seconds: float | None) -> str:
    return "end not known yet" if seconds is None else f"about {duration(seconds)} left"


def by_class(slo: SloView) -> str:
    """The same for each class that had requests, unless all are of one class."""
    seen = [f"{part.name} {number(part.attainment, '.1%')}" for part in slo.classes if part.requests]
    return f" ({', '.join(seen)})" if len(seen) > 1 else ""


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s"


def ps(json: Json = False, url: Url = None) -> None:
    """Show what is running: requests, models and jobs."""
    from harli_appliance.schema import ENDED

    now = talk(url, lambda client: client.status())
    active = [job for job in now.jobs if job.status not in ENDED]
    if json:
        print_json(
            {
                "requests": {"running": now.serving.running, "waiting": now.serving.waiting},
                "models": [model.model_dump(mode="json") for model in now.models],
                "jobs": [job.model_dump(mode="json") for job in active],
            }
        )
        return
    typer.echo(f"{now.serving.running} requests running, {now.serving.waiting} waiting\n")
    print_table(
        ("MODEL", "KIND", "MADE BY"), [(model.id, model.kind, model.job or "-") for model in now.models]
    )
    if active:
        typer.echo()
        rows = [
            (
                job.id,
                state(job.status, job.waits_for),
                steps(job.step, job.total_steps),
                number(job.loss),
                str(job.priority),
                number(job.device_share, ".0%"),
                "-" if job.remaining_s is None else duration(job.remaining_s),
            )
            for job in active
        ]
        print_table(("JOB", "STATUS", "STEP", "LOSS", "PRIORITY", "SHARE", "LEFT"), rows)


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one snapshot as text and end.")] = False,
    theme: Annotated[
        str | None,
        typer.Option(
            envvar="HARLI_THEME", help="Colours: dark, light, or the name of another file in themes/."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one snapshot as JSON and end.")] = False,
    url: Url = None,
) -> None:
    """Watch the appliance live in a dashboard."""
    if json:
        status(json=True, url=url)
        return
    client = connect(url)
    if once:
        from harli_appliance.tui.snapshot import print_snapshot

        print_snapshot(client)
        return
    from harli_appliance.tui.app import HarliTop

    os.nice(NICENESS)
    HarliTop(client, theme_name=theme).run()
