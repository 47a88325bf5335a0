"""Which implementation runs, seen from outside: whole steps by the kernels give what the twins give."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.triton.paged import Shape, make_batch
from tests.unit.batches import Batch, FakeJob
from vllm_d2cache.mechanisms import importance
from vllm_d2cache.mechanisms.importance import ImportanceCapture, MapPool
from vllm_d2cache.ops import dispatch
from vllm_d2cache.ops.backends import disagreement
from vllm_d2cache.ops.density import certainty_density
from vllm_d2cache.ops.paged_attention import AttentionShape, paged_attention, write_kv
from vllm_d2cache.ops.row_stats import RowParams, tile_stats
from vllm_d2cache.ops.triton import attention, density, pages, rollout, row_stats
from vllm_d2cache.options.sampling import SamplingSpec


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel's wrapper has been called."""
    counter: Counter[str] = Counter()

    def count(module: ModuleType, name: str) -> None:
        stock = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return stock(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(attention, "paged_attention")
    count(pages, "write_kv")
    count(rollout, "batched_rollout")
    count(row_stats, "tile_stats")
    count(density, "certainty_density")
    return counter


@pytest.fixture
def triton_chosen(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Kernels instead of twins on the tests' device."""
    monkeypatch.setitem(dispatch._chosen, device.type, "triton")


def forward(device: torch.device) -> torch.Tensor:
    """Importance after two layers over a first step, a later one, and a request that reads none."""
    torch.manual_seed(0)
    batch = make_batch([33, 4, 5], [33, 40, 20], Shape(4, 2, 32), device)
    capture = ImportanceCapture(batch.layout, [True, True, False], batch.positions, MapPool())
    for _ in range(2):
        query, cache = torch.randn_like(batch.query), batch.cache.clone()  # a layer's pages are its own
        write_kv(cache, query[:, :2], query[:, 2:], batch.layout.slots)
        maps = capture.start_layer(query, cache, 0.3)
        paged_attention(query, cache, batch.layout, 0.3, torch.empty_like(query), maps)
    assert [layer.maps[0] is None for layer in capture.layers] == [True, True]
    assert [layer.maps[1] is None for layer in capture.layers] == [False, False]
    importance = capture.importance(41)
    assert importance is not None
    return importance


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps as small as the test's are computed again, too."""
    monkeypatch.setattr(importance, "_SMALL_MAP", 0)


@pytest.mark.usefixtures("replayed")
def test_the_twins_run_until_another_backend_is_chosen(calls: Counter[str], device: torch.device) -> None:
    assert dispatch.chosen(device) == "torch"
    forward(device)
    assert not calls


@pytest.mark.usefixtures("replayed")
def test_a_forward_pass_by_kernels(calls: Counter[str], monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    want = forward(device)
    monkeypatch.setitem(dispatch._chosen, device.type, "triton")
    got = forward(device)
    # make_batch writes the pages of its three requests, and each layer its rows.
    assert calls == {"write_kv": 5, "paged_attention": 2, "batched_rollout": 1}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("torch.cuda.is_available()", reason="the fake network lives on the CPU")
def test_decoding_by_kernels_gives_the_same_tokens(calls: Counter[str], triton_chosen: None) -> None:
    jobs = [
        FakeJob([1, 2, 3], 6, {"score": "margin", "tokens_per_step": 2}, noise=1),
        FakeJob([4] * 7, 4, {"score": "entropy", "sigma": 2.0}, SamplingSpec(temperature=0.8, top_p=0.8, seed=3), 2),
    ]
    Batch(jobs).run()
    assert calls["tile_stats"] > 0
    assert calls["certainty_density"] > 0
    dispatch._chosen.clear()
    again = [job.fresh() for job in jobs]
    Batch(again).run()
    assert [job.steps for job in jobs] == [job.steps for job in again]


@pytest.mark.gpu
def test_no_op_waits_for_the_device(triton_chosen: None, device: torch.device) -> None:
    shape = Shape(32, 32, 128, 16, torch.bfloat16)
    batch = make_batch([33, 40, 5], [33, 400, 20], shape, device)
    logits = torch.randn(40, 1000, device=device)
    params = RowParams(
        torch.ones(40, device=device),
        torch.full((40,), 0.9, device=device),
        torch.zeros(40, dtype=torch.int64, device=device),
        torch.rand(40, dtype=torch.float64, device=device),
        True,
        True,
    )
    length, sigma = torch.full((3,), 20, device=device), torch.full((3,), 10.0, device=device)
    output = torch.empty_like(batch.query)

    def step() -> None:
        capture = ImportanceCapture(batch.layout, [True, True, False], batch.positions, MapPool())
        for _ in range(2):
            write_kv(batch.cache, batch.query, batch.query, batch.layout.slots)
            maps = capture.start_layer(batch.query, batch.cache, 0.1)
            paged_attention(batch.query, batch.cache, batch.layout, 0.1, output, maps)
        capture.importance(400)
        tile_stats(logits, params, 5, True, True)
        certainty_density(logits[:3, :20] > 0, length, sigma)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_at_start_up_accepts_the_kernels(device: torch.device) -> None:
    assert disagreement("triton", device, AttentionShape(4, 2, 32, 16, torch.float32)) == []
    assert dispatch.chosen(device) == "torch"


def test_the_check_at_start_up_notices_wrong_numbers(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    stock = attention.paged_attention

    def wrong(*args: Any) -> None:
        stock(*args)
        args[4][0] += 1

    monkeypatch.setattr(attention, "paged_attention", wrong)
    (reason,) = disagreement("triton", device, AttentionShape(4, 2, 32, 16, torch.float32))
    assert "outputs" in reason


def test_the_check_at_start_up_reports_what_is_raised(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    def fails(*args: Any) -> None:
        raise ValueError("no such instruction\ndetails")

    monkeypatch.setattr(pages, "write_kv", fails)
    (reason,) = disagreement("triton", device, AttentionShape(4, 2, 32, 16, torch.float32))
    assert "ValueError: no such instruction" in reason


def test_xformers_description_of_the_pages(device: torch.device) -> None:
    """Its mask, written out, over the views we hand it, is paged attention."""
    pytest.importorskip("xformers", reason="xformers is not installed")
    from vllm_d2cache.ops.xformers_attention import _inputs

    batch = make_batch([3, 0, 5], [17, 9, 40], Shape(6, 2, 32), device)
    batch.layout.block_table[batch.layout.block_table > 1000] = 0  # written out, unused entries are read
    q, k, v, bias = _inputs(batch.query, batch.cache, batch.layout)
    mask = bias.materialize((1, q.shape[1], 16 * bias.block_tables.numel()), device=device)
    keys = mask.shape[-1]
    q, k, v = (x.flatten(2, 3)[0, :n].transpose(0, 1) for x, n in ((q, q.shape[1]), (k, keys), (v, keys)))
    got = torch.softmax(q @ k.nan_to_num(0).transpose(1, 2) * 0.3 + mask, -1) @ v.nan_to_num(0)
    want = torch.empty_like(batch.query)
    paged_attention(batch.query, batch.cache, batch.layout, 0.3, want, [None] * 3)
    torch.testing.assert_close(got.transpose(0, 1), want[None][0], rtol=1e-4, atol=1e-5)


def test_which_pages_the_triton_kernel_of_xformers_takes() -> None:
    """But for the device, nothing is against pages of 64; doctor and the documents say so."""
    pytest.importorskip("xformers", reason="xformers is not installed")
    from xformers.ops import fmha

    from vllm_d2cache.ops.xformers_attention import _not_supported
    from vllm_d2cache.ops.xformers_build import PAGE

    def against(size: int) -> list[str]:
        shape = AttentionShape(4, 2, 64, size, torch.float16)
        found = _not_supported(fmha, fmha.triton_splitk.FwOp, torch.device("cpu"), shape)
        return [reason for reason in found if not reason.startswith("device=cpu")]

    assert against(PAGE) == against(2 * PAGE) == []
    assert "page size" in against(16)[0]
    assert "page size" in against(PAGE // 2)[0]


@pytest.mark.skipif("torch.cuda.is_available()", reason="a dry run is for machines without a GPU")
def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu import __main__ as benchmark

    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--dry-run"])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "attention map" in printed
    assert "not measured: xformers for tiny: " in printed
    assert "nothing written" in printed
