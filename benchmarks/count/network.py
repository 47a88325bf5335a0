"""A small network on whatever device: attention over pages by the real ops and hooks, between random matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_d2cache.mechanisms.base import Hook
from vllm_d2cache.mechanisms.partial_forward import PartialForward, RowHook
from vllm_d2cache.ops.paged_attention import AttentionMaps, MapPlan, PagedLayout, paged_attention, write_kv

LAYERS, HEADS, HEAD, VOCAB = 4, 2, 8, 32
WIDTH = HEADS * HEAD


@dataclass
class Pass:
    """What the layers of one forward pass share."""

    layout: PagedLayout
    hooks: tuple[Hook, ...]

    def use_layout(self, layout: PagedLayout) -> None:
        """The next layer's rows are those of ``layout``."""
        self.layout = layout


class Layer:
    """See partial_forward.Layer."""

    def __init__(self, pages: torch.Tensor, matrix: torch.Tensor) -> None:
        self.pages, self.matrix = pages, matrix
        self.step: Pass | None = None

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.matrix).view(-1, HEADS, HEAD)

    def __call__(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.step is not None
        layout, hooks, n = self.step.layout, self.step.hooks, self.step.layout.slots.shape[0]
        stream = hidden if residual is None else hidden + residual
        query = self._project(stream)
        key, value = query.flip(2), query * 0.5
        output = torch.zeros_like(query)
        write_kv(self.pages, key[:n], value[:n], layout.slots)
        maps = AttentionMaps(MapPlan.pack([None] * len(layout.counts)), output.new_zeros(0))
        for hook in hooks:
            maps = hook.maps(query[:n], self.pages, 0.3, layout) or maps
        for hook in hooks:
            layout = hook.before_attention(query[:n], self.pages, 0.3, layout)
        paged_attention(query[:n], self.pages, layout, 0.3, output[:n], maps)
        for hook in hooks:
            if hook.extra is not None:
                hook.attend(query[n:], key[n:], value[n:], self.pages, layout, 0.3, output[n:])
        return output.flatten(1) * 0.5, stream

    def values(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._project(hidden + residual) * 0.5

    def keys_and_values(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query = self._project(hidden + residual)
        return query.flip(2), query * 0.5

    def value_projection(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.matrix.t().float(), self.matrix.new_zeros(WIDTH)


class Network:
    """Embeddings, layers, head.

    Args:
        blocks: KV blocks of each layer.
        page: positions of a block.
    """

    def __init__(self, blocks: int, page: int, max_len: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(3)

        def made(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(device)

        self.embedding, self.place, self.head = made(VOCAB, WIDTH), made(max_len, WIDTH), made(WIDTH, VOCAB)
        shape = (blocks, HEADS, page, 2 * HEAD)
        self.layers: Sequence[Layer] = [
            Layer(torch.zeros(shape, device=device), made(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(LAYERS)
        ]

    def hidden(
        self, input_ids: torch.Tensor, positions: torch.Tensor, layout: PagedLayout, hooks: tuple[Hook, ...]
    ) -> torch.Tensor:
        """[N, d] final hidden states."""
        step = Pass(layout, hooks)
        for layer in self.layers:
            layer.step = step
        hidden = self.embedding[input_ids.long()] + self.place[positions]
        choosing = [hook for hook in hooks if isinstance(hook, RowHook)]
        residual: torch.Tensor | None = None
        if choosing:
            hidden, residual = PartialForward(choosing, layout, step.use_layout).run(self.layers, positions, hidden)
        else:
            for layer in self.layers:
                hidden, residual = layer(positions, hidden, residual)
        assert residual is not None
        return hidden + residual

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, vocab]."""
        return hidden @ self.head
