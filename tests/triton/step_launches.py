"""Every kernel of a step outside the layers, launched in each of its specialisations; compiled, not run."""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget

from tests.triton.hopper import HOPPER, Launch, launches
from vllm_d2cache.ops.refresh_choice import Outcome
from vllm_d2cache.ops.triton import ranking, refresh_choice, row_sampling, step_rows, texts

MAX_LENGTH, SLOTS = 4096, 8
KERNELS = {
    *("_read_kernel", "_commit_kernel", "_emit_kernel", "_choose_kernel", "_pack_kernel", "_store_kernel"),
    *("_spread_kernel", "_page_slots_kernel", "_sampling_kernel", "_entropy_kernel"),
    *("_masked_kernel", "_refresh_kernel"),
}


def step_kernels(rows: int = 3, prompt: int = 700, canvas: int = 256, target: GPUTarget = HOPPER) -> list[Launch]:
    """Of a batch of ``rows`` requests alike."""
    total = prompt + canvas
    slots, first = torch.arange(rows), torch.full((rows,), prompt)
    flags, ones = torch.zeros(rows, canvas, dtype=torch.bool), torch.ones(rows)
    tokens = torch.zeros(SLOTS, MAX_LENGTH, dtype=torch.int32)
    plans = [torch.zeros(SLOTS, MAX_LENGTH, dtype=torch.bool) for _ in range(3)]
    counts, numbers = torch.zeros(7, SLOTS, dtype=torch.int64), torch.ones(SLOTS, 8)
    stop_ids, score = torch.zeros(SLOTS, 2, dtype=torch.int32), torch.zeros(rows, canvas)
    whole, whole_option = torch.zeros(rows, dtype=torch.int64), torch.zeros(SLOTS, dtype=torch.int64)
    with launches(target) as found:
        now = texts.read_texts(slots, *plans[:2], counts, numbers, canvas, None)
        texts.read_texts(slots, *plans[:2], counts, numbers, canvas, 32)
        text = (slots, now.integers, now.masked)
        for some, ordered in ((None, False), (flags[:, 0], True)):
            step_rows.choose_rows(slots, *plans, now.integers, flags, flags, some, some, ordered, 1, total)
            step_rows.store_plan(slots, plans[0][:rows, :total], flags, None if some is None else flags, tuple(plans))
            every = None if some is None else flags
            edits = texts.Edits(flags, score.int(), every, every, some)
            tables = (tokens, *plans[:2], counts, stop_ids, 7, total)
            texts.commit_texts(*text, edits, *tables, None if some is None else 32)
            texts.emit_texts(slots, now.integers, whole, flags, flags, (some, some), tokens, counts)
        step_rows.store_plan(slots, plans[0][:rows, :total], None, None, tuple(plans))
        packed = step_rows.pack_rows(
            slots, plans[0][:rows, :total], flags, torch.zeros(2, rows, dtype=torch.int64), tokens, first, 40, 20
        )
        table = torch.zeros(rows, MAX_LENGTH // 16, dtype=torch.int32)
        step_rows.page_slots(table, packed.request, packed.positions, packed.live, 16)
        seeds = (whole_option, whole_option)
        for entropy, drawn in ((None, None), (torch.zeros(20), seeds)):
            step_rows.spread(flags, packed.place, torch.zeros(20), packed.who, entropy)
            row_sampling.sampling_of_rows(packed.who, packed.slot, slots, first, torch.zeros(SLOTS, 3), drawn)
        for threshold in (None, ones):
            for factor in (None, ones):
                ranking.choose_commits(score, flags, whole, threshold, factor)
        ranking.choose_by_entropy(score, flags, whole, score, ones)
        outcome = Outcome(flags, score, flags[:, 0], whole)
        memory = (torch.zeros(SLOTS, MAX_LENGTH), whole_option, whole_option)
        refresh_choice.select_masked(slots, *memory, score, now.integers, flags, flags, outcome)
        importance, columns = (
            torch.zeros(rows, MAX_LENGTH)[:, :total],
            (whole_option.double(), whole_option, whole_option),
        )
        refresh_choice.choose_refresh(slots, importance, flags, flags, flags, now.integers, *columns, 1)
    return found
