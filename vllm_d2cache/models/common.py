"""The network all families share, in vLLM's layers, so that tensor parallelism and quantised weights come with them.

A llama-type transformer without a causal mask (docs/methods/d2cache.md, section 9). A family adds the names its
checkpoints give to the tensors, and its configuration the sizes and switches (shape.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from vllm_d2cache.engine.attention_backend import D2CacheAttentionBackend, rotate_into_pages
from vllm_d2cache.engine.weight_check import finite_weights
from vllm_d2cache.mechanisms.partial_forward import PartialForward
from vllm_d2cache.models.configs import DiffusionLMConfig
from vllm_d2cache.models.experts import SparseMLP
from vllm_d2cache.models.mlp import GatedMLP
from vllm_d2cache.models.shape import TransformerShape

# A buffer that some tools save; it follows from config.json.
_REDUNDANT = "rotary_emb.inv_freq"

# Unit vectors that are projected at one time.
_UNITS_AT_ONCE = 256

# Three tensors of a checkpoint that are one here.
QKV = {f".{name}_proj.": (".qkv_proj.", name) for name in "qkv"}


class SelfAttention(nn.Module):
    """Self-attention over all positions."""

    def __init__(
        self,
        shape: TransformerShape,
        cache_config: CacheConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        head_size, world = shape.head_size, get_tensor_model_parallel_world_size()
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size,
            head_size,
            shape.num_heads,
            shape.num_kv_heads,
            bias=shape.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            shape.q_size, shape.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        num_heads = shape.num_heads // world
        num_kv_heads = max(1, shape.num_kv_heads // world)
        self.sizes = [num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size]
        self.q_norm = RMSNorm(head_size, eps=shape.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(head_size, eps=shape.norm_eps) if shape.qk_norm else None
        self.rope_in_fp32 = shape.rope_in_fp32
        rotary_dim = head_size if shape.rotary_dim is None else shape.rotary_dim
        self.rotary_emb = get_rope(
            head_size,
            max_position=shape.max_positions,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "partial_rotary_factor": rotary_dim / head_size,
            },
            is_neox_style=True,
            dtype=torch.float32 if shape.rope_in_fp32 else None,
        )
        assert self.rotary_emb.rotary_dim == rotary_dim  # vLLM rounds the product of both
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
        q, k, v = self._project(hidden)
        if not rotate_into_pages(self.attn, self.rotary_emb, positions, q, k, v):
            q, k = self._rotate(positions, q, k)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [N, heads * head size], not yet rotated."""
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _each_head(self.q_norm, q), _each_head(self.k_norm, k)
        return q, k, v

    def _rotate(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys by their positions; ``q`` and ``k`` may be overwritten."""
        if self.rope_in_fp32 and q.dtype != torch.float32:
            q32, k32 = self.rotary_emb(positions, q.float(), k.float())
            return q32.to(q.dtype), k32.to(k.dtype)
        q, k = self.rotary_emb(positions, q, k)
        return q, k

    def keys_and_values(self, positions: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, d] normed rows -> two of [n, kv heads, head size], as attention writes them to the cache."""
        query, key, value = self._project(hidden)
        _, key = self._rotate(positions, query, key)
        shape = (len(hidden), -1, self.attn.head_size)
        return key.reshape(shape), value.reshape(shape)

    def value_projection(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [kv heads * head size, d] and bias, float32 (value_directions.Projects).

        The weight is what the projection makes of unit vectors: it does not matter how it is packed or quantised.
        """
        projection, size = self.qkv_proj, self.sizes[2]
        units = torch.eye(projection.input_size, dtype=dtype, device=self.attn.kv_cache.device)
        parts = [projection.quant_method.apply(projection, rows, None) for rows in units.split(_UNITS_AT_ONCE)]
        weight = torch.cat([part[:, -size:].float() for part in parts]).t()
        return weight, weight.new_zeros(size) if projection.bias is None else projection.bias[-size:].float()

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] normed rows -> [n, kv heads, head size]."""
        # The joint projection, as its weights may be packed or quantised: they are not for others to cut.
        value = self.qkv_proj(hidden)[0].split(self.sizes, dim=-1)[2]
        return value.reshape(len(hidden), -1, self.attn.head_size)


def _each_head(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """``norm`` over each head of [N, heads * head size]."""
    return norm(x.reshape(-1, norm.weight.shape[0])).view(x.shape)


class TransformerLayer(nn.Module):
    """Attention and an MLP, each behind an RMS norm."""

    def __init__(
        self,
        shape: TransformerShape,
        number: int,
        cache_config: CacheConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(shape, cache_config, quant_config, f"{prefix}.self_attn")
        mixture = shape.mixture_of(number)
        self.mlp: nn.Module
        if mixture is None:
            self.mlp = GatedMLP(shape.hidden_size, shape.intermediate_size, quant_config, f"{prefix}.mlp")
        else:
            self.mlp = SparseMLP(shape.hidden_size, mixture, quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, d] and the residual stream [N, d] before it is added -> the same after the layer."""
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual

    def values(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[n, kv heads, head size] values of rows [n, d] before the layer (stored_outputs.Layer)."""
        normed, _ = self.input_layernorm(hidden, residual)
        return self.self_attn.values(normed)

    def keys_and_values(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, kv heads, head size] of rows [n, d] before the layer (stored_outputs.Layer)."""
        normed, _ = self.input_layernorm(hidden, residual)
        return self.self_attn.keys_and_values(positions, normed)

    def value_projection(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the value projection (value_directions.Projects)."""
        return self.self_attn.value_projection(dtype)

    @property
    def pages(self) -> torch.Tensor:
        """[blocks, kv heads, block size, 2 * head size] K and V of this layer (stored_outputs.Layer)."""
        return self.self_attn.attn.kv_cache


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden": 0})
class LayerStack(nn.Module):
    """The layers one after the other and the last norm: what torch.compile gets, where the operator chooses it.

    The model owns both; forward passes in which layers differ in their rows (mechanisms/partial_forward.py) call them.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layers: nn.ModuleList, norm: RMSNorm) -> None:
        super().__init__()
        self._parts = [layers, norm]  # not as submodules: their tensors have one name each

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] embeddings -> [N, d] final hidden states."""
        layers, norm = self._parts
        residual = None
        for layer in layers:
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = norm(hidden, residual)
        return hidden


@dataclass
class ModelStep:
    """What the model state sets while a step is under way.

    Attributes:
        head_in_sampler: the sampler applies the LM head itself, a tile of rows at a time.
        partial_forward: runs the layers in place of the plain loop, where they differ in their rows.
        replay: does the step as a CUDA graph, its inputs being in place.
    """

    head_in_sampler: bool = False
    partial_forward: PartialForward | None = None
    replay: Callable[[], torch.Tensor] | None = None

    def clear(self) -> None:
        """The step is over."""
        self.head_in_sampler, self.partial_forward, self.replay = False, None, None


class DiffusionLM(nn.Module):
    """A masked diffusion language model; subclasses name the tensors of their checkpoints."""

    hf_to_vllm_mapper: ClassVar[WeightsMapper]
    head_tensor: ClassVar[str]
    """The LM head's name in a checkpoint. A tied checkpoint may carry it all the same."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: DiffusionLMConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        shape = config.shape()
        self.config = config
        self.shape = shape
        self.quant_config = quant_config
        self.traits = config.traits()
        # embedding_size may exceed vocab_size; the rows beyond it are padding and never predicted.
        self.embed_tokens = VocabParallelEmbedding(
            shape.embedding_size,
            shape.hidden_size,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "embed_tokens"),
        )
        self.layers = nn.ModuleList(
            TransformerLayer(shape, i, vllm_config.cache_config, quant_config, maybe_prefix(prefix, f"layers.{i}"))
            for i in range(shape.num_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.stack = LayerStack(vllm_config=vllm_config, layers=self.layers, norm=self.norm)
        self.lm_head = ParallelLMHead(
            shape.embedding_size,
            shape.hidden_size,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if shape.tied_head:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)
        self.logits_processor = LogitsProcessor(shape.embedding_size, shape.vocab_size)
        self.step = ModelStep()

    @staticmethod
    def tensor_shapes(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of an unquantised checkpoint, the LM head included."""
        raise NotImplementedError

    @staticmethod
    def get_model_state_cls() -> type:
        """How vLLM's model runner finds the state class that conducts a step."""
        from vllm_d2cache.engine.model_state import D2CacheModelState

        return D2CacheModelState

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, d]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: object | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N] token ids at [N] absolute positions, in any order -> [N, d] final hidden states."""
        if self.step.replay is not None:
            return self.step.replay()
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if self.step.partial_forward is None:
            return self.stack(positions, hidden)
        # A ModuleList is no Sequence of its layers to a type checker.
        hidden, residual = self.step.partial_forward.run(self.layers, positions, hidden)  # type: ignore[arg-type]
        hidden, _ = self.norm(hidden, residual)
        return hidden

    def lm_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, vocab] logits."""
        return self.logits_processor(self.lm_head, hidden)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, vocab] logits, or ``hidden`` itself within a step."""
        return hidden if self.step.head_in_sampler else self.lm_logits(hidden)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint in the family's published layout.

        Raises:
            ValueError: a tensor is unknown, missing, damaged or has another shape; the message has its name.
        """
        named = ((name, tensor) for name, tensor in weights if not name.endswith(_REDUNDANT))
        weights = finite_weights(named, self.norm.weight.dtype)
        if self.quant_config is None:
            weights = self._checked(weights)
        if self.shape.tied_head:
            weights = ((name, tensor) for name, tensor in weights if name != self.head_tensor)
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def _checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, compared with the list. A quantised checkpoint has others: vLLM's layers check those."""
        expected = self.tensor_shapes(self.shape)
        missing = set(expected)
        if self.shape.tied_head:
            missing.discard(self.head_tensor)
        for name, tensor in weights:
            if name not in expected:
                raise ValueError(f"the checkpoint has a tensor {name} that {type(self).__name__} does not know")
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(
                    f"the checkpoint's tensor {name} has the shape {tuple(tensor.shape)}; "
                    f"config.json asks for {expected[name]}"
                )
            missing.discard(name)
            yield name, tensor
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(missing))}")
