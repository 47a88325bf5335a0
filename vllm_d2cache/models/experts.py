"""A mixture of experts in vLLM's fused layer: tensor and expert parallelism and its kernels come with it."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from vllm_d2cache.models.mlp import GatedMLP
from vllm_d2cache.models.shape import Mixture


class SparseMLP(nn.Module):
    """The weighted sum of the outputs of the experts a row is routed to, and of the shared expert's (shape.Mixture)."""

    def __init__(
        self, hidden_size: int, mixture: Mixture, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        dtype = torch.float32 if mixture.router_in_fp32 else None  # None = the model's
        # Never quantised.
        self.gate = GateLinear(
            hidden_size, mixture.num_experts, params_dtype=dtype, out_dtype=dtype, prefix=f"{prefix}.gate"
        )
        self.gate.expert_bias = (
            nn.Parameter(torch.empty(mixture.num_experts, dtype=torch.float32)) if mixture.bias else None
        )
        self.shared_experts = (
            GatedMLP(hidden_size, mixture.shared_width, quant_config, f"{prefix}.shared_experts", reduce=False)
            if mixture.shared_width
            else None
        )
        # vLLM scores with a sigmoid, and adds biases, where experts are in groups: one group is the same as none.
        grouped = mixture.groups > 1 or mixture.bias or mixture.scoring != "softmax"
        self.experts = FusedMoEFactory(
            shared_experts=self.shared_experts,
            num_experts=mixture.num_experts,
            top_k=mixture.per_token,
            hidden_size=hidden_size,
            intermediate_size=mixture.width,
            renormalize=mixture.renormalised,
            scoring_func=mixture.scoring,
            e_score_correction_bias=self.gate.expert_bias,
            use_grouped_topk=grouped,
            num_expert_group=mixture.groups if grouped else None,
            topk_group=mixture.groups_kept if grouped else None,
            routed_scaling_factor=mixture.scale,
            router_logits_dtype=dtype,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] -> [N, d]."""
        router_logits, _ = self.gate(hidden)
        return self.experts(hidden_states=hidden, router_logits=router_logits)
