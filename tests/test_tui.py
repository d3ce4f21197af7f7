"""The dashboard: what it shows, what its keys do, and what it does without an appliance."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Digits, Input

from harli_appliance.api.ports import JobSpec, StoredFile
from harli_appliance.client import HarliClient
from harli_appliance.errors import ConfigError
from harli_appliance.schema import JobView, PolicyChange
from harli_appliance.tui import app as dashboard
from harli_appliance.tui import words
from harli_appliance.tui.app import HarliTop
from harli_appliance.tui.bars import Share, bar, legend, widths
from harli_appliance.tui.dialogs import CancelScreen, PolicyScreen
from harli_appliance.tui.feed import Feed, History
from harli_appliance.tui.help import HelpScreen
from harli_appliance.tui.panels import PoolPanel
from harli_appliance.tui.plots import tick_step
from harli_appliance.tui.snapshot import sparkline
from harli_appliance.tui.themes import load_themes
from tests.fakes import BASE, FakeAppliance, listening, make_sample, make_status

NOW = 1_790_000_100.0


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeAppliance:
    monkeypatch.setattr(dashboard, "POLL_S", 0.1)
    monkeypatch.setattr(dashboard, "DRAW_S", 0.5)
    return FakeAppliance(tmp_path)


@asynccontextmanager
async def opened(url: str, size: tuple[int, int] = (140, 44)) -> AsyncIterator[tuple[HarliTop, Pilot[None]]]:
    app = HarliTop(HarliClient(url))
    async with app.run_test(size=size, notifications=True) as pilot:
        yield app, pilot


async def until(
    pilot: Pilot[None], true: Callable[[], bool], why: Callable[[], str] = lambda: "it did not come to that"
) -> None:
    for _ in range(100):
        if true():
            return
        await pilot.pause(0.05)
    raise AssertionError(why())


def shown(app: HarliTop) -> str:
    """The text on the screen."""
    strips = app.screen._compositor.render_strips()
    return "\n".join(strip.text for strip in strips)


async def test_it_shows_what_the_appliance_says(port: FakeAppliance) -> None:
    async with listening(port) as listener, opened(listener.url) as (app, pilot):
        pieces = (
            "Compute  busy 94% · 3.0 GiB",
            "ready 1h 02m",
            "policy adaptive",
            "smollm2-135m-instruct",
            "CPU, 2 cores",
            "target 250 ms",
            "181 ms",
            "99.5%",
            "Serving 33.4 tokens/s",
            "Training 52.5 tokens/s",
            "6 running, 1 waiting",
            "loss 1.734",
            "training core 1",
            "both at once · with training beside it",
            "leased 6,144",
            "16,384 slots",
            "ftjob-run",
            "31/100",
            "ft:smollm2:harbour",
            "/ Filter",
            "space Pause",
        )
        # The parts of a screen are drawn one after the other.
        missing = lambda: [piece for piece in pieces if piece not in shown(app)]  # noqa: E731
        await until(pilot, lambda: not missing(), lambda: f"missing: {missing()}")
        digits = app.query_one("#tpot", Digits)
        assert (digits.value, digits.has_class("success")) == ("180", True)


async def test_a_breach_turns_red_and_a_silence_blank(port: FakeAppliance) -> None:
    port.samples = [make_sample(seq, 300.0) for seq in range(4)]
    async with listening(port) as listener, opened(listener.url) as (app, pilot):
        digits = app.query_one("#tpot", Digits)
        await until(pilot, lambda: digits.value == "300")
        assert digits.has_class("error")
        port.samples += [make_sample(seq, None) for seq in range(4, 30)]
        await until(pilot, lambda: digits.value == "-")
        assert not digits.has_class("error")


async def test_it_follows_the_appliance(port: FakeAppliance) -> None:
    async with listening(port) as listener, opened(listener.url) as (app, pilot):
        await until(pilot, lambda: "31/100" in shown(app))
        jobs = [
            JobView(id="ftjob-bad", status="failed", model="m", created_at=1, error="the loss is NaN"),
            JobView(id="ftjob-other", status="queued", model="m", created_at=2, waits_for="m"),
        ]
        port.status_now = make_status(jobs=jobs, mode="pause", reason="slo_tight")
        await until(pilot, lambda: "the loss is NaN" in shown(app))
        assert "waits for m" in shown(app)
        assert "training waits · slo_tight" in shown(app)


async def test_without_an_appliance_it_waits_and_then_connects(port: FakeAppliance) -> None:
    async with listening(port) as listener:
        number = listener.port
    async with opened(f"http://127.0.0.1:{number}") as (app, pilot):
        await until(pilot, lambda: "no connection, trying again" in shown(app))
        assert "start one with 'harli serve'" in shown(app)
        assert not app.query_one("#body").display
        async with listening(port, number=number):
            await until(pilot, lambda: "core 0" in shown(app))
        await until(pilot, lambda: "no connection" in shown(app))
        assert "31/100" in shown(app), "the last numbers stay"


async def test_an_appliance_that_starts_is_waited_for(
    port: FakeAppliance, capsys: pytest.CaptureFixture[str]
) -> None:
    port.is_ready = False
    async with listening(port) as listener, opened(listener.url) as (app, pilot):
        await until(pilot, lambda: "not ready" in shown(app))
        assert "the appliance is starting" in shown(app)
        assert "no connection" not in shown(app)
        port.is_ready = True
        await until(pilot, lambda: "core 0" in shown(app))
    assert "request failed" not in "".join(capsys.readouterr()), (
        "its log is not filled with what waits for it"
    )


async def test_a_wrong_key_is_said(port: FakeAppliance) -> None:
    async with listening(port, api_key="k") as listener, opened(listener.url) as (app, pilot):
        await until(pilot, lambda: "Authorization: Bearer" in shown(app))


async def test_the_policy_is_picked_from_what_the_appliance_can_use(port: FakeAppliance) -> None:
    port.status_now = make_status(policies=["adaptive", "harli", "static:44", "time_slice:64", "serve_only"])
    async with listening(port) as listener, opened(listener.url) as (app, pilot):
        await until(pilot, lambda: "policy adaptive" in shown(app))
        await pilot.press("p")
        await until(pilot, lambda: "one micro-batch after every 64 steps" in shown(app))
        assert "● adaptive" in shown(app)
        assert "static:44" in shown(app)
        await pilot.press("down", "escape")
        await pilot.press("p", "enter")
        assert port.changes == [], "it is the policy already"
        await pilot.press("p")
        await until(pilot, lambda: isinstance(app.screen, PolicyScreen))
        await pilot.press("up", "enter")
        await until(pilot, lambda: "policy serve_only" in shown(app))
        assert port.changes == [PolicyChange(policy="serve_only")]


async def with_jobs(port: FakeAppliance) -> None:
    """The jobs of the status, as the appliance keeps them."""
    port.stored["file-0"] = StoredFile("file-0", "a.jsonl", "fine-tune", 1, 1)
    for view in port.status_now.jobs:
        job = await port.create_job(JobSpec(BASE, "file-0"))
        port.all_jobs[view.id] = replace(port.all_jobs.pop(job.id), id=view.id, status=view.status)
        port.all_events[view.id] = port.all_events.pop(job.id)


async def test_keys_act_on_the_job_under_the_cursor(port: FakeAppliance) -> None:
    await with_jobs(port)
    status = lambda name: port.all_jobs[name].status  # noqa: E731
    async with listening(port) as listener, opened(listener.url) as (app, pilot):
        table = app.query_one(DataTable)
        await until(pilot, lambda: table.row_count == 3)
        await pilot.press("down", "space")
        await until(pilot, lambda: status("ftjob-wait") == "paused")
        paused = port.status_now.jobs[1].model_copy(update={"status": "paused"})
        running, _, done = port.status_now.jobs
        port.status_now = make_status(jobs=[paused, done, running])
        await until(pilot, lambda: table.get_row_index("ftjob-wait") == 0)
        assert table.cursor_row == 0, "the cursor stays on its job"
        await pilot.press("space")
        await until(pilot, lambda: status("ftjob-wait") == "queued")
        await pilot.press("plus")
        await until(pilot, lambda: port.all_jobs["ftjob-wait"].priority == 20)
        await pilot.press("minus")
        await until(pilot, lambda: port.all_jobs["ftjob-wait"].priority == 5)
        port.happen("ftjob-wait", "Something of note")
        await pilot.press("enter")
        await until(pilot, lambda: "Something of note" in shown(app))
        await pilot.press("escape", "x")
        await until(pilot, lambda: "Cancel the job?" in shown(app))
        assert "is paused and has made no step yet" in shown(app)
        await pilot.press("escape")
        await pilot.press("x")
        await until(pilot, lambda: isinstance(app.screen, CancelScreen))
        assert status("ftjob-wait") == "queued", "Esc cancelled nothing"
        await pilot.press("y")
        await until(pilot, lambda: status("ftjob-wait") == "cancelled")
        await pilot.press("space")
        await until(pilot, lambda: "job 'ftjob-wait' is cancelled" in shown(app))


async def test_jobs_are_filtered(port: FakeAppliance) -> None:
    async with listening(port) as listener, opened(listener.url) as (app, pilot):
        table = app.query_one(DataTable)
        await until(pilot, lambda: table.row_count == 3)
        await pilot.press("slash", *"done", "enter")
        await until(pilot, lambda: table.row_count == 1)
        assert "ftjob-done" in shown(app)
        assert "ftjob-wait" not in shown(app)
        await pilot.press("t")
        assert app.query_one("#filter", Input).value == "done", "keys are keys again"
        await pilot.press("escape")
        await until(pilot, lambda: table.row_count == 3)


async def test_the_theme_changes(port: FakeAppliance) -> None:
    async with listening(port) as listener, opened(listener.url) as (app, pilot):
        await until(pilot, lambda: "core 0" in shown(app))
        before = app.query_one(PoolPanel).shares[0].colour
        await pilot.press("t")
        assert app.theme == "harli-light"
        assert app.query_one(PoolPanel).shares[0].colour != before
        await pilot.press("t")
        assert app.theme == "harli-dark"


async def test_help_opens_and_closes_while_it_goes_on(port: FakeAppliance) -> None:
    async with listening(port) as listener, opened(listener.url) as (app, pilot):
        await until(pilot, lambda: "core 0" in shown(app))
        await pilot.press("question_mark")
        assert isinstance(app.screen, HelpScreen)
        port.status_now = make_status(policy="time_slice")
        await pilot.pause(0.2)
        await pilot.press("escape")
        await until(pilot, lambda: "policy time_slice" in shown(app))


@pytest.mark.parametrize("size", [(80, 24), (60, 20), (100, 30), (120, 33), (100, 34), (99, 50), (200, 60)])
async def test_every_size_shows_latency_memory_and_a_job(port: FakeAppliance, size: tuple[int, int]) -> None:
    async with listening(port) as listener, opened(listener.url, size) as (app, pilot):
        await until(pilot, lambda: "Memory" in shown(app) and "core 0" in shown(app))
        assert "Serving 33.4" in shown(app)
        assert app.screen.has_class("-compact") == (size[0] < 100)
        if size[1] >= 24:
            await until(pilot, lambda: "ftjob-run" in shown(app))
            for panel in app.query(".panel"):
                assert panel.region.bottom < size[1], panel


# -- the parts ---------------------------------------------------------------------------------------


def test_every_theme_file_is_a_theme() -> None:
    themes = load_themes()
    assert next(iter(themes)) == "dark"
    assert themes["dark"].dark
    assert not themes["light"].dark


@pytest.mark.parametrize(
    ("text", "word"),
    [("dark = ", "not valid TOML"), ("dark = true", "colors"), ("nonsense = 1", "shows a whole theme")],
)
def test_a_broken_theme_is_named(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=word) as caught:
        load_themes(tmp_path)
    assert "mine.toml" in caught.value.message


def test_an_unknown_theme_is_refused() -> None:
    with pytest.raises(ConfigError, match="no theme 'pink'; there are dark, light"):
        HarliTop(HarliClient("http://127.0.0.1:9"), theme_name="pink")


@pytest.mark.parametrize(
    ("sizes", "width", "cells"),
    [
        ([1, 1], 10, [5, 5]),
        ([1, 0, 999], 10, [1, 0, 9]),
        ([0, 0], 10, [0, 0]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([1, 1, 1], 0, [0, 0, 0]),
    ],
)
def test_bars_fill_their_width_exactly(sizes: list[float], width: int, cells: list[int]) -> None:
    assert widths(sizes, width) == cells
    shares = [Share(str(size), size, "red", "") for size in sizes]
    assert bar(shares, width).cell_len == sum(cells)


def test_a_legend_takes_a_second_line_when_it_has_one() -> None:
    shares = [Share("serving", 1, "red", "100"), Share("leased", 1, "blue", "200")]
    assert legend(shares, 40).plain == "■ serving 100  ■ leased 200"
    assert legend(shares, 15, lines=2).plain == "■ serving 100\n■ leased 200"
    assert legend(shares, 15).plain == "■ serving 100 …"


def test_verdicts() -> None:
    assert [words.verdict(value, 100) for value in (None, 50, 95, 100, 101)] == [
        None,
        "success",
        "warning",
        "warning",
        "error",
    ]
    assert words.attainment_verdict(0.98) == "error"


def test_history_forgets_and_breaks_lines_at_silences() -> None:
    history = History()
    values = [100.0, 110.0, None, 120.0]
    history.add([make_sample(seq, value, t=NOW - 3 + seq) for seq, value in enumerate(values)], NOW)
    assert history.tpot(NOW) == [([-3.0, -2.0], [100.0, 110.0]), ([0.0], [120.0])]
    assert history.live_tpot(NOW) == 110.0
    assert history.live_tpot(NOW + 10) is None
    history.forget(NOW + 119)
    assert [sample.tpot_ms for sample in history.samples] == [None, 120.0]


def test_rates_are_counted_by_the_appliances_clock() -> None:
    history = History()
    there = [make_sample(seq, t=5.0 + seq * 0.25, output_tokens=10) for seq in range(41)]
    history.add(there, NOW)
    xs, ys = history.served_per_s(NOW)
    assert (xs[0], xs[-1]) == (-10.0, 0.0)
    assert ys[3:-1] == [40.0] * 7
    assert history.trained_per_s(NOW)[0] == xs


@pytest.mark.parametrize(
    ("highest", "step"), [(0, 1), (1.5, 1), (30, 20), (57, 50), (95, 50), (96, 100), (400, 250), (9000, 5000)]
)
def test_axes_have_round_numbers(highest: float, step: float) -> None:
    assert tick_step(highest) == step


def test_sparklines_are_drawn_against_the_target() -> None:
    assert sparkline([0, 50, 100, 500], 100) == "▁▄██"


async def test_the_feed_starts_over_with_the_appliance(port: FakeAppliance) -> None:
    async with listening(port) as listener, HarliClient(listener.url) as client:
        feed = Feed(client)
        assert len((await feed.read()).history.samples) == 8
        assert len((await feed.read()).history.samples) == 8
        port.status_now = make_status(uptime_s=1.0)
        port.samples = [make_sample(0)]
        assert len((await feed.read()).history.samples) == 1
