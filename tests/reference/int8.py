"""Checkpoints with 8-bit weights and activations (compressed-tensors), and the arithmetic they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.reference.dense import DenseModel

_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head", "model.transformer.ff_out"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip


# CPUs without VNNI add pairs of products in 16 bits, which overflows where weights use all of their 8 bits; such a
# checkpoint gives wrong sums there with any model of vLLM.
_LARGEST_WEIGHT = 63


def quantise(x: torch.Tensor, largest: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, d] as int8 [n, d] up to ``largest`` and scale [n, 1], symmetric."""
    scale = x.abs().amax(1, keepdim=True) / largest
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


def _is_linear(name: str, tensor: torch.Tensor) -> bool:
    inside = ".layers." in name or ".blocks." in name
    return inside and tensor.ndim == 2


def write_int8(source: Path, directory: Path) -> Path:
    """``source`` with the matrices of its layers in 8 bits; embedding, head, norms and biases stay."""
    config = json.loads((source / "config.json").read_text())
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": _CONFIG}))
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if _is_linear(name, tensor):
            tensors[name], tensors[f"{name}_scale"] = quantise(tensor.float(), _LARGEST_WEIGHT)
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def in_int8(model: DenseModel) -> DenseModel:
    """``model`` computing its layers' products as such a checkpoint says: rows of both factors rounded to 8 bits."""
    quantised = {name: quantise(w, _LARGEST_WEIGHT) for name, w in model.w.items() if name[0].isdigit() and w.ndim == 2}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, scale = quantised[name]
        rows, row_scale = quantise(x.reshape(-1, x.shape[-1]))
        # Exact in float64: sums of a few hundred products of 8-bit integers.
        product = (rows.double() @ weight.double().T).float() * row_scale * scale.T
        return product + model.w.get(f"{name}.bias", torch.zeros(()))

    model._linear = linear  # type: ignore[method-assign]
    return model
