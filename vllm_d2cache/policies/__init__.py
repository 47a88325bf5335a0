"""Cache policies: which positions to recompute. One class a policy, found by name."""

from __future__ import annotations

from vllm_d2cache.policies.base import CachePolicy
from vllm_d2cache.policies.d2cache import D2CachePolicy
from vllm_d2cache.policies.full import FullPolicy

POLICY_CLASSES: dict[str, type[CachePolicy]] = {cls.name: cls for cls in (D2CachePolicy, FullPolicy)}

__all__ = ["POLICY_CLASSES", "CachePolicy"]
