"""A recorded request in a terminal: figures, the canvas after some step, and which positions each step refreshed."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from vllm_d2cache.observe.trace_reader import RecordedRequest

_CONTROL = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})
_SHADES = " ░▒▓█"
_MOST_LINES = 32
_UNSURE = 0.5  # below this confidence a token is shown in yellow


def render_terminal(request: RecordedRequest, texts: Mapping[int, str], done: int, console: Console) -> None:
    """Print the request as it is after ``done`` steps.

    Args:
        texts: token id -> text; tokens that are not in it are shown by their ids.
    """
    console.print(
        Group(
            Rule(Text(request.request_id), align="left"),
            _figures(request),
            Rule(f"canvas after step {done} of {len(request.steps)}", align="left"),
            _canvas(request, texts, done),
            Rule(
                "refreshed positions: a line is one or more steps, ● a commit, │ where the canvas begins", align="left"
            ),
            _picture(request, console.width),
        )
    )


def _figures(request: RecordedRequest) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    steps, rows = len(request.steps), sum(request.step_rows)
    commits = sum(len(step.commits) for step in request.steps)
    table.add_row("prompt", f"{len(request.prompt)} tokens", "canvas", f"{request.canvas_len} positions")
    per_step = f"{commits / steps:.2f}" if steps else "-"
    table.add_row("steps", str(steps), "commits per step", per_step)
    share = f", {100 * rows / (steps * request.num_positions):.1f} % of full" if steps else ""
    seconds = request.step_seconds
    time = f"{sum(seconds):.3f} s, {1000 * sum(seconds) / steps:.1f} ms a step" if seconds else "not recorded"
    table.add_row("rows refreshed", f"{rows}{share}", "time", time)
    table.add_row("policy", str(request.options.get("policy")), "end", request.finish_reason or "not recorded")
    return table


def _canvas(request: RecordedRequest, texts: Mapping[int, str], done: int) -> Text:
    """Tokens so far; those of the last step in reverse, unsure ones in yellow."""
    state = request.canvas_after(done)
    line = Text()
    for slot in range(request.canvas_len):
        if slot not in state:
            line.append("░", Style(dim=True))
            continue
        number, commit = state[slot]
        text = texts.get(commit.token)
        unsure = commit.confidence is not None and commit.confidence < _UNSURE
        style = Style(reverse=number == done - 1, color="yellow" if unsure else None)
        line.append(f"[{commit.token}]" if text is None else text.translate(_CONTROL), style)
        if text is not None and text.endswith("\n"):
            line.append("\n")
    return line


def _picture(request: RecordedRequest, width: int) -> Text:
    """Steps downward, positions to the right; a character is the refreshed share of what it stands for."""
    steps, positions, start = request.steps, request.num_positions, len(request.prompt)
    columns, lines = min(positions, width - 8), min(len(steps), _MOST_LINES)
    picture = Text()
    edge = start * columns // positions
    for line in range(lines):
        first, stop = line * len(steps) // lines, (line + 1) * len(steps) // lines
        share, committed = [0.0] * columns, set()
        for step in steps[first:stop]:
            for position in range(positions) if step.refreshed is None else step.refreshed:
                share[position * columns // positions] += columns / positions / (stop - first)
            committed |= {(start + c.slot) * columns // positions for c in step.commits}
        picture.append(f"{first + 1:>6} ", Style(dim=True))
        for column, value in enumerate(share):
            if column == edge:
                picture.append("│", Style(dim=True))
            if column in committed:
                picture.append("●", Style(color="red"))
            else:
                picture.append(_SHADES[min(4, round(4 * value + 0.49))], Style(color="blue"))
        picture.append("\n")
    return picture
