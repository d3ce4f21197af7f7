"""Pictures of a comparison of policies: who trains how fast and keeps what, how long tokens took, one run in time.

Knows matplotlib, through `figures`. Does not know where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from harli_appliance.bench.compare_store import Moment, Request
from harli_appliance.bench.figures import MARKERS, drawing, themed
from harli_appliance.bench.verdict import OURS, keeps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Policies = Mapping[str, Mapping[str, Any]]

_COLOURS: Final = ("blue", "red", "grey", "ink")
"""Orange is the promise, green is ours."""
_DASHES: Final = ("-", "--", ":")
_SHAPES: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d", "*")
_MODES: Final = {
    "partition": ("green", "both lanes at once"),
    "fused": ("red", "training tokens inside the serving step"),
    "time_slice": ("orange", "one after the other"),
    "training": ("blue", "training only: nobody to serve"),
    "pause": ("grey", "serving only: training waits"),
    "idle": ("faint", "idle"),
}
_BIN_S: Final = 1.0
SAMPLE_EVERY_S: Final = 0.25
"""The appliance notes its state so often; a longer gap between two moments is idle time."""


def speed_bars(policies: Policies, name: str) -> str:
    """A panel for each load: finetuning speed of every policy; colour says whether it kept the promise."""
    loads = _loads(policies)
    order = sorted(policies, key=lambda policy: _mean_speed(policies[policy]))
    with drawing((9.6, 0.9 + 0.36 * len(order))) as figure:
        panels = figure.subplots(1, len(loads), sharey=True, sharex=True, squeeze=False)[0]
        for panel, load in zip(panels, loads, strict=True):
            _prepare(panel, f"load {load}%", grid="x")
            for row, policy in enumerate(order):
                cell = policies[policy].get(load)
                if cell is not None:
                    _bar(panel, row, cell)
            panel.set_yticks(range(len(order)), order)
            panel.set_xlabel("finetune tokens/s")
            panel.margins(x=0.22)
            panel.set_xlim(left=0)
        for label in panels[0].get_yticklabels():
            if label.get_text() == OURS:
                label.set_fontweight("bold")
        return themed(figure, name)


def _bar(panel: Axes, row: int, cell: Mapping[str, Any]) -> None:
    rate, half = cell["finetune_tokens_per_s"], cell["finetune_tokens_per_s_ci"]
    colour = MARKERS["green" if keeps(cell) else "red"]
    panel.barh(row, rate, height=0.66, color=colour, alpha=0.85 if keeps(cell) else 0.45)
    if half is not None:
        low = min(half, rate)
        panel.errorbar(rate, row, xerr=[[low], [half]], color=MARKERS["ink"], capsize=2.5, linewidth=1.1)
    share = cell["attainment"]
    text = "no requests" if share is None else f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"
    panel.annotate(
        text, (rate + (half or 0.0), row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
    )


def trade_off(policies: Policies, name: str) -> str:
    """Finetuning speed against attainment, a panel for each load, a mark for each policy."""
    loads = _loads(policies)
    with drawing((9.6, 4.2)) as figure:
        panels = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
        for panel, load in zip(panels, loads, strict=True):
            _prepare(panel, f"load {load}%", grid="both")
            panel.axvline(99, color=MARKERS["orange"], linewidth=1.5)
            for index, policy in enumerate(policies):
                cell = policies[policy].get(load)
                if cell is None or cell["attainment"] is None:
                    continue
                panel.errorbar(
                    100 * cell["attainment"],
                    cell["finetune_tokens_per_s"],
                    yerr=cell["finetune_tokens_per_s_ci"],
                    fmt=_SHAPES[index % len(_SHAPES)],
                    markersize=12 if policy == OURS else 7,
                    zorder=2 if policy == OURS else 3,  # behind, where another one lies on it
                    color=_colour(index, policy),
                    linewidth=1,
                    label=policy,
                )
            panel.set_xlabel("attainment, %")
            panel.set_ylim(bottom=0)
            left = min(90.0, panel.get_xlim()[0])
            panel.set_xlim(left, 100 + 0.04 * (100 - left))
        panels[0].set_ylabel("finetune tokens/s")
        _legend(figure, panels)
        return themed(figure, name)


def tpot_curves(tpots: Mapping[str, Mapping[str, Sequence[float]]], slo_tpot_ms: float, name: str) -> str:
    """For each load (panel) and policy (line): the share of answers whose TPOT is at most x.

    Args:
        tpots: by load, then by policy, in milliseconds.
    """
    order = list(dict.fromkeys(policy for found in tpots.values() for policy in found))
    with drawing((9.6, 4.2)) as figure:
        panels = figure.subplots(1, len(tpots), sharey=True, sharex=True, squeeze=False)[0]
        for panel, (load, found) in zip(panels, tpots.items(), strict=True):
            _prepare(panel, f"load {load}%", grid="both")
            panel.axvline(slo_tpot_ms, color=MARKERS["orange"], linewidth=1.5)
            for policy, values in found.items():
                if values:
                    index = order.index(policy)
                    ordered = np.sort(np.asarray(values))
                    panel.step(
                        ordered,
                        100 * np.arange(1, len(ordered) + 1) / len(ordered),
                        where="post",
                        color=_colour(index, policy),
                        linestyle="-" if policy == OURS else _DASHES[(index // len(_COLOURS)) % 3],
                        linewidth=2.6 if policy == OURS else 1.4,
                        label=policy,
                        zorder=3 if policy == OURS else 2,
                    )
            panel.set_xlabel("time per output token, ms")
            panel.set_xlim(0, 2.5 * slo_tpot_ms)
            panel.set_ylim(0, 101)
        panels[0].set_ylabel("answers at most this slow, %")
        _legend(figure, panels)
        return themed(figure, name)


def run_in_time(
    moments: Sequence[Moment], requests: Sequence[Request], slo_tpot_ms: float, end_s: float, name: str
) -> str:
    """One run: the mode of the engine, requests under way, how slow each answer was, and training."""
    with drawing((9.6, 6.4)) as figure:
        modes, queue, answers, training = figure.subplots(
            4, 1, sharex=True, gridspec_kw={"height_ratios": [0.5, 2, 2, 2]}
        )
        for panel in (modes, queue, answers, training):
            panel.patch.set_alpha(0)
        _mode_strip(modes, moments, end_s)
        _queue(queue, requests, end_s)
        _answers(answers, requests, slo_tpot_ms)
        _training(training, moments, end_s)
        training.set_xlim(0, end_s)
        training.set_xlabel("seconds")
        for panel in (modes, queue, answers):
            if panel.get_legend_handles_labels()[0]:
                panel.legend(
                    loc="lower left",
                    bbox_to_anchor=(0, 1),
                    ncols=4,
                    frameon=False,
                    fontsize=9,
                    handlelength=1.4,
                )
        figure.align_ylabels()
        return themed(figure, name)


def _mode_strip(axes: Axes, moments: Sequence[Moment], end_s: float) -> None:
    """What the engine did, as one band."""
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.set_ylabel("mode", rotation=0, ha="right", va="center")
    told: set[str] = set()
    ends = [moment.at_s for moment in moments]
    for mode, begin, end in _stretches([moment.mode for moment in moments], ends):
        colour, label = _MODES.get(mode, ("faint", mode))
        label = "_" + label if label in told else label  # the legend leaves out what begins with _
        axes.axvspan(max(0.0, begin), min(end_s, end), color=MARKERS[colour], linewidth=0.4, label=label)
        told.add(label)


def _stretches(modes: Sequence[str], ends: Sequence[float]) -> list[tuple[str, float, float]]:
    """Modes with their begin and end; consecutive moments of one mode are one stretch."""
    found: list[tuple[str, float, float]] = []
    for mode, end in zip(modes, ends, strict=True):
        begin = end - SAMPLE_EVERY_S
        if found and found[-1][0] == mode and begin - found[-1][2] < SAMPLE_EVERY_S:
            found[-1] = (mode, found[-1][1], end)
        else:
            found.append((mode, begin, end))
    return found


def _queue(axes: Axes, requests: Sequence[Request], end_s: float) -> None:
    times = np.linspace(0.0, end_s, 4 * int(end_s) + 1)
    begun = np.array([request.at_s for request in requests])
    ended = begun + np.array([request.took_s for request in requests])
    first = begun + np.array(
        [request.took_s if request.ttft_ms is None else request.ttft_ms / 1e3 for request in requests]
    )
    under_way = [int(((begun <= t) & (t < ended)).sum()) for t in times]
    waiting = [int(((begun <= t) & (t < first)).sum()) for t in times]
    axes.step(times, under_way, where="post", color=MARKERS["blue"], label="requests under way")
    axes.fill_between(
        times,
        waiting,
        step="post",
        color=MARKERS["orange"],
        alpha=0.6,
        linewidth=0,
        label="of these, no token yet",
    )
    axes.set_ylabel("requests")
    axes.set_ylim(bottom=0)


def _answers(axes: Axes, requests: Sequence[Request], slo_tpot_ms: float) -> None:
    for met, colour, label in ((True, "blue", "an answer"), (False, "red", "a broken promise")):
        found = [(r.at_s + r.took_s, r.tpot_ms) for r in requests if r.met is met and r.tpot_ms is not None]
        if found:
            x, y = zip(*found, strict=True)
            axes.scatter(x, y, s=22, color=MARKERS[colour], linewidths=0, label=label)
    axes.axhline(slo_tpot_ms, color=MARKERS["orange"], linewidth=1.6, label=f"SLO {slo_tpot_ms:.0f} ms")
    axes.set_ylabel("TPOT, ms")
    axes.set_ylim(0, None)


def _training(axes: Axes, moments: Sequence[Moment], end_s: float) -> None:
    edges = np.arange(0.0, end_s + _BIN_S, _BIN_S)
    tokens, _ = np.histogram(
        [moment.at_s for moment in moments], edges, weights=[moment.training_tokens for moment in moments]
    )
    axes.stairs(tokens / _BIN_S, edges, fill=True, color=MARKERS["green"])
    axes.set_ylabel("finetune tokens/s")


# -- what the pictures share -------------------------------------------------------------------------


def _loads(policies: Policies) -> list[str]:
    return sorted({load for cells in policies.values() for load in cells}, key=int)


def _mean_speed(cells: Mapping[str, Any]) -> float:
    return float(np.mean([cell["finetune_tokens_per_s"] for cell in cells.values()]))


def _colour(index: int, policy: str) -> str:
    return MARKERS["green"] if policy == OURS else MARKERS[_COLOURS[index % len(_COLOURS)]]


def _prepare(panel: Axes, title: str, grid: str) -> None:
    panel.patch.set_alpha(0)
    panel.set_title(title, fontsize=11)
    panel.grid(visible=False)
    panel.grid(visible=True, axis=grid)  # type: ignore[arg-type]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Each policy once, whichever panels it is in."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=6, frameon=False, fontsize=10
    )
