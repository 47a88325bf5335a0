"""The report of a load run as a table, and a picture of the memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.machine import caption

COLUMNS = ("answered", "refused", "hung up", "answered first", "wrong", "failed")


def rows(report: dict[str, Any]) -> list[list[str]]:
    """All requests, then those of each trait: how many there were and what became of them."""
    counted = {"all": report["outcomes"], **report["by_trait"]}
    return [
        [trait, str(sum(counts.values())), *(str(counts.get(c, 0)) for c in COLUMNS)]
        for trait, counts in counted.items()
    ]


def size(report: dict[str, Any]) -> str:
    """How many requests, in words."""
    return f"{report['requests']} requests, {report['concurrency']} at a time"


def memory_line(report: dict[str, Any]) -> str:
    """How the memory changed, in a sentence."""
    memory = report["memory"]
    before, after = sum(memory["before_load_mib"].values()), sum(memory["after_load_mib"].values())
    which = "the load" if memory["loads"] == 1 else f"the last of {memory['loads']} loads of the same size"
    return (
        f"Resident memory of all processes: {before:.0f} MiB before {which}, {after:.0f} MiB after it "
        f"({memory['growth_percent']:+.2f} %), at most {memory['peak_mib']:.0f} MiB in between."
    )


def markdown(report: dict[str, Any]) -> str:
    """The table, for terminals and documents, and what the figures mean."""
    head = ["requests", "sent", *COLUMNS]
    table = [head, *rows(report)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(head))]
    table.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |" for cells in table]
    places = report["places"]
    notes = [
        f"{size(report)}, drawn from {report['distinct']} distinct ones (seed {report['seed']}), in "
        f"{report['seconds']:.0f} s. Each answer was compared with that of the same request alone: text, reason "
        "of the end, log-probabilities to the last digit. `hung up`: the client closed the connection, at once or "
        "midway; `answered first`: it meant to, too late. A request counts in the line of each of its traits.",
        f"{memory_line(report)} Left behind: {report['left_behind']}; afterwards {places['filled_afterwards']} of "
        f"{places['all']} places could be filled at once.",
        f"Problems: {len(report['problems'])}.",
        caption(report["machine"]),
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def as_json(report: dict[str, Any]) -> str:
    """One line for each list of numbers."""
    text = json.dumps(report, indent=1)
    return re.sub(r"\[\s+([\d.,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Memory of each process over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    memory = report["memory"]
    samples = dict(memory["samples"])
    times = samples.pop("seconds")
    figure, axes = plt.subplots(figsize=(9, 4.5))
    axes.stackplot(times, *samples.values(), labels=list(samples), alpha=0.8)
    axes.axvspan(memory["load_begins_s"], memory["load_ends_s"], color="black", alpha=0.07, label="load")
    axes.set(xlabel="seconds", ylabel="resident memory, MiB", xlim=(0, max(times)), ylim=(0, None))
    axes.set_title(f"{size(report)}: {memory['growth_percent']:+.2f} %")
    axes.legend(loc="lower right")
    figure.text(0.01, 0.01, caption(report["machine"]), fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
