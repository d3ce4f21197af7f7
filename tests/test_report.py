"""The report's page and pictures: self-contained, escaped, themed, and drawn from the right numbers."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from harli_appliance.bench.figures import (
    Phase,
    loss_per_step,
    memory_split,
    moving_rate,
    rates_over_time,
    tpot_over_time,
)
from harli_appliance.bench.machine import describe_machine
from harli_appliance.bench.progress import Narrator
from harli_appliance.bench.replay import Record
from harli_appliance.bench.report import (
    Conversation,
    Goal,
    Page,
    Picture,
    Table,
    render,
    write_report,
)
from tests.fakes import make_pool, make_sample

SVG = "{http://www.w3.org/2000/svg}"
PHASES = [Phase("serving only", 100.0, 160.0), Phase("training only", 162.0, 185.0)]
EVIL = '<script src="https://evil.example/x.js">alert("1")</script>'


def answer(ended_at: float, tpot_s: float | None) -> Record:
    return Record(0, "hi", ended_at - 1, ended_at, 0.1, tpot_s, (), 5, 10, "x")


def pictures() -> dict[str, str]:
    samples = [make_sample(i, t=100 + i, loss=None) for i in range(80)]
    return {
        "tpot": tpot_over_time([answer(110, 0.1), answer(120, 0.3), answer(130, None)], 200, PHASES),
        "rates": rates_over_time(samples, 70, PHASES),
        "loss": loss_per_step([3.0, 2.0, 1.0]),
        "memory": memory_split(samples, PHASES),
    }


def page(*, met: bool = True) -> Page:
    return Page(
        title="A & B",
        lead=EVIL,
        goals=[Goal("one", "first goal", "> 1", "2", True), Goal("two", "second goal", "< 1", EVIL, met)],
        tables=[Table("Numbers", [("a", EVIL)])],
        pictures=[Picture(name, EVIL, svg) for name, svg in pictures().items()],
        conversations=[Conversation(EVIL, [("before", "x < y"), ("after", EVIL)])],
        footer="the end",
    )


class Checker(HTMLParser):
    """Collects what a browser would load, the ids, and whether tags are closed."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href", "data"} and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing() -> None:
    text = render(page())
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.loads == []
    assert "script" not in checker.open
    assert "@import" not in text
    assert len(set(checker.ids)) == len(checker.ids)
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert references
    assert {first or second for first, second in references} <= set(checker.ids)


def test_all_text_is_escaped() -> None:
    text = render(page())
    assert "<script" not in text
    assert text.count("&lt;script src=&quot;") >= 5
    assert "<h1>A &amp; B</h1>" in text


def test_the_verdict_names_what_was_missed() -> None:
    assert "All 2 goals met." in render(page())
    missed = render(page(met=False))
    assert "1 of 2 goals missed: second goal." in missed
    assert 'class="verdict missed"' in missed


def test_the_page_follows_light_and_dark() -> None:
    text = render(page())
    used = set(re.findall(r"var\(--([a-z]+)\)", text))
    light, dark = text.split("@media (prefers-color-scheme: dark)", 1)
    assert {"ink", "faint", "blue", "orange", "green", "red", "page"} <= used
    for name in used:
        assert f"--{name}:" in light + dark.split("</style>")[0]
    # a picture has no colour of its own that a dark page could swallow
    for svg in pictures().values():
        assert re.findall(r"(?:fill|stroke): (#[0-9a-f]{3,6})", svg) == []
        assert re.findall(r"DejaVu|width=\"\d+.*pt\"", svg.split(">")[0]) == []


def test_files_are_written_whole(tmp_path: Path) -> None:
    numbers, view = write_report(tmp_path / "new" / "out", "demo", {"a": [1, None, "ü"]}, page())
    assert json.loads(numbers.read_text()) == {"a": [1, None, "ü"]}
    assert view.read_text().startswith("<!doctype html>")
    assert {path.name for path in numbers.parent.iterdir()} == {"demo.json", "demo.html"}
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path / "new" / "out", "demo", {"a": float("nan")}, page())
    assert json.loads(numbers.read_text()) == {"a": [1, None, "ü"]}


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 - we have just written it


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in parsed(svg).iter(f"{SVG}text")]


def test_tpot_picture_tells_good_from_slow_and_names_the_phases() -> None:
    svg = tpot_over_time([answer(110, 0.1), answer(112, 0.2), answer(120, 0.3)], 200, PHASES)
    shown = texts(svg)
    assert {"SLO 200 ms", "an answer", "an answer that was too slow"} <= set(shown)
    assert {"serving only", "training only", "seconds"} <= set(shown)
    dots = [node.get("style") for node in parsed(svg).iter(f"{SVG}use")]
    assert dots.count("fill: var(--blue)") == 2 + 1  # and one in the legend
    assert dots.count("fill: var(--red)") == 1 + 1
    assert "too slow" not in tpot_over_time([answer(110, 0.1)], 200, PHASES)


def test_rates_picture_has_the_reference_line() -> None:
    assert {"training", "serving", "training alone, 70 tokens/s"} <= set(texts(pictures()["rates"]))


def test_memory_picture_stacks_to_the_whole_pool() -> None:
    svg = memory_split([make_sample(i, t=100 + i, pool=make_pool(slots=10_000)) for i in range(5)], PHASES)
    shown = texts(svg)
    assert {"serving", "cached prefixes", "leased to training", "free", "10,000"} <= set(shown)
    assert "12,500" not in shown


def test_pictures_of_nothing_are_still_pictures() -> None:
    for svg in (
        tpot_over_time([], 200, PHASES),
        rates_over_time([], 70, PHASES),
        loss_per_step([]),
        memory_split([], PHASES),
    ):
        parsed(svg)


def test_pictures_are_the_same_each_time() -> None:
    assert pictures() == pictures()


def test_moving_rate() -> None:
    times = np.arange(0, 20, 0.5)
    _, rates = moving_rate(times, np.full(len(times), 5.0), 5.0)
    assert rates[-1] == pytest.approx(10.0)  # 5 every half second
    burst = np.zeros(len(times))
    burst[20] = 50  # at t = 10
    _, rates = moving_rate(times, burst, 5.0)
    assert rates[19] == 0
    assert rates[20] == pytest.approx(10.0)
    assert rates[29] == pytest.approx(10.0)
    assert rates[30] == 0


def test_the_machine_is_described_for_the_report() -> None:
    machine = describe_machine()
    assert machine["cpu"]
    assert isinstance(machine["cores"], int)
    assert machine["python"]
    assert set(machine) >= {"memory_gib", "platform", "torch", "sglang", "transformers", "peft"}
    json.dumps(machine)


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Narrator() as narrator, narrator.step("Cooking [red]") as step:
        step.update(0.5, "half")
        step.update(1.0, "well done")
    with pytest.raises(ValueError, match="burnt"), Narrator() as narrator, narrator.step("Baking"):
        raise ValueError("burnt")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["Cooking [red] ...", "  done in 0 s: well done", "Baking ..."]


def test_progress_in_a_terminal_shows_every_step() -> None:
    from rich.console import Console

    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    with Narrator(console) as narrator, narrator.step("Cooking [red]") as step:
        step.update(0.5, "half")
    shown = console.export_text()
    assert "Cooking [red]" in shown
    assert "half" in shown
