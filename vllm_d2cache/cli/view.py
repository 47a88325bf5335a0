"""Replay a recorded request (server option trace_dir): an HTML page that needs no network, or in the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_d2cache.observe.trace_reader import RecordedRequest, TraceError, read_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a request's .jsonl file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page to write (default: TRACE with .html)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="show tokens as text (default: the trace's model, if it is here)"
    )
    parser.add_argument("--terminal", action="store_true", help="print it instead of writing a page")
    parser.add_argument("--step", type=int, metavar="N", help="with --terminal: show the canvas after N steps")


def run(args: argparse.Namespace) -> int:
    """Write the page or print the request."""
    from vllm_d2cache.cli import UsageError

    if args.terminal and args.out:
        raise UsageError("--out names a page; with --terminal there is none")
    if args.step is not None and not args.terminal:
        raise UsageError("--step goes with --terminal; the page shows every step")
    try:
        request = read_trace(args.trace)
    except (OSError, TraceError) as error:
        raise UsageError(str(error)) from error
    texts = _texts(request, args.tokenizer)
    if args.terminal:
        return _print(request, texts, args.step)
    out = args.out or args.trace.with_suffix(".html")
    from vllm_d2cache.viewer.page import render_page

    try:
        out.write_text(render_page(request, texts), encoding="utf-8")
    except OSError as error:
        raise UsageError(str(error)) from error
    print(f"{out}: {len(request.steps)} steps, {request.num_positions} positions; open it in a browser")
    return 0


def _print(request: RecordedRequest, texts: dict[int, str], step: int | None) -> int:
    from vllm_d2cache.cli import UsageError

    try:
        from rich.console import Console

        from vllm_d2cache.viewer.terminal import render_terminal
    except ImportError as error:
        raise UsageError(f"--terminal needs the package rich ({error}); pip install rich") from error
    done = len(request.steps) if step is None else step
    if not 0 <= done <= len(request.steps):
        raise UsageError(f"--step must be 0 to {len(request.steps)}, got {done}")
    render_terminal(request, texts, done, Console(highlight=False))
    return 0


def _texts(request: RecordedRequest, tokenizer: Path | None) -> dict[int, str]:
    """Token id -> text; empty without a tokenizer."""
    from vllm_d2cache.cli import UsageError
    from vllm_d2cache.viewer.text import texts_of, token_decoder

    directory = tokenizer
    if directory is None and request.model and Path(request.model, "tokenizer.json").is_file():
        directory = Path(request.model)
    if directory is None:
        return {}
    written = (c.token for step in request.steps for c in (*step.commits, *step.edited))
    tokens = [*request.prompt, *request.given.values(), *written]
    try:
        return texts_of(tokens, token_decoder(directory))
    except ValueError as error:
        raise UsageError(str(error)) from error
