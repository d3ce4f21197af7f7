"""The plots of the dashboard, drawn by plotext: latency against its target, and tokens per second.

Knows colours of the theme and axes; the points come from a reading.
"""

from __future__ import annotations

import math

from textual.app import ComposeResult
from textual.color import Color
from textual.containers import Vertical
from textual.widgets import Sparkline
from textual_plotext import PlotextPlot

from harli_appliance.tui.feed import WINDOW_S, Points, Reading

HEADROOM = 1.25
"""The target lies this far below the top, so that a breach can be seen."""

MOST_ROOM = 2.0
"""A value beyond so many targets is cut off rather than flattening all the others."""


TICKS = 2
"""Marks on the axis of a rate above zero."""


def tick_step(highest: float) -> float:
    """The least of 1, 2, 2.5, 5, 10, 20, ... of which `TICKS` reach a little above `highest`."""
    needed = max(highest * 1.05 / TICKS, 1.0)
    magnitude = 10.0 ** math.floor(math.log10(needed))
    return next(step for f in (1.0, 2.0, 2.5, 5.0, 10.0) if (step := f * magnitude) >= needed)


class LanePlot(PlotextPlot):  # type: ignore[misc]  # mypy does not follow textual-plotext
    """A plot of the last two minutes in the colour of a lane."""

    def colour(self, variable: str) -> tuple[int, int, int]:
        return Color.parse(self.app.theme_variables[variable]).rgb

    def prepare(self, top: float) -> None:
        plot = self.plt
        plot.clear_data()
        plot.clear_figure()
        plot.xlim(-WINDOW_S, 0)
        plot.ylim(0, top)
        plot.xticks([-120, -90, -60, -30, 0], ["2 min ago", "90 s", "60 s", "30 s", "now"])
        plot.xaxes(True, False)
        plot.yaxes(True, False)


class LatencyPlot(LanePlot):
    """Inter-token latency over time, with the promised time per output token as a line."""

    BORDER_TITLE = "Latency of each token against the target"

    def show(self, reading: Reading, target_ms: float) -> None:
        runs = reading.history.tpot(reading.now)
        highest = max((value for _, ys in runs for value in ys), default=0.0)
        top = min(max(target_ms * HEADROOM, highest * 1.05), target_ms * MOST_ROOM)
        self.prepare(top)
        for xs, ys in runs:
            shown = [min(value, top) for value in ys]
            self.plt.plot(xs, shown, marker="braille", color=self.colour("harli-serving"))
        self.plt.hline(target_ms, color=self.colour("harli-target"))
        self.plt.yticks([0, target_ms / 2, target_ms], ["0", f"{target_ms / 2:.0f}", f"{target_ms:.0f}"])
        self.refresh()


class RatePlot(LanePlot):
    """Tokens per second of one lane over time."""

    def __init__(self, lane: str) -> None:
        super().__init__()
        self._lane = f"harli-{lane}"

    def show(self, points: Points) -> None:
        xs, ys = points
        step = tick_step(max(ys, default=0.0))
        self.prepare(TICKS * step)
        if xs:
            self.plt.plot(xs, ys, marker="braille", color=self.colour(self._lane), fillx=True)
        ticks = [step * index for index in range(TICKS + 1)]
        self.plt.yticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        self.refresh()


class RatePanel(Vertical):
    """How fast a lane works: as a plot, or on a low screen as one line of blocks."""

    def __init__(self, title: str, lane: str) -> None:
        super().__init__(id=lane, classes="panel rate")
        self._title = title
        self._plot = RatePlot(lane)
        self._line = Sparkline(summary_function=max)

    def compose(self) -> ComposeResult:
        yield self._plot
        yield self._line

    def show(self, rate: float, note: str) -> None:
        self.border_title = f"{self._title} {rate:,.1f} tokens/s"
        self.border_subtitle = note

    def draw(self, points: Points) -> None:
        self._plot.show(points)
        self._line.data = points[1]
