"""A dense LLaDA: the oracle of the engine's model."""

from __future__ import annotations

from tests.reference.dense import DenseModel

_TOP = {"wte": "embed", "ln_f": "norm", "ff_out": "head"}
_BLOCK = {
    "attn_norm": "norm1",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "attn_out": "o",
    "ff_norm": "norm2",
    "ff_proj": "gate",
    "up_proj": "up",
    "ff_out": "down",
}


class DenseLlada(DenseModel):
    """A checkpoint in LLaDA's layout."""

    keys_of_config = ("n_heads", "n_kv_heads", "d_model", "n_layers", "weight_tying")

    @staticmethod
    def common_name(name: str) -> str:
        """``model.transformer.wte.weight`` or ``model.transformer.blocks.0.q_proj.weight``."""
        *_, number, module, _ = name.split(".")
        return f"{number}.{_BLOCK[module]}" if number.isdigit() else _TOP[module]
