"""A small run of benchmarks/load against the shared server."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.load.run import Plan, load
from tests.e2e.server import Server
from vllm_d2cache.requests.resolve import DECODERS

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


def test_mixed_load_with_aborts_and_bad_requests(server: Server) -> None:
    # 128 places are vLLM's default on CPU; the shared server has no table for decoder pc.
    decoders = tuple(name for name in DECODERS if name != "pc")
    plan = Plan(requests=60, concurrency=12, distinct=14, seed=1, places=128, decoders=decoders)
    report = asyncio.run(load(server.url, server.process.pid, plan))
    assert report["problems"] == []
    assert set(report["outcomes"]) >= {"answered", "refused", "hung up"}
    assert sum(report["outcomes"].values()) == 60
