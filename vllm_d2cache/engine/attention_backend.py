"""vLLM attention backend: writes the refreshed K and V into the pages, attends both ways, leaves maps behind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_d2cache.mechanisms.base import Hook
from vllm_d2cache.mechanisms.partial_forward import PartialForward, RowHook
from vllm_d2cache.ops.dispatch import chosen
from vllm_d2cache.ops.paged_attention import (
    AttentionMaps,
    AttentionShape,
    MapPlan,
    PagedLayout,
    paged_attention,
    write_kv,
)
from vllm_d2cache.ops.rotary import rotate_and_write


@dataclass
class D2CacheMetadata(AttentionMetadata):
    """What the layers of one forward pass share; built by the model state."""

    layout: PagedLayout
    hooks: tuple[Hook, ...] = ()  # of the mechanisms of the step
    written: torch.nn.Module | None = None  # the layer whose fresh K and V are in their pages already

    @cached_property
    def no_maps(self) -> AttentionMaps:
        """Where attention leaves its maps if no mechanism wants them."""
        plan = MapPlan.pack([None] * len(self.layout.counts))
        return AttentionMaps(plan, torch.empty(0, device=self.layout.slots.device))

    def slots(self, first: int, count: int) -> torch.Tensor:
        """[n] int64, n <= count: KV slots of rows from ``first`` on; those behind the text have none."""
        return self.layout.slots[first : first + count]

    def use_layout(self, layout: PagedLayout) -> None:
        """The next layer's rows are those of ``layout``, and those behind the text."""
        self.layout = layout

    def partial_forward(self) -> PartialForward | None:
        """What runs the layers where they differ in their rows; None = they do not."""
        choosing = [hook for hook in self.hooks if isinstance(hook, RowHook)]
        return PartialForward(choosing, self.layout, self.use_layout) if choosing else None


class D2CacheAttentionImpl(AttentionImpl[D2CacheMetadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        unsupported = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
        }
        given = [name for name, value in unsupported.items() if value]
        if given or attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"d2cache attention does not support {', '.join(given) or attn_type}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: D2CacheMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from [N, heads, head size] rows; ``output`` of that shape is written and returned.

        Where keys and values are in their pages already, ``key`` and ``value`` may be those behind the text alone.
        """
        if attn_metadata is None:
            # Memory profiling runs the model before there is a cache.
            return output.zero_()
        layout, hooks = attn_metadata.layout, attn_metadata.hooks
        n = layout.slots.shape[0]  # K and V of rows behind the text go into no page
        if attn_metadata.written is not layer:
            write_kv(kv_cache, key[:n], value[:n], layout.slots)
        maps = attn_metadata.no_maps
        for hook in hooks:
            maps = hook.maps(query[:n], kv_cache, self.scale, layout) or maps
        for hook in hooks:
            layout = hook.before_attention(query[:n], kv_cache, self.scale, layout)
        paged_attention(query[:n], kv_cache, layout, self.scale, output[:n], maps)
        for hook in hooks:
            if hook.extra is not None:
                at = key.shape[0] - (query.shape[0] - n)
                hook.attend(query[n:], key[at:], value[at:], kv_cache, layout, self.scale, output[n:])
        return output


def rotate_into_pages(
    attn: Attention,
    rotation: RotaryEmbedding,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: int = 0,
) -> bool:
    """Rotate [n, heads * head size] queries and keys in place, and put keys and values into their pages: one kernel.

    Args:
        first: the first of these rows among those of the step.

    Returns:
        False where nothing was done, as there is no kernel on the device, no step under way, or a compiler that
        follows the layers.
    """
    if torch.compiler.is_compiling() or chosen(query.device) == "torch":
        return False
    metadata = _metadata(attn)
    if metadata is None:
        return False
    q, k, v = (x.view(x.shape[0], -1, attn.head_size) for x in (query, key, value))
    slots = metadata.slots(first, len(q))
    rotate_and_write(attn.kv_cache, q, k, v, positions, rotation.cos_sin_cache, slots, q, k)
    metadata.written = attn
    return True


def write_into_pages(attn: Attention, key: torch.Tensor, value: torch.Tensor, first: int) -> None:
    """Put [n, kv heads * head size] keys and values of the step's rows from ``first`` on into their pages."""
    if (metadata := _metadata(attn)) is not None:
        slots = metadata.slots(first, len(key))
        k, v = (x.view(x.shape[0], -1, attn.head_size)[: len(slots)] for x in (key, value))
        write_kv(attn.kv_cache, k, v, slots)
        metadata.written = attn


def rows_in_pages(attn: Attention, first: int, count: int) -> int:
    """How many of ``count`` rows of the step, from ``first`` on, have a place in pages: those of the text."""
    metadata = _metadata(attn)
    return count if metadata is None else len(metadata.slots(first, count))


def step_is_under_way() -> bool:
    """Whether rows have places and keys; they have none while memory is being profiled."""
    return isinstance(get_forward_context().attn_metadata, dict)


def _metadata(attn: Attention) -> D2CacheMetadata | None:
    """Of the step under way; None = there is none."""
    if not step_is_under_way():
        return None
    metadata: Any = get_forward_context().attn_metadata
    metadata = metadata[attn.layer_name]
    assert isinstance(metadata, D2CacheMetadata)
    return metadata


class D2CacheMetadataBuilder(AttentionMetadataBuilder[D2CacheMetadata]):
    """Never asked to build: the model state makes the metadata itself, as only it knows the refresh set."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> D2CacheMetadata:
        """Not part of the design; see the class."""
        raise NotImplementedError("d2cache attention metadata comes from D2CacheModelState.prepare_attn")


class D2CacheAttentionBackend(AttentionBackend):
    """Handed to vLLM's Attention layers directly; needs no registration."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "float32"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """Must be a name vLLM's enum knows; CUSTOM is the one for backends from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[D2CacheAttentionImpl]:
        """The layer's implementation."""
        return D2CacheAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[D2CacheMetadataBuilder]:
        """The metadata builder."""
        return D2CacheMetadataBuilder

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Bidirectional is all it does."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Heads outside blocks first: a request in consecutive blocks is then one strided matrix a head."""
        return (KVCacheLayout.LHBNC, KVCacheLayout.LBHNC)


def attention_shape(config: Any) -> AttentionShape:
    """What a rank's attention looks like, from a VllmConfig."""
    model, parallel = config.model_config, config.parallel_config
    return AttentionShape(
        model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel),
        model.get_head_size(),
        config.cache_config.block_size,
        model.dtype,
    )
