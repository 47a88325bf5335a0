"""How much of the rows reserved for refresh steps is used: trained tiny models, prompts and canvases of many lengths.

    python -m benchmarks.budget_fill [--out benchmarks/results/budget_fill.json]

A step reserves a request's row budget (CachePolicy.max_rows); a padded step computes all of it (docs/architecture.md,
"Rows are exact, budgets are bounds"). The prompt of a wanted length is solved questions before a new one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from benchmarks.machine import caption, machine
from vllm_d2cache.step.step import Step

MODELS = ("models/tiny-llada", "models/tiny-dream")
PROMPTS, CANVASES = (64, 256, 768), (64, 256)
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "threshold 0.9": {"d2cache_threshold": 0.9},
    "rollout_p 0.2": {"d2cache_rollout_p": 0.2},
}
REQUESTS = 4  # of each kind


def main() -> None:
    """Run everything, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/budget_fill.json"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    lines = [line for model in args.models for line in measure(model)]
    facts = machine()
    text = f"{table(lines)}\n\n{REQUESTS} requests a line, steps after the first. {caption(facts)}"
    print(text)
    args.out.with_suffix(".md").write_text(text + "\n")
    args.out.write_text(json.dumps({"machine": facts, "requests": REQUESTS, "lines": lines}, indent=1) + "\n")


def measure(model: str) -> list[dict[str, Any]]:
    """Every setting at every length: one line each."""
    from tqdm import tqdm
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_d2cache.compat.internals import in_process_model_state

    llm = LLM(model, dtype="float32", max_num_seqs=REQUESTS, max_model_len=max(PROMPTS) + max(CANVASES))
    runner = in_process_model_state(llm).steps
    stock = runner.open
    steps: list[tuple[int, int]] = []

    def counting(*args: Any, **kwargs: Any) -> Step:
        step = stock(*args, **kwargs)
        bounds = [runner.canvas.requests[slot].row_budget for slot in step.rows.slots]
        numbers = zip(step.rows.counts, bounds, step.rows.view.step.tolist(), strict=True)
        steps.extend((n, bound) for n, bound, number in numbers if number)
        return step

    runner.open = counting
    tokenizer, lines = llm.get_tokenizer(), []
    cells = [(p, g, name) for p in PROMPTS for g in CANVASES for name in SETTINGS]
    for prompt_len, canvas, name in tqdm(cells, desc=model):
        rng = random.Random(prompt_len)
        prompts = [{"prompt_token_ids": prompt(tokenizer, prompt_len, rng)} for _ in range(REQUESTS)]
        # The whole canvas, as a text without an early end would have it.
        params = SamplingParams(temperature=0, max_tokens=canvas, ignore_eos=True, extra_args=SETTINGS[name])
        steps.clear()
        llm.generate(prompts, params, use_tqdm=False)
        lines.append({"model": model, "prompt": prompt_len, "canvas": canvas, "setting": name, **summary(steps)})
    llm.llm_engine.engine_core.shutdown()
    runner.open = stock
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return lines


def prompt(tokenizer: Any, length: int, rng: random.Random) -> list[int]:
    """Token ids: as many solved questions as fit before an unsolved one, cut at the left to ``length``."""
    from tools.tiny_tasks import KINDS, make_problem

    ids: list[int] = []
    while len(ids) < length:
        problem = make_problem(rng, rng.choice(KINDS), held=True)
        ids = tokenizer.encode(f"{problem.prompt}\n{problem.answer}\n", add_special_tokens=False) + ids
    return ids[-length:]


def summary(steps: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Of the (rows, budget) of all steps after the first: shares of the budget, and rows."""
    fills = [rows / budget for rows, budget in steps]
    return {
        "steps": len(steps),
        "budget": max(budget for _, budget in steps),
        "rows": round(mean(rows for rows, _ in steps), 1),
        "most_rows": max(rows for rows, _ in steps),
        "fill": round(sum(rows for rows, _ in steps) / sum(budget for _, budget in steps), 4),
        "fill_p95": round(quantiles(fills, n=20)[-1], 4),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """For people, in Markdown."""
    head = "| model | prompt | canvas | setting | budget | rows | most | fill | 95th percentile |\n" + "|---" * 9 + "|"
    body = [
        f"| {Path(x['model']).name} | {x['prompt']} | {x['canvas']} | {x['setting']} | {x['budget']} | {x['rows']} | "
        f"{x['most_rows']} | {x['fill']:.0%} | {x['fill_p95']:.0%} |"
        for x in lines
    ]
    return "\n".join([head, *body])


if __name__ == "__main__":
    main()
