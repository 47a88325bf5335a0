"""A dense Dream: the oracle of the engine's model."""

from __future__ import annotations

from tests.reference.dense import DenseModel

_MODULES = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "norm": "norm",
    "input_layernorm": "norm1",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "post_attention_layernorm": "norm2",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


class DenseDream(DenseModel):
    """A checkpoint in Dream's layout."""

    logit_shift = 1
    keys_of_config = (
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "num_hidden_layers",
        "tie_word_embeddings",
    )

    @staticmethod
    def common_name(name: str) -> str:
        """``model.norm.weight`` or ``model.layers.0.self_attn.q_proj.bias``."""
        *_, module, kind = name.split(".")
        number = next((f"{part}." for part in name.split(".") if part.isdigit()), "")
        return number + _MODULES[module] + (".bias" if kind == "bias" else "")
