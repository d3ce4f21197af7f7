"""`harli bench`: measurements of this machine. Knows the flags; what happens is in `harli_appliance.bench`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from harli_appliance.cli.connect import Json

app = typer.Typer(no_args_is_help=True, help="Measure what the appliance costs and brings on this machine.")


TraceFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Azure 2023 or 2024 (CSV), BurstGPT (CSV) or Mooncake (JSON lines); a synthetic bursty one when not "
        "given.",
    ),
]
ModelName = Annotated[str, typer.Option(help="A folder, or a name that 'harli models' lists.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows of the trace out.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
DEMO_MODEL = "smollm2-135m-instruct"
REPORTS = Path("bench-report")


@app.command("run")
def run(
    policies: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Policies to compare; all but train_only when not given."),
    ] = None,
    trace: TraceFile = None,
    slo_tpot: Annotated[
        str,
        typer.Option(
            metavar="SLO,SLO",
            help="Promised time per output token: a time (40ms) or a multiple of serving alone at light load "
            "(1.5x).",
        ),
    ] = "1.5x",
    slo_ttft: Annotated[str, typer.Option(metavar="TIME", help="Promised time to the first token.")] = "5s",
    loads: Annotated[
        str,
        typer.Option(metavar="L,L", help="Loads, as shares of what serving alone can take under the SLO."),
    ] = "0.3,0.6,0.9",
    repetitions: Annotated[
        int, typer.Option(min=1, help="Runs of each policy, each on another part of the trace.")
    ] = 3,
    seconds: Annotated[
        float, typer.Option(min=2.0, help="How long requests arrive and count in a run.")
    ] = 36.0,
    model: ModelName = DEMO_MODEL,
    replay: Annotated[
        str,
        typer.Option(
            metavar="engine|http", help="Ask the engine in its process, or over HTTP as clients do."
        ),
    ] = "engine",
    skip_bad: SkipBad = False,
    prompt_scale: Annotated[float, typer.Option(help="Factor on prompt lengths.")] = 0.04,
    output_scale: Annotated[float, typer.Option(help="Factor on answer lengths.")] = 0.25,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are cut to this.")] = 128,
    min_output_tokens: Annotated[int, typer.Option(min=2, help="Shorter answers are made this long.")] = 16,
    max_output_tokens: Annotated[int, typer.Option(min=2, help="Longer answers are cut to this.")] = 64,
    variation: Annotated[
        float,
        typer.Option(
            min=0.0, help="Burstiness of the synthetic trace: how much its rate varies; 0 is Poisson."
        ),
    ] = 1.0,
    sequence_tokens: Annotated[
        int, typer.Option(min=16, help="Tokens of one micro-batch of the finetuning job.")
    ] = 128,
    seed: Seed = 7,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results are written.")] = REPORTS,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in --out.")] = False,
    json: Json = False,
) -> None:
    """Compare policies on this machine: finetuning speed and kept promises, on the same requests."""
    from harli_appliance.bench import compare_plan as asked
    from harli_appliance.bench.compare import run as compare
    from harli_appliance.scheduling.names import POLICY_NAMES

    default = ",".join(name for name in POLICY_NAMES if name != "train_only")
    plan = asked.ComparePlan(
        policies=asked.parse_policies(policies or default),
        slos=asked.parse_slos(slo_tpot),
        model=model,
        trace=trace.absolute() if trace else None,
        skip_bad=skip_bad,
        replay=asked.parse_replay(replay),
        ttft_ms=asked.parse_milliseconds("slo-ttft", slo_ttft),
        loads=asked.parse_loads(loads),
        repetitions=repetitions,
        seconds=seconds,
        prompt_scale=prompt_scale,
        output_scale=output_scale,
        max_prompt_tokens=max_prompt_tokens,
        min_output_tokens=min_output_tokens,
        max_output_tokens=max_output_tokens,
        variation=variation,
        sequence_tokens=sequence_tokens,
        seed=seed,
    )
    raise typer.Exit(compare(plan, out, resume=resume, json_output=json, typed=_typed()))


@app.command("runtime")
def runtime(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where runtime.json and the logs are written.")
    ] = Path("bench-report"),
    json: Json = False,
) -> None:
    """Overhead of a tick, CPU attention, prefix cache and adapter loading, against their goals."""
    from harli_appliance.bench.runtime import run

    raise typer.Exit(run(out, json))


@app.command("training")
def training(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where training.json and the logs are written.")
    ] = Path("bench-report"),
    json: Json = False,
) -> None:
    """Memory and speed of finetuning by work units, beside PEFT plain and with checkpointed layers."""
    from harli_appliance.bench.training import run

    raise typer.Exit(run(out, json))


@app.command("decide")
def decide(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where decide.json is written.")] = Path(
        "bench-report"
    ),
    json: Json = False,
) -> None:
    """How long the scheduler takes to decide, for every policy."""
    from harli_appliance.bench.decide import run

    raise typer.Exit(run(out, json))


@app.command("memory")
def memory(
    model: ModelName = DEMO_MODEL,
    bursts: Annotated[
        int, typer.Option(min=1, help="Bursts of requests, each of which takes slots back from training.")
    ] = 30,
    sequence_tokens: Annotated[
        int, typer.Option(min=16, help="Tokens of one micro-batch of the finetuning job.")
    ] = 512,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where memory.json is written.")] = REPORTS,
    json: Json = False,
) -> None:
    """How fast slots change hands between serving and training, and what it costs the prefix cache."""
    from harli_appliance.bench.compare_plan import ComparePlan, parse_slos
    from harli_appliance.bench.memory_bench import run

    plan = ComparePlan(
        policies=("naive",),
        slos=parse_slos("1.5x"),
        model=model,
        sequence_tokens=sequence_tokens,
    )
    raise typer.Exit(run(plan, bursts, out, json_output=json, typed=_typed()))


@app.command("predictor")
def predictor(
    trace: TraceFile = None,
    model: ModelName = DEMO_MODEL,
    seconds: Annotated[
        float, typer.Option(min=2.0, help="How long requests arrive, for each of six parts.")
    ] = 30.0,
    skip_bad: SkipBad = False,
    seed: Seed = 7,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where predictor.json is written.")] = REPORTS,
    json: Json = False,
) -> None:
    """How wrong the latency predictor is on a part of a trace that it has not seen."""
    from harli_appliance.bench.compare_plan import ComparePlan, parse_slos
    from harli_appliance.bench.predictor_bench import run

    plan = ComparePlan(
        policies=("serve_only",),
        slos=parse_slos("1.5x"),
        model=model,
        trace=trace.absolute() if trace else None,
        skip_bad=skip_bad,
        repetitions=2,
        seconds=seconds,
        light_requests=4,
        seed=seed,
    )
    raise typer.Exit(run(plan, out, json_output=json, typed=_typed()))


@app.command("adapt")
def adapt(
    trace: TraceFile = None,
    model: ModelName = DEMO_MODEL,
    slo_tpot: Annotated[
        str, typer.Option(metavar="SLO", help="Promised time per output token, as for 'harli bench run'.")
    ] = "3x",
    seconds: Annotated[
        float,
        typer.Option(min=4.0, help="How long requests arrive; everything is slower in the second half."),
    ] = 60.0,
    skip_bad: SkipBad = False,
    seed: Seed = 7,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where adapt.json is written.")] = REPORTS,
    json: Json = False,
) -> None:
    """How long a promise is broken when all steps suddenly take twice as long."""
    from harli_appliance.bench.adapt import run
    from harli_appliance.bench.compare_plan import ComparePlan, parse_slos

    plan = ComparePlan(
        policies=("adaptive",),
        slos=parse_slos(slo_tpot)[:1],
        model=model,
        trace=trace.absolute() if trace else None,
        skip_bad=skip_bad,
        repetitions=2,
        seconds=seconds,
        light_requests=8,
        seed=seed,
    )
    raise typer.Exit(run(plan, out, json_output=json, typed=_typed()))


@app.command("device")
def device(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where device.json is written.")] = REPORTS,
    shapes: Annotated[
        str | None,
        typer.Option(help="Shapes of the model: tiny, smollm2-135m or llama-3-8b; by device when not given."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION", help="Measure only this (a wrong name lists them); may be given several times."
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option(metavar="SECONDS", help="Begin no section after so many seconds.")
    ] = 480.0,
    json: Json = False,
) -> None:
    """Bandwidth, matmul, decoding and finetuning by partition, alone and side by side; more on a GPU."""
    arguments = [sys.executable, "-m", "harli_appliance.bench.device", "--out", str(out)]
    arguments += ["--budget", str(budget)]
    for section in only or []:
        arguments += ["--only", section]
    if shapes is not None:
        arguments += ["--shapes", shapes]
    if json:
        arguments.append("--json")
    # One OpenMP thread a lane, as `harli serve` has it; torch reads this when it is imported.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    raise typer.Exit(subprocess.run(arguments, env=environment).returncode)  # noqa: S603 - our own module


def _typed() -> str:
    """The command, to be typed again."""
    return shlex.join(["harli", *(part for part in sys.argv[1:] if part != "--resume")])
