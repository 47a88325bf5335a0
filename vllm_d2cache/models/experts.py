"""A mixture of experts in vLLM's fused layer: tensor and expert parallelism and its kernels come with it."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from vllm_d2cache.models.shape import TransformerShape


class SparseMLP(nn.Module):
    """The sum of the most probable experts' outputs, each times its probability among all experts."""

    def __init__(self, shape: TransformerShape, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        # Which experts answer is decided in the model's dtype, as published; never quantised.
        self.gate = GateLinear(shape.hidden_size, shape.num_experts, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=shape.num_experts,
            top_k=shape.experts_per_token,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            renormalize=False,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] -> [N, d]."""
        router_logits, _ = self.gate(hidden)
        return self.experts(hidden_states=hidden, router_logits=router_logits)
