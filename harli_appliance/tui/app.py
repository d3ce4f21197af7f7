"""`harli top`: the dashboard. A process of its own, attached over HTTP, so that drawing delays no token.

Knows the layout, the keys and how often to look. What is shown lies in `panels` and `plots`, where it comes from
in `feed`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Footer, Input, Static

from harli_appliance.client import HarliClient
from harli_appliance.errors import ConfigError, HarliError
from harli_appliance.schema import JobView, PolicyChange, Status
from harli_appliance.tui import words
from harli_appliance.tui.dialogs import CancelScreen, JobScreen, PolicyScreen
from harli_appliance.tui.feed import Feed, Reading
from harli_appliance.tui.help import HelpScreen
from harli_appliance.tui.panels import (
    Headline,
    JobsPanel,
    LatencyPanel,
    ModelsPanel,
    PartitionPanel,
    PoolPanel,
    lane_colours,
)
from harli_appliance.tui.plots import LatencyPlot, RatePanel
from harli_appliance.tui.themes import DEFAULT, PREFIX, load_themes

POLL_S = 0.5

DRAW_S = 1.0
"""Plots are nearly all of the dashboard's work, and that machine has other things to do."""

SHOWN_EVENTS = 100

PRIORITIES = (1, 2, 5, 10, 20, 50, 100)
"""Where + and - go."""


class HarliTop(App[None]):
    """The dashboard around a client that is not connected yet."""

    TITLE = "harli top"
    CSS_PATH = "harli.tcss"
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = "#jobs DataTable"  # the arrows choose a job; every other key is ours
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012 - Textual declares it so
        (0, "-compact"),
        (100, "-roomy"),
        (130, "-wide"),
    ]
    VERTICAL_BREAKPOINTS = [(0, "-low"), (34, "-high")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("p", "policy", "Policy"),
        Binding("t", "next_theme", "Theme"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("escape", "leave", "Back", show=False),
    ]

    def __init__(self, client: HarliClient, theme_name: str | None = None) -> None:
        super().__init__()
        self._client = client
        self._feed = Feed(client)
        self._reading: Reading | None = None
        self._seen = False
        self._drawn = 0.0
        self._themes = load_themes()
        if theme_name is not None and theme_name not in self._themes:
            raise ConfigError(f"no theme '{theme_name}'; there are {', '.join(self._themes)}", param="theme")
        for name, file in self._themes.items():
            self.register_theme(file.theme(name))
        self._theme_name = theme_name or DEFAULT
        self.theme = PREFIX + self._theme_name

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """The lanes' colours for Textual's own themes, which do not have them."""
        return {PREFIX + lane: colour for lane, colour in load_themes()[DEFAULT].lanes}

    def compose(self) -> ComposeResult:
        yield Headline(id="headline")
        yield Static(id="nothing")
        with Vertical(id="body"):
            with Horizontal(id="latency-row"):
                yield LatencyPanel(id="latency", classes="panel")
                yield LatencyPlot(id="latency-plot", classes="panel")
            with Horizontal(id="rates-row"):
                yield RatePanel("Serving", "serving")
                yield RatePanel("Training", "training")
            with Horizontal(id="shares-row"):
                yield PartitionPanel(id="partition", classes="panel")
                yield PoolPanel(id="pool", classes="panel")
            with Horizontal(id="bottom-row"):
                yield JobsPanel(id="jobs", classes="panel")
                yield ModelsPanel(id="models", classes="panel")
        yield Input(placeholder="show jobs that contain…", id="filter", disabled=True)
        yield Footer()

    def on_mount(self) -> None:
        self.watch_appliance()

    @work
    async def watch_appliance(self) -> None:
        """Look twice a second, for as long as the dashboard is open."""
        async with self._client:
            while self.is_running:
                reading = await self._feed.read()
                if self.is_running:  # it may have been closed meanwhile
                    self.show(reading)
                await asyncio.sleep(POLL_S)

    def show(self, reading: Reading) -> None:
        self._reading = reading
        self.query_one(Headline).show(reading)
        main = self.screen_stack[0]
        main.set_class(reading.status is None, "stale")
        main.set_class(not self._seen and reading.status is None, "never")
        if reading.status is None:
            until = "serves" if reading.answers else "answers"
            self.query_one("#nothing", Static).update(f"{reading.trouble}\n\nTrying again until it {until}.")
        else:
            self._seen = True
            self._show_status(reading, reading.status)

    def _show_status(self, reading: Reading, status: Status) -> None:
        serving, training = status.serving, status.training
        self.query_one(LatencyPanel).show(reading, status)
        queue = f"{serving.running} running, {serving.waiting} waiting"
        self.query_one("#serving", RatePanel).show(serving.output_tokens_per_s, queue)
        self.query_one("#training", RatePanel).show(training.tokens_per_s, words.running_jobs(training))
        colours = lane_colours(self)
        self.query_one(PartitionPanel).show(words.partition_shares(status, colours), words.mode(status))
        self.query_one(PartitionPanel).show_device(words.hardware(status))
        pool = f"{status.pool.slots:,} slots · {status.pool.reclaims} reclaims"
        self.query_one(PoolPanel).show(words.pool_shares(status.pool, colours), pool)
        self.query_one(JobsPanel).show(status.jobs)
        self.query_one(ModelsPanel).show(status)
        if reading.now - self._drawn >= DRAW_S:
            self._drawn = reading.now
            self._draw(reading, status)

    def _draw(self, reading: Reading, status: Status) -> None:
        history, now = reading.history, reading.now
        self.query_one(LatencyPlot).show(reading, status.slo.tpot_ms)
        self.query_one("#serving", RatePanel).draw(history.served_per_s(now))
        self.query_one("#training", RatePanel).draw(history.trained_per_s(now))

    def _show_again(self) -> None:
        self._drawn = 0.0
        if self._reading is not None:
            self.show(self._reading)

    # -- keys ------------------------------------------------------------------------------------

    def action_help(self) -> None:
        self.push_screen(HelpScreen())

    def action_next_theme(self) -> None:
        names = list(self._themes)
        self._theme_name = names[(names.index(self._theme_name) + 1) % len(names)]
        self.theme = PREFIX + self._theme_name
        self._show_again()

    def action_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.disabled = False
        field.add_class("open")
        field.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.query_one(JobsPanel).wanted = event.value.strip()
        self._show_again()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._close_filter()

    def _close_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.remove_class("open")
        field.disabled = True
        self.query_one("#jobs DataTable").focus()

    def action_leave(self) -> None:
        """Esc: forget the filter."""
        self.query_one("#filter", Input).value = ""
        self._close_filter()

    # -- what is asked of the appliance ----------------------------------------------------------

    @work
    async def action_policy(self) -> None:
        """Offer what this appliance can use."""
        status = self._reading.status if self._reading is not None else None
        if status is None:
            return
        chosen = await self.push_screen_wait(PolicyScreen(status.policies, status.policy))
        if chosen is not None and chosen != status.policy:
            change = PolicyChange.model_validate({"policy": chosen})
            await self._do(self._client.change_policy(change), f"The policy is now {chosen}.")

    @work
    async def on_jobs_panel_asked(self, event: JobsPanel.Asked) -> None:
        job, client = event.job, self._client
        if event.what == "show":
            with self._errors_told():
                events = await client.events(job.id, limit=SHOWN_EVENTS)
                self.push_screen(JobScreen(job, events.data))
        elif event.what == "cancel":
            if await self.push_screen_wait(CancelScreen(job)):
                await self._do(client.cancel_job(job.id), f"{job.id} is cancelled.")
        elif event.what == "pause" and job.status == "paused":
            await self._do(client.resume_job(job.id), f"{job.id} goes on.")
        elif event.what == "pause":
            await self._do(client.pause_job(job.id), f"{job.id} pauses.")
        else:
            await self._change_priority(job, up=event.what == "raise")

    async def _change_priority(self, job: JobView, *, up: bool) -> None:
        steps = [p for p in PRIORITIES if (p > job.priority if up else p < job.priority)]
        if steps:
            priority = steps[0] if up else steps[-1]
            await self._do(self._client.set_priority(job.id, priority), f"{job.id} has priority {priority}.")

    async def _do(self, call: Awaitable[object], done: str) -> None:
        with self._errors_told():
            await call
            self.notify(done)

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except HarliError as error:
            self.notify(error.message, severity="error")
