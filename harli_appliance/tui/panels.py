"""The panels of the dashboard. Each shows one part of a reading and knows nothing of the others."""

from __future__ import annotations

from typing import ClassVar, Literal

from rich.text import Text
from textual.app import App, ComposeResult, RenderResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.coordinate import Coordinate
from textual.message import Message
from textual.widget import Widget
from textual.widgets import DataTable, Digits, Static

from harli_appliance.schema import ENDED, JobView, Status
from harli_appliance.tui import words
from harli_appliance.tui.bars import Share, bar, legend
from harli_appliance.tui.feed import Reading

JobWish = Literal["pause", "cancel", "raise", "lower", "show"]
"""What a key asks for a job; `pause` resumes one that is paused."""


def lane_colours(app: App[None]) -> dict[str, str]:
    """The theme's colours by owner of memory; what training leases has training's colour."""
    variables = app.theme_variables
    owners = {"serving": "serving", "cached": "cached", "leased": "training", "free": "free"}
    return {owner: variables[f"harli-{lane}"] for owner, lane in owners.items()}


class Headline(Static):
    """State, uptime, policy, model and device in one line; or why there is nothing to show."""

    def show(self, reading: Reading) -> None:
        status = reading.status
        variables = self.app.theme_variables
        if status is None:
            state, colour = (
                ("not ready", "warning") if reading.answers else ("no connection, trying again", "error")
            )
            text = Text(f" ● {state}", style=f"bold {variables[colour]}", no_wrap=True)
            self.update(text.append(f"  {reading.trouble}", style=f"not bold {variables['foreground']}"))
            return
        colour = variables["success" if status.state == "ready" else "warning"]
        text = Text(" Harli ", style="bold", no_wrap=True, overflow="ellipsis")
        text.append(f" ● {status.state}", style=f"bold {colour}")
        text.append(f" {words.duration(status.uptime_s)}", style="not bold dim")
        for label, value in (("policy", status.policy), ("", status.model), ("on", status.device)):
            text.append(f"  {label} " if label else "  ", style="not bold dim")
            text.append(value)
        self.update(text)


class LatencyPanel(Vertical):
    """The live time per output token as a big number, its percentiles and the attainment."""

    BORDER_TITLE = "TPOT"

    def compose(self) -> ComposeResult:
        yield Digits("-", id="tpot")
        yield Static(id="tpot-facts")

    def show(self, reading: Reading, status: Status) -> None:
        serving, slo = status.serving, status.slo
        live = reading.history.live_tpot(reading.now)
        digits = self.query_one("#tpot", Digits)
        digits.update("-" if live is None else f"{live:.0f}")
        digits.set_classes(words.verdict(live, slo.tpot_ms) or "")
        self.border_subtitle = f"target {slo.tpot_ms:,.0f} ms"
        variables = self.app.theme_variables
        facts = Text()
        rows: tuple[tuple[str, str, words.Verdict | None], ...] = (
            ("p50", words.ms(serving.tpot_ms.p50), words.verdict(serving.tpot_ms.p50, slo.tpot_ms)),
            ("p99", words.ms(serving.tpot_ms.p99), words.verdict(serving.tpot_ms.p99, slo.tpot_ms)),
            ("attained", words.percent(slo.attainment), words.attainment_verdict(slo.attainment)),
            ("ITL p99", words.ms(serving.itl_ms.p99), None),
            ("TTFT p99", words.ms(serving.ttft_ms.p99), words.verdict(serving.ttft_ms.p99, slo.ttft_ms)),
        )
        classes = [part for part in slo.classes if part.requests]
        kept = (
            (part.name, words.percent(part.attainment), words.attainment_verdict(part.attainment))
            for part in classes
        )
        rows = (*rows, *kept) if len(classes) > 1 else rows
        for index, (name, value, verdict) in enumerate(rows):
            facts.append("\n" if index else "")
            facts.append(f"{name:<11}", style="dim")
            facts.append(f"{value:>9}", style=f"bold {variables[verdict]}" if verdict else "")
        self.query_one("#tpot-facts", Static).update(facts)


class SharesPanel(Widget):
    """A whole that is shared out: one bar as wide as the panel, and its legend."""

    shares: tuple[Share, ...] = ()

    def show(self, shares: list[Share], subtitle: str) -> None:
        self.shares = tuple(shares)
        self.border_subtitle = subtitle
        self.refresh()

    def render(self) -> RenderResult:
        width, height = self.size
        drawn = bar(self.shares, width)
        return Text("\n").join([drawn, legend(self.shares, width, lines=max(height - 1, 1))])


class PartitionPanel(SharesPanel):
    """How the lanes share the device, and in its title what the device tells of itself."""

    BORDER_TITLE = "Compute"

    def show_device(self, told: str) -> None:
        self.border_title = f"Compute  {told}" if told else "Compute"


class PoolPanel(SharesPanel):
    BORDER_TITLE = "Memory"


class JobsPanel(Vertical):
    """Jobs with progress and loss; shows those that contain the filter. Keys act on the job under the cursor."""

    BORDER_TITLE = "Jobs"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "ask('pause')", "Pause"),
        Binding("x", "ask('cancel')", "Cancel"),
        Binding("plus", "ask('raise')", "Priority", key_display="+/-"),
        Binding("minus", "ask('lower')", "Lower priority", show=False),
        Binding("j", "move(1)", "Down", show=False),
        Binding("k", "move(-1)", "Up", show=False),
    ]
    COLUMNS = ("job", "status", "progress", "left", "loss", "prio", "time", "adapter")
    wanted = ""

    class Asked(Message):
        """A person wants something of a job."""

        def __init__(self, job: JobView, what: JobWish) -> None:
            super().__init__()
            self.job = job
            self.what = what

    def __init__(self, *, id: str, classes: str) -> None:
        super().__init__(id=id, classes=classes)
        self._shown: list[JobView] = []

    def compose(self) -> ComposeResult:
        table: DataTable[Text] = DataTable(
            cursor_type="row", cursor_foreground_priority="renderable", zebra_stripes=True
        )
        yield table

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns(*self.COLUMNS)

    def show(self, jobs: list[JobView]) -> None:
        wanted = self.wanted
        shown = [
            job
            for job in jobs
            if wanted in f"{job.id} {job.status} {job.fine_tuned_model or job.suffix or ''}"
        ]
        table: DataTable[Text] = self.query_one(DataTable)
        if [job.id for job in shown] == [job.id for job in self._shown]:
            for row, job in enumerate(shown):
                for column, cell in enumerate(self._cells(job)):
                    table.update_cell_at(Coordinate(row, column), cell, update_width=True)
        else:
            self._fill(table, shown)
        self._shown = shown
        self.border_subtitle = f"{len(shown)} of {len(jobs)} · /{wanted}" if wanted else ""

    def _fill(self, table: DataTable[Text], jobs: list[JobView]) -> None:
        """Other rows; the cursor stays on its job, which may be in another place now."""
        before = self.selected
        scroll = table.scroll_y
        table.clear()
        for job in jobs:
            table.add_row(*self._cells(job), key=job.id)
        table.scroll_to(y=scroll, animate=False)
        if before is not None and before.id in table.rows:
            table.move_cursor(row=table.get_row_index(before.id))

    @property
    def selected(self) -> JobView | None:
        """The job under the cursor."""
        row = self.query_one(DataTable).cursor_row
        return self._shown[row] if row < len(self._shown) else None

    def action_move(self, rows: int) -> None:
        table = self.query_one(DataTable)
        table.move_cursor(row=table.cursor_row + rows)

    def action_ask(self, what: JobWish) -> None:
        if self.selected is not None:
            self.post_message(self.Asked(self.selected, what))

    def on_data_table_row_selected(self) -> None:
        self.action_ask("show")

    def _cells(self, job: JobView) -> tuple[Text, ...]:
        variables = self.app.theme_variables
        colours = {
            "running": variables["harli-training"],
            "paused": variables["warning"],
            "succeeded": variables["success"],
            "failed": variables["error"],
        }
        what = Text(job.fine_tuned_model or "")
        if job.error:
            what = Text(job.error, style=variables["error"])
        elif job.waits_for:
            what = Text(f"waits for {job.waits_for}", style=variables["warning"])
        elif job.suffix and job.status not in ENDED:
            what = Text(job.suffix, style="dim")
        left = "" if job.remaining_s is None else words.duration(job.remaining_s)
        share = "" if job.device_share is None else f"{job.device_share:.0%}"
        return (
            Text(words.job_name(job.id)),
            Text(job.status, style=colours.get(job.status, "dim")),
            Text(words.progress(job), style=colours.get(job.status, "dim")),
            Text(left, justify="right"),
            Text("" if job.loss is None else f"{job.loss:.3f}", justify="right"),
            Text("" if job.status in ENDED else str(job.priority), justify="right"),
            Text(share, justify="right"),
            what,
        )


class ModelsPanel(Static):
    BORDER_TITLE = "Models"

    def show(self, status: Status) -> None:
        text = Text(no_wrap=True, overflow="ellipsis")
        for index, model in enumerate(status.models):
            text.append("\n" if index else "")
            base = model.kind == "base"
            text.append("● " if base else "└ ", style=self.app.theme_variables["harli-serving"])
            text.append(model.id, style="bold" if base else "")
        self.update(text)
