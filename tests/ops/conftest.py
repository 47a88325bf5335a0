"""Every test of this folder runs with poisoned uninitialised memory."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def poisoned_memory(poison_empty: None) -> None:
    """See tests/conftest.py."""
