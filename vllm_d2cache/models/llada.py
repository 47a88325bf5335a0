"""LLaDA in vLLM's layers, so that tensor parallelism and quantised weights come with them.

A llama-type transformer without a causal mask (d2cache.md, section 9). ``ff_out`` names both the LM head and each
block's down projection in the checkpoint; the mapper below keeps them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from vllm_d2cache.attention.backend import D2CacheAttentionBackend
from vllm_d2cache.models.configs import LLaDAConfig
from vllm_d2cache.records import FamilyTraits
from vllm_d2cache.stored_outputs import PartialForward


class LLaDAAttention(nn.Module):
    """Self-attention over all positions."""

    def __init__(
        self,
        config: LLaDAConfig,
        cache_config: CacheConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        head_size = config.d_model // config.n_heads
        world = get_tensor_model_parallel_world_size()
        self.qkv_proj = QKVParallelLinear(
            config.d_model,
            head_size,
            config.n_heads,
            config.n_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.attn_out = RowParallelLinear(
            config.d_model, config.d_model, bias=False, quant_config=quant_config, prefix=f"{prefix}.attn_out"
        )
        num_heads = config.n_heads // world
        num_kv_heads = max(1, config.n_kv_heads // world)
        self.sizes = [num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size]
        # The published model rotates in fp32 whatever its dtype (rope_full_precision).
        self.rotary_emb = get_rope(
            head_size,
            max_position=config.max_sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            is_neox_style=True,
            dtype=torch.float32,
        )
        self.attn = Attention(
            num_heads,
            head_size,
            head_size**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=D2CacheAttentionBackend,
        )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] -> [N, d]."""
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if q.dtype == torch.float32:
            q, k = self.rotary_emb(positions, q, k)
        else:
            q32, k32 = self.rotary_emb(positions, q.float(), k.float())
            q, k = q32.to(v.dtype), k32.to(v.dtype)
        out, _ = self.attn_out(self.attn(q, k, v))
        return out

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] normed rows -> [n, kv heads, head size]."""
        # The joint projection, as its weights may be packed or quantised: they are not for others to cut.
        value = self.qkv_proj(hidden)[0].split(self.sizes, dim=-1)[2]
        return value.reshape(len(hidden), -1, self.attn.head_size)


class LLaDABlock(nn.Module):
    """Attention and a gated MLP, each behind an RMS norm."""

    def __init__(
        self,
        config: LLaDAConfig,
        cache_config: CacheConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.self_attn = LLaDAAttention(config, cache_config, quant_config, f"{prefix}.self_attn")
        self.gate_up_proj = MergedColumnParallelLinear(
            config.d_model,
            [config.mlp_hidden_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.ff_out = RowParallelLinear(
            config.mlp_hidden_size,
            config.d_model,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.ff_out",
        )
        self.act = SiluAndMul()
        self.attn_norm = RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.ff_norm = RMSNorm(config.d_model, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, d] and the residual stream [N, d] before it is added -> the same after the block."""
        if residual is None:
            residual = hidden
            hidden = self.attn_norm(hidden)
        else:
            hidden, residual = self.attn_norm(hidden, residual)
        hidden = self.self_attn(positions, hidden)
        hidden, residual = self.ff_norm(hidden, residual)
        gate_up, _ = self.gate_up_proj(hidden)
        hidden, _ = self.ff_out(self.act(gate_up))
        return hidden, residual

    def values(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[n, kv heads, head size] values of rows [n, d] before the block (stored_outputs.Layer)."""
        normed, _ = self.attn_norm(hidden, residual)
        return self.self_attn.values(normed)

    @property
    def pages(self) -> torch.Tensor:
        """[blocks, kv heads, block size, 2 * head size] K and V of this block (stored_outputs.Layer)."""
        return self.self_attn.attn.kv_cache


class LLaDAModelLM(nn.Module):
    """The architecture name of the published checkpoints (Base, Instruct, 1.5 and their kin)."""

    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["ff_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.transformer.wte.": "wte.",
            "model.transformer.ln_f.": "ln_f.",
            "model.transformer.ff_out.": "lm_head.",
            "model.transformer.blocks.": "blocks.",
        },
        orig_to_new_substr={".attn_out.": ".self_attn.attn_out."},
        orig_to_new_stacked={
            ".q_proj.": (".self_attn.qkv_proj.", "q"),
            ".k_proj.": (".self_attn.qkv_proj.", "k"),
            ".v_proj.": (".self_attn.qkv_proj.", "v"),
            ".ff_proj.": (".gate_up_proj.", 0),
            ".up_proj.": (".gate_up_proj.", 1),
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LLaDAConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        self.config = config
        self.quant_config = quant_config
        self.traits = FamilyTraits(config.mask_token_id)
        # embedding_size may exceed vocab_size; the rows beyond it are padding and never predicted.
        self.wte = VocabParallelEmbedding(
            config.embedding_size,
            config.d_model,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "wte"),
        )
        self.blocks = nn.ModuleList(
            LLaDABlock(config, vllm_config.cache_config, quant_config, maybe_prefix(prefix, f"blocks.{i}"))
            for i in range(config.n_layers)
        )
        self.ln_f = RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.lm_head = ParallelLMHead(
            config.embedding_size,
            config.d_model,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.weight_tying:
            self.lm_head = self.lm_head.tie_weights(self.wte)
        self.logits_processor = LogitsProcessor(config.embedding_size, config.vocab_size)
        # Set by the model state while a step is under way: the sampler then applies the head itself, a tile of rows
        # at a time, and compute_logits hands the hidden states through.
        self.head_in_sampler = False
        # Likewise, where a request's policy stores outputs of layers: runs the layers in place of the plain loop.
        self.partial_forward: PartialForward | None = None

    @staticmethod
    def get_model_state_cls() -> type:
        """How vLLM's model runner finds the state class that conducts a step."""
        from vllm_d2cache.model_state import D2CacheModelState

        return D2CacheModelState

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, d]."""
        return self.wte(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: object | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N] token ids at [N] absolute positions, in any order -> [N, d] final hidden states."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        if self.partial_forward is not None:
            hidden, residual = self.partial_forward.run(self.blocks, positions, hidden)
        else:
            for block in self.blocks:
                hidden, residual = block(positions, hidden, residual)
        hidden, _ = self.ln_f(hidden, residual)
        return hidden

    def lm_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, vocab] logits."""
        return self.logits_processor(self.lm_head, hidden)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, vocab] logits, or ``hidden`` itself within a step (see ``head_in_sampler``)."""
        return hidden if self.head_in_sampler else self.lm_logits(hidden)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint in LLaDA's layout.

        Raises:
            ValueError: a tensor is unknown, or one is missing; the message has its name.
        """
        seen: set[str] = set()

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                seen.add(name)
                # A tied checkpoint may carry the head all the same.
                if not (self.config.weight_tying and name == _HEAD):
                    yield name, tensor

        loaded = AutoWeightsLoader(self).load_weights(noted(), mapper=self.hf_to_vllm_mapper)
        # Quantised checkpoints have other tensors; vLLM's own layers check those.
        missing = expected_tensors(self.config) - seen if self.quant_config is None else set()
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        return loaded


_HEAD = "model.transformer.ff_out.weight"
_BLOCK_TENSORS = (
    "attn_norm",
    "q_proj",
    "k_proj",
    "v_proj",
    "attn_out",
    "ff_norm",
    "ff_proj",
    "up_proj",
    "ff_out",
)


def expected_tensors(config: LLaDAConfig) -> set[str]:
    """Names of all tensors of an unquantised checkpoint."""
    names = {"model.transformer.wte.weight", "model.transformer.ln_f.weight"}
    if not config.weight_tying:
        names.add(_HEAD)
    for i in range(config.n_layers):
        names |= {f"model.transformer.blocks.{i}.{name}.weight" for name in _BLOCK_TENSORS}
    return names
