"""What policies and decoders may need of the layers beyond fresh K and V: a mechanism each (mechanisms/base.py)."""

from vllm_d2cache.mechanisms.base import (
    FRESH,
    KEYS,
    ROWS,
    Finding,
    Hook,
    Mechanism,
    RequestSize,
    Use,
    Wish,
    Worker,
    finding,
)

__all__ = [
    "FRESH",
    "KEYS",
    "ROWS",
    "Finding",
    "Hook",
    "Mechanism",
    "RequestSize",
    "Use",
    "Wish",
    "Worker",
    "finding",
]
