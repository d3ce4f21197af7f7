"""`harli plan`: what finetuning a GPU would leave room for. Knows the flags; the simulator is in `planner`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from harli_appliance.cli.connect import Json
from harli_appliance.cli.output import note, print_json
from harli_appliance.errors import UsageError

POLICIES = "adaptive,static,harli,flexllm,llmstation,time_slice,time_slice:64,naive,serve_only"
WINDOW_S = 60.0
LEAD_S = 30.0


def plan(
    gpu: Annotated[str, typer.Option(metavar="NAME", help="h100, h200, a100-80 or l40s.")] = "h100",
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="A built-in model (a wrong name lists them), or a Hugging Face folder."
        ),
    ] = "meta-llama/Llama-3.1-8B",
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Azure, BurstGPT or Mooncake; a bursty synthetic one without."),
    ] = None,
    slo_tpot: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Time per token: 40ms, or 1.5x that of requests served alone, one by one (p99).",
        ),
    ] = "1.5x",
    slo_ttft: Annotated[str, typer.Option(metavar="TIME", help="Promised time to the first token.")] = "5s",
    policies: Annotated[
        str, typer.Option(metavar="LIST", help="Policies; 'static' stands for every split of the device.")
    ] = POLICIES,
    loads: Annotated[
        str, typer.Option(metavar="LIST", help="Shares of what serving alone can take under the SLO.")
    ] = "0.3,0.6,0.9",
    replicas: Annotated[
        int, typer.Option(help="Appliances behind a router that picks the least loaded.", min=1)
    ] = 1,
    start: Annotated[float, typer.Option(metavar="S", help="Second of the trace to begin at.", min=0)] = 0.0,
    duration: Annotated[
        float, typer.Option(metavar="S", help="Seconds of the trace to replay.", min=1)
    ] = WINDOW_S,
    lead: Annotated[
        float, typer.Option(metavar="S", help="Seconds before these, in which policies learn.", min=0)
    ] = LEAD_S,
    repetitions: Annotated[int, typer.Option(help="Runs of each, with other arrivals.", min=1)] = 1,
    decode_only: Annotated[
        bool, typer.Option("--decode-only", help="Prompts are read on other machines.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad rows of the trace out, and count them.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes to simulate in; one for each core when not set.", min=1)
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="steps.json of 'harli bench predictor': simulate that machine."),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of 'harli bench run' on that machine.")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Predict the runs in --measured, and compare.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where report.json and report.html are written as well."),
    ] = None,
    json: Json = False,
) -> None:
    """Simulate finetuning beside serving on a GPU: how much fits at which load and promise; which policy wins."""
    from dataclasses import replace

    from rich.console import Console

    from harli_appliance.bench.compare_plan import (
        parse_loads,
        parse_milliseconds,
        parse_policies,
        parse_slos,
    )
    from harli_appliance.planner.gpus import find_gpu
    from harli_appliance.planner.measured import Measured
    from harli_appliance.planner.plan import Question, read_trace, simulate
    from harli_appliance.planner.roofline import Roofline
    from harli_appliance.planner.scenario import Fleet
    from harli_appliance.planner.shapes import model_shape
    from harli_appliance.planner.show import print_plan, print_validation

    if calibration is not None and measured is not None:
        machine = Measured(measured)
        fleet = replace(machine.fleet(calibration), replicas=replicas)
        if validate:
            found = machine.validate(fleet)
            print_json(found) if json else print_validation(found, Console())
            raise typer.Exit(int(found["within_goal"] != 1.0))
    elif calibration is not None or measured is not None or validate:
        raise UsageError(
            "--calibration and --measured tell of a machine together; give both", param="measured"
        )
    else:
        fleet = Fleet(Roofline(find_gpu(gpu), model_shape(model)), replicas, decode_only=decode_only)
    question = Question(
        fleet=fleet,
        trace=read_trace(trace, start, lead + duration, skip_bad=skip_bad),
        promises=parse_slos(slo_tpot),
        ttft_ms=parse_milliseconds("slo-ttft", slo_ttft),
        policies=parse_policies(policies),
        loads=parse_loads(loads),
        lead_s=lead,
        repetitions=repetitions,
        workers=workers or len(os.sched_getaffinity(0)),
    )
    if question.trace.skipped:
        note(f"{question.trace.skipped} bad rows of the trace were left out")
    report = simulate(question, shlex.join(["harli", *sys.argv[1:]]), progress=_Progress().show)
    if out is not None:
        from harli_appliance.bench.report import write_report
        from harli_appliance.planner.page import build_page

        note("wrote {} and {}".format(*write_report(out, "report", report, build_page(report))))
    if json:
        print_json(report)
    else:
        print_plan(report, Console())


class _Progress:
    """One line on stderr that is written over; nothing where stderr is no terminal."""

    def show(self, what: str, done: float) -> None:
        if sys.stderr.isatty():
            line = f"{done:4.0%}  {what}"[:78] if done < 1 else ""
            sys.stderr.write(f"\r{line:<78}\r")
            sys.stderr.flush()
