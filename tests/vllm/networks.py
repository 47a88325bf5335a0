"""A network in vLLM's layers, over pages, with the interface of the plain ones: whoever drives those drives this.

The engine has no block-causal attention yet. Here the rows of one forward see positions below one bound, which is all
that the attention operator knows; several blocks at once go as requests of their own over the same pages.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import set_forward_context

from tests.vllm.conftest import Loaded
from vllm_d2cache.engine.attention_backend import D2CacheMetadata
from vllm_d2cache.ops.paged_attention import PagedLayout

PAGE = 16


class PagedNetwork:
    """A loaded model and its K and V; see tests/reference/blocks.py, BlockModel."""

    def __init__(self, loaded: Loaded) -> None:
        self.model = model = loaded.model
        self.vllm_config = loaded.config
        self.config: dict[str, Any] = model.config.to_dict()
        self.attention = [layer.self_attn.attn for layer in model.layers]

    def reset(self, num_positions: int) -> None:
        """Forget everything and make room; the pages are handed out backwards."""
        pages = -(-num_positions // PAGE)
        self.table = torch.arange(pages - 1, -1, -1)
        for layer in self.attention:
            layer.kv_cache = torch.full((pages, layer.num_kv_heads, PAGE, 2 * layer.head_size), torch.nan)

    def rows(self, tokens: list[int], first: int, keys: int) -> torch.Tensor:
        """Logits [n, vocab] of rows from position ``first`` on that see positions below ``keys``."""
        return self._forward(tokens, first, [len(tokens)], [keys])

    def store(self, tokens: list[int], first: int, length: int) -> torch.Tensor:
        """Whole blocks in one forward; logits [n, vocab]."""
        ends = range(first + length, first + len(tokens) + 1, length)
        return self._forward(tokens, first, [length] * len(ends), list(ends))

    def _forward(self, tokens: list[int], first: int, counts: list[int], lengths: list[int]) -> torch.Tensor:
        positions = torch.arange(first, first + len(tokens))
        slots = self.table[positions // PAGE] * PAGE + positions % PAGE
        table = self.table.expand(len(counts), -1)
        layout = PagedLayout(counts, lengths, table, [-1] * len(counts), slots)
        metadata = dict.fromkeys((layer.layer_name for layer in self.attention), D2CacheMetadata(layout))
        with torch.inference_mode(), set_forward_context(metadata, self.vllm_config, num_tokens=len(tokens)):
            return self.model.compute_logits(self.model(torch.tensor(tokens), positions)).float()
