"""Cache policies by name (options/plugins.py). Loading the table loads no policy, and no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_d2cache.options.plugins import Plugins, discover

if TYPE_CHECKING:
    from vllm_d2cache.policies.base import CachePolicy

GROUP = "vllm_d2cache.policies"

BUILT_IN = {
    "d2cache": "vllm_d2cache.policies.d2cache:D2CachePolicy",
    "d2cache_light": "vllm_d2cache.policies.d2cache_light:D2CacheLightPolicy",
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
    inside = _inside(cls)
    if not (inside is cls or (inside.name == cls.name and inside.keeps_blocks)):
        return f"has in_blocks {inside.__name__}, which must keep blocks and have the same name"
    return conflict(cls.uses, cls.takes()) or conflict(inside.uses, inside.takes())


def _inside(cls: Any) -> Any:
    """What it is in blocks; a subclass is not what its parent is there."""
    return vars(cls).get("in_blocks") or cls


POLICY_CLASSES: Plugins[CachePolicy] = Plugins("cache policy", discover(GROUP, BUILT_IN), _problem)


def policy_class(name: str, block: int | None) -> type[CachePolicy]:
    """What the policy of that name is where texts are cut into blocks of ``block`` positions (0, None = they are not).

    One that is no other class there and does not keep blocks has no meaning with them.

    Raises:
        KeyError, PluginError: as ``POLICY_CLASSES`` does.
    """
    cls = POLICY_CLASSES[name]
    inside: type[CachePolicy] = _inside(cls) if block else cls
    return inside
