"""Runs lm-evaluation-harness against a server under one setting, and counts what the server did for it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.tasks import Task
from tools.traces import Trace, read

HARNESS = Path(".venv-clients/bin/lm_eval")


class HarnessError(Exception):
    """The harness failed. The message has the end of its output."""


@dataclass(frozen=True)
class Setting:
    """Options that every request of a run carries.

    Attributes:
        name: for the table.
        curve: settings of one curve differ in how many tokens they commit at a time.
        options: by option name, without prefix.
    """

    name: str
    curve: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """One task under one setting. Token and step counts are sums over the requests."""

    task: str
    setting: str
    curve: str
    options: dict[str, Any]
    requests: int
    score: float  # percent
    interval: float  # half width of the 95 % interval, percent points
    output_tokens: int  # of the responses: up to the end-of-text token, which is counted
    canvas_tokens: int
    committed_tokens: int
    steps: int  # forward passes that a request took part in
    rows: int
    full_rows: int  # rows of the same steps without a cache
    seconds: float  # from the first request's arrival to the last response
    marks: str = ""  # of every problem, in an order that is the same for all settings: 1 right, 0 wrong

    @property
    def tokens_per_forward(self) -> float:
        """Output tokens for each forward pass of a request."""
        return self.output_tokens / self.steps

    @property
    def rows_per_forward(self) -> float:
        """Positions recomputed in a forward pass of a request."""
        return self.rows / self.steps

    @property
    def row_share(self) -> float:
        """Rows as a share of what full recompute takes for the same steps."""
        return self.rows / self.full_rows

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all requests together, a second."""
        return self.output_tokens / self.seconds


@dataclass(frozen=True)
class Harness:
    """How the harness reaches the server.

    Attributes:
        url: of the server, without /v1.
        model: the name it serves.
        traces: its trace directory; emptied by every run.
        chat: whether to use /v1/chat/completions, else /v1/completions.
        concurrency: requests in flight.
        limit: problems a task at most; None = all.
        include: directory of further tasks.
        seed: of the harness's choice of few-shot examples and of sampling.
    """

    url: str
    model: str
    traces: Path
    chat: bool
    concurrency: int = 8
    limit: int | None = None
    include: Path | None = None
    seed: int = 1234

    def config(self, task: Task, setting: Setting, output: Path) -> dict[str, Any]:
        """The harness's configuration file."""
        path = "chat/completions" if self.chat else "completions"
        xargs = {f"d2cache_{name}": value for name, value in setting.options.items()}
        generation: dict[str, Any] = {"temperature": 0, "vllm_xargs": xargs} if xargs else {"temperature": 0}
        if task.canvas is not None:
            generation["max_gen_toks"] = task.canvas
        config: dict[str, Any] = {
            "model": "local-chat-completions" if self.chat else "local-completions",
            "model_args": {
                "model": self.model,
                "base_url": f"{self.url}/v1/{path}",
                "num_concurrent": self.concurrency,
                "max_retries": 1,
                "tokenizer_backend": None,
                "tokenized_requests": False,
            },
            "tasks": [task.name],
            "gen_kwargs": generation,
            "apply_chat_template": self.chat,
            "output_path": str(output),
            "log_samples": True,
            "batch_size": 1,
            "seed": [self.seed] * 4,
        }
        optional = {"num_fewshot": task.shots, "limit": self.limit}
        config |= {name: value for name, value in optional.items() if value is not None}
        if self.include is not None:
            config["include_path"] = str(self.include)
        if task.runs_code:
            config["confirm_run_unsafe_code"] = True
        return config

    def run(self, task: Task, setting: Setting, scratch: Path) -> Score:
        """Ask everything once.

        Raises:
            HarnessError: the harness failed, or its results lack the task's metric.
        """
        for old in self.traces.glob("*.jsonl"):
            old.unlink()
        output, config = scratch / "results.json", scratch / "config.yaml"
        output.unlink(missing_ok=True)
        config.write_text(json.dumps(self.config(task, setting, output)))
        command = [str(HARNESS.absolute()), "run", "--config", str(config)]
        env = {**os.environ, "OPENAI_API_KEY": "none"}
        if task.runs_code:
            env["HF_ALLOW_CODE_EVAL"] = "1"
        log = scratch / "harness.log"
        with (
            log.open("w") as sink,
            subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT) as process,
        ):
            begin = self._first_request(process)
        found = sorted(scratch.rglob("results*.json"), key=lambda path: path.stat().st_mtime)
        if process.returncode or not found:
            raise HarnessError(f"{' '.join(command)}\n{log.read_text()[-4000:]}")
        results = json.loads(found[-1].read_text())
        samples = list(scratch.rglob("samples_*.jsonl"))
        marks = marks_of(samples, task.metric)
        for path in [*found, *samples]:
            path.unlink()
        return self._score(task, setting, results, begin, marks)

    def _first_request(self, process: subprocess.Popen[bytes]) -> float:
        """When the first trace file appeared: the harness itself takes a while to start."""
        while process.poll() is None and not any(self.traces.glob("*.jsonl")):
            time.sleep(0.02)
        return time.time()

    def _score(self, task: Task, setting: Setting, results: dict[str, Any], begin: float, marks: str = "") -> Score:
        values = {**results.get("results", {}), **results.get("groups", {})}.get(task.name, {})
        metric, _, filter_name = task.metric.partition(",")
        if task.metric not in values:
            raise HarnessError(f"{task.name}: no {task.metric} among {', '.join(values)}")
        traces, end = self._traces()
        error = values.get(f"{metric}_stderr,{filter_name}")
        if not isinstance(error, float):
            # The harness gives none for some groups: that of answers that are right or wrong.
            share = float(values[task.metric])
            error = math.sqrt(share * (1 - share) / len(traces))
        return Score(
            task.name,
            setting.name,
            setting.curve,
            setting.options,
            len(traces),
            100 * values[task.metric],
            196 * error,
            sum(len(t.output or []) for t in traces),
            sum(t.canvas_len for t in traces),
            sum(len(pairs) for t in traces for pairs in t.committed),
            sum(t.steps for t in traces),
            sum(t.rows for t in traces),
            sum(t.full_rows for t in traces),
            end - begin,
            marks,
        )

    def _traces(self) -> tuple[list[Trace], float]:
        """All traces of the run, and when the last line was written."""
        paths = sorted(self.traces.glob("*.jsonl"))
        deadline = time.monotonic() + 5
        traces = [read(path) for path in paths]
        while any(t.finish_reason is None for t in traces) and time.monotonic() < deadline:
            time.sleep(0.1)
            traces = [read(path) for path in paths]
        return traces, max(path.stat().st_mtime for path in paths)


def marks_of(paths: Iterable[Path], metric: str) -> str:
    """Right and wrong of every problem, from the harness's files of samples, sorted by task and number.

    Args:
        paths: one file a task.
        metric: "metric,filter".

    Returns:
        "" where the metric is not one of right and wrong: no two settings can be compared problem by problem then.
    """
    name, _, wanted = metric.partition(",")
    found: dict[tuple[str, int], Any] = {}
    for path in paths:
        # samples_TASK_2026-01-01T00-00-00.jsonl
        task = path.name.rpartition("_")[0]
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            if sample.get("filter") == wanted and name in sample:
                found[task, sample["doc_id"]] = sample[name]
    values = [found[key] for key in sorted(found)]
    return "".join(str(int(v)) for v in values) if all(v in (0, 1) for v in values) else ""
