"""Pictures of a run, as SVG that takes its colours from the page it is put into.

Knows matplotlib. Does not know where the numbers come from. The colours are Okabe and Ito's, which people
with any kind of colour vision can tell apart; the page gives each a lighter shade on a dark background
(`STYLE`). Times on the x axes are seconds since the first phase began.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from harli_appliance.bench.replay import Record
from harli_appliance.schema import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib wants colours; the page wants variables. Each name is drawn in a marker colour that is replaced
# by the variable of that name.
MARKERS: Final = {
    "ink": "#010101",
    "faint": "#020202",
    "shade": "#030303",
    "blue": "#040404",
    "orange": "#050505",
    "green": "#060606",
    "red": "#070707",
    "grey": "#080808",
}
STYLE: Final = """
:root { --ink: #1b1f24; --faint: #d5d9de; --shade: #eef1f4;
        --blue: #0072b2; --orange: #d98c00; --green: #009e73; --red: #c94f00; --grey: #a9b0b8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --faint: #3a424c; --shade: #20262d;
          --blue: #56b4e9; --orange: #f0b23e; --green: #2fc79a; --red: #ff8a4c; --grey: #6c7681; } }
"""
RATE_WINDOW_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the run; times are seconds since the epoch."""

    name: str
    start: float
    end: float


def tpot_over_time(records: Sequence[Record], slo_tpot_ms: float, phases: Sequence[Phase]) -> str:
    """One dot for each answer, where it ended, against the promise."""
    with picture("tpot", "time per output token, ms", phases) as (axes, origin, svg):
        answered = [record for record in records if record.tpot_s is not None]
        for met, colour, label in (
            (True, "blue", "an answer"),
            (False, "red", "an answer that was too slow"),
        ):
            points = [
                (record.ended_at - origin, record.tpot_s * 1e3)
                for record in answered
                if record.tpot_s is not None and (record.tpot_s * 1e3 <= slo_tpot_ms) is met
            ]
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, s=26, color=MARKERS[colour], linewidths=0, label=label)
        axes.axhline(slo_tpot_ms, color=MARKERS["orange"], linewidth=2, label=f"SLO {slo_tpot_ms:.0f} ms")
        axes.set_ylim(bottom=0)
        axes.set_ylim(top=max(axes.get_ylim()[1], slo_tpot_ms * 1.1))
    return svg.text


def rates_over_time(samples: Sequence[Sample], alone_tokens_per_s: float, phases: Sequence[Phase]) -> str:
    """Training and serving side by side, against training alone."""
    with picture("rates", f"tokens/s, mean of {RATE_WINDOW_S:.0f} s", phases) as (axes, origin, svg):
        times = np.array([sample.t - origin for sample in samples])
        for counts, colour, label, dashes in (
            ([sample.training_tokens for sample in samples], "green", "training", "-"),
            ([sample.output_tokens for sample in samples], "blue", "serving", (0, (5, 1.5))),
        ):
            x, y = moving_rate(times, np.array(counts, dtype=float), RATE_WINDOW_S)
            axes.plot(x, y, color=MARKERS[colour], linewidth=1.8, linestyle=dashes, label=label)
        axes.axhline(
            alone_tokens_per_s,
            color=MARKERS["orange"],
            linewidth=2,
            label=f"training alone, {alone_tokens_per_s:.0f} tokens/s",
        )
        axes.set_ylim(bottom=0)
        axes.set_ylim(top=max(axes.get_ylim()[1], alone_tokens_per_s * 1.1))
    return svg.text


def loss_per_step(losses: Sequence[float]) -> str:
    """The loss of each optimizer step."""
    with picture("loss", "loss", ()) as (axes, _, svg):
        axes.plot(
            range(1, len(losses) + 1),
            losses,
            color=MARKERS["green"],
            linewidth=1.6,
            marker="o",
            markersize=4,
            markeredgewidth=0,
            label="loss",
        )
        axes.set_xlabel("optimizer step")
        axes.margins(x=0.01)
        axes.set_ylim(bottom=0)
    return svg.text


def memory_split(samples: Sequence[Sample], phases: Sequence[Phase]) -> str:
    """Who owns the slots of the pool, stacked up to all of them."""
    with picture("memory", "slots of the pool", phases) as (axes, origin, svg):
        axes.stackplot(
            [sample.t - origin for sample in samples],
            [sample.pool.serving for sample in samples],
            [sample.pool.cached for sample in samples],
            [sample.pool.leased for sample in samples],
            [sample.pool.free for sample in samples],
            labels=["serving", "cached prefixes", "leased to training", "free"],
            colors=[MARKERS[name] for name in ("blue", "grey", "green", "faint")],
            linewidth=0,
        )
        axes.yaxis.set_major_formatter("{x:,.0f}")
        if samples:
            axes.set_ylim(0, samples[-1].pool.slots)
    return svg.text


def moving_rate(times: Any, counts: Any, window_s: float) -> tuple[Any, Any]:
    """Counts a second over the `window_s` before each time; `times` ascend, counts belong to each time."""
    if len(times) == 0:
        return times, counts
    total = np.concatenate([[0.0], np.cumsum(counts)])
    before = np.searchsorted(times, times - window_s, side="right")
    span = np.minimum(window_s, times - times[0])
    span[span <= 0] = window_s
    return times, (total[1:] - total[before]) / span


# -- the frame that all pictures share -----------------------------------------------------------


@dataclass(slots=True)
class _Svg:
    text: str = ""


@contextmanager
def picture(name: str, label: str, phases: Sequence[Phase]) -> Iterator[tuple[Axes, float, _Svg]]:
    """Axes to draw into and the time that is 0 on them; the SVG is there after the block."""
    svg = _Svg()
    with drawing((9.6, 3.5)) as figure:
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        origin = phases[0].start if phases else 0.0
        yield axes, origin, svg
        axes.set_ylabel(label)
        if phases:
            _shade(axes, phases, origin)
            axes.set_xlabel("seconds")
        if len(axes.get_legend_handles_labels()[0]) > 1:
            figure.legend(loc="outside upper left", ncols=5, frameon=False, handlelength=1.6)
        svg.text = themed(figure, name)


@contextmanager
def drawing(inches: tuple[float, float]) -> Iterator[Figure]:
    """A figure in the style of all pictures; `themed` turns it into SVG, inside the block."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
        "svg.hashsalt": "harli",  # the same picture has the same ids each time
        "font.size": 11,
        "text.color": MARKERS["ink"],
        "axes.labelcolor": MARKERS["ink"],
        "axes.edgecolor": MARKERS["faint"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": MARKERS["faint"],
        "grid.linewidth": 0.8,
        "xtick.color": MARKERS["faint"],
        "ytick.color": MARKERS["faint"],
        "xtick.labelcolor": MARKERS["ink"],
        "ytick.labelcolor": MARKERS["ink"],
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        figure.patch.set_alpha(0)
        yield figure


def _shade(axes: Axes, phases: Sequence[Phase], origin: float) -> None:
    """Every second phase gets a background, each one its name above."""
    axes.set_xlim(0, max(phase.end for phase in phases) - origin)
    for number, phase in enumerate(phases):
        start, end = phase.start - origin, phase.end - origin
        if number % 2:
            axes.axvspan(start, end, color=MARKERS["shade"], linewidth=0, zorder=0)
        axes.annotate(
            phase.name,
            ((start + end) / 2, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=10,
        )


def themed(figure: Figure, name: str) -> str:
    """The figure as SVG; `name` keeps its ids apart from those of other pictures on the page."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for variable, marker in MARKERS.items():
        svg = svg.replace(marker, f"var(--{variable})")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)  # as wide as the page gives it
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    # Several pictures share a page, so each one's ids get its name.
    for reference in ('id="', "url(#", 'href="#'):
        svg = svg.replace(reference, f"{reference}{name}-")
    return svg
