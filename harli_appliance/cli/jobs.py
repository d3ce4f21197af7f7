"""`harli jobs`: finetuning jobs from the shell."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from harli_appliance.cli.connect import Json, Url, base_model, talk
from harli_appliance.cli.output import note, number, print_json, print_table, state, steps, when

if TYPE_CHECKING:
    from harli_appliance.api.wire import Hyperparameters, JobEventObject, JobObject, ListOf
    from harli_appliance.client import HarliClient
    from harli_appliance.schema import JobStatus

Result = TypeVar("Result")

app = typer.Typer(help="Finetuning jobs: create, watch, pause, resume, cancel.", no_args_is_help=True)

JobId = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A job's id or a part of it that no other has, its adapter's name, or 'last'."
    ),
]


@app.command("create")
def create(
    file: Annotated[str, typer.Argument(help="A training file (JSONL), or the id of one already uploaded.")],
    model: Annotated[
        str | None, typer.Option(help="What to finetune; the base model when not given.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Times that the file is gone through.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples of one optimizer step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate, e.g. 2e-4.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of the adapter.")] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank) in place of alpha / rank.")
    ] = False,
    lora_dropout: Annotated[
        float | None, typer.Option(help="Share of the adapter's inputs dropped while learning, e.g. 0.05.")
    ] = None,
    method: Annotated[str, typer.Option(help="supervised, or dpo for a file of preferences.")] = "supervised",
    beta: Annotated[
        float | None,
        typer.Option(help="Of dpo: how strongly the adapter is held to the base model, e.g. 0.1."),
    ] = None,
    peft_method: Annotated[
        str | None, typer.Option(help="lora, dora or ia3; only lora can be served, the others downloaded.")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Projections to adapt, e.g. q_proj,v_proj; all when not given.")
    ] = None,
    lr_scheduler: Annotated[
        str | None, typer.Option(help="After the warm-up the learning rate is: cosine, linear or constant.")
    ] = None,
    warmup_ratio: Annotated[
        float | None, typer.Option(help="Share of the steps over which the learning rate rises, e.g. 0.1.")
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Gradients are clipped to this norm, e.g. 1; 0 leaves them alone.")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out examples: a file or the id of one uploaded.")
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps between two evaluations on the held-out examples.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="End after so many evaluations without a better loss; 0 never does.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Becomes part of the adapter's name.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same order of examples.")] = None,
    priority: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            help="20 gets twice the device time of 10, and is started before it; 10 when not given.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job has ended.")] = False,
    json: Json = False,
    url: Url = None,
) -> None:
    """Queue a job for a training file."""

    local = {name: _existing(name) for name in (file, validation) if name is not None}

    async def work(client: HarliClient) -> JobObject:
        file_id = await training_file(client, file, local[file])
        held_out = await training_file(client, validation, local[validation]) if validation else None
        return await client.create_job(
            model or await base_model(client),
            file_id,
            validation_file=held_out,
            suffix=suffix,
            seed=seed,
            priority=priority,
            n_epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            use_rslora=rslora or None,
            lora_dropout=lora_dropout,
            method=method,
            beta=beta,
            peft_method=peft_method,
            target_modules=target_modules.split(",") if target_modules is not None else None,
            lr_scheduler_type=lr_scheduler,
            warmup_ratio=warmup_ratio,
            max_grad_norm=max_grad_norm,
            eval_steps=eval_steps,
            early_stopping_patience=patience,
        )

    job = talk(url, work)
    if wait:
        note(f"{job.id} is queued")
        wait_for(job.id, json, url)
    elif json:
        print_json(job.model_dump(mode="json"))
    else:
        typer.echo(job.id)


def of_job(url: str | None, told: str, work: Callable[[HarliClient, str], Awaitable[Result]]) -> Result:
    """Do `work` with the job that `told` names."""
    from harli_appliance.cli.job_ids import find_job

    async def conversation(client: HarliClient) -> Result:
        return await work(client, await find_job(client, told))

    return talk(url, conversation)


def _existing(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path if path.exists() else None


async def training_file(client: HarliClient, file: str, path: Path | None) -> str:
    """The id of a training file: of `path` once it is uploaded, or `file` itself if that is an id already."""
    from harli_appliance.errors import DatasetError, UsageError

    if path is not None:
        try:
            return (await client.upload(path)).id
        except DatasetError as error:
            message = f"{error.message}; 'harli data check {file}' shows every fault"
            raise DatasetError(message, findings=error.findings) from error
    if file.startswith("file-"):
        return file
    raise UsageError(f"{file}: no such file; give a JSONL file or the id of an uploaded one", param="file")


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100, help="Jobs shown at most, newest first.")] = 20,
    json: Json = False,
    url: Url = None,
) -> None:
    """Show the newest jobs."""

    async def work(client: HarliClient) -> tuple[ListOf[JobObject], str]:
        return await client.jobs(limit), await base_model(client)

    page, served = talk(url, work)
    if json:
        print_json(page.model_dump(mode="json"))
        return
    rows = [
        (
            job.id,
            _state(job, served),
            steps(job.harli.step, job.harli.total_steps),
            number(job.harli.loss),
            str(job.harli.priority),
            when(job.created_at),
            job.fine_tuned_model or "-",
        )
        for job in page.data
    ]
    print_table(("JOB", "STATUS", "STEP", "LOSS", "PRIORITY", "CREATED", "ADAPTER"), rows)
    if page.has_more:
        note(f"there are more; --limit shows up to 100 (now {limit})")


@app.command("show")
def show(job_id: JobId, json: Json = False, url: Url = None) -> None:
    """Show one job."""

    async def work(client: HarliClient, id: str) -> tuple[JobObject, str]:
        return await client.job(id), await base_model(client)

    job, served = of_job(url, job_id, work)
    if json:
        print_json(job.model_dump(mode="json"))
        return
    chosen = job.hyperparameters
    facts = {
        "job": job.id,
        "status": _state(job, served),
        "model": job.model,
        "adapter": job.fine_tuned_model or "-",
        "step": f"{job.harli.step} of {job.harli.total_steps}",
        "loss": number(job.harli.loss),
        **({"validation loss": _validation(job)} if job.validation_file is not None else {}),
        "trained tokens": str(job.harli.trained_tokens),
        "training file": job.training_file,
        "epochs": str(chosen.n_epochs),
        "batch size": str(chosen.batch_size),
        "learning rate": f"{chosen.learning_rate:g}, {chosen.lr_scheduler_type}, "
        f"warm-up over {chosen.warmup_ratio:.0%} of the steps",
        "method": _method(chosen),
        "adapted": ", ".join(chosen.target_modules),
        "seed": str(job.seed),
        "priority": str(job.harli.priority),
        "created": when(job.created_at),
        "started": when(job.harli.started_at),
        "finished": when(job.finished_at),
    }
    if job.error is not None:
        facts["error"] = job.error.message
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {value}")


def _state(job: JobObject, served: str) -> str:
    from harli_appliance.schema import waits_for

    return state(job.status, waits_for(job.status, job.model, served))


def _validation(job: JobObject) -> str:
    best = f", best at step {job.harli.best_step}" if job.harli.best_step else ""
    return f"{number(job.harli.valid_loss)}{best}"


def _method(chosen: Hyperparameters) -> str:
    if chosen.peft_method == "ia3":
        return "IA3"
    return (
        f"{'DoRA' if chosen.peft_method == 'dora' else 'LoRA'}, rank {chosen.lora_rank}, "
        f"alpha {chosen.lora_alpha:g}, dropout {chosen.lora_dropout:g}"
        + (", rank-stabilised" if chosen.use_rslora else "")
    )


@app.command("download")
def download(
    job_id: JobId,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the adapter's folder is made.")] = Path(),
    json: Json = False,
    url: Url = None,
) -> None:
    """Fetch the adapter of a finished job, in PEFT's format."""
    folder = of_job(url, job_id, lambda client, id: client.download_adapter(id, out))
    if json:
        print_json({"folder": str(folder)})
    else:
        typer.echo(str(folder))


@app.command("events")
def events(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    url: Url = None,
) -> None:
    """Show what happened to a job, oldest first."""
    from harli_appliance.cli.watching import each_event

    def show_event(event: JobEventObject) -> None:
        if json:
            typer.echo(event.model_dump_json())
        else:
            mark = "" if event.level == "info" else f"{event.level}: "
            typer.echo(f"{when(event.created_at)}  {mark}{event.message}")

    of_job(url, job_id, lambda client, id: each_event(client, id, show_event, follow=follow))


@app.command("wait")
def wait(job_id: JobId, json: Json = False, url: Url = None) -> None:
    """Wait until a job has ended; exit 4 when it made no adapter."""
    wait_for(job_id, json, url)


def wait_for(job_id: str, json: bool, url: str | None) -> None:
    from harli_appliance.cli.watching import until_ended
    from harli_appliance.errors import JobFailed

    job = of_job(url, job_id, until_ended)
    if json:
        print_json(job.model_dump(mode="json"))
    elif job.fine_tuned_model is not None:
        typer.echo(job.fine_tuned_model)
    if job.status != "succeeded":
        reason = f": {job.error.message}" if job.error is not None else ""
        raise JobFailed(f"{job.id} {job.status}{reason}")


@app.command("cancel")
def cancel(job_id: JobId, json: Json = False, url: Url = None) -> None:
    """Cancel a job that has not ended; what it learned is lost."""
    _print_state(of_job(url, job_id, lambda client, id: client.cancel_job(id)), json, "cancelled")


@app.command("pause")
def pause(job_id: JobId, json: Json = False, url: Url = None) -> None:
    """Pause a job; what it learned is kept, also when the appliance is started again."""
    _print_state(of_job(url, job_id, lambda client, id: client.pause_job(id)), json, "paused")


@app.command("resume")
def resume(job_id: JobId, json: Json = False, url: Url = None) -> None:
    """Let a paused job go on where it was."""
    _print_state(of_job(url, job_id, lambda client, id: client.resume_job(id)), json, "queued")


@app.command("priority")
def priority(
    job_id: JobId,
    value: Annotated[int, typer.Argument(metavar="PRIORITY", min=1, max=100, help="1 to 100; 10 is usual.")],
    json: Json = False,
    url: Url = None,
) -> None:
    """Change how much device time a job gets beside others, and when a waiting one begins."""
    job = of_job(url, job_id, lambda client, id: client.set_priority(id, value))
    if json:
        print_json(job.model_dump(mode="json"))
    else:
        typer.echo(f"{job.id} {job.status}, priority {job.harli.priority}")


def _print_state(job: JobObject, json: bool, wanted: JobStatus) -> None:
    """A running job does what is asked of it a moment later, which is said."""
    if json:
        print_json(job.model_dump(mode="json"))
        return
    typer.echo(f"{job.id} {job.status}")
    if job.status == "running" and wanted != "queued":
        note(f"it is {wanted} as soon as its work unit ends")
