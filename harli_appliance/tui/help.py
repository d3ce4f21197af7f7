"""The help of the dashboard: keys, and the words on the screen."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

TEXT = """\
[b]Keys[/b]
  q   quit             p   choose the policy
  t   next theme       /   show only jobs that contain a word (Esc: all)
  ?   this help
[b]Keys for the job under the cursor[/b] (arrows, j, k)
  space   pause or resume     x       cancel
  + -     priority            Enter   what happened to it

[b]Words[/b]
  [b]time per output token[/b] (TPOT): how long an answer takes for each further token. The appliance
    promises a target; green keeps it, yellow is within a tenth of it, red breaks it.
  [b]TTFT[/b]: time to the first token.   [b]attained[/b]: share of recent requests that met both targets.
  [b]compute[/b]: the part of the device that answers have, and the part that finetuning has.
    [b]both at once[/b]: each on its part.   [b]taking turns[/b]: one after the other, because that fits better.
    [b]serving, training waits[/b]: no time is left to give away.
  [b]priority[/b] of a job: its part of the training time beside other jobs; [b]time[/b] is what it had lately.
  [b]memory[/b]: the KV cache in slots of one token. [b]serving[/b]: answers in progress. [b]cached[/b]: kept from
    earlier answers, given up at need. [b]leased[/b]: lent to finetuning, taken back at need. [b]free[/b]: unused.
"""


class HelpScreen(ModalScreen[None]):
    BINDINGS = [("escape,question_mark,q", "dismiss", "Close")]  # noqa: RUF012 - Textual's way

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog") as box:
            box.border_title = "Help"
            box.border_subtitle = "Esc closes"
            yield Static(TEXT)
