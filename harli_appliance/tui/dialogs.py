"""What the dashboard asks: which policy, whether to really cancel a job; and the story of a job.

Knows how to ask and what was answered. Does not know what is done with the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from harli_appliance.api.wire import JobEventObject
from harli_appliance.scheduling.names import describe_policy
from harli_appliance.schema import JobView
from harli_appliance.tui import words


class PolicyScreen(ModalScreen[str | None]):
    """Every policy with what it does; Enter gives the chosen one, Esc None."""

    BINDINGS = [Binding("escape,p", "dismiss", "Close")]  # noqa: RUF012 - Textual's way

    def __init__(self, policies: Sequence[str], now: str) -> None:
        super().__init__()
        self._policies = policies
        self._now = now

    def compose(self) -> ComposeResult:
        width = max(map(len, self._policies))
        with Vertical(classes="dialog") as box:
            box.border_title = "Policy"
            box.border_subtitle = "Enter takes it · Esc leaves it"
            yield OptionList(*(self._option(name, width) for name in self._policies))

    def _option(self, name: str, width: int) -> Option:
        text = Text.assemble(
            ("● " if name == self._now else "  ", self.app.theme_variables["success"]),
            (f"{name:<{width}}  ", "bold"),
            describe_policy(name),
        )
        return Option(text, id=name)

    def on_mount(self) -> None:
        options = self.query_one(OptionList)
        options.highlighted = self._policies.index(self._now) if self._now in self._policies else 0
        options.focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option_id)


class CancelScreen(ModalScreen[bool]):
    """Whether a job is really to be cancelled."""

    BINDINGS = [  # noqa: RUF012
        Binding("y,enter", "answer(True)", "Yes"),
        Binding("n,escape", "answer(False)", "No"),
    ]

    def __init__(self, job: JobView) -> None:
        super().__init__()
        self._job = job

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = "Cancel the job?"
            box.border_subtitle = "y yes · Esc no"
            yield Static(words.cancelling(self._job))

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)


class JobScreen(ModalScreen[None]):
    """What a job is and what happened to it, the newest event first."""

    BINDINGS = [Binding("escape,q,enter", "dismiss", "Close")]  # noqa: RUF012

    def __init__(self, job: JobView, events: Sequence[JobEventObject]) -> None:
        super().__init__()
        self._job = job
        self._events = events

    def compose(self) -> ComposeResult:
        job = self._job
        with VerticalScroll(classes="dialog") as box:
            box.border_title = job.id
            box.border_subtitle = "Esc closes"
            facts = [job.status, words.progress(job), f"priority {job.priority}"]
            if job.loss is not None:
                facts.append(f"loss {job.loss:.3f}")
            yield Static(Text("  ".join(fact for fact in facts if fact) + "\n", style="bold"))
            yield Static(self._story())

    def _story(self) -> Text:
        variables = self.app.theme_variables
        colours = {"info": "", "warn": variables["warning"], "error": variables["error"]}
        lines = [
            Text.assemble(
                (f"{words.clock(event.created_at)}  ", "dim"), (event.message, colours[event.level])
            )
            for event in self._events
        ]
        return Text("\n").join(lines)
