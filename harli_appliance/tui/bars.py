"""Stacked bars made of text: how a whole is shared out. Used by the dashboard and by its text snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

FULL = "█"
GAP = "  "
GLYPHS = "█▓▒░"
"""For paper and pipes, where there may be no colours: one a share, in order."""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of the whole: its name, its size, a colour, and how the legend tells the size."""

    name: str
    size: float
    colour: str
    told: str


def widths(sizes: Sequence[float], width: int) -> list[int]:
    """`width` cells shared out by `sizes` (largest remainders); whatever is not zero gets at least one cell."""
    total = sum(sizes)
    if total <= 0 or width <= 0:
        return [0] * len(sizes)
    exact = [size / total * width for size in sizes]
    cells = [max(int(share), 1 if share > 0 else 0) for share in exact]
    while sum(cells) < width:
        neediest = max(range(len(cells)), key=lambda index: exact[index] - cells[index])
        cells[neediest] += 1
    while sum(cells) > width:
        largest = max(range(len(cells)), key=lambda index: cells[index])
        cells[largest] -= 1
    return cells


def bar(shares: Sequence[Share], width: int, glyphs: str = FULL) -> Text:
    """The shares side by side; `glyphs` are taken in turn."""
    text = Text(no_wrap=True)
    cells = widths([share.size for share in shares], width)
    for index, share in enumerate(shares):
        text.append(glyphs[index % len(glyphs)] * cells[index], style=share.colour)
    return text


def legend(shares: Sequence[Share], width: int, lines: int = 1, glyphs: str = "■") -> Text:
    """The names with their sizes, on as many of `lines` lines as they need; what does not fit is cut off."""
    rows = [Text(no_wrap=True)]
    for index, share in enumerate(shares):
        entry = Text.assemble(
            (f"{glyphs[index % len(glyphs)]} ", share.colour), share.name, (f" {share.told}", "bold")
        )
        gap = GAP if rows[-1] else ""
        if rows[-1].cell_len + len(gap) + entry.cell_len > width and len(rows) < lines and rows[-1]:
            rows.append(entry)
        else:
            rows[-1].append(gap).append_text(entry)
    for row in rows:
        row.truncate(width, overflow="ellipsis")
    return Text("\n", no_wrap=True).join(rows)
