"""`harli run`: ask the model, once or in a conversation."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from harli_appliance.cli.connect import Json, Url, base_model, talk
from harli_appliance.cli.output import note, print_json

if TYPE_CHECKING:
    from harli_appliance.client import HarliClient, StreamEnd

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    model: str
    text: str
    end: StreamEnd
    ttft_ms: float
    tpot_ms: float | None

    def as_json(self) -> dict[str, object]:
        return {
            "model": self.model,
            "text": self.text,
            "finish_reason": self.end.finish_reason,
            "usage": self.end.usage.model_dump(),
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
        }


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The question; from stdin when piped, a conversation when left out."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model or adapter that is served; the base model when not given.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the question.")] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Ask a question; the answer is streamed to stdout."""
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    chosen = {name: value for name, value in sampling.items() if value is not None}
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise typer.BadParameter("stdin is empty; give a question", param_hint="PROMPT")
    if prompt is not None:
        history.append({"role": "user", "content": prompt})
        answer = talk(url, lambda client: ask(client, model, history, chosen, show=not json))
        if json:
            print_json(answer.as_json())
        return
    if json:
        raise typer.BadParameter("a conversation cannot be JSON; give a question", param_hint="--json")
    converse(url, model, history, chosen)


def converse(
    url: str | None, model: str | None, history: list[Message], sampling: dict[str, float | int]
) -> None:
    import readline  # noqa: F401 - gives input() line editing and a history

    note("Ask away; Ctrl-D ends.")
    while True:
        try:
            question = input(">>> ").strip()
        except EOFError:
            typer.echo()
            return
        if not question:
            continue
        history.append({"role": "user", "content": question})
        answer = talk(url, lambda client: ask(client, model, history, sampling, show=True))
        history.append({"role": "assistant", "content": answer.text})


async def ask(
    client: HarliClient,
    model: str | None,
    messages: list[Message],
    sampling: dict[str, float | int],
    *,
    show: bool,
) -> Answer:
    """Stream an answer to stdout (when `show`), and measure it as the SLO does."""
    import time

    from harli_appliance.client import StreamedText

    model = model or await base_model(client)
    start = time.perf_counter()
    pieces: list[StreamedText] = []
    async for event in client.stream_chat(model, messages, **sampling):
        if isinstance(event, StreamedText):
            pieces.append(event)
            if show:
                typer.echo(event.text, nl=False)
                sys.stdout.flush()
        else:
            end = event
    if show:
        typer.echo()
    first = pieces[0].at if pieces else end.at
    gaps = end.usage.completion_tokens - 1
    last = pieces[-1].at if pieces else end.at
    return Answer(
        model=model,
        text="".join(piece.text for piece in pieces),
        end=end,
        ttft_ms=(first - start) * 1000,
        tpot_ms=(last - first) / gaps * 1000 if gaps > 0 else None,
    )
