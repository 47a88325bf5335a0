"""Layers that compute their rows in parts give what they give of all rows at a time, and take less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.forward_context import set_forward_context

from tests.ops.live import LiveMemory
from tests.reference.blocks import BLOCK_ORACLE
from tests.reference.llada_moe import write_random
from tests.reference.oracle import ORACLE
from tests.vllm.conftest import Loaded
from tests.vllm.networks import PAGE, PagedNetwork
from vllm_d2cache.canvas.rows import ExtraRows
from vllm_d2cache.engine.attention_backend import D2CacheMetadata
from vllm_d2cache.mechanisms.base import Hook
from vllm_d2cache.models.parts import in_parts, parts
from vllm_d2cache.ops.paged_attention import PagedLayout
from vllm_d2cache.ops.shadow_attention import ShadowRows, shadow_attention

pytestmark = pytest.mark.vllm

Load = Callable[..., Loaded]
ROWS, BEHIND = 75, 9


class Watching(Hook):
    """Keeps the queries that hooks are shown, and attends from rows behind the text."""

    def __init__(self, extra: ExtraRows) -> None:
        self.extra, self.queries = extra, []

    def maps(self, query: torch.Tensor, *rest: Any) -> None:
        self.queries.append(query.clone())

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
        kv_cache, layout, scale, output = rest
        assert len(query) == len(key) == len(value) == BEHIND
        shadows = ShadowRows(self.extra.counts, self.extra.positions)
        shadow_attention(query, key, value, kv_cache, layout, shadows, scale, output)


def run(network: PagedNetwork, most: int) -> tuple[list[torch.Tensor], int]:
    """Final hidden states, pages, and queries, of two requests and rows behind the text; and the peak in bytes."""
    model = network.model
    for layer in (model, *model.layers):
        layer.part_rows = most
    network.reset(2 * ROWS)
    pages = -(-ROWS // PAGE)
    positions = torch.arange(ROWS).repeat(2)
    slots = torch.cat([table[torch.arange(ROWS) // PAGE] * PAGE for table in network.table.split(pages)[:2]])
    slots += positions % PAGE
    behind = torch.arange(BEHIND) + 20
    layout = PagedLayout([ROWS, ROWS], [ROWS, ROWS], network.table[: 2 * pages].view(2, pages), [-1, -1], slots)
    hook = Watching(ExtraRows([BEHIND, 0], behind, behind.int(), behind))
    names = [layer.layer_name for layer in network.attention]
    metadata = dict.fromkeys(names, D2CacheMetadata(layout, (hook,)))
    ids = torch.randint(0, 300, (2 * ROWS + BEHIND,), generator=torch.Generator().manual_seed(0))
    context = set_forward_context(metadata, network.vllm_config, num_tokens=len(ids))
    with torch.inference_mode(), context, LiveMemory() as live:
        hidden = model(ids, torch.cat([positions, behind]))
    written = [layer.kv_cache.transpose(1, 2).flatten(0, 1)[slots] for layer in network.attention]
    return [hidden, *written, *hook.queries], live.peak


def checkpoint(family: str, directory: Path) -> Path:
    if family == "llada_moe":
        return write_random(directory / "model")
    return ORACLE / family if (ORACLE / family).exists() else BLOCK_ORACLE / family


@pytest.mark.parametrize("family", ["llada", "dream", "llada_moe", "llada2", "sdar"])
def test_any_size_of_parts_gives_the_same(family: str, load: Load, tmp_path: Path) -> None:
    network = PagedNetwork(load(checkpoint(family, tmp_path), dtype="float32"))
    whole, peak = run(network, 1000)
    assert len(whole) == 1 + 2 * len(network.attention)
    assert not any(x.isnan().any() for x in whole)
    for most in (1, 7, 64, 149, 150, 158):  # ends in a request, with the text, among the rows behind it
        got, less = run(network, most)
        for x, y in zip(got, whole, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        assert less < peak or most > 100


def test_memory_of_a_part(load: Load) -> None:
    """Residual stream, queries and outputs of attention of all rows; whatever else there is, of a part of them."""
    network = PagedNetwork(load(ORACLE / "llada", dtype="float32"))
    shape = network.model.shape
    width = 2 * shape.hidden_size + 2 * shape.q_size
    rows = 2 * ROWS + BEHIND
    for most in (5, 10, 20):
        _, peak = run(network, most)
        part = most * (shape.q_size + 2 * shape.kv_size + 3 * shape.hidden_size + 3 * shape.intermediate_size)
        assert peak - _kept(network, rows) <= 4 * (rows * width + part) + 64 * rows


def _kept(network: PagedNetwork, rows: int) -> int:
    """Bytes of the queries that the test's hook keeps, and of the embeddings."""
    shape = network.model.shape
    return 4 * rows * (len(network.attention) * shape.q_size + shape.hidden_size)


def test_rows_of_other_layers_too(load: Load) -> None:
    """What hooks ask of a layer, keys and values of some rows, comes in parts as well."""
    layer = load(ORACLE / "dream", dtype="float32").model.layers[1]
    generator = torch.Generator().manual_seed(1)
    hidden, residual = torch.randn(2, 40, layer.self_attn.qkv_proj.input_size, generator=generator)
    positions = torch.arange(40)

    def asked(most: int) -> list[torch.Tensor]:
        layer.part_rows = most
        with torch.inference_mode():
            both = layer.keys_and_values(positions, hidden.clone(), residual.clone())
            return [layer.values(hidden.clone(), residual.clone()), *both]

    for got, want in zip(asked(7), asked(40), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_parts() -> None:
    assert [(p.start, p.stop) for p in parts(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert [(p.start, p.stop) for p in parts(6, 3)] == [(0, 3), (3, 6)]
    x = torch.arange(7)
    double, square = in_parts(lambda x: (2 * x, x * x), 3, x)
    assert double.equal(2 * x)
    assert square.equal(x * x)
