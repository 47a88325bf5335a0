"""Clients that others wrote, against a real `vllm serve`: `make clients`, in an environment without torch and vLLM.

conftest.py of the folder above is not loaded (--confcutdir): it needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.e2e.server import TINY, Server, serve

pytest.importorskip("schemathesis", reason="a client is missing: make clients")
import hypothesis

# The same examples in every run; `make fuzz` takes others each time, and more.
hypothesis.settings.register_profile(
    "clients",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "fuzz", hypothesis.settings.get_profile("clients"), derandomize=False, max_examples=300, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "clients"))

MODEL = TINY
CHAT = [{"role": "user", "content": "Reverse: abcdefgh"}]
ANSWER = "hgfedcba"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vllm serve models/tiny-llada`, no other flag."""
    with serve(tmp_path_factory.mktemp("server") / "log") as running:
        yield running
