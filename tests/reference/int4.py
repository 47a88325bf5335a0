"""Checkpoints with 4-bit weights in the layouts that people publish, and the numbers that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32  # elements of a row that share a scale
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIGS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", "model.transformer.ff_out"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
                    "dynamic": False,
                },
            }
        },
    },
    "gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False,
        "checkpoint_format": "gptq",
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}  # fmt: skip


def _quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, d] as numbers from 0 to 15 that stand for themselves less 8, and scales [n, d / GROUP] in bf16."""
    grouped = weight.float().unflatten(1, (-1, GROUP))
    scale = (grouped.abs().amax(2, keepdim=True) / 7).clamp_min(1e-8).bfloat16().float()
    numbers = (grouped / scale).round().clamp(-8, 7) + 8
    return numbers.flatten(1).int(), scale.squeeze(2).bfloat16()


def stands_for(weight: torch.Tensor) -> torch.Tensor:
    """[n, d] float32: what is left of ``weight``."""
    numbers, scale = _quantise(weight)
    return (numbers - 8).float() * scale.float().repeat_interleave(GROUP, 1)


def _pack(numbers: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight numbers along ``dim`` in an int32, the lowest bits first."""
    eights = numbers.movedim(dim, -1).unflatten(-1, (-1, 8))[..., list(order)].long()
    packed = sum(eights[..., i] << (4 * i) for i in range(8))
    assert isinstance(packed, torch.Tensor)
    return packed.where(packed < 2**31, packed - 2**32).int().movedim(-1, dim).contiguous()


def _tensors(layout: str, module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, scale = _quantise(weight)
    if layout == "compressed-tensors":
        shape = torch.tensor(weight.shape)
        parts = {"weight_packed": _pack(numbers, 1), "weight_scale": scale, "weight_shape": shape}
    elif layout == "gptq":
        zeros = torch.full(scale.T.shape, 7, dtype=torch.int32)  # the layout keeps them less one
        index = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
        parts = {"qweight": _pack(numbers.T, 0), "qzeros": _pack(zeros, 1), "scales": scale.T, "g_idx": index}
    else:
        zeros = torch.full(scale.T.shape, 8, dtype=torch.int32)
        parts = {
            "qweight": _pack(numbers.T, 1, _AWQ_ORDER),
            "qzeros": _pack(zeros, 1, _AWQ_ORDER),
            "scales": scale.T,
        }
    return {f"{module}.{name}": tensor.contiguous() for name, tensor in parts.items()}


def write_int4(source: Path, directory: Path, layout: str) -> Path:
    """``source`` with the matrices of its layers in 4 bits; embedding, head, norms and biases stay."""
    config = json.loads((source / "config.json").read_text())
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[layout]}))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if (".layers." in name or ".blocks." in name) and tensor.ndim == 2:
            tensors |= _tensors(layout, name.removesuffix(".weight"), tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
