"""Cache policies: which positions to recompute. One class a policy, found by name (policy_registry)."""

from __future__ import annotations

from vllm_d2cache.policies.base import CachePolicy
from vllm_d2cache.policy_registry import POLICY_CLASSES

__all__ = ["POLICY_CLASSES", "CachePolicy"]
