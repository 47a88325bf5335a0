"""``vllm-d2cache view``: reading traces, the page in a real browser, the terminal."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Page, browser, find_browser
from vllm_d2cache.cli import main
from vllm_d2cache.observe.trace_reader import TraceError, read_trace
from vllm_d2cache.viewer.page import ranges, render_page

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "trace.jsonl"
TINY = ROOT / "models" / "tiny-llada"
EVIL = '</script><script>document.title="owned"</script>{{DATA}}'


def write_trace(path: Path, prompt: int, canvas: int, steps: int, old: bool = False, **head: Any) -> Path:
    """A made-up request that commits its slots in random order, as evenly as it can."""
    rng = random.Random(prompt + canvas)
    slots = rng.sample(range(canvas), canvas)
    first = {"request_id": "made-up", "prompt_token_ids": [7] * prompt, "canvas_length": canvas}
    lines: list[dict[str, Any]] = [{**first, "options": {"policy": "d2cache", "window": 0}, **head}]
    for step in range(steps):
        chosen = sorted(slots[step * canvas // steps : (step + 1) * canvas // steps])
        refreshed = sorted(rng.sample(range(prompt + canvas), min(prompt + canvas, 60)))
        line: dict[str, Any] = {"step": step, "refreshed": refreshed if step else None}
        line["committed"] = [[slot, 100 + slot % 50] for slot in chosen]
        line["masked_left"] = canvas - (step + 1) * canvas // steps
        if not old:
            line["confidence"] = [round(rng.random(), 6) for _ in chosen]
            line["elapsed"] = 0.01 * (step + 1)
        lines.append(line)
    output = [100 + slot % 50 for slot in range(canvas)]
    lines.append({"output_token_ids": output, "finish_reason": "length"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_reads_what_was_recorded() -> None:
    request = read_trace(EXAMPLE)
    assert request.finish_reason == "stop"
    assert request.output is not None and request.step_seconds is not None
    last = {c.slot: c.token for step in request.steps for c in step.commits}
    assert [last[slot] for slot in range(len(request.output))] == request.output
    assert len(request.step_seconds) == len(request.steps)
    assert sum(request.step_seconds) == pytest.approx(request.steps[-1].elapsed)


def test_reads_files_without_confidence_and_times(tmp_path: Path) -> None:
    request = read_trace(write_trace(tmp_path / "old.jsonl", 3, 4, 2, old=True))
    assert request.step_seconds is None
    assert {c.confidence for step in request.steps for c in step.commits} == {None}


def test_leaves_out_a_line_that_is_still_being_written(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", 3, 4, 4)
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    request = read_trace(path)
    assert len(request.steps) == 2
    assert request.finish_reason is None


BROKEN = {
    "": "no complete line",
    "hello\n": "line 1",
    '{"request_id": "a"}\n': "line 1: no field 'canvas_length'",
    '{"request_id": "a", "prompt_token_ids": [1], "canvas_length": 2, "options": {}}\n[1]\n': "line 2",
    '{"request_id": "a", "prompt_token_ids": [1], "canvas_length": 2, "options": {}}\n'
    '{"refreshed": null, "committed": [[2, 5]]}\n': "line 2: committed: a slot is not in 0..1",
    '{"request_id": "a", "prompt_token_ids": [1], "canvas_length": 2, "options": {}}\n'
    '{"refreshed": null, "committed": [], "revoked": [2]}\n': "line 2: revoked: a slot is not in 0..1",
    '{"request_id": "a", "prompt_token_ids": [1], "canvas_length": 2, "options": {}}\n'
    '{"refreshed": null, "committed": [], "edited": [[2, 5]]}\n': "line 2: edited: a slot is not in 0..1",
    '{"request_id": "a", "prompt_token_ids": [1], "canvas_length": 2, "options": {}, "canvas": [1]}\n': (
        "line 1: canvas: 1 slots instead of 2"
    ),
    '{"request_id": "a", "prompt_token_ids": [1], "canvas_length": 2, "options": {}}\n'
    '{"refreshed": [3], "committed": []}\n': "line 2: refreshed: a position is not in 0..2",
}


@pytest.mark.parametrize("content", BROKEN)
def test_says_what_is_wrong_with_a_file(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(TraceError, match=re.escape(BROKEN[content])):
        read_trace(path)
    assert main(["view", str(path)]) == 2
    assert BROKEN[content] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(write_trace(tmp_path / "t.jsonl", 3, 4, 2))
    for arguments, message in {
        (trace + "x",): "No such file",
        (trace, "--terminal", "--out", "x.html"): "--out names a page",
        (trace, "--step", "1"): "--step goes with --terminal",
        (trace, "--terminal", "--step", "3"): "--step must be 0 to 2, got 3",
        (trace, "--tokenizer", str(tmp_path)): "no tokenizer that can be read",
        (trace, "--out", str(tmp_path / "no" / "x.html")): "No such file",
    }.items():
        assert main(["view", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err


def write_revoking_trace(path: Path) -> Path:
    """Slot 1 is given; slot 0 is committed, masked again, and committed as another token; slot 2 is edited then."""
    head = {"request_id": "r", "prompt_token_ids": [7], "canvas_length": 3, "options": {"policy": "full"}}
    lines: list[dict[str, Any]] = [
        {**head, "canvas": [-1, 50, -1]},
        {"refreshed": None, "committed": [[0, 60]]},
        {"refreshed": [1, 3], "committed": [[2, 61]], "revoked": [0]},
        {"refreshed": [1], "committed": [[0, 62]], "edited": [[2, 63]]},
        {"output_token_ids": [62, 50, 63], "finish_reason": "length"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_given_and_revoked_tokens(tmp_path: Path) -> None:
    request = read_trace(write_revoking_trace(tmp_path / "t.jsonl"))
    states = [{slot: (step, c.token) for slot, (step, c) in request.canvas_after(done).items()} for done in range(4)]
    assert states == [
        {1: (-1, 50)},
        {1: (-1, 50), 0: (0, 60)},
        {1: (-1, 50), 2: (1, 61)},
        {1: (-1, 50), 2: (2, 63), 0: (2, 62)},
    ]


def test_ranges_are_the_positions() -> None:
    assert ranges([]) == []
    assert ranges([0, 1, 2, 5, 9, 10]) == [0, 3, 5, 1, 9, 2]


class Elements(HTMLParser):
    """Counts start tags, and collects attributes that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_is_self_contained_and_no_text_can_break_out(tmp_path: Path) -> None:
    request = read_trace(write_trace(tmp_path / "t.jsonl", 2, 4, 2, request_id=EVIL, model=EVIL))
    page = render_page(request, {7: EVIL, 100: "<!--"})
    elements = Elements(page)
    assert elements.tags.count("script") == 2
    assert elements.loads == []
    assert "http" not in page.replace("http-equiv", "")


def test_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["view", str(EXAMPLE), "--terminal", "--tokenizer", str(TINY), "--step", "3"]) == 0
    text = capsys.readouterr().out
    request = read_trace(EXAMPLE)
    assert request.request_id in text
    assert f"canvas after step 3 of {len(request.steps)}" in text
    masked = request.canvas_len - sum(len(step.commits) for step in request.steps[:3])
    canvas = text.split("canvas after step")[1].split("refreshed positions")[0]
    assert canvas.count("░") == masked
    assert f"rows refreshed  {sum(request.step_rows)}" in text


def test_terminal_with_a_long_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "t.jsonl", 96, 4000, 500, old=True)
    assert main(["view", str(path), "--terminal"]) == 0
    picture = capsys.readouterr().out.split("refreshed positions")[1]
    assert len(picture.strip().split("\n")) == 1 + 32


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium on this machine (looked for chromium, chromium-browser, google-chrome, chrome)")
    with browser(executable, tmp_path_factory.mktemp("profile")) as page:
        yield page


def open_trace(page: Page, trace: Path, out: Path, tokenizer: bool = True, **settings: Any) -> None:
    page.problems.clear()
    page.requested.clear()
    assert main(["view", str(trace), "--out", str(out), *(["--tokenizer", str(TINY)] if tokenizer else [])]) == 0
    page.open(out.as_uri(), **settings)


def masks(page: Page) -> int:
    return page.run("document.querySelectorAll('#canvas span.mask').length")


def text(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector({selector!r}).textContent")


def test_replay_by_keyboard_slider_buttons_and_picture(page: Page, tmp_path: Path) -> None:
    request = read_trace(EXAMPLE)
    steps = len(request.steps)
    left = [request.canvas_len]
    for step in request.steps:
        left.append(left[-1] - len(step.commits))
    open_trace(page, EXAMPLE, tmp_path / "page.html")
    assert page.run("document.title").startswith(request.request_id)
    assert masks(page) == left[steps]
    visible = "[...document.querySelectorAll('#canvas span:not(.mask):not(.control)')].map(e => e.textContent).join('')"
    assert page.run(visible) == "12,14,16,18,20,22,24,26,28,30,32,34."

    page.press("Home")
    assert masks(page) == left[0]
    assert text(page, "#where").startswith(f"step 0 of {steps}")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert masks(page) == left[2]
    fresh = page.run("[...document.querySelectorAll('#canvas .fresh')].map(e => +e.dataset.position)")
    assert fresh == [len(request.prompt) + c.slot for c in request.steps[1].commits]
    marked = page.run("[...document.querySelectorAll('#canvas .refreshed')].map(e => +e.dataset.position)")
    assert marked == [p for p in request.steps[1].refreshed or [] if p >= len(request.prompt)]
    page.press("ArrowLeft")
    assert masks(page) == left[1]
    page.press("ArrowRight", shift=True)
    assert masks(page) == left[min(steps, 11)]
    page.click("#first")
    assert masks(page) == left[0]
    page.click("#next")
    assert masks(page) == left[1]
    page.run("(s => (s.value = 3, s.dispatchEvent(new Event('input'))))(document.querySelector('#slider'))")
    assert masks(page) == left[3]
    page.click("#picture", 0.5, (4 + 0.5) / steps)
    assert text(page, "#where").startswith(f"step 5 of {steps}")
    assert "step 5" in text(page, "#tip")
    assert page.problems == []
    assert page.requested == [(tmp_path / "page.html").as_uri()]


def test_given_and_revoked_tokens_in_the_page(page: Page, tmp_path: Path) -> None:
    open_trace(page, write_revoking_trace(tmp_path / "t.jsonl"), tmp_path / "page.html", tokenizer=False)
    shown = "[...document.querySelectorAll('#canvas span')].map(e => e.matches('.mask') ? '' : e.textContent)"
    states = [(page.press("ArrowLeft"), page.run(shown))[1] for _ in range(3)]
    assert states == [["", "[50]", "[61]"], ["[60]", "[50]", ""], ["", "[50]", ""]]
    assert text(page, ".given") == "[50]"
    assert page.run("document.querySelectorAll('.fresh').length") == 1  # the legend's
    page.press("End")
    assert page.run(shown) == ["[62]", "[50]", "[63]"]
    assert "edited" in text(page, "#figures")
    assert page.problems == []


def test_plays_to_the_end_and_pauses(page: Page, tmp_path: Path) -> None:
    steps = len(read_trace(EXAMPLE).steps)
    open_trace(page, EXAMPLE, tmp_path / "page.html")
    page.run("document.querySelector('#speed').value = '5'")
    page.press(" ")
    assert text(page, "#play") == "Pause"
    assert text(page, "#where").startswith("step ")  # which one depends on how busy the machine is
    end = (
        f"new Promise(ok => {{ const look = () => done === {steps} && !timer ? ok(1) : setTimeout(look, 20); look() }})"
    )
    assert page.run(end) == 1
    assert text(page, "#play") == "Play"
    page.press(" ")
    page.press(" ")
    assert text(page, "#play") == "Play"
    assert page.problems == []


@pytest.mark.parametrize(
    ("prompt", "canvas", "steps", "old", "dark"),
    [(10, 5, 5, False, False), (0, 1, 1, False, True), (2, 3, 0, False, False), (3840, 256, 64, True, True)],
)
def test_sizes(page: Page, tmp_path: Path, prompt: int, canvas: int, steps: int, old: bool, dark: bool) -> None:
    trace = write_trace(tmp_path / "t.jsonl", prompt, canvas, max(1, steps), old)
    if not steps:
        trace.write_text(trace.read_text().split("\n")[0] + "\n")
    open_trace(page, trace, tmp_path / "page.html", dark=dark, width=500)
    assert masks(page) == (0 if steps else canvas)
    page.press("Home")
    assert masks(page) == canvas
    assert page.run("document.querySelector('#time-box').hidden") == (old or not steps)
    assert page.run("document.documentElement.scrollWidth") <= 500
    assert page.problems == []


def test_a_canvas_of_4000_positions_and_1000_steps_answers_at_once(page: Page, tmp_path: Path) -> None:
    open_trace(page, write_trace(tmp_path / "t.jsonl", 96, 4000, 1000), tmp_path / "page.html")
    milliseconds = page.run("(t => (show(500), performance.now() - t))(performance.now())")
    assert masks(page) == 2000
    assert milliseconds < 500
    assert page.problems == []


def test_hostile_text_stays_text(page: Page, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 2, 4, 2, request_id=EVIL, model=EVIL)
    out = tmp_path / "page.html"
    out.write_text(render_page(read_trace(trace), {7: EVIL, 101: EVIL}))
    page.problems.clear()
    page.open(out.as_uri())
    assert page.run("document.title") == EVIL + " – d2Cache trace"
    assert EVIL in page.run("document.querySelector('#canvas').textContent")
    assert page.problems == []
