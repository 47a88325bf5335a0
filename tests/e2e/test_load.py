"""A small run of benchmarks/load.py against the shared server."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.load import load
from tests.e2e.server import Server

pytestmark = [pytest.mark.vllm, pytest.mark.engine]


def test_mixed_load_with_aborts_and_bad_requests(server: Server) -> None:
    report = asyncio.run(load(server.url, requests=60, concurrency=12, distinct=14, seed=1))
    assert report["problems"] == []
    assert {"answered", "refused", "hung up"} == set(report["outcomes"])
    assert sum(report["outcomes"].values()) == 60
