"""Before any request is served: a replay of each graph beside the eager step of the same batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_d2cache.graphs.step_graphs import GraphSize, StepBuffers, StepGraphs
from vllm_d2cache.mechanisms.importance import ImportanceCapture, MapPool, keeps_map
from vllm_d2cache.ops.paged_attention import PagedLayout, spans

# Largest relative difference (Euclidean norm) of a row's hidden states or a request's importance. An eager step has
# fewer rows, so that matrix products may add up in another order; what is not copied or baked in is wrong altogether.
_ALLOWED = {torch.float32: 1e-3}
_ALLOWED_16_BIT = 5e-2


class GraphError(RuntimeError):
    """A graph does not do what the eager step does."""


@dataclass(frozen=True)
class CacheSize:
    """The KV cache of a layer.

    Attributes:
        blocks: how many there are; the first is nobody's.
        size: positions of a block.
    """

    blocks: int
    size: int


def check_graphs(graphs: StepGraphs, pages: CacheSize, vocab_size: int, device: torch.device) -> None:
    """Run every graph on a made-up batch, not the one it was recorded with. Overwrites the first KV blocks.

    Args:
        vocab_size: token ids are made up below this.

    Raises:
        GraphError: names the graph and how to do without.
    """
    for size in graphs.sizes:
        trial = _Trial.make(size, graphs.buffers, pages, vocab_size, device)
        difference, allowed = _deviation(graphs, size, trial)
        if not difference <= allowed:  # nor is NaN
            raise GraphError(
                f"the CUDA graph for {size.rows} rows differs from the eager step of the same batch by "
                f"{difference:.2g} (at most {allowed:g} is rounding). Start with --enforce-eager, which uses no "
                "graphs, and please report it."
            )


@dataclass(frozen=True)
class _Trial:
    """Whole texts in pages, and some of their rows to refresh; the last row of each text is padding."""

    text_ids: torch.Tensor  # [sum of T]
    everywhere: torch.Tensor  # [sum of T], positions
    text: PagedLayout
    input_ids: torch.Tensor  # [n]
    positions: torch.Tensor  # [n]
    rows: PagedLayout

    @classmethod
    def make(
        cls, size: GraphSize, buffers: StepBuffers, pages: CacheSize, vocab_size: int, device: torch.device
    ) -> _Trial:
        """A batch that nearly fills ``size``, of two texts where it takes two."""
        max_length, block = buffers.max_length, buffers.block
        requests = min(2, size.requests, pages.blocks - 1)
        room = min(max_length, (pages.blocks - 1) // requests * pages.size)
        generator = torch.Generator().manual_seed(size.rows)
        shares = [size.rows] if requests == 1 else [size.rows // 3, size.rows * 2 // 3]
        counts: list[int] = []
        lengths: list[int] = []
        table = torch.zeros(requests, -(-max_length // pages.size), dtype=torch.int32)
        chosen, ids, everywhere, slots, next_block = [], [], [], [], 1
        for r, share in enumerate(shares):
            length = min(room, 4 * share)
            count = next(n for n in range(min(share, length), -1, -1) if block or keeps_map(n, length))
            blocks = -(-length // pages.size)
            # Blocks in descending order: no two positions of different blocks lie where they would by accident.
            table[r, :blocks] = torch.arange(next_block + blocks - 1, next_block - 1, -1)
            next_block += blocks
            position = torch.arange(length)
            slot = table[r, position // pages.size].long() * pages.size + position % pages.size
            rows = torch.randperm(length, generator=generator)[:count].sort().values
            chosen.append(rows + sum(lengths))
            counts.append(count)
            lengths.append(length)
            ids.append(torch.randint(vocab_size, (length,), generator=generator, dtype=torch.int32))
            everywhere.append(position)
            slots.append(slot)
        row, slot = torch.cat(chosen), torch.cat(slots)
        row_slots = slot[row]
        padding = torch.tensor(counts).cumsum(0) - 1
        row_slots[padding[torch.tensor(counts) > 1]] = -1
        table, row = table.to(device), row.to(device)
        text_ids, positions = torch.cat(ids).to(device), torch.cat(everywhere).to(device)
        return cls(
            text_ids,
            positions,
            PagedLayout(
                lengths, lengths, table, [-1] * requests, slot.to(device), limits=spans(positions, block or None)
            ),
            text_ids[row],
            positions[row],
            PagedLayout(
                counts,
                lengths,
                table,
                [-1] * requests,
                row_slots.to(device),
                limits=spans(positions[row], block or None),
            ),
        )


def _deviation(graphs: StepGraphs, size: GraphSize, trial: _Trial) -> tuple[float, float]:
    """The largest relative difference, and what is allowed."""
    requests, width = len(trial.rows.counts), max(trial.rows.lengths)
    # Keys and values of whole texts first: rows attend to all of them.
    capture = ImportanceCapture(trial.text, [False] * requests, trial.everywhere, MapPool())
    graphs.forward(trial.text_ids, trial.everywhere, trial.text, capture)
    wanted = [not graphs.buffers.block] * requests
    capture = ImportanceCapture(trial.rows, wanted, trial.positions, MapPool(), graphs.tensor_parallel)
    hidden = graphs.forward(trial.input_ids, trial.positions, trial.rows, capture)
    importance = capture.importance(width)
    graphs.buffers.load(size, trial.input_ids, trial.positions, trial.rows, capture.plan)
    replayed = graphs.run(size)[: hidden.shape[0]]
    live = trial.rows.slots >= 0
    pairs = [(replayed[live], hidden[live])]
    if importance is not None:
        pairs.append((graphs.buffers.importance[:requests, :width], importance))
    differences = [((got - want).float().norm(dim=1) / want.float().norm(dim=1)).max() for got, want in pairs]
    return float(torch.stack(differences).max()), _ALLOWED.get(hidden.dtype, _ALLOWED_16_BIT)
