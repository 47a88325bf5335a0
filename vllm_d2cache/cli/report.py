"""A comparison as text, Markdown, JSON and a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_d2cache.cli.grid import Cell
from vllm_d2cache.cli.machine import caption

HEADS = (
    "policy",
    "decoder",
    "right, %",
    "from full, points",
    "p",
    "agreement, %",
    "identical, %",
    "tokens/forward",
    "rows/step",
    "rows/token",
    "keys/step",
    "ms/step",
    "tokens/s",
    "peak, MB",
)
_WORDS = 2  # columns of text, aligned left


def cells_of(cell: Cell) -> list[str]:
    """The line of one setting."""
    return [
        cell.policy,
        cell.decoder,
        "" if cell.right is None else f"{100 * cell.right:.1f}",
        *(("", "") if cell.difference is None else (str(cell.difference), f"{cell.difference.p_value:.2g}")),
        f"{100 * cell.agreement:.1f}",
        f"{100 * cell.identical:.1f}",
        f"{cell.output_tokens / cell.forwards:.2f}",
        f"{cell.rows / cell.steps:.1f}",
        f"{cell.rows / cell.output_tokens:.1f}" if cell.output_tokens else "",
        f"{cell.keys / cell.steps:.1f}",
        f"{1000 * cell.seconds / cell.steps:.2f}",
        f"{cell.output_tokens / cell.seconds:.1f}",
        "" if cell.peak_bytes is None else f"{cell.peak_bytes / 1e6:.0f}",
    ]


def _lines(cells: list[Cell]) -> list[list[str]]:
    """Heads and lines, without columns that are empty throughout."""
    lines = [list(HEADS), *map(cells_of, cells)]
    kept = [c for c in range(len(HEADS)) if any(line[c] for line in lines[1:])]
    return [[line[c] for c in kept] for line in lines]


def text_table(cells: list[Cell]) -> str:
    """The table for a terminal."""
    lines = _lines(cells)
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    rows = [
        "  ".join(t.ljust(w) if c < _WORDS else t.rjust(w) for c, (t, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def markdown_table(cells: list[Cell], notes: list[str]) -> str:
    """The table for documents, with its notes behind it."""
    head, *lines = _lines(cells)
    rule = ["---"] * _WORDS + ["---:"] * (len(head) - _WORDS)
    table = ["| " + " | ".join(line) + " |" for line in [head, rule, *lines]]
    return "\n".join([*table, "", *notes, ""])


def notes_of(cells: list[Cell], facts: dict[str, Any], model: str, num_prompts: int, batch: int) -> list[str]:
    """What the figures are of."""
    tokens = cells[0].canvas_tokens
    paired = (
        "From full: right answers against those of full recompute under the same decoder (full recompute's own: under "
        "the first decoder), with the 95 % interval of the paired difference; p: McNemar's exact test."
    )
    return [
        f"{model}: {num_prompts} prompts, {tokens} canvas tokens, at most {batch} request(s) at a time, greedy.",
        "Agreement and identical: with the responses of full recompute under the same decoder. Tokens: of the "
        "responses, up to and including the end-of-text token.",
        *([paired] if any(cell.difference for cell in cells) else []),
        caption(facts) + ".",
    ]


def write_json(path: Path, cells: list[Cell], facts: dict[str, Any], about: dict[str, Any]) -> None:
    """All figures, without the responses."""
    rows = []
    for cell in cells:
        row = asdict(cell)
        del row["outputs"], row["texts"], row["marks"]
        if cell.difference:
            row["difference"] |= {"points": cell.difference.points, "interval": cell.difference.interval}
            row["difference"]["p_value"] = cell.difference.p_value
        rows.append({**row, "output_tokens": cell.output_tokens})
    path.write_text(json.dumps({"machine": facts, **about, "cells": rows}, indent=1) + "\n")


def plot(cells: list[Cell], path: Path, title: str) -> None:
    """Agreement with full recompute over tokens a second; a colour a policy, a marker a decoder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    policies = list(dict.fromkeys(c.policy for c in cells))
    decoders = list(dict.fromkeys(c.decoder for c in cells))
    colours = plt.get_cmap("tab10")
    markers = "osD^v<>P*Xhp"
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for cell in cells:
        colour = colours(policies.index(cell.policy) % 10)
        marker = markers[decoders.index(cell.decoder) % len(markers)]
        speed, score = cell.output_tokens / cell.seconds, cell.agreement if cell.right is None else cell.right
        label = f"{cell.policy}, {cell.decoder}"
        axes.plot(speed, 100 * score, linestyle="", markersize=8, label=label, color=colour, marker=marker)
    axes.set_xlabel("response tokens a second")
    axes.set_ylabel("agreement with full recompute, %" if cells[0].right is None else "right answers, %")
    axes.set_ylim(0, 102)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
