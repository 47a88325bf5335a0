"""Requests denoised by a small random network of real ops, without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_d2cache.attention.capture import ImportanceCapture, MapPool
from vllm_d2cache.canvas import Request
from vllm_d2cache.config import ServerOptions
from vllm_d2cache.denoiser import Denoiser
from vllm_d2cache.ops.paged_attention import PagedLayout, paged_attention, write_kv
from vllm_d2cache.policies import row_budget
from vllm_d2cache.records import FamilyTraits, SamplingSpec, StepResult, StepRows
from vllm_d2cache.step_graphs import StepGraphs

VOCAB, MASK, HEADS, HEAD, PAGE, LAYERS = 29, 5, 2, 16, 16, 2
TEXTS = [(24, 8), (40, 13)]  # prompt and canvas of each request


class Loop:
    """Attention layers between random matrices.

    Args:
        options: of each request, by plain name; a single mapping is everybody's.
        texts: prompt and canvas length of each request.
    """

    def __init__(
        self,
        device: torch.device,
        options: dict[str, Any] | list[dict[str, Any]],
        sampling: SamplingSpec | None = None,
        texts: list[tuple[int, int]] = TEXTS,
    ) -> None:
        server = ServerOptions({})
        self.texts, self.device = texts, device
        longest = max(p + g for p, g in texts)
        self.denoiser = Denoiser(len(texts), longest, device, FamilyTraits(MASK), server)
        blocks = -(-longest // PAGE)
        self.table = 1 + torch.arange(len(texts) * blocks, dtype=torch.int32, device=device).view(len(texts), -1)
        shape = (1 + self.table.numel(), HEADS, PAGE, 2 * HEAD)
        self.caches = [torch.zeros(shape, device=device) for _ in range(LAYERS)]
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB, HEADS, HEAD, generator=generator).to(device)
        self.place = torch.randn(longest, HEADS, HEAD, generator=generator).to(device)
        self.head = torch.randn(HEADS * HEAD, VOCAB, generator=generator).to(device)
        self.graphs: StepGraphs | None = None
        self.graph_steps = 0
        for slot, (p, g) in enumerate(texts):
            chosen = server.resolve(options[slot] if isinstance(options, list) else options)
            rows = row_budget(chosen, p, g, None)
            prompt = np.random.default_rng(slot).integers(6, VOCAB, p)
            request = Request(f"r{slot}", p, g, chosen, sampling or SamplingSpec(), rows)
            self.denoiser.add(slot, request, prompt)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, layout: PagedLayout, capture: ImportanceCapture
    ) -> torch.Tensor:
        """[N, d] final hidden states (step_graphs.Forward)."""
        hidden = self.embedding[input_ids.long()] + self.place[positions]
        for cache in self.caches:
            write_kv(cache, hidden, hidden.flip(2), layout.slots)
            output = torch.empty_like(hidden)
            paged_attention(hidden, cache, layout, 0.2, output, capture.start_layer(hidden, cache, 0.2))
            hidden = 0.7 * (hidden + output)
        return hidden.flatten(1)

    def layout(self, rows: StepRows) -> PagedLayout:
        """Where the rows of a step go."""
        table = self.table[rows.view.slots]
        page = table[rows.request, rows.positions // PAGE].long() * PAGE + rows.positions % PAGE
        lengths = [sum(self.texts[slot]) for slot in rows.slots]
        return PagedLayout(
            rows.counts, lengths, table, [-1] * len(lengths), torch.where(rows.live, page, -1), rows.keys
        )

    def step(self, padded: bool = True, slots: list[int] | None = None) -> StepResult:
        """What an engine does in a step, from the plans of the last one to those of the next."""
        host = list(range(len(self.texts))) if slots is None else slots
        index = torch.arange(len(self.texts), device=self.device)
        if slots is not None:
            index = torch.tensor(slots, device=self.device)
        if padded:
            assert self.denoiser.can_pad(host)
        rows = self.denoiser.begin(index, host, padded)
        layout = self.layout(rows)
        size = None
        if padded and self.graphs is not None:
            size = self.graphs.fitting(rows.counts, layout.lengths, rows.reads_importance)
        if size is not None:
            assert self.graphs is not None
            self.graph_steps += 1
            step = self.graphs.step(size, rows, layout)
            hidden, importance = step.replay(), step.importance(rows.view.num_positions)
        else:
            wants = rows.reads_importance
            capture = ImportanceCapture(layout, wants, rows.positions, MapPool(), None, rows.bounds)
            hidden = self.forward(rows.input_ids, rows.positions, layout, capture)
            importance = capture.importance(rows.view.num_positions)
        stats = self.denoiser.row_stats(rows, hidden[rows.logits_rows], lambda x: x @ self.head)
        return self.denoiser.finish(rows, stats, importance)
