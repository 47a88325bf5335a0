"""The plain MLP of a layer."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x).

    Args:
        width: of the gate and up projections.
        reduce: add up the ranks' parts. False where the caller does, together with others'.
    """

    def __init__(
        self, hidden_size: int, width: int, quant_config: QuantizationConfig | None, prefix: str, reduce: bool = True
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [width] * 2, bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width,
            hidden_size,
            bias=False,
            reduce_results=reduce,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act = SiluAndMul()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] -> [N, d]."""
        gate_up, _ = self.gate_up_proj(hidden)
        out, _ = self.down_proj(self.act(gate_up))
        return out
