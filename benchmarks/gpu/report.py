"""What the GPU benchmark leaves: a short table, a plot, JSON, and the profile in docs/performance.md."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.engine import Step
from benchmarks.gpu.kernels import Line
from benchmarks.gpu.timing import Ceilings

_BEGIN, _END = "<!-- profile: written by python -m benchmarks.gpu -->", "<!-- end of profile -->"


@dataclass
class Results:
    """Everything of one run."""

    machine: dict[str, Any]
    limits: Ceilings
    kernels: list[Line] = field(default_factory=list)
    tiles: list[tuple[Any, ...]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    profile: str = ""
    left_out: list[str] = field(default_factory=list)  # what was asked for and not measured, and why

    def write(self, path: Path) -> None:
        """As JSON."""
        content = {
            "machine": self.machine,
            "ceilings": asdict(self.limits),
            "kernels": [{**asdict(x), "ratio": x.ratio} for x in self.kernels],
            "tiles": self.tiles,
            "steps": [
                {**asdict(s), "ratio": s.ratio, "outside": s.outside, "tokens_per_s": s.tokens_per_s}
                for s in self.steps
            ],
            "left_out": self.left_out,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")

    def show(self) -> None:
        """A short table."""
        print(f"\n{self.machine}")
        copy, product = self.limits.bytes_per_s / 1e9, self.limits.flops_per_s / 1e12
        print(f"ceilings: copy {copy:.0f} GB/s, bf16 product {product:.0f} TFLOP/s")
        if self.kernels:
            print(
                f"{'kernel':24}{'family':10}{'reqs':>5}{'rows':>6}{'T':>7}{'ms':>9}{'x floor':>9}{'twin ms':>9}  other"
            )
        for x in self.kernels:
            twin = "" if x.twin_ms is None else f"{x.twin_ms:.3f}"
            other = "" if x.other_ms is None else f"{x.other} {x.other_ms:.3f}"
            place = f"{x.kernel:24}{x.family:10}{x.requests:5}{x.rows:6}{x.length:7}"
            print(f"{place}{x.ms:9.3f}{x.ratio:9.2f}{twin:>9}  {other}")
        if self.steps:
            head = (
                f"{'step':10}{'backend':9}{'run':7}{'policy':12}{'workload':15}{'sent':>5}{'in':>4}{'T':>6}{'rows':>8}"
            )
            print(f"\n{head}{'ms':>8}{'x floor':>9}{'outside':>9}{'tok/s':>8}{'GB':>6}")
        for s in self.steps:
            place = f"{s.family:10}{s.backend:9}{s.execution:7}{s.policy:12}{s.workload:15}{s.requests:5}{s.running:4}"
            numbers = f"{s.length:6}{s.rows:8.0f}{s.step_ms:8.2f}{s.ratio:9.2f}{s.outside:9.1%}{s.tokens_per_s:8.0f}"
            print(f"{place}{numbers}{s.peak_gb:6.1f}")
        for reason in self.left_out:
            print(f"not measured: {reason}")

    def plot(self, path: Path) -> None:
        """Time over floor of kernels and of batch 1; tokens a second over the number of requests."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(20, max(6, 0.18 * len(self.kernels))))
        names = [f"{x.kernel} {x.family} {x.requests}x{x.rows}/{x.length}" for x in self.kernels]
        left.barh(names, [x.ratio for x in self.kernels])
        left.set_xscale("log")
        left.set_xlabel("time / floor")
        left.tick_params(axis="y", labelsize=5)
        left.invert_yaxis()
        lines: dict[tuple[str, ...], list[Step]] = {}
        for s in self.steps:
            single = s.workload.startswith("T=")
            name = (s.family, s.backend, s.execution, s.policy, *([] if single else [s.workload]))
            lines.setdefault(name, []).append(s)
        for name, steps in lines.items():
            single = steps[0].workload.startswith("T=")
            axis, x = (middle, [s.length for s in steps]) if single else (right, [s.requests for s in steps])
            axis.plot(x, [s.ratio if single else s.tokens_per_s for s in steps], marker="o", label=" ".join(name))
        middle.set(xlabel="T, batch 1", ylabel="step / max(weight bytes / bandwidth, flops / rate)")
        right.set(xlabel="requests", ylabel="tokens / s", xscale="log", yscale="log")
        for axis in (middle, right):
            if axis.lines:
                axis.legend(fontsize=5)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)

    def document(self, page: Path) -> None:
        """Put the profile where docs/performance.md keeps it."""
        text = page.read_text()
        before, found, rest = text.partition(_BEGIN)
        _, closed, after = rest.partition(_END)
        if not found or not closed:
            raise ValueError(f"{page} has no place for a profile: {_BEGIN} ... {_END}")
        device = f"{self.machine['device']}, torch {self.machine['torch']}, commit {self.machine['commit']}"
        page.write_text(f"{before}{_BEGIN}\n\n{device}:\n\n```\n{self.profile.strip()}\n```\n\n{_END}{after}")
