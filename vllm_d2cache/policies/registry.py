"""Cache policies by name (options/plugins.py). Loading the table loads no policy, and no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_d2cache.options.plugins import Plugins, discover

if TYPE_CHECKING:
    from vllm_d2cache.policies.base import CachePolicy

GROUP = "vllm_d2cache.policies"

BUILT_IN = {
    "d2cache": "vllm_d2cache.policies.d2cache:D2CachePolicy",
    "full": "vllm_d2cache.policies.full:FullPolicy",
    "prefix": "vllm_d2cache.policies.fast_dllm:PrefixPolicy",
    "dual": "vllm_d2cache.policies.fast_dllm:DualPolicy",
    "dkv": "vllm_d2cache.policies.dkv:DKVPolicy",
    "vicinity": "vllm_d2cache.policies.vicinity:VicinityPolicy",
    "entropy": "vllm_d2cache.policies.entropy:EntropyPolicy",
    "window_diffusion": "vllm_d2cache.policies.window_diffusion:WindowDiffusionPolicy",
    "streaming": "vllm_d2cache.policies.streaming:StreamingPolicy",
    "dllm_cache": "vllm_d2cache.policies.dllm_cache:DLLMCachePolicy",
    "spa": "vllm_d2cache.policies.spa:SPAPolicy",
    "sparse_dllm": "vllm_d2cache.policies.sparse_dllm:SparseDLLMPolicy",
    "es": "vllm_d2cache.policies.es:ESPolicy",
    "elastic": "vllm_d2cache.policies.elastic:ElasticPolicy",
    "block": "vllm_d2cache.policies.block:BlockPolicy",
}


def _problem(cls: Any) -> str | None:
    from vllm_d2cache.mechanisms.base import conflict
    from vllm_d2cache.policies.base import CachePolicy

    if not (isinstance(cls, type) and issubclass(cls, CachePolicy)):
        return "is not a subclass of vllm_d2cache.policies.CachePolicy"
    return conflict(cls.uses, cls.takes())


POLICY_CLASSES: Plugins[CachePolicy] = Plugins("cache policy", discover(GROUP, BUILT_IN), _problem)
