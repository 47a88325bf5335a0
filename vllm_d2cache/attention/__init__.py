"""The attention backend handed to vLLM's attention layers."""

from vllm_d2cache.attention.backend import D2CacheAttentionBackend, D2CacheMetadata

__all__ = ["D2CacheAttentionBackend", "D2CacheMetadata"]
