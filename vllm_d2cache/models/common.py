"""The network all families share, in vLLM's layers, so that tensor parallelism and quantised weights come with them.

A llama-type transformer without a causal mask (docs/methods/d2cache.md, section 9). A family adds the names its
checkpoints give to the tensors, and its configuration the sizes and switches (shape.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from vllm_d2cache.engine.attention_backend import step_is_under_way
from vllm_d2cache.engine.part_rows import part_rows
from vllm_d2cache.engine.weight_check import finite_weights
from vllm_d2cache.mechanisms.partial_forward import PartialForward
from vllm_d2cache.models.attention import SelfAttention
from vllm_d2cache.models.base_configs import DiffusionLMConfig
from vllm_d2cache.models.experts import SparseMLP
from vllm_d2cache.models.mlp import GatedMLP
from vllm_d2cache.models.parts import in_parts, parts
from vllm_d2cache.models.safetensors_files import readable
from vllm_d2cache.models.shape import TransformerShape
from vllm_d2cache.models.tensor_rules import (
    REDUNDANT,
    dtype_problem,
    missing_modules,
    missing_problem,
    tensor_problem,
    twice_problem,
)

# Three tensors of a checkpoint that are one here.
QKV = {f".{name}_proj.": (".qkv_proj.", name) for name in "qkv"}


class TransformerLayer(nn.Module):
    """Attention and an MLP, each behind an RMS norm.

    Args:
        part_rows: most rows that it computes at a time.
    """

    def __init__(
        self,
        shape: TransformerShape,
        number: int,
        cache_config: CacheConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        part_rows: int,
    ) -> None:
        super().__init__()
        self.part_rows = part_rows
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
        """[N, d] and the residual stream [N, d] before it is added -> the same after the layer. May overwrite them."""
        if len(hidden) <= self.part_rows:
            return self.whole(positions, hidden, residual)
        return self._by_parts(positions, hidden, residual)

    def whole(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``forward`` of all rows at a time."""
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual

    def _by_parts(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``whole``, but with no more than ``part_rows`` rows at a time in all that is wider than the stream.

        K and V of all rows come first: each row then finds the keys of all others in their pages. Attention is called
        once, as mechanisms look at the queries of all rows; it keeps nothing but those and its outputs.
        """
        stream = hidden if residual is None else residual
        query, behind = stream.new_empty(len(stream), self.self_attn.sizes[0]), []
        for part in parts(len(stream), self.part_rows):
            if residual is None:
                normed = self.input_layernorm(stream[part])
            else:
                normed, stream[part] = self.input_layernorm(hidden[part], stream[part])
            query[part], *others = self.self_attn.store(positions[part], normed, part.start)
            behind.append(others)
        attended = self.self_attn.attn(query, *(torch.cat(rows) for rows in zip(*behind, strict=True)))
        del query
        if residual is None:
            hidden = torch.empty_like(stream)
        for part in parts(len(stream), self.part_rows):
            out, _ = self.self_attn.o_proj(attended[part])
            normed, stream[part] = self.post_attention_layernorm(out, stream[part])
            hidden[part] = self.mlp(normed)
        return hidden, stream

    def values(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[n, kv heads, head size] values of rows [n, d] before the layer (stored_outputs.Layer)."""

        def values(hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self.self_attn.values(self.input_layernorm(hidden, residual)[0]),)

        (value,) = in_parts(values, self.part_rows, hidden, residual)
        return value

    def keys_and_values(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, kv heads, head size] of rows [n, d] before the layer (stored_outputs.Layer)."""

        def both(positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.self_attn.keys_and_values(positions, self.input_layernorm(hidden, residual)[0])

        key, value = in_parts(both, self.part_rows, positions, hidden, residual)
        return key, value

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

    The model owns both, and calls the layers itself where they differ in their rows (mechanisms/partial_forward.py) or
    have more than they compute at a time (parts.py).
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layers: nn.ModuleList, norm: RMSNorm) -> None:
        super().__init__()
        self._parts = [layers, norm]  # not as submodules: their tensors have one name each

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] embeddings -> [N, d] final hidden states."""
        layers, norm = self._parts
        residual = None
        for layer in layers:
            hidden, residual = layer.whole(positions, hidden, residual)
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


class DiffusionLM(nn.Module, SupportsLoRA):
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
        self.directory = Path(vllm_config.model_config.model)  # of the checkpoint, or its name on the hub
        self.traits = config.traits()
        self.part_rows = part_rows(vllm_config)
        # embedding_size may exceed vocab_size; the rows beyond it are padding and never predicted.
        self.embed_tokens = VocabParallelEmbedding(
            shape.embedding_size,
            shape.hidden_size,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "embed_tokens"),
        )
        self.layers = nn.ModuleList(
            TransformerLayer(
                shape, i, vllm_config.cache_config, quant_config, maybe_prefix(prefix, f"layers.{i}"), self.part_rows
            )
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
        if self.step.partial_forward is not None:
            # A ModuleList is no Sequence of its layers to a type checker.
            hidden, residual = self.step.partial_forward.run(self.layers, positions, hidden)  # type: ignore[arg-type]
        elif len(hidden) <= self.part_rows:
            return self.stack(positions, hidden)
        else:
            residual = None
            if not step_is_under_way():
                # vLLM looks at the longest step there can be. A compiler must see the layers now, too.
                self.stack(positions[: self.part_rows], hidden[: self.part_rows].clone())
            for layer in self.layers:
                hidden, residual = layer(positions, hidden, residual)
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
            ValueError: a tensor is unknown, missing, damaged, there twice, or has another shape or no dtype of weights;
                the message has its name. Or a file cannot be read; it has the file's.
        """
        read = readable(weights, self.directory)
        named = ((name, tensor) for name, tensor in read if not name.endswith(REDUNDANT))
        weights = self._checked(finite_weights(named, self.norm.weight.dtype))
        if self.shape.tied_head:
            weights = ((name, tensor) for name, tensor in weights if name != self.head_tensor)
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def _checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, compared with the list. A quantised checkpoint has others: vLLM's layers check those."""
        expected, quantised = self.tensor_shapes(self.shape), self.quant_config is not None
        found: set[str] = set()
        for name, tensor in weights:
            problem = None
            if name in found:
                problem = twice_problem(name)
            elif not quantised:
                problem = tensor_problem(name, tensor.shape, expected, type(self).__name__)
                problem = problem or dtype_problem(name, str(tensor.dtype))
            if problem is not None:
                raise ValueError(problem)
            found.add(name)
            yield name, tensor
        missing = missing_modules if quantised else missing_problem
        problem = missing(found, expected, self.head_tensor if self.shape.tied_head else None)
        if problem is not None:
            raise ValueError(problem)
