"""Make a wider network that says the same as a small one, so that the network is most of a step on a CPU.

    python tools/widen.py models/tiny-llada out/tiny-llada-wide --times 2

Every unit of the residual stream, every head and every unit of the MLPs stands in the new network several times, and
each weight that reads them is divided by that number (function-preserving widening: Net2Net, arXiv:1511.05641, section
2.2, with each unit copied equally often). Answers are those of the small network but for rounding; with a power of two
the weights are exact in any floating-point type. Twice as wide is four times the arithmetic: a third size of
checkpoint, for speed, that need not be trained or kept. For the families of train_tiny.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# What the families call the token embedding and the LM head: only their columns are the network's.
EMBEDDINGS = ("model.transformer.wte.weight", "model.embed_tokens.weight")
HEADS = ("model.transformer.ff_out.weight", "lm_head.weight")
HEAD_NORMS = (".q_norm.weight", ".k_norm.weight")
SIZES = (
    "d_model", "hidden_size", "n_heads", "n_kv_heads", "num_attention_heads", "num_key_value_heads", "mlp_hidden_size",
    "intermediate_size",
)  # fmt: skip
"""Keys of config.json that grow, whichever of them the family has."""


def widened(name: str, weight: torch.Tensor, times: int) -> torch.Tensor:
    """The tensor ``name`` of the wider network: [out, in] or [out], with each widened side ``times`` as long."""
    if name.endswith(HEAD_NORMS):
        return weight
    if name in EMBEDDINGS:
        return weight.repeat(1, times)
    if name in HEADS:
        return weight.repeat(1, times) / times
    return weight.repeat(times) if weight.ndim == 1 else weight.repeat(times, times) / times


def widen(source: Path, out: Path, times: int) -> None:
    """Write the wider network of the checkpoint ``source`` into ``out``, with the same tokenizer.

    Raises:
        ValueError: ``times`` is not 1, 2, 4 or another power of two.
    """
    if times < 1 or times & (times - 1):
        raise ValueError(f"times={times}: a power of two, so that dividing by it is exact")
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name != "training.json":
            shutil.copy(file, out / file.name)
    config = json.loads((source / "config.json").read_text())
    config |= {key: config[key] * times for key in SIZES if config.get(key)}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = load_file(source / "model.safetensors")
    wide = {name: widened(name, weight, times).contiguous() for name, weight in weights.items()}
    save_file(wide, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("source", type=Path, help="a checkpoint of tools/train_tiny.py")
    parser.add_argument("out", type=Path, help="where the wider one goes")
    parser.add_argument("--times", type=int, default=2, help="how much wider (default: 2)")
    args = parser.parse_args()
    widen(args.source, args.out, args.times)


if __name__ == "__main__":
    main()
