"""One HTML file that can be mailed: verdict, goals, numbers, pictures, conversations. And its JSON twin.

Knows HTML. Does not know what was measured; each benchmark describes its page with the types below. Nothing
is loaded from anywhere, all text is escaped, and the page follows the reader's light or dark setting.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harli_appliance.bench.figures import STYLE


@dataclass(frozen=True, slots=True)
class Goal:
    """Something that the run had to show. `target` and `value` are ready to be read."""

    name: str
    title: str
    target: str
    value: str
    met: bool

    def as_json(self) -> dict[str, object]:
        return {"title": self.title, "target": self.target, "value": self.value, "met": self.met}


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Picture:
    title: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Words:
    """A heading and what is to be said under it."""

    title: str
    paragraphs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table with columns. A row's mark is "met", "missed" or nothing, and colours its first cell."""

    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A question and what each of several models said, with a word for each."""

    question: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    lead: str
    """One sentence: what was done."""
    goals: Sequence[Goal]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    conversations: Sequence[Conversation]
    footer: str
    introduction: Sequence[Words | Grid | Picture] = ()
    """Before the goals: what a reader has to know to understand them."""
    parts: Sequence[Words | Grid | Picture] = ()
    """Between pictures and numbers, in this order."""

    @property
    def verdict(self) -> str:
        missed = [goal.title for goal in self.goals if not goal.met]
        if not missed:
            return f"All {len(self.goals)} goals met."
        return f"{len(missed)} of {len(self.goals)} goals missed: {', '.join(missed)}."

    @property
    def passed(self) -> bool:
        return all(goal.met for goal in self.goals)


def write_report(folder: Path, stem: str, data: Mapping[str, Any], page: Page) -> tuple[Path, Path]:
    """Write ``stem.json`` and ``stem.html`` into `folder`, each whole or not at all; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, view = folder / f"{stem}.json", folder / f"{stem}.html"
    _replace(numbers, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _replace(view, render(page))
    return numbers, view


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def render(page: Page) -> str:
    """The page as HTML."""
    parts: list[str] = [
        f"<h1>{_text(page.title)}</h1>",
        f'<p class="verdict {"met" if page.passed else "missed"}">{_text(page.verdict)}</p>',
        f'<p class="lead">{_text(page.lead)}</p>',
        *map(_part, page.introduction),
        _goals(page.goals),
    ]
    if page.conversations:
        parts.append("<h2>Before and after</h2>")
        parts += [_conversation(conversation) for conversation in page.conversations]
    parts += [_picture(picture) for picture in page.pictures]
    parts += [_part(part) for part in page.parts]
    parts.append('<h2>Numbers</h2><div class="tables">')
    parts += [_table(table) for table in page.tables]
    parts.append(f"</div><footer>{_text(page.footer)}</footer>")
    return _DOCUMENT.format(title=_text(page.title), style=STYLE + _STYLE, body="\n".join(parts))


def _goals(goals: Iterable[Goal]) -> str:
    rows = "".join(
        f'<tr class="{"met" if goal.met else "missed"}"><th scope="row">{_text(goal.title)}</th>'
        f"<td>{_text(goal.target)}</td><td>{_text(goal.value)}</td>"
        f'<td class="mark">{"✓ met" if goal.met else "✗ missed"}</td></tr>'
        for goal in goals
    )
    head = "<tr><th>Goal</th><th>Target</th><th>Measured</th><th></th></tr>"
    return f'<table class="goals"><thead>{head}</thead><tbody>{rows}</tbody></table>'


def _conversation(conversation: Conversation) -> str:
    said = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(answer)}</dd></div>"
        for label, answer in conversation.answers
    )
    question = f'<p class="question">{_text(conversation.question)}</p>'
    return f'<section class="talk">{question}<dl>{said}</dl></section>'


def _picture(picture: Picture) -> str:
    caption = f"<figcaption>{_text(picture.caption)}</figcaption>"
    label = html.escape(picture.title, quote=True)
    return (
        f'<figure role="group" aria-label="{label}"><h2>{_text(picture.title)}</h2>'
        f"{picture.svg}{caption}</figure>"
    )


def _part(part: Words | Grid | Picture) -> str:
    if isinstance(part, Picture):
        return _picture(part)
    if isinstance(part, Words):
        said = "".join(f"<p>{_text(paragraph)}</p>" for paragraph in part.paragraphs)
        return f'<section class="words"><h2>{_text(part.title)}</h2>{said}</section>'
    head = "".join(f"<th>{_text(name)}</th>" for name in part.head)
    rows = "".join(
        f'<tr class="{_text(mark)}"><th scope="row">{_text(cells[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in cells[1:])
        + "</tr>"
        for mark, cells in part.rows
    )
    return (
        f'<section class="grid"><h3>{_text(part.title)}</h3><div class="wide">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _table(table: Table) -> str:
    rows = "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>' for k, v in table.rows)
    return f"<section><h3>{_text(table.title)}</h3><table><tbody>{rows}</tbody></table></section>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

_STYLE = """
:root { --page: #ffffff; --quiet: #5b6570; --card: #f6f8fa; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --quiet: #a2acb7; --card: #1c2229; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
.verdict { font-size: 1.15rem; font-weight: 600; padding: .7rem 1rem; border-radius: .4rem;
           background: var(--card); border-left: .4rem solid; margin: 0 0 .8rem; }
.verdict.met { border-color: var(--green); } .verdict.missed { border-color: var(--red); }
.lead, figcaption, footer { color: var(--quiet); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; font-weight: 400; padding: .38rem .8rem .38rem 0; vertical-align: top;
         border-bottom: 1px solid var(--faint); overflow-wrap: anywhere; }
thead th { color: var(--quiet); font-size: .88rem; }
.goals { margin-top: 1.4rem; } .goals .mark { white-space: nowrap; font-weight: 600; }
.goals .met .mark { color: var(--green); } .goals .missed .mark { color: var(--red); }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 2rem 3rem; }
.tables th { color: var(--quiet); width: 52%; }
.talk { background: var(--card); border-radius: .4rem; padding: .9rem 1.1rem; margin: 0 0 .9rem; }
.talk .question { font-weight: 600; margin: 0 0 .6rem; }
.talk dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; margin: 0; }
.talk dt { color: var(--quiet); font-size: .88rem; } .talk dd { margin: 0; white-space: pre-wrap; }
.words p { margin: 0 0 .7rem; max-width: 46rem; } .grid { margin: 1.4rem 0; } .wide { overflow-x: auto; }
.grid tbody th { white-space: nowrap; } .grid td, .grid th { font-size: .93rem; overflow-wrap: normal; }
.grid .met th { color: var(--green); font-weight: 600; } .grid .missed th { color: var(--red); }
figure { margin: 0; } figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .92rem; margin-top: .3rem; }
footer { margin-top: 3rem; font-size: .88rem; }
@media print { :root { --page: #ffffff; } figure, section { break-inside: avoid; } }
"""
